"""The ranks that share one set of experts, and the differentiable exchanges between them.

An exchange has two ends, so that computation between them overlaps with it: in the forward pass `start` launches the
collective and `finish` waits for it. In the backward pass autograd meets the ends in reverse order: `finish` launches the
exchange of the gradient (the transposed exchange), and `start` waits for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """Bytes that this rank's expert exchanges sent to other ranks: forward, recomputed and backward."""

    sent: int = 0

    def take(self) -> int:
        """Return the bytes since the last call."""
        taken, self.sent = self.sent, 0
        return taken


@dataclass(frozen=True)
class ExpertGroup:
    """The `size` ranks of one group that share one set of experts, seen from its member `index`.

    The methods are the raw collectives; each returns its result, to be read after the work with it is done. They count the
    bytes for other ranks by arithmetic on the host; gathers and reduce-scatters count as rings, where each part travels
    `size - 1` times.
    """

    process_group: dist.ProcessGroup
    size: int
    index: int
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def name(self) -> str:
        """The group's name in DeepSpeed, which reads the size out of it."""
        return f"ep_size_{self.size}"

    def all_to_all(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> tuple[Tensor, Any]:
        """Send `sent[0]` rows to member 0, and so on; return `received[p]` rows from each member p, and the work."""
        out = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(
            out, rows.contiguous(), list(received), list(sent), group=self.process_group, async_op=True
        )
        self.traffic.sent += (sum(sent) - sent[self.index]) * rows.shape[1:].numel() * rows.element_size()
        return out, work

    def all_gather(self, rows: Tensor) -> tuple[Tensor, Any]:
        """Return the rows of all members, in their order, and the work; every member has equally many."""
        out = rows.new_empty(self.size * rows.shape[0], *rows.shape[1:])
        work = dist.all_gather_into_tensor(out, rows.contiguous(), group=self.process_group, async_op=True)
        self.traffic.sent += (self.size - 1) * rows.nbytes
        return out, work

    def reduce_scatter(self, rows: Tensor) -> tuple[Tensor, Any]:
        """Return this member's part of the sum over all members' rows, and the work."""
        out = rows.new_empty(rows.shape[0] // self.size, *rows.shape[1:])
        work = dist.reduce_scatter_tensor(out, rows.contiguous(), group=self.process_group, async_op=True)
        self.traffic.sent += (self.size - 1) * out.nbytes
        return out, work


class Exchange:
    """One exchange, which sets out in `start` and arrives in `finish`."""

    def __init__(self, group: ExpertGroup) -> None:
        self.group = group
        self._pending: tuple[Tensor, Any] | None = None

    def start(self, rows: Tensor) -> Tensor:
        """Send `rows`; the result may be given to `finish` alone."""
        return _Start.apply(rows, self)

    def finish(self, pending: Tensor) -> Tensor:
        """Return what arrived."""
        return _Finish.apply(pending, self)

    def __call__(self, rows: Tensor) -> Tensor:
        """Send and wait."""
        return self.finish(self.start(rows))

    def launch(self, rows: Tensor, forward: bool) -> Tensor:
        """Start the collective on raw tensors, forwards or backwards; the result must not be read before `wait`."""
        self._pending = self._forward(rows) if forward else self._backward(rows)
        return self._pending[0]

    def wait(self) -> Tensor:
        """Wait for the collective that `launch` started and return its result."""
        assert self._pending is not None
        (out, work), self._pending = self._pending, None
        work.wait()
        return out

    def _forward(self, rows: Tensor) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def _backward(self, grad: Tensor) -> tuple[Tensor, Any]:
        raise NotImplementedError


class AllToAll(Exchange):
    """`sent[p]` rows go to member p, `received[p]` come from it; the gradient goes the way back."""

    def __init__(self, group: ExpertGroup, sent: Sequence[int], received: Sequence[int]) -> None:
        super().__init__(group)
        self._sent, self._received = sent, received

    def _forward(self, rows: Tensor) -> tuple[Tensor, Any]:
        return self.group.all_to_all(rows, self._sent, self._received)

    def _backward(self, grad: Tensor) -> tuple[Tensor, Any]:
        return self.group.all_to_all(grad, self._received, self._sent)


class AllGather(Exchange):
    """Every member gets the rows of all; a row's gradient is the sum of what all members have for it."""

    def _forward(self, rows: Tensor) -> tuple[Tensor, Any]:
        return self.group.all_gather(rows)

    def _backward(self, grad: Tensor) -> tuple[Tensor, Any]:
        return self.group.reduce_scatter(grad)


class ReduceScatter(Exchange):
    """Every member gets its part of the sum of all members' rows; every summand has the gradient of the sum."""

    def _forward(self, rows: Tensor) -> tuple[Tensor, Any]:
        return self.group.reduce_scatter(rows)

    def _backward(self, grad: Tensor) -> tuple[Tensor, Any]:
        return self.group.all_gather(grad)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.launch(rows, forward=True)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pending: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return pending.view_as(pending)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # What comes back has the shape of what was sent; it waits in the exchange, and `grad` only stands for it.
        ctx.exchange.launch(grad, forward=False)
        return grad, None
