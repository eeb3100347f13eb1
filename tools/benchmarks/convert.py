"""`tools/bench.py convert`: seconds, rate and peak memory of converting checkpoints, compared with copying the files."""

import argparse
import resource
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from raphael_dist.checkpoint.progress import Progress
from raphael_dist.checkpoint.tensors import KINDS
from raphael_dist.config.schema import Config, load_config
from raphael_dist.convert.conversion import convert, write_target
from raphael_dist.convert.layouts import layout_of
from raphael_dist.convert.mpi_ranks import MpiRanks
from raphael_dist.convert.source_checkpoint import parameter_shapes
from raphael_dist.convert.write_plan import Options
from raphael_dist.storage.files import sync
from raphael_dist.storage.tensorfile import CHUNK


class Noise:
    """A made-up checkpoint of a model of any size, which serves as the source of a conversion and needs little memory.

    It has the interface `convert.write_plan.Source`. All values are read from one small block of random numbers.
    """

    def __init__(self, config: Config, kinds: Sequence[str]) -> None:
        self.path, self.config, self.shapes = Path("noise"), config, parameter_shapes(config)
        self.whole = True
        self.progress, self.dataset = Progress(1, config.train.global_batch_size, 1, {}), ""
        self._kinds, self._values = tuple(kinds), torch.randn(CHUNK + 4096)

    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of values that this checkpoint has, such as "master" (fp32 weights) and "ema"."""
        return self._kinds

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Return random numbers as the elements from `start` on of a parameter, float32 [numel]. `numel`: at most CHUNK."""
        first = (len(kind) * 31 + len(name) * 7 + start) % 4096
        return self._values[first : first + numel]


def make_run(config: Config, kinds: Sequence[str], options: Options, folder: Path) -> None:
    """Write a run directory with one checkpoint of random numbers.

    Args:
        config: configuration of the model.
        kinds: kinds of values, such as "master" (fp32 weights).
        options: number of ranks and ZeRO stage of the checkpoint.
        folder: the new run directory.
    """
    source = Noise(config, kinds)
    plan = layout_of("--to", "raphael").plan(source, options, folder)
    write_target("raphael", source, plan, folder, MpiRanks(), {})


def bench_convert(source: Path, options: Options, layouts: Sequence[str], repeats: int) -> dict[str, float]:
    """Return the median seconds of copying the run `source`, and of converting it to each layout (format on disk).

    In each of `repeats` rounds the run is copied and converted to each layout. Written files are synced to the disk. If
    `repeats` is above 1, an additional round comes first, and its times are not used. `options`: number of ranks and ZeRO
    stage of converted checkpoints of the layout "deepspeed".
    """
    target = source.with_name(source.name + "-target")
    rows: dict[str, list[float]] = {}
    for _ in range(repeats + (repeats > 1)):
        began = time.monotonic()
        _copy(source, target)
        rows.setdefault("copy and sync", []).append(time.monotonic() - began)
        shutil.rmtree(target)
        for layout in layouts:
            chosen = options if layout == "deepspeed" else Options()
            began = time.monotonic()
            convert("raphael", source, layout, target, chosen)
            rows.setdefault(f"convert to {layout}", []).append(time.monotonic() - began)
            shutil.rmtree(target)
    return {name: statistics.median(values[-repeats:]) for name, values in rows.items()}


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        sync(path)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to its parser `command`."""
    command.add_argument("--config", default="emoji-small", help="preset or YAML file of the model (default emoji-small)")
    command.add_argument("--kinds", nargs="+", default=list(KINDS), help="kinds of values in the checkpoint (default: all)")
    command.add_argument("--world", type=int, default=4, help="number of ranks, and of files, of the source (default 4)")
    command.add_argument("--zero", type=int, choices=[0, 1, 2, 3], default=2, help="ZeRO stage of the source (default 2)")
    command.add_argument("--to", nargs="+", default=["canonical", "deepspeed"], help="layouts to convert to")
    command.add_argument(
        "--folder", type=Path, default=Path("runs/bench-convert"), help="folder to write to, on the disk to measure"
    )
    command.add_argument("--repeats", type=int, default=3, help="number of rounds that are measured (default 3)")


def run(args: argparse.Namespace) -> None:
    """Print the time of conversions in one process, compared with a copy. --folder must have room for two checkpoints."""
    # SGD if the source has no moments; otherwise moments of zeros would be written.
    config = load_config(args.config, [] if "exp_avg" in args.kinds else ["optim.kind=sgd"])
    options, source = Options(world=args.world, stage=args.zero), args.folder / "run"
    try:
        make_run(config, args.kinds, options, source)
        size = sum(path.stat().st_size for path in source.rglob("*")) / 2**20
        seconds = bench_convert(source, options, args.to, args.repeats)
        print(f"{size:.0f} MiB ({', '.join(args.kinds)}) in {options.world} files, one process, median of {args.repeats}")
        print(table(seconds, size, "copy and sync", "copy"))
        print(f"most memory in use: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


def table(seconds: dict[str, float], size: float, unit: str, of: str) -> str:
    """Return one line of text per measured operation: its name, seconds, MiB/s, and time relative to the operation `unit`.

    Args:
        seconds: seconds of each operation (such as copying or converting a checkpoint), by name.
        size: size of the data in MiB.
        unit: name of the operation with which all are compared.
        of: short name of that operation in the text.
    """
    return "\n".join(
        f"  {name:30} {s:8.3f} s {size / s:8.0f} MiB/s {s / seconds[unit]:7.2f} x {of}" for name, s in seconds.items()
    )
