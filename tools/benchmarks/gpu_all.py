"""`tools/bench.py gpu --all`: takes all documented measurements of one GPU. The same command can be repeated to continue.

Each measurement runs in its own process (`tools/bench.py gpu --json`), so that a failed measurement does not affect the
others. The measurements that a goal needs come first, and are taken twice: once each before any is repeated, so that slow
changes of the machine affect all of them. Results are written to a JSON file (`--out`) after each measurement; the next call
takes the missing measurements. The command ends after `--minutes` at the latest, and prints the goals and the table of all
results so far.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from raphael_dist.config.assets import git_commit
from raphael_dist.config.schema import load_config
from raphael_dist.config.types import Kernel
from raphael_dist.errors import UserError
from raphael_dist.storage.files import replace_bytes
from raphael_dist.storage.versions import versions
from raphael_dist.text import counted

KERNELS: tuple[str, ...] = get_args(Kernel)
ROUNDS = 2  # how often a measurement that a goal needs is taken
_GRAPHS = ("train.cuda_graphs=true", "train.dtype=bfloat16")  # in float32 the preset `emoji` cannot be captured
_KEEP, _RECOMPUTE = ("model.checkpoint_activations=none",), ("model.checkpoint_activations=blocks",)
Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One measurement of an optimizer step on a GPU.

    Attributes:
        config: the preset.
        images: images of a micro-batch.
        step_of: whose step is measured: "ours", "diffusers" or "diffusers-compiled".
        overrides: overrides of the configuration, as on the command line.
        rounds: how often it is taken.
    """

    config: str
    images: int
    step_of: str = "ours"
    overrides: tuple[str, ...] = ()
    rounds: int = 1

    @property
    def name(self) -> str:
        return " ".join([self.config, str(self.images), self.step_of, *self.overrides])

    def command(self) -> list[str]:
        """Return the arguments of `tools/bench.py gpu` for this measurement."""
        words = ["--config", self.config, "--micro-batch", str(self.images), "--step-of", self.step_of, "--json"]
        return [*words, *self.overrides]


def cases() -> list[Case]:
    """Return all measurements, the most important first."""
    chosen = _against_diffusers("sd2-dense", 64, ROUNDS)
    for config, images in (("raphael-3b", 8), ("raphael-sd2", 8), ("emoji", 1024)):
        chosen += _ours(config, images, _KEEP, ROUNDS)
    for images in (8, 32):
        chosen += _against_diffusers("sd2-dense", images)
    chosen += _ours("emoji", 256, _KEEP)
    for config in ("raphael-3b", "raphael-sd2"):
        chosen += _ours(config, 8, _RECOMPUTE) + _ours(config, 2, _KEEP)
        # The largest that fits: a size that is too large ends at once.
        sizes = itertools.product((16, 32, 64), (_KEEP, _RECOMPUTE))
        chosen += [_graphed(config, images, overrides, _usable(config)) for images, overrides in sizes]
    for config, images in (("sd2-dense", 64), ("raphael-3b", 8)):
        chosen += [_graphed(config, images, _KEEP, kernels) for kernels in _each_left_out(config)]
    return chosen


def _against_diffusers(config: str, images: int, rounds: int = 1) -> list[Case]:
    diffusers = [Case(config, images, step, _KEEP, rounds) for step in ("diffusers", "diffusers-compiled")]
    compiled = _graphed(config, images, (*_KEEP, "train.compile=true"), rounds=rounds)
    return [*_ours(config, images, _KEEP, rounds), compiled, *diffusers]


def _ours(config: str, images: int, overrides: tuple[str, ...], rounds: int = 1) -> list[Case]:
    return [_graphed(config, images, overrides, kernels, rounds) for kernels in _switches(config)]


def _graphed(config: str, images: int, overrides: tuple[str, ...], kernels: Sequence[str] = (), rounds: int = 1) -> Case:
    """Return the case of our step in CUDA graphs with these kernels and further overrides."""
    switches = (f"train.kernels=[{','.join(kernels)}]",) if kernels else ()
    return Case(config, images, overrides=(*_GRAPHS, *overrides, *switches), rounds=rounds)


