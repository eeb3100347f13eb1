"""Metrics with their reduction over ranks, written to metrics.jsonl and TensorBoard under the same tags."""

import json
import logging
import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raphael_dist.model.device import from_host
from raphael_dist.storage.files import write_all

_log = logging.getLogger(__name__)

Reduction = Literal["sum", "mean", "max"]


class Metrics:
    """Collects values on this rank without waiting for the device; `reduce` combines them over ranks in two collectives.

    Repeated values of one name add up (sum, mean) or give the largest (max). Tensors stay on the device, numbers on the
    host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, Tensor | float] = {}
        self._maxima: dict[str, Tensor | float] = {}

    def add(self, name: str, value: Tensor | float, reduction: Reduction, count: Tensor | float = 1.0) -> None:
        """Record a value; a mean is sum(value) / sum(count). Values may be tensors of any one shape per name, on the
        metrics' device, or numbers.
        """
        value = _plain(value)
        if reduction == "max":
            self._maxima[name] = _larger(self._maxima[name], value) if name in self._maxima else value
            return
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        if reduction == "mean":
            n = _plain(count)
            self._counts[name] = self._counts[name] + n if name in self._counts else n

    def reduce(self) -> dict[str, Tensor]:
        """Combine over all ranks and start anew; float32 on the host. Waits for the device, once.

        Every rank must have recorded the same names and shapes.
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


def _larger(one: Tensor | float, other: Tensor | float) -> Tensor | float:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.maximum(one, other)
    if isinstance(one, Tensor):
        return one.clamp(min=float(other))
    return _larger(other, one) if isinstance(other, Tensor) else max(one, other)


def _flat(values: dict[str, Tensor | float], device: torch.device) -> Tensor:
    """Return all values by name as one vector on the device; the numbers go there in one copy."""
    numbers = from_host([v for _, v in sorted(values.items()) if not isinstance(v, Tensor)], device)
    rest = iter(numbers.split(1))
    parts = [v.reshape(-1) if isinstance(v, Tensor) else next(rest) for _, v in sorted(values.items())]
    return torch.cat(parts) if parts else numbers


def _named(flat: Tensor, like: dict[str, Tensor | float]) -> dict[str, Tensor]:
    shapes = {name: v.shape if isinstance(v, Tensor) else torch.Size() for name, v in sorted(like.items())}
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


# What TensorBoard's page of custom scalars opens with: the curves that matter first.
LAYOUT = {
    "first": {
        "loss": ["Multiline", ["^train/loss"]],
        "validation loss by timestep (t0: least noisy)": ["Multiline", ["^val/loss"]],
        "images per second": ["Multiline", ["^throughput/samples_per_s$"]],
        "gradient norm": ["Multiline", ["^optim/grad_norm$"]],
        "busiest and idlest expert (1: an even share)": ["Multiline", ["^moe/(space|time)/load_"]],
    }
}
_OF_A_BLOCK = re.compile(r"moe/\w+/L\d+/")


