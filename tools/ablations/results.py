"""What a campaign found: a row for each run, a mean with an interval for each variant, and the difference to `full`.

Intervals are of 95%, by Student's t over the seeds; differences are taken seed by seed, since runs of one seed see the same
pictures, noise and timesteps in the same order.
"""

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from ablations.campaign import BENCHMARK, Campaign, finished
from raphael_dist.errors import UserError
from raphael_dist.storage.files import atomic_path
from raphael_dist.training.metrics import read_metrics

LAST = 0.1  # share of the steps whose mean is the final training loss
CONFIDENCE = 0.95
VALIDATION = ("val/loss", "val/loss_t0", "val/loss_t1", "val/loss_t2", "val/loss_t3")


@dataclass(frozen=True)
class RunResult:
    """One finished run. losses: L_denoise on held-out data at fixed noise, of all timesteps and of each quarter of them.

    train_loss: the mean L_denoise of the last tenth of the steps. images_per_s: the median over the log lines.
    benchmark: value by row of the emoji benchmark.
    """

    variant: str
    seed: int
    outcome: str
    overrides: dict[str, str]
    parameters: int
    flops_per_image: int
    losses: dict[str, float] = field(default_factory=dict)
    train_loss: float | None = None
    images_per_s: float | None = None
    benchmark: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Interval:
    """A mean over `count` seeds, and half the width of its interval; None with a single seed."""

    mean: float
    half: float | None
    count: int

    def text(self, digits: int = 4, sign: str = "") -> str:
        """Return `0.1234 +- 0.0012`."""
        return f"{self.mean:{sign}.{digits}f}" + ("" if self.half is None else f" +- {self.half:.{digits}f}")

    @property
    def side(self) -> int:
        """1 or -1 where the interval lies above or below 0, else 0."""
        if self.half is None or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1


@dataclass(frozen=True)
class Summary:
    """All finished runs of one variant. difference: of the held-out loss to `full`, over the seeds that both have."""

    variant: str
    what: str
    overrides: dict[str, str]
    match: str | None
    runs: int
    diverged: int
    parameters: int
    flops_per_image: int
    loss: Interval | None
    difference: Interval | None
    train_loss: Interval | None
    images_per_s: Interval | None
    benchmark: dict[str, Interval]


def interval(values: Sequence[float]) -> Interval | None:
    """Return mean and interval of values, None without any."""
    if not values:
        return None
    count, half = len(values), None
    if count > 1:
        half = float(student.ppf((1 + CONFIDENCE) / 2, count - 1)) * statistics.stdev(values) / count**0.5
    return Interval(statistics.fmean(values), half, count)


def collect(campaign: Campaign) -> tuple[list[RunResult], list[Summary]]:
    """Return the finished runs of a campaign's folder, of all variants that are there, and what they amount to.

    UserError: none is finished.
    """
    runs, words = [], {}
    order = {variant.name: number for number, variant in enumerate(campaign.variants)}
    for path in sorted((campaign.out / "runs").glob("*/seed-*")):
        said = finished(path)
        if said is not None:
            words[said["variant"]] = said
            runs.append(_read(path, said))
    if not runs:
        raise UserError(f"--out {campaign.out}: no run is finished yet")
    runs.sort(key=lambda run: (order.get(run.variant, len(order)), run.variant, run.seed))
    whole = {run.seed: run.losses["val/loss"] for run in runs if run.variant == "full" and run.losses}
    names = dict.fromkeys(run.variant for run in runs)
    return runs, [_summary(words[name], [run for run in runs if run.variant == name], whole) for name in names]


def _read(folder: Path, said: dict[str, Any]) -> RunResult:
    keys = ("variant", "seed", "outcome", "overrides", "parameters", "flops_per_image")
    common = {key: said[key] for key in keys}
    if said["outcome"] != "complete":
        return RunResult(**common)
    try:
        series = read_metrics(folder / "metrics.jsonl")
        losses = {tag: dict(series[tag])[said["steps"]] for tag in VALIDATION if tag in series}
        late = [loss for step, loss in series["train/loss_denoise"] if step > (1 - LAST) * said["steps"]]
        rates = [rate for _, rate in series["throughput/samples_per_s"]]
        assert "val/loss" in losses
    except (OSError, KeyError, AssertionError) as error:
        raise UserError(f"{folder / 'metrics.jsonl'}: is not of a complete run ({error}); remove {folder}") from None
    drawn = folder / BENCHMARK / "results.json"
    rows = json.loads(drawn.read_text())["this model"] if drawn.is_file() else []
    return RunResult(
        **common,
        losses=losses,
        train_loss=statistics.fmean(late),
        images_per_s=statistics.median(rates),
        benchmark={row["what"]: row["value"] for row in rows if not row["what"].startswith("loss")},
    )


def _summary(said: dict[str, Any], runs: Sequence[RunResult], whole: dict[int, float]) -> Summary:
    complete = [run for run in runs if run.losses]
    differences = [run.losses["val/loss"] - whole[run.seed] for run in complete if run.seed in whole]
    columns: dict[str, list[float]] = {}
    for run in complete:
        for what, value in run.benchmark.items():
            columns.setdefault(what, []).append(value)
    return Summary(
        said["variant"],
        said["what"],
        said["overrides"],
        said["match"],
        runs=len(runs),
        diverged=len(runs) - len(complete),
        parameters=said["parameters"],
        flops_per_image=said["flops_per_image"],
        loss=interval([run.losses["val/loss"] for run in complete]),
        difference=None if said["variant"] == "full" else interval(differences),
        train_loss=interval([run.train_loss for run in complete if run.train_loss is not None]),
        images_per_s=interval([run.images_per_s for run in complete if run.images_per_s is not None]),
        benchmark={what: found for what, values in columns.items() if (found := interval(values)) is not None},
    )


def write(campaign: Campaign, runs: Sequence[RunResult], summaries: Sequence[Summary], table: str) -> None:
    """Write results.csv (a line for each run), results.json and results.md; a campaign and `--table` may do so at once."""
    everything = {"runs": [asdict(run) for run in runs], "variants": [asdict(summary) for summary in summaries]}
    rows = [_flat(run) for run in runs]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    contents = {"results.json": json.dumps(everything, indent=1), "results.md": table, "results.csv": text.getvalue()}
    for name, content in contents.items():
        with atomic_path(campaign.out / name) as temporary:
            temporary.write_text(content)


def _flat(run: RunResult) -> dict[str, Any]:
    row = asdict(run)
    nested = {**row.pop("losses"), **row.pop("benchmark")}
    overrides = " ".join(f"{key}={text}" for key, text in row.pop("overrides").items())
    return {**row, **nested, "overrides": overrides}
