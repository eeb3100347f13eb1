"""Metrics with their reduction over ranks, written to metrics.jsonl and TensorBoard under the same tags."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Reduction = Literal["sum", "mean", "max"]


class Metrics:
    """Collects values on this rank without waiting for the device; `reduce` combines them over ranks in two collectives.

    Repeated values of one name add up (sum, mean) or give the largest (max).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor | float, reduction: Reduction, count: Tensor | float = 1.0) -> None:
        """Record a value; a mean is sum(value) / sum(count). Values may be tensors of any one shape per name."""
        value = self._tensor(value)
        if reduction == "max":
            self._maxima[name] = torch.maximum(self._maxima[name], value) if name in self._maxima else value
            return
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        if reduction == "mean":
            n = self._tensor(count)
            self._counts[name] = self._counts[name] + n if name in self._counts else n

    def reduce(self) -> dict[str, Tensor]:
        """Combine over all ranks and start anew. Every rank must have recorded the same names and shapes."""
        summed = _all_reduce(self._sums | {f"#{n}": c for n, c in self._counts.items()}, dist.ReduceOp.SUM, self._device)
        result = {
            n: v / summed[f"#{n}"].clamp(min=1e-12) if f"#{n}" in summed else v for n, v in summed.items() if n[0] != "#"
        }
        result |= _all_reduce(self._maxima, dist.ReduceOp.MAX, self._device)
        self._sums, self._counts, self._maxima = {}, {}, {}
        return result

    def _tensor(self, value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float32, device=self._device).detach()


def _all_reduce(values: dict[str, Tensor], op: Any, device: torch.device) -> dict[str, Tensor]:
    if not values:
        return {}
    names = sorted(values)
    flat = torch.cat([values[n].reshape(-1) for n in names])
    dist.all_reduce(flat, op=op)
    parts = flat.cpu().split([values[n].numel() for n in names])
    return {n: part.view(values[n].shape) for n, part in zip(names, parts, strict=True)}


class MetricsWriter:
    """Writes scalars to `metrics.jsonl` and to TensorBoard below the run directory. For rank 0."""

    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._board = SummaryWriter(str(run_dir / "tensorboard"))
        self._file = open(run_dir / "metrics.jsonl", "a", buffering=1)

    def write(self, step: int, samples_seen: int, values: dict[str, float]) -> None:
        """Append one line, and one TensorBoard scalar per tag, for optimizer step `step`."""
        self._file.write(json.dumps({"step": step, "samples_seen": samples_seen, **values}) + "\n")
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)

    def image(self, tag: str, step: int, image_hwc: Any) -> None:
        """Show an RGB image, uint8 [h, w, 3], in TensorBoard."""
        self._board.add_image(tag, image_hwc, step, dataformats="HWC")

    def close(self) -> None:
        """Flush both."""
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the (step, value) pairs of each tag in a metrics.jsonl; after a resume the later value of a step counts."""
    series: dict[str, dict[int, float]] = defaultdict(dict)
    for line in path.read_text().splitlines():
        row = json.loads(line)
        step = row.pop("step")
        row.pop("samples_seen", None)
        for tag, value in row.items():
            series[tag][step] = value
    return {tag: sorted(values.items()) for tag, values in series.items()}


def load_metrics(prefix: str, load_LK: Tensor, total_samples: float | None = None) -> dict[str, float]:
    """Return per-layer scalars from expert loads [L, K]: the largest and smallest load relative to an even share.

    With `total_samples`, load_LK is a sum over samples of the share of image tokens per expert, and `density` is the share
    of (token, expert) pairs in use.
    """
    values = {}
    for layer, load_K in enumerate(load_LK):
        relative = load_K / load_K.mean().clamp(min=1e-12)
        values[f"{prefix}/L{layer:02d}/load_max"] = float(relative.max())
        values[f"{prefix}/L{layer:02d}/load_min"] = float(relative.min())
        if total_samples:
            values[f"{prefix}/L{layer:02d}/density"] = float(load_K.mean() / total_samples)
    return values


class LoadWatch:
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
