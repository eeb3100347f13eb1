"""Results of an ablation campaign: losses of each run, and for each variant their mean and the difference to `full`.

`full` is the variant with all parts of the model. Means have 95% intervals by Student's t over seeds. Differences are
computed between runs with the same seed, because these have the same images, noise and timesteps in the same order.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from ablations.campaign import BENCHMARK, TEXT, Campaign, read_finished
from raphael_dist.errors import UserError
from raphael_dist.storage.files import atomic_path
from raphael_dist.training.metrics_files import read_metrics

LAST = 0.1  # the final training loss is the mean over this last share of the steps
CONFIDENCE = 0.95
VALIDATION = ("val/loss", "val/loss_t0", "val/loss_t1", "val/loss_t2", "val/loss_t3")
ROUTING = (
    "moe/dead_experts", "moe/space/density",
    "moe/space/load_max", "moe/space/load_min", "moe/space/gate_entropy", "moe/space/routes_changed",
    "moe/time/load_max", "moe/time/load_min", "moe/time/gate_entropy", "moe/time/routes_changed",
)  # fmt: skip


@dataclass(frozen=True)
class RunResult:
    """The results of one finished run.

    Attributes:
        variant, seed: which run it is.
        outcome: how the run ended: "complete", or "diverged" (with an infinite or NaN loss).
        overrides: the settings of the variant that differ from the base configuration, as strings by field.
        parameters, flops_per_image: size of the model.
        losses: denoising loss on held-out data with fixed noise, over all timesteps and over each quarter of the
            timesteps, by name of the metric (VALIDATION).
        train_loss: mean denoising loss of the last tenth of the steps.
        images_per_s: training speed, median over the log lines.
        benchmark: results of the emoji benchmark and scores of rendered text, by name of the measure.
        routing: last value of each metric in ROUTING (loads of experts, entropy of gates), by metric.
        curves: points (images seen, value) of each metric in VALIDATION (losses) and ROUTING, by metric.
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
    routing: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    @property
    def measures(self) -> dict[str, float]:
        """All losses and benchmark values of the run by name, which are compared with those of the variant `full`."""
        return {**self.losses, **self.benchmark}


@dataclass(frozen=True)
class Interval:
    """A mean over `count` seeds with its 95% interval, mean +- half. `half` is None with a single seed."""

    mean: float
    half: float | None
    count: int

    def text(self, digits: int = 4, sign: str = "") -> str:
        """Return the interval as text, e.g. `0.1234 +- 0.0012`. `sign`: "+" to show the sign of a positive mean too."""
        return f"{self.mean:{sign}.{digits}f}" + ("" if self.half is None else f" +- {self.half:.{digits}f}")

    @property
    def side(self) -> int:
        """1 if the whole interval is above 0, -1 if it is below 0, else 0 (no significant difference)."""
        if self.half is None or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1


@dataclass(frozen=True)
class Summary:
    """The results of a variant of the model, as means over all its finished runs (seeds).

    Attributes:
        variant, what: name and description of the variant.
        overrides: its settings that differ from the base configuration, as strings by field.
        match: which number was made equal to that of `full` by scaling the expert width: "parameters" or "flops". None: the
            width was not scaled.
        runs, diverged: number of all finished runs, and number of finished runs with an infinite or NaN loss.
        parameters, flops_per_image, images_per_s, benchmark, routing: as in `RunResult`.
        loss, train_loss: held-out loss and training loss.
        differences: for each measure, the difference to the variant `full` over the seeds that both have.
        difference: the difference of the held-out loss to that of `full`.
    """

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
    differences: dict[str, Interval]
    train_loss: Interval | None
    images_per_s: Interval | None
    benchmark: dict[str, Interval]
    routing: dict[str, Interval]


def interval(values: Sequence[float]) -> Interval | None:
    """Return the mean of values and its 95% interval by Student's t; None if there are no values."""
    if not values:
        return None
    count, half = len(values), None
    if count > 1:
        half = float(student.ppf((1 + CONFIDENCE) / 2, count - 1)) * statistics.stdev(values) / count**0.5
    return Interval(statistics.fmean(values), half, count)


def collect(campaign: Campaign) -> tuple[list[RunResult], list[Summary]]:
    """Return all finished runs in a campaign's folder and a summary of each variant.

    Raises UserError if no run is finished.
    """
    runs, results = [], {}
    order = {variant.name: number for number, variant in enumerate(campaign.variants)}
    for path in sorted((campaign.out / "runs").glob("*/seed-*")):
        result = read_finished(path)
        if result is not None:
            results[result["variant"]] = result
            runs.append(_read_run(path, result, campaign.base.config().train.global_batch_size))
    if not runs:
        raise UserError(f"--out={campaign.out} has no finished run yet. Start the command without --table first.")
    runs.sort(key=lambda run: (order.get(run.variant, len(order)), run.variant, run.seed))
    full = {run.seed: run for run in runs if run.variant == "full" and run.losses}
    names = dict.fromkeys(run.variant for run in runs)
    return runs, [_summarise(results[name], [run for run in runs if run.variant == name], full) for name in names]


