"""`tools/bench.py gpu --all`: takes all documented measurements of one GPU. The same command can be repeated to continue.

Each measurement runs in its own process (`tools/bench.py gpu --json`), so that a failed measurement does not affect the
others. Every measurement is taken once before the second round begins, so that slow changes of the machine affect all of
them. Results are written to a JSON file (`--out`) after each measurement; the next call takes the missing measurements. The
command ends after `--minutes` at the latest, and prints the table of all results so far.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
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
ROUNDS = 2  # how often each measurement is taken
_GRAPHS = "train.cuda_graphs=true"
_NO_RECOMPUTE = "model.checkpoint_activations=none"
Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One measurement of an optimizer step on a GPU.

    Attributes:
        config: the preset.
        images: images of a micro-batch.
        step_of: whose step is measured: "ours", "diffusers" or "diffusers-compiled".
        overrides: overrides of the configuration, as on the command line.
    """

    config: str
    images: int
    step_of: str = "ours"
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join([self.config, str(self.images), self.step_of, *self.overrides])

    def command(self) -> list[str]:
        """Return the arguments of `tools/bench.py gpu` for this measurement."""
        words = ["--config", self.config, "--micro-batch", str(self.images), "--step-of", self.step_of, "--json"]
        return [*words, *self.overrides]


def cases() -> list[Case]:
    """Return all measurements, the most important first."""
    chosen = [c for images in (64, 8, 32) for c in _against_diffusers("sd2-dense", images)]
    for config in ("raphael-3b", "raphael-sd2"):
        for images in (8, 2, 16, 32):
            for overrides in ((), (_NO_RECOMPUTE,)):
                each_off = (config, images, overrides) == ("raphael-3b", 8, ())
                switches = _switches(config, each_off)
                chosen += [Case(config, images, overrides=(_GRAPHS, *overrides, *kernels)) for kernels in switches]
    chosen += [Case("emoji", n, overrides=(_GRAPHS, *kernels)) for n in (1024, 256) for kernels in _switches("emoji")]
    return chosen


def _against_diffusers(config: str, images: int) -> list[Case]:
    ours = [Case(config, images, overrides=(_GRAPHS, *kernels)) for kernels in _switches(config, each_off=True)]
    compiled = Case(config, images, overrides=(_GRAPHS, "train.compile=true"))
    return [*ours, compiled, Case(config, images, "diffusers"), Case(config, images, "diffusers-compiled")]


def _switches(config: str, each_off: bool = False) -> list[tuple[str, ...]]:
    """Return combinations of train.kernels to measure, as overrides.

    They are: no kernel, all kernels that the preset can use, and these with deferred_update. The kernels space_moe and
    space_moe_dense exclude each other, so a model with space experts has a combination for each of them. With `each_off`
    there are also combinations that leave out one kernel each.
    """
    loaded = load_config(config)
    model = loaded.model
    unfit = {"space_moe_dense"} if model.space_experts else {"space_moe", "space_moe_dense"}
    unfit |= set() if model.time_experts and model.time_activation == "gelu" else {"time_moe"}
    unfit |= set() if model.space_experts or loaded.edge.weight > 0 else {"cross_attention"}
    names = [name for name in KERNELS if name not in {*unfit, "deferred_update"}]
    sets = [[], names, [*names, "deferred_update"]]
    if model.space_experts:
        sets.append(["space_moe_dense" if name == "space_moe" else name for name in names])
    if each_off:
        sets += [[other for other in names if other != name] for name in names]
    return [(f"train.kernels=[{','.join(kernels)}]",) if kernels else () for kernels in sets]


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
        """Return the measurements of `chosen` that are missing, in order. Failed ones are not repeated."""
        counts = {case: len(self.of(case)) for case in chosen}
        failed = {case for case in chosen if any("error" in record for record in self.of(case))}
        return [case for i in range(ROUNDS) for case in chosen if counts[case] <= i and case not in failed]


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
        mid = {key: statistics.median(r[key] for r in records) for key in ("seconds", "mfu", "useful_mfu", "peak_gib")}
        rate = case.images / mid["seconds"]
        shares = f"{mid['mfu']:.1%} | {mid['useful_mfu']:.1%} | {mid['peak_gib']:.1f}"
        lines.append(f"{head} {mid['seconds'] * 1e3:.1f} | {rate:.1f} | {shares} | {len(records)} |")
    return "\n".join(lines)


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
    print(table(chosen, results))
    print(
        f"\n{counted(left, 'measurement')} left. Run the same command again." if left else f"\nAll is measured: {args.out}"
    )
