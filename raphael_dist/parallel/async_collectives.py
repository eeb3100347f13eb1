"""Differentiable, asynchronous exchanges of tensor rows between the ranks that share one set of experts.

An exchange has two halves, so that computation between them overlaps with communication. In the forward pass `start`
launches the collective and `finish` waits for it. Autograd runs the halves in reverse order: the backward pass of `finish`
launches the transposed collective on the gradient, and the backward pass of `start` waits for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

# Its name since torch 2.13, and before.
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Work(Protocol):
    """The handle of a collective in progress, such as torch.distributed returns with async_op=True."""

    def wait(self) -> object:
        """Wait until the collective's result can be read."""


@dataclass
class Traffic:
    """Bytes that this rank sent to other ranks.

    They are computed on the host from the sizes of the tensors, not measured. For gathers and reductions a ring algorithm is
    assumed: for n ranks a rank sends (n - 1)/n of the whole tensor, and in an all-reduce twice as much.

    Attributes:
        experts: expert parallelism: tokens or samples sent to experts, their outputs and gradients, in forward, recomputed
            and backward passes.
        gradients: reduction of gradients.
        weights: gathering of weights.
    """

    experts: int = 0
    gradients: int = 0
    weights: int = 0

    def take(self) -> "Traffic":
        """Return the bytes since the last call as a new object, and set the counters to 0."""
        taken = replace(self)
        self.experts = self.gradients = self.weights = 0
        return taken


def reduce_scatter(out: Tensor, rows: Tensor, group: dist.ProcessGroup | None) -> Work:
    """Start to sum `rows` over the ranks of a group; each rank gets an equal part of the sum.

    `rows` is [n R, ...] for n ranks, and `out` [R, ...]. When the returned work is done, `out` contains this rank's part.

    Gloo's own reduce-scatter is an all-reduce, which sends every byte twice. On gloo this function sends each part directly
    to the rank that needs it, and that rank adds the parts up.
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
        """Wait for the part that each rank sends, and write their sum to `out`. A bfloat16 sum is rounded only once."""
        self.work.wait()
        torch.sum(self.parts, dim=0, out=self.out)


@dataclass(frozen=True)
class ExpertGroup:
    """A group of ranks that together have every expert once, as seen from one of its members (ranks of the group).

    The methods start collectives. Each returns its result and a `Work`; the result must not be read before `Work.wait`.

    Attributes:
        process_group: the group in torch.distributed.
        size: number of members.
        index: number of this rank within the group.
        traffic: counter to which the methods add the bytes that this rank sends.
    """

    process_group: dist.ProcessGroup
    size: int
    index: int
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def name(self) -> str:
        """The group's name in DeepSpeed's registry. DeepSpeed reads the group's size from it."""
        return f"ep_size_{self.size}"

    def all_to_all(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> tuple[Tensor, Work]:
        """Send `sent[p]` consecutive rows to each member p; return the received rows by member, and the handle to wait for.

        `received[p]` is the number of rows that member p sends to this rank.
        """
        out = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(
            out, rows.contiguous(), list(received), list(sent), group=self.process_group, async_op=True
        )
        self.traffic.experts += (sum(sent) - sent[self.index]) * rows.shape[1:].numel() * rows.element_size()
        return out, work

    def all_gather(self, rows: Tensor) -> tuple[Tensor, Work]:
        """Return the rows of all members, in the order of members, and the handle to wait for.

        All members must have equally many rows.
        """
        out = rows.new_empty(self.size * rows.shape[0], *rows.shape[1:])
        work = dist.all_gather_into_tensor(out, rows.contiguous(), group=self.process_group, async_op=True)
        self.traffic.experts += (self.size - 1) * rows.nbytes
        return out, work

    def reduce_scatter(self, rows: Tensor) -> tuple[Tensor, Work]:
        """Sum `rows` over all members; return this member's 1/size of the summed rows, and the handle to wait for."""
        out = rows.new_empty(rows.shape[0] // self.size, *rows.shape[1:])
        work = reduce_scatter(out, rows.contiguous(), self.process_group)
        self.traffic.experts += (self.size - 1) * out.nbytes
        return out, work


class Exchange:
    """Base class for sending tensor rows between ranks: `start` launches a collective, `finish` waits for its result.

    Between the two calls, the caller can compute something else. Autograd works through both: in the backward pass, the
    gradients are sent in the opposite direction.
    """

    def __init__(self, group: ExpertGroup) -> None:
        self.group = group
        self._pending: tuple[Tensor, Work] | None = None

    def start(self, rows: Tensor) -> Tensor:
        """Start the exchange of `rows` [R, ...]. Return a placeholder, which must only be passed to `finish`."""
        pending: Tensor = _Start.apply(rows, self)  # type: ignore[no-untyped-call]
        return pending

    def finish(self, pending: Tensor) -> Tensor:
        """Wait for the exchange that `start` launched, and return its result [R', ...], such as the received rows.

        `pending`: the placeholder that `start` returned.
        """
        received: Tensor = _Finish.apply(pending, self)  # type: ignore[no-untyped-call]
        return received

    def __call__(self, rows: Tensor) -> Tensor:
        """Send rows and wait; return the received rows."""
        return self.finish(self.start(rows))

    def launch(self, rows: Tensor, forward: bool) -> Tensor:
        """Start the collective that exchanges `rows`, without autograd.

        `forward`: True for the exchange of the forward pass, False for that of gradients in the opposite direction.
        Returns the collective's result, which must not be read before `wait`.
        """
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
    """Sends `sent[p]` consecutive rows to each member p of a group, and receives `received[p]` rows from it.

    Gradients go in the opposite direction.
    """

    def __init__(self, group: ExpertGroup, sent: Sequence[int], received: Sequence[int]) -> None:
        super().__init__(group)
        self._sent, self._received = sent, received

    def _forward(self, rows: Tensor) -> tuple[Tensor, Work]:
        return self.group.all_to_all(rows, self._sent, self._received)

    def _backward(self, grad: Tensor) -> tuple[Tensor, Work]:
        return self.group.all_to_all(grad, self._received, self._sent)


class AllGather(Exchange):
    """Gives every member of a group the rows of all members.

    The gradient of a row is the sum of all members' gradients for it.
    """

    def _forward(self, rows: Tensor) -> tuple[Tensor, Work]:
        return self.group.all_gather(rows)

    def _backward(self, grad: Tensor) -> tuple[Tensor, Work]:
        return self.group.reduce_scatter(grad)


class ReduceScatter(Exchange):
    """Sums the rows over all members of a group and gives each member its part of the sum.

    The gradient of each summand is the gradient of the sum.
    """

    def _forward(self, rows: Tensor) -> tuple[Tensor, Work]:
        return self.group.reduce_scatter(rows)

    def _backward(self, grad: Tensor) -> tuple[Tensor, Work]:
        return self.group.all_gather(grad)


class _Context(FunctionCtx):
    """What the forward pass keeps for the backward pass."""

    exchange: Exchange


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.launch(rows, forward=True)

    @staticmethod
    def backward(ctx: _Context, _: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, pending: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return pending.view_as(pending)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
        # The received gradient stays in the exchange until `start` reads it; `grad` is a placeholder of the right shape.
        ctx.exchange.launch(grad, forward=False)
        return grad, None
