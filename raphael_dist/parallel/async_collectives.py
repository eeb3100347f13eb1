"""The ranks that share one set of experts, and differentiable exchanges between them.

An exchange has two parts, so that computation between them overlaps with it. In the forward pass `start` launches the
collective and `finish` waits for it. In the backward pass autograd reaches the parts in reverse order: `finish` launches the
exchange of the gradient (the transposed exchange), and `start` waits for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

# Its name since torch 2.13, and before.
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Work(Protocol):
    """A collective in progress."""

    def wait(self) -> object:
        """Wait for its result."""


@dataclass
class Traffic:
    """Bytes that this rank sent to other ranks.

    They are counted by arithmetic on the host. Gathers and reductions count as rings, in which a rank sends all parts but
    one, twice in an all-reduce.

    Attributes:
        experts: rows of experts and their gradients, forward, recomputed and backward.
        gradients: reduction of gradients.
        weights: gathering of weights.
    """

    experts: int = 0
    gradients: int = 0
    weights: int = 0

    def take(self) -> "Traffic":
        """Return the bytes since the last call."""
        taken = replace(self)
        self.experts = self.gradients = self.weights = 0
        return taken


def reduce_scatter(out: Tensor, rows: Tensor, group: dist.ProcessGroup | None) -> Work:
    """Start to sum `rows` over a group; `out` is this member's part when the returned work is done.

    Gloo's own reduce-scatter is an all-reduce, which sends every byte twice. Here each part goes to its member at once,
    which adds the parts up.
    """
    if dist.get_backend(group) != "gloo":
        return cast(Work, REDUCE_SCATTER(out, rows, group=group, async_op=True))
    parts = torch.empty_like(rows)
    work = dist.all_to_all_single(parts, rows, group=group, async_op=True)
    return _LocalSum(work, parts.view(-1, *out.shape), out)


@dataclass
class _LocalSum:
    work: Work
    parts: Tensor
    out: Tensor

    @torch.no_grad()
    def wait(self) -> None:
        """Wait for the parts and add them up; the sums of bfloat16 are rounded once."""
        self.work.wait()
        torch.sum(self.parts, dim=0, out=self.out)


@dataclass(frozen=True)
class ExpertGroup:
    """The `size` ranks of one group that share one set of experts; this rank is member `index`.

    Methods are raw collectives. Each returns its result, which can be read when its work is done.
    """

    process_group: dist.ProcessGroup
    size: int
    index: int
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def name(self) -> str:
        """The group's name in DeepSpeed, which parses the size from it."""
        return f"ep_size_{self.size}"

    def all_to_all(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> tuple[Tensor, Work]:
        """Send the first `sent[0]` rows to member 0, and so on; return `received[p]` rows from each member p, and work."""
        out = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(
            out, rows.contiguous(), list(received), list(sent), group=self.process_group, async_op=True
        )
        self.traffic.experts += (sum(sent) - sent[self.index]) * rows.shape[1:].numel() * rows.element_size()
        return out, work

    def all_gather(self, rows: Tensor) -> tuple[Tensor, Work]:
        """Return the rows of all members in their order, and the work. All members have equally many rows."""
        out = rows.new_empty(self.size * rows.shape[0], *rows.shape[1:])
        work = dist.all_gather_into_tensor(out, rows.contiguous(), group=self.process_group, async_op=True)
        self.traffic.experts += (self.size - 1) * rows.nbytes
        return out, work

    def reduce_scatter(self, rows: Tensor) -> tuple[Tensor, Work]:
        """Return this member's part of the sum over all members' rows, and the work."""
        out = rows.new_empty(rows.shape[0] // self.size, *rows.shape[1:])
        work = reduce_scatter(out, rows.contiguous(), self.process_group)
        self.traffic.experts += (self.size - 1) * out.nbytes
        return out, work


class Exchange:
    """One exchange: launched in `start`, completed in `finish`."""

    def __init__(self, group: ExpertGroup) -> None:
        self.group = group
        self._pending: tuple[Tensor, Work] | None = None

    def start(self, rows: Tensor) -> Tensor:
        """Send `rows`. The result must only be passed to `finish`."""
        pending: Tensor = _Start.apply(rows, self)  # type: ignore[no-untyped-call]
        return pending

    def finish(self, pending: Tensor) -> Tensor:
        """Return the received rows."""
        received: Tensor = _Finish.apply(pending, self)  # type: ignore[no-untyped-call]
        return received

    def __call__(self, rows: Tensor) -> Tensor:
        """Send and wait."""
        return self.finish(self.start(rows))

    def launch(self, rows: Tensor, forward: bool) -> Tensor:
        """Start the collective on raw tensors, or its transpose. The result must not be read before `wait`."""
        self._pending = self._forward(rows) if forward else self._backward(rows)
        return self._pending[0]

    def wait(self) -> Tensor:
        """Wait for the collective that `launch` started and return its result."""
        assert self._pending is not None
        (out, work), self._pending = self._pending, None
        work.wait()
        return out

    def _forward(self, rows: Tensor) -> tuple[Tensor, Work]:
        raise NotImplementedError

    def _backward(self, grad: Tensor) -> tuple[Tensor, Work]:
        raise NotImplementedError


class AllToAll(Exchange):
    """`sent[p]` rows go to member p and `received[p]` rows come from it. Gradients go in the opposite direction."""

    def __init__(self, group: ExpertGroup, sent: Sequence[int], received: Sequence[int]) -> None:
        super().__init__(group)
        self._sent, self._received = sent, received

    def _forward(self, rows: Tensor) -> tuple[Tensor, Work]:
        return self.group.all_to_all(rows, self._sent, self._received)

    def _backward(self, grad: Tensor) -> tuple[Tensor, Work]:
        return self.group.all_to_all(grad, self._received, self._sent)


class AllGather(Exchange):
    """Every member receives the rows of all. The gradient of a row is the sum of all members' gradients for it."""

    def _forward(self, rows: Tensor) -> tuple[Tensor, Work]:
        return self.group.all_gather(rows)

    def _backward(self, grad: Tensor) -> tuple[Tensor, Work]:
        return self.group.reduce_scatter(grad)


class ReduceScatter(Exchange):
    """Every member receives its part of the sum of all members' rows. The gradient of a summand is that of the sum."""

    def _forward(self, rows: Tensor) -> tuple[Tensor, Work]:
        return self.group.reduce_scatter(rows)

    def _backward(self, grad: Tensor) -> tuple[Tensor, Work]:
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
        # The received gradient stays in the exchange until `start` reads it; `grad` is a placeholder of the right shape.
        ctx.exchange.launch(grad, forward=False)
        return grad, None