def _usable(config: str) -> list[str]:
    """Return the kernels that a preset can use together, with space_moe rather than space_moe_dense."""
    loaded = load_config(config)
    model = loaded.model
    unfit = {"space_moe_dense", "deferred_update"} | (set() if model.space_experts else {"space_moe"})
    unfit |= set() if model.time_experts and model.time_activation == "gelu" else {"time_moe"}
    unfit |= set() if model.space_experts or loaded.edge.weight > 0 else {"cross_attention"}
    return [name for name in KERNELS if name not in unfit]


def _switches(config: str) -> list[list[str]]:
    """Return the sets of kernels to measure: none, all that the preset can use, and these with deferred_update.

    The kernels space_moe and space_moe_dense exclude each other, so a model with space experts has a set for each of them.
    """
    names = _usable(config)
    dense = [["space_moe_dense" if name == "space_moe" else name for name in names]] if "space_moe" in names else []
    return [[], names, [*names, "deferred_update"], *dense]


def _each_left_out(config: str) -> list[list[str]]:
    names = _usable(config)
    return [[other for other in names if other != name] for name in names]


class Results:
    """The records of all measurements in a JSON file. All are of the same device, commit and versions.

    Raises UserError if the file has records of another device, commit or versions.
    """

    def __init__(self, path: Path, machine: Record) -> None:
        self.path, self.machine, self.records = path, machine, list[Record]()
        if not path.exists():
            return
        stored = json.loads(path.read_text())
        if stored["machine"] != machine:
            raise UserError(
                f"--out={path} has results of {stored['machine']}, but the present device, commit and versions are "
                f"{machine}. Give another --out, or remove the file."
            )
        self.records = stored["records"]

    def add(self, record: Record) -> None:
        """Append the record of a measurement, and write the file."""
        self.records.append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"machine": self.machine, "records": self.records}, indent=1) + "\n"
        replace_bytes(self.path, content.encode())

    def of(self, case: Case) -> list[Record]:
        """Return the records of the measurement `case`, one per repetition, also those of earlier calls of this tool."""
        return [record for record in self.records if record["case"] == case.name]

    def pending(self, chosen: list[Case]) -> list[Case]:
        """Return the measurements of `chosen` that are missing: the repeated ones first, round by round.

        Failed ones are not repeated. To try one again, remove its record from the file.
        """
        counts = {case: len(self.of(case)) for case in chosen}
        failed = {case for case in chosen if any("error" in record for record in self.of(case))}
        repeated = [case for i in range(ROUNDS) for case in chosen if case.rounds == ROUNDS and counts[case] <= i]
        once = [case for case in chosen if case.rounds < ROUNDS and not counts[case]]
        return [case for case in [*repeated, *once] if case not in failed]