class MetricsWriter:
    """Writes scalars to `metrics.jsonl` and to TensorBoard below the run directory. For rank 0.

    TensorBoard gets no scalars of single blocks (moe/space/L00/...) unless `every_scalar`: heat maps show these.

    What cannot be written, the disk being full, say, is lost with one warning: it ends no run.
    """

    def __init__(self, run_dir: Path, every_scalar: bool = False) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        threading.excepthook = _without_tensorboards(threading.excepthook)
        self._warned = False
        self._path = run_dir / "metrics.jsonl"
        self._broken = _ends_within_a_line(self._path)  # a kill or a full disk ended the process before
        self._board: SummaryWriter | None = None
        self._try("TensorBoard's file", lambda: setattr(self, "_board", SummaryWriter(str(run_dir / "tensorboard"))))
        self._every_scalar = every_scalar
        self._to_board("add_custom_scalars", LAYOUT)

    def describe(self, yaml: str, values: dict[str, Any]) -> None:
        """Show a run's configuration: a page of text, and its values among the hyperparameters that runs are compared by."""
        from torch.utils.tensorboard.summary import hparams

        self._to_board("add_text", "configuration", f"```yaml\n{yaml}\n```")
        # Not by add_hparams, which would put them into a run of their own, apart from the curves.
        writer: Any = None if self._board is None else self._board.file_writer
        for summary in hparams(values, {"train/loss": 0.0, "val/loss": 0.0}) if writer else ():
            self._try("TensorBoard's file", partial(writer.add_summary, summary))

    def write(self, step: int, samples_seen: int, values: dict[str, float]) -> None:
        """Append one line, and one TensorBoard scalar per tag, for optimizer step `step`."""
        line = json.dumps({"step": step, "samples_seen": samples_seen, **values}) + "\n"
        self._try(str(self._path), lambda: self._append(line))
        for tag, value in values.items():
            if self._every_scalar or not _OF_A_BLOCK.match(tag):
                self._to_board("add_scalar", tag, value, step)

    def image(self, tag: str, step: int, image: Any) -> None:
        """Show a PIL image in TensorBoard."""
        pixels = np.asarray(image.convert("RGB"))
        self._to_board("add_image", tag, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Write out what TensorBoard holds back."""
        self._to_board("close")

    def _append(self, line: str) -> None:
        with open(self._path, "ab", buffering=0) as file:
            text = ("\n" * self._broken + line).encode()  # behind half a line, a line of its own
            self._broken = True
            write_all(file.fileno(), memoryview(text))
            self._broken = False

    def _to_board(self, method: str, *args: Any, **kwargs: Any) -> None:
        board = self._board
        if board is not None and not self._try("TensorBoard's file", lambda: getattr(board, method)(*args, **kwargs)):
            self._board = None  # its thread is gone, and a flush would wait for it

    def _try(self, what: str, work: Callable[[], Any]) -> bool:
        try:
            work()
        except OSError as error:
            if not self._warned:
                _log.warning("cannot write %s: %s; training goes on, metrics are lost", what, error.strerror or error)
            self._warned = True
            return False
        return True


def _ends_within_a_line(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() != b"\n"
    except OSError:  # there is none, or it is empty
        return False


def _without_tensorboards(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a hook for threads' exceptions that leaves out what TensorBoard cannot write: the next call raises it too."""

    def quiet(args: Any) -> None:
        if not (type(args.thread).__name__ == "_AsyncWriterThread" and isinstance(args.exc_value, OSError)):
            hook(args)

    return quiet


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the (step, value) pairs of each tag in a metrics.jsonl; after a resume the later value of a step counts.

    Half a line, which a kill or a full disk leaves, is passed over.
    """
    series: dict[str, dict[int, float]] = defaultdict(dict)
    for line in path.read_text().splitlines():
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
    """Return scalars from expert loads [L, K], of each layer and over all: the largest and smallest load relative to an even
    share.

    With `total_samples`, load_LK is a sum over samples of the share of image tokens per expert, and `density` is the share
    of (token, expert) pairs in use.
    """
    share_LK = relative_load(load_LK)
    values = {f"{prefix}/load_max": float(share_LK.max()), f"{prefix}/load_min": float(share_LK.min())}
    if total_samples:
        values[f"{prefix}/density"] = float(load_LK.mean() / total_samples)
    for layer, (load_K, relative) in enumerate(zip(load_LK, share_LK, strict=True)):
        values[f"{prefix}/L{layer:02d}/load_max"] = float(relative.max())
        values[f"{prefix}/L{layer:02d}/load_min"] = float(relative.min())
        if total_samples:
            values[f"{prefix}/L{layer:02d}/density"] = float(load_K.mean() / total_samples)
    return values


def relative_load(load_LK: Tensor) -> Tensor:
    """Return loads relative to an even share of their layer, [L, K]."""
    return load_LK / load_LK.mean(dim=1, keepdim=True).clamp(min=1e-12)


class ExpertLoadMonitor:
    """Says once of an expert that it is dead (almost nothing reaches it) or overloaded (almost everything does)."""

    DEAD, OVERLOADED = 0.02, 0.9  # relative to an even share; share of all
    ENOUGH = 20.0  # samples that an expert would get if the load were even, to judge it

    def __init__(self) -> None:
        self._said: set[tuple[str, int, int]] = set()

    def new(self, kind: str, load_LK: Tensor, samples: float) -> list[str]:
        """Return a line with what to do for each expert of which none has been returned; loads as in `load_metrics`."""
        num_experts = load_LK.shape[1]
        if num_experts == 1 or samples / num_experts < self.ENOUGH:
            return []
        share_LK = load_LK / load_LK.sum(dim=1, keepdim=True).clamp(min=1e-12)
        found = []
        for layer, expert in ((share_LK * num_experts < self.DEAD) | (share_LK > self.OVERLOADED)).nonzero().tolist():
            if (kind, layer, expert) not in self._said:
                self._said.add((kind, layer, expert))
                found.append(self._line(kind, layer, expert, float(share_LK[layer, expert])))
        return found

    def _line(self, kind: str, layer: int, expert: int, share: float) -> str:
        what = f"{share:.1%} of the load since the last log line" if share > self.OVERLOADED else "almost nothing to do"
        remedy = "raise model.gate_noise"
        if kind == "space":
            remedy += " or set model.balance_weight=0.01"
        return f"{kind} expert {expert} of block {layer} has {what}; if that lasts (see moe/{kind}/L{layer:02d}), {remedy}"