def _read_run(folder: Path, result: dict[str, Any], batch: int) -> RunResult:
    keys = ("variant", "seed", "outcome", "overrides", "parameters", "flops_per_image")
    common = {key: result[key] for key in keys}
    if result["outcome"] != "complete":
        return RunResult(**common)
    try:
        series = read_metrics(folder / "metrics.jsonl")
        losses = {tag: dict(series[tag])[result["steps"]] for tag in VALIDATION if tag in series}
        late = [loss for step, loss in series["train/loss"] if step > (1 - LAST) * result["steps"]]
        rates = [rate for _, rate in series["throughput/samples_per_s"]]
        assert "val/loss" in losses
    except (OSError, KeyError, AssertionError) as error:
        why = error if isinstance(error, OSError) else f"it lacks values up to step {result.get('steps')}"
        raise UserError(
            f"{folder / 'metrics.jsonl'} must be of a complete run: {why}. Remove {folder}; the next start trains it again."
        ) from None
    curves = {tag: [(step * batch, value) for step, value in series[tag]] for tag in VALIDATION + ROUTING if tag in series}
    return RunResult(
        **common,
        losses=losses,
        train_loss=statistics.fmean(late),
        images_per_s=statistics.median(rates),
        benchmark=_read_benchmarks(folder),
        routing={tag: curves[tag][-1][1] for tag in ROUTING if tag in curves},
        curves=curves,
    )


def _read_benchmarks(folder: Path) -> dict[str, float]:
    values, drawn, read = {}, folder / BENCHMARK / "results.json", folder / TEXT / "results.json"
    if drawn.is_file():
        rows = json.loads(drawn.read_text())["this model"]
        values = {row["what"]: row["value"] for row in rows if not row["what"].startswith("loss")}
    if read.is_file():
        (row,) = json.loads(read.read_text())
        values |= {"text read exactly": row["text_exact"], "character error rate": row["text_cer"]}
    return values


def _summarise(result: dict[str, Any], runs: Sequence[RunResult], full: dict[int, RunResult]) -> Summary:
    complete = [run for run in runs if run.losses]
    differences = _intervals(paired_differences(complete, full)) if result["variant"] != "full" else {}
    return Summary(
        result["variant"],
        result["what"],
        result["overrides"],
        result["match"],
        runs=len(runs),
        diverged=len(runs) - len(complete),
        parameters=result["parameters"],
        flops_per_image=result["flops_per_image"],
        loss=interval([run.losses["val/loss"] for run in complete]),
        difference=differences.get("val/loss"),
        differences=differences,
        train_loss=interval([run.train_loss for run in complete if run.train_loss is not None]),
        images_per_s=interval([run.images_per_s for run in complete if run.images_per_s is not None]),
        benchmark=_intervals([run.benchmark for run in complete]),
        routing=_intervals([run.routing for run in complete]),
    )


def paired_differences(runs: Sequence[RunResult], full: dict[int, RunResult]) -> list[dict[str, float]]:
    """Return the differences of all measures between each run and the run of the variant `full` with the same seed.

    `full`: the runs of the variant `full`, by seed. Runs with a seed that is not in `full` are left out.
    """
    pairs = [(run.measures, full[run.seed].measures) for run in runs if run.seed in full]
    return [{what: own[what] - other[what] for what in own if what in other} for own, other in pairs]


def _intervals(rows: Sequence[dict[str, float]]) -> dict[str, Interval]:
    """Return mean and 95% interval for each key, over the dicts that have the key."""
    keys = dict.fromkeys(key for row in rows for key in row)
    means = {key: interval([row[key] for row in rows if key in row]) for key in keys}
    return {key: mean for key, mean in means.items() if mean is not None}


def write(campaign: Campaign, runs: Sequence[RunResult], summaries: Sequence[Summary], table: str) -> None:
    """Write results.md (`table`), results.json and curves.csv into the campaign's folder.

    Files are replaced atomically, since a campaign and `--table` may write at the same time.
    """
    everything = {"runs": [_without_curves(run) for run in runs], "variants": [asdict(summary) for summary in summaries]}
    curves = ["variant,seed,images,metric,value"]
    for run in runs:
        for tag, points in run.curves.items():
            curves += [f"{run.variant},{run.seed},{images},{tag},{value:.6g}" for images, value in points]
    contents = {
        "curves.csv": "\n".join(curves) + "\n",
        "results.json": json.dumps(everything, indent=1),
        "results.md": table,
    }
    for name, content in contents.items():
        with atomic_path(campaign.out / name) as temporary:
            temporary.write_text(content)


def _without_curves(run: RunResult) -> dict[str, Any]:
    return {key: value for key, value in asdict(run).items() if key != "curves"}