def measure_all(
    chosen: list[Case],
    results: Results,
    measure: Callable[[Case, float], Record],
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Take measurements until all are done or time is up; return how many are left.

    Args:
        chosen: the measurements.
        results: where records are added.
        measure: takes a measurement, given the seconds that are left; returns its record.
        seconds: time for all. A measurement starts only if the longest one so far would still fit.
        clock: returns the time in seconds.
    """
    began, longest = clock(), 0.0
    pending = results.pending(chosen)
    while pending:
        start = clock()
        left = seconds - (start - began)
        if left <= longest:
            break
        record = measure(pending[0], left)
        longest = max(longest, clock() - start)
        if record.get("error") == TIME_IS_UP and left < seconds:
            break  # not recorded: a new call of the tool measures it again, with the full time
        results.add({"case": pending[0].name, **record})
        pending = results.pending(chosen)
    return len(pending)


TIME_IS_UP = "time is up"


def run_case(case: Case, seconds: float) -> Record:
    """Take a measurement in its own process, within `seconds`; return its record, or one with "error"."""
    command = [sys.executable, str(Path(__file__).parents[1] / "bench.py"), "gpu", *case.command()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": TIME_IS_UP}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            record: Record = json.loads(line)
            return record
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return {"error": (lines or [f"exit code {done.returncode}"])[-1][:200]}


def table(chosen: list[Case], results: Results) -> str:
    """Return the results as a Markdown table, with the median of the records of each measurement."""
    lines = ["| preset | images | step of | overrides | ms | images/s | MFU | useful MFU | peak GiB | rounds |"]
    lines.append("|" + "---|" * 10)
    for case in chosen:
        records = results.of(case)
        if not records:
            continue
        head = f"| {case.config} | {case.images} | {case.step_of} | {' '.join(case.overrides)} |"
        if "error" in records[-1]:
            lines.append(f"{head} {records[-1]['error'].replace('|', '/')} | | | | | {len(records)} |")
            continue
        mid = _medians(records)
        shares = f"{mid['mfu']:.1%} | {mid['useful_mfu']:.1%} | {mid['peak_gib']:.1f}"
        lines.append(f"{head} {mid['seconds'] * 1e3:.1f} | {mid['rate']:.1f} | {shares} | {len(records)} |")
    return "\n".join(lines)


def goals(chosen: Sequence[Case], results: Results) -> str:
    """Return a line for each goal: its number, the number measured, and whether it is reached.

    Of our steps the fastest counts. Steps of models with experts are compared with the fastest step of `sd2-dense` with 64
    images: by FLOPs per second, without the FLOPs of space experts where they are not needed.
    """
    measured = {case: _medians(records) for case in chosen if (records := results.of(case)) and "error" not in records[-1]}

    def best(config: str, images: int, key: str, step_of: str = "ours") -> float:
        """Return the largest value of `key` of such a step; NaN if none is measured."""
        values_of_steps = [
            values[key]
            for case, values in measured.items()
            if (case.config, case.images, case.step_of) == (config, images, step_of)
        ]
        return max(values_of_steps, default=math.nan)

    dense = best("sd2-dense", 64, "useful_tflops")
    rows = [
        ("sd2-dense, 64 images: images/s", 150, best("sd2-dense", 64, "rate")),
        (
            "sd2-dense, 64 images: times diffusers compiled",
            1.6,
            best("sd2-dense", 64, "rate") / best("sd2-dense", 64, "rate", "diffusers-compiled"),
        ),
        ("raphael-sd2, 8 images: useful MFU", 0.35, best("raphael-sd2", 8, "useful_mfu")),
        ("raphael-3b, 8 images: useful MFU", 0.25, best("raphael-3b", 8, "useful_mfu")),
        ("raphael-sd2, 8 images: FLOP/s of sd2-dense's", 1 / 1.15, best("raphael-sd2", 8, "useful_tflops") / dense),
        ("raphael-3b, 8 images: FLOP/s of sd2-dense's", 1 / 1.15, best("raphael-3b", 8, "useful_tflops") / dense),
        ("emoji, 1,024 images: images/s", 12000, best("emoji", 1024, "rate")),
    ]
    return "\n".join(f"- {what}: {_judged(value, goal)}" for what, goal, value in rows)


def _judged(value: float, goal: float) -> str:
    if math.isnan(value):
        return f"not measured (goal {goal:.5g})"
    missed = f"missed by {1 - value / goal:.1%}"
    return f"{value:.4g}, goal {goal:.5g}: {'reached' if value >= goal else missed}"


def _medians(records: Sequence[Record]) -> dict[str, float]:
    """Return the medians over the records of a measurement, with images per second and useful TFLOP/s."""
    keys = ("seconds", "mfu", "useful_mfu", "peak_gib", "tflops", "flops", "useful_flops")
    mid = {key: statistics.median(record[key] for record in records) for key in keys}
    share = mid["useful_flops"] / mid["flops"]
    return {**mid, "rate": mid["tflops"] * 1e12 / mid["flops"], "useful_tflops": mid["tflops"] * share}


def machine() -> Record:
    """Return the device, versions and commit, all of which must be equal for results in one file."""
    return {"device": torch.cuda.get_device_name(), **versions(), "cuda": torch.version.cuda, "commit": git_commit()}


def run_all(args: argparse.Namespace) -> None:
    """Take the measurements that are missing in `--out`, for `--minutes`; print the table and how many are left."""
    if not torch.cuda.is_available():
        raise SystemExit("tools/bench.py gpu --all requires a GPU, but torch finds none. Run it on a machine with one.")
    try:
        chosen, results = cases(), Results(args.out, machine())
    except UserError as error:
        raise SystemExit(str(error)) from None
    left = measure_all(chosen, results, run_case, 60 * args.minutes)
    print(goals(chosen, results), table(chosen, results), sep="\n\n")
    print(
        f"\n{counted(left, 'measurement')} left. Run the same command again." if left else f"\nAll is measured: {args.out}"
    )
