"""Collects metrics on each rank and reduces them over ranks."""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from raphael_dist.model.device import from_host

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

        Args:
            name: name of the metric.
            value: the number or tensor. A tensor must be on the device of this object, and have the same shape at every
                call with this name.
            reduction: how values of all calls and ranks are combined: "sum", "max", or "mean": sum(value) / sum(count).
            count: number of items (e.g. samples) that `value` is the sum of. It is used for "mean" only.
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
        """Record all values of `other` in this object, too, as if `add` had been called for each. `other` is not changed."""
        for name, value in other._sums.items():
            self.add(name, value, "mean" if name in other._counts else "sum", other._counts.get(name, 1.0))
        for name, value in other._maxima.items():
            self.add(name, value, "max")

    def reduce(self) -> dict[str, Tensor]:
        """Combine the recorded values of all ranks; return them by name, as float32 tensors on the host. Clears this object.

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
    """Return all values, in the order of their names, as one vector on the device.

    Python numbers are copied to the device in one transfer.
    """
    numbers = from_host([v for _, v in sorted(values.items()) if not isinstance(v, Tensor)], device)
    rest = iter(numbers.split(1))
    parts = [v.reshape(-1) if isinstance(v, Tensor) else next(rest) for _, v in sorted(values.items())]
    return torch.cat(parts) if parts else numbers


def _named(flat: Tensor, like: dict[str, Tensor | float]) -> dict[str, Tensor]:
    shapes = {name: v.shape if isinstance(v, Tensor) else torch.Size() for name, v in sorted(like.items())}
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
