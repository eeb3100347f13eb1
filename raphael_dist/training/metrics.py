"""Collects metrics, reduces them over ranks, and writes them to metrics.jsonl and TensorBoard under the same tags."""

import json
import logging
import math
import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from raphael_dist.analysis.experts import DEAD_SHARE
from raphael_dist.model.device import from_host
from raphael_dist.storage.files import no_links, replace_bytes, write_all

_log = logging.getLogger(__name__)

Reduction = Literal["sum", "mean", "max"]


class Metrics:
    """Collects named values on this rank without waiting for the device; `reduce` combines them over ranks.

    If a name is recorded several times, its values are added (reductions "sum" and "mean"), or the largest is kept ("max").
    Tensors stay on the device, Python numbers on the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, Tensor | float] = {}
        self._maxima: dict[str, Tensor | float] = {}

    def add(self, name: str, value: Tensor | float, reduction: Reduction, count: Tensor | float = 1.0) -> None:
        """Record a number or tensor under `name`, without waiting for the device.

        A "mean" is sum(value) / sum(count) over all calls and ranks. A tensor must be on the device of this object, with the
        same shape at every call with this name.
        """
        value = _plain(value)
        if reduction == "max":
            self._maxima[name] = _larger(self._maxima[name], value) if name in self._maxima else value
            return
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        if reduction == "mean":
            n = _plain(count)
            self._counts[name] = self._counts[name] + n if name in self._counts else n

    def merge(self, other: "Metrics") -> None:
        """Add all values recorded in `other` to this object, without waiting for the device."""
        for name, value in other._sums.items():
            self.add(name, value, "mean" if name in other._counts else "sum", other._counts.get(name, 1.0))
        for name, value in other._maxima.items():
            self.add(name, value, "max")

    def reduce(self) -> dict[str, Tensor]:
        """Return the values reduced over all ranks by name, as float32 tensors on the host, and clear this object.

        Collective (at most two all-reduces); waits for the device once. All ranks must have recorded the same names and
        shapes.
        """
        sums = self._sums | {f"#{n}": c for n, c in self._counts.items()}
        parts = [_flat(sums, self._device), _flat(self._maxima, self._device)]
        for flat, op in zip(parts, (dist.ReduceOp.SUM, dist.ReduceOp.MAX), strict=True):
            if flat.numel():
                dist.all_reduce(flat, op=op)
        on_host = torch.cat(parts).cpu().split([flat.numel() for flat in parts])
        summed, result = _named(on_host[0], sums), _named(on_host[1], self._maxima)
        for name in self._sums:
            result[name] = summed[name] / summed[f"#{name}"].clamp(min=1e-12) if name in self._counts else summed[name]
        self._sums, self._counts, self._maxima = {}, {}, {}
        return result


def _plain(value: Tensor | float) -> Tensor | float:
    return value.detach().float() if isinstance(value, Tensor) else float(value)


def _larger(a: Tensor | float, b: Tensor | float) -> Tensor | float:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.maximum(a, b)
    if isinstance(a, Tensor):
        return a.clamp(min=float(b))
    return _larger(b, a) if isinstance(b, Tensor) else max(a, b)


def _flat(values: dict[str, Tensor | float], device: torch.device) -> Tensor:
    """Return all values, in the order of their names, as one vector on the device. Numbers go there in one copy."""
    numbers = from_host([v for _, v in sorted(values.items()) if not isinstance(v, Tensor)], device)
    rest = iter(numbers.split(1))
    parts = [v.reshape(-1) if isinstance(v, Tensor) else next(rest) for _, v in sorted(values.items())]
    return torch.cat(parts) if parts else numbers


def _named(flat: Tensor, like: dict[str, Tensor | float]) -> dict[str, Tensor]:
    shapes = {name: v.shape if isinstance(v, Tensor) else torch.Size() for name, v in sorted(like.items())}
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


# TensorBoard's page of custom scalars opens with these curves.
LAYOUT = {
    "first": {
        "loss": ["Multiline", ["^train/loss"]],
        "validation loss by timestep (t0: least noisy)": ["Multiline", ["^val/loss"]],
        "images per second": ["Multiline", ["^throughput/samples_per_s$"]],
        "gradient norm": ["Multiline", ["^optim/grad_norm$"]],
        "busiest and least busy expert (1: an even share)": ["Multiline", ["^moe/(space|time)/load_"]],
        "dead experts": ["Multiline", ["^moe/(space/|time/)?dead_experts$"]],
    }
}
REMEDY = "Set model.balance_weight=0.01, or raise it; docs/metrics.md defines moe/dead_experts."
_OF_A_BLOCK = re.compile(r"moe/\w+/L\d+/")
_BOARD = "TensorBoard's file"


class MetricsWriter:
    """Writes scalars to `metrics.jsonl` and to TensorBoard's files in the run directory. Used on rank 0.

    Scalars of single blocks (moe/space/L00/...) go to TensorBoard only with `every_scalar`, since heat maps show them
    already. If a file cannot be written, e.g. on a full disk, one warning is logged, the values are lost, and the run
    continues.
    """

    def __init__(self, run_dir: Path, every_scalar: bool = False) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        threading.excepthook = _without_tensorboard_errors(threading.excepthook)
        self._warned = False
        self._path = run_dir / "metrics.jsonl"
        self._mid_line = _ends_within_line(self._path)  # a kill or a full disk ended an earlier process
        self._every_scalar = every_scalar
        self._board: SummaryWriter | None = None
        with self._tolerating(_BOARD):
            self._board = SummaryWriter(str(run_dir / "tensorboard"))
            self._board.add_custom_scalars(LAYOUT)

    def describe(self, yaml: str, values: Mapping[str, bool | int | float | str]) -> None:
        """Write a run's configuration to TensorBoard, as YAML text and as hyperparameters for comparing runs.

        `values`: the settings by key `section.key`.
        """
        from torch.utils.tensorboard.summary import hparams

        if self._board is not None:
            with self._tolerating(_BOARD):
                self._board.add_text("configuration", f"```yaml\n{yaml}\n```")
                # add_hparams would put them into a run of their own, apart from the curves.
                for summary in hparams(dict(values), {"train/loss": 0.0, "val/loss": 0.0}):
                    self._board._get_file_writer().add_summary(summary)

    def write(self, step: int, samples_seen: int, values: dict[str, float]) -> None:
        """Write the scalars of optimizer step `step`: one line in metrics.jsonl, and one TensorBoard scalar per tag."""
        line = json.dumps({"step": step, "samples_seen": samples_seen, **values}) + "\n"
        with self._tolerating(str(self._path)):
            self._append(line)
        if self._board is not None:
            with self._tolerating(_BOARD):
                for tag, value in values.items():
                    if self._every_scalar or not _OF_A_BLOCK.match(tag):
                        self._board.add_scalar(tag, value, step)

    def return_to(self, step: int) -> None:
        """Remove all values of steps after `step`, because the run continues from `step` and will log those steps again."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        with self._tolerating(str(self._path)):
            _drop_after(self._path, step)
        if self._board is not None:
            with self._tolerating(_BOARD):  # as SummaryWriter(purge_step=...) does, but for an open writer
                start = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
                self._board._get_file_writer().add_event(start, step + 1)

    def image(self, tag: str, step: int, image: Image.Image) -> None:
        """Write an image to TensorBoard under `tag`."""
        if self._board is not None:
            with self._tolerating(_BOARD):
                self._board.add_image(tag, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Write what TensorBoard has buffered, and close its file."""
        if self._board is not None:
            with self._tolerating(_BOARD):
                self._board.close()

    def _append(self, line: str) -> None:
        with open(self._path, "ab", buffering=0, opener=no_links) as file:
            text = ("\n" * self._mid_line + line).encode()  # after an incomplete line, start a new one
            self._mid_line = True
            write_all(file.fileno(), memoryview(text))
            self._mid_line = False

    @contextmanager
    def _tolerating(self, what: str) -> Iterator[None]:
        """Return a context manager that ignores OSError in its body, and logs the first one. `what`: name of the file."""
        try:
            yield
        except OSError as error:
            if what == _BOARD:
                self._board = None  # its thread has ended, and a flush would wait for it
            if not self._warned:
                _log.warning(
                    "%s cannot be written (%s): training continues, but metrics are lost", what, error.strerror or error
                )
            self._warned = True


def _drop_after(path: Path, step: int) -> None:
    """Remove the lines of steps after `step` from a metrics.jsonl. The file is replaced by one rename."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    remaining = [line for line in lines if _step_of(line) <= step]
    if len(remaining) < len(lines):
        replace_bytes(path, b"".join(remaining))


def _step_of(line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # an incomplete line, which readers skip
        return -1


def _ends_within_line(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() != b"\n"
    except OSError:  # there is none, or it is empty
        return False


_Hook = Callable[[threading.ExceptHookArgs], object]


def _without_tensorboard_errors(hook: _Hook) -> _Hook:
    """Return a hook that ignores failed writes of TensorBoard's thread: the next call to TensorBoard raises them too."""

    def filtered(args: threading.ExceptHookArgs) -> None:
        if not (type(args.thread).__name__ == "_AsyncWriterThread" and isinstance(args.exc_value, OSError)):
            hook(args)

    return filtered


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the (step, value) pairs of each tag in a metrics.jsonl, in order of steps.

    If a tag has two values for one step, the later line counts. An incomplete line, caused by a kill or a full disk, is
    skipped.
    """
    series: dict[str, dict[int, float]] = defaultdict(dict)
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        step = row.pop("step")
        row.pop("samples_seen", None)
        for tag, value in row.items():
            series[tag][step] = value
    return {tag: sorted(values.items()) for tag, values in series.items()}


def load_metrics(prefix: str, load_LK: Tensor, total_samples: float | None = None) -> dict[str, float]:
    """Return scalars by tag that describe how evenly work is divided over experts, in total and for each block.

    `load_max` and `load_min` are the largest and the smallest load of an expert, divided by the mean load of its block.
    `load_entropy` is the result of the function `load_entropy`. `density` is the share of all (image token, expert) pairs
    that are computed.

    Args:
        prefix: first part of the tags, e.g. "moe/space".
        load_LK: work of expert k in transformer block l. Time experts: number of samples. Space experts: the sum over
            samples of the share of image tokens that need the expert.
        total_samples: number of samples in `load_LK`, for the `density` of space experts. None: no `density`.
    """
    share_LK = relative_load(load_LK)
    values = {f"{prefix}/load_max": float(share_LK.max()), f"{prefix}/load_min": float(share_LK.min())}
    values[f"{prefix}/load_entropy"] = load_entropy(share_LK)
    if total_samples:
        values[f"{prefix}/density"] = float(load_LK.mean() / total_samples)
    for layer, (load_K, relative) in enumerate(zip(load_LK, share_LK, strict=True)):
        values[f"{prefix}/L{layer:02d}/load_max"] = float(relative.max())
        values[f"{prefix}/L{layer:02d}/load_min"] = float(relative.min())
        if total_samples:
            values[f"{prefix}/L{layer:02d}/density"] = float(load_K.mean() / total_samples)
    return values


def relative_load(load_LK: Tensor) -> Tensor:
    """Return each expert's load (in any unit), divided by the mean load of its block; 1 means an even share.

    Argument and result are [L, K] for L transformer blocks with K experts each.
    """
    return load_LK / load_LK.mean(dim=1, keepdim=True).clamp(min=1e-12)


def load_entropy(share_LK: Tensor) -> float:
    """Return the normalised entropy of the expert loads, averaged over blocks: 1 if even, 0 if one expert has all work.

    `share_LK`: the result of `relative_load`.
    """
    experts = share_LK.shape[1]
    p_LK = (share_LK / experts).clamp(min=1e-12)
    return float(-(p_LK * p_LK.log()).sum(dim=1).mean() / math.log(experts)) if experts > 1 else 1.0


class DeadExperts:
    """Detects experts that get almost no work, and creates a warning with a remedy.

    An expert is dead if its load is below DEAD_SHARE of the mean load of its block. The loads of the last log lines are
    added up, as many lines as are needed for SAMPLES samples per expert.
    """

    SAMPLES = 100

    def __init__(self) -> None:
        self._lines: dict[str, list[tuple[Tensor, float]]] = defaultdict(list)
        self._warned: dict[str, int] = defaultdict(int)

    def clear(self) -> None:
        """Forget the loads of earlier log lines."""
        self._lines.clear()

    def find(self, kind: str, load_LK: Tensor, samples: float) -> Tensor | None:
        """Add the expert loads of one log line; return which experts are dead, bool [L, K]; None: too few samples yet.

        Args:
            kind: "space" or "time".
            load_LK: as for `load_metrics`.
            samples: number of samples in `load_LK`.
        """
        lines, needed = self._lines[kind], self.SAMPLES * load_LK.shape[1]
        lines.append((load_LK, samples))
        while sum(count for _, count in lines[1:]) >= needed:
            del lines[0]
        if sum(count for _, count in lines) < needed:
            return None
        return relative_load(torch.stack([load for load, _ in lines]).sum(dim=0)) < DEAD_SHARE

    def warning(self, kind: str, dead_LK: Tensor) -> str | None:
        """Return a warning about the dead experts of a kind ("space" or "time"), or None. `dead_LK`: the result of `find`.

        None if no expert is dead, or if their number has not doubled since the last warning.
        """
        count = int(dead_LK.sum())
        if count == 0 or count < 2 * self._warned[kind]:
            return None
        self._warned[kind] = count
        blocks = ", ".join(str(block) for block in dead_LK.any(dim=1).nonzero().flatten().tolist())
        return (
            f"{count} of {dead_LK.numel()} {kind} experts are dead: each gets under {DEAD_SHARE:.0%} of the mean load of "
            f"its block (blocks {blocks}). {REMEDY}"
        )
