"""Differentiable, asynchronous exchanges of tensor rows between the ranks that share one set of experts.

An exchange has two halves, so that computation between them overlaps with communication. In the forward pass `start`
launches the collective and `finish` waits for it. Autograd runs the halves in reverse order: the backward pass of `finish`
launches the transposed collective on the gradient, and the backward pass of `start` waits for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from raphael_dist.parallel import gloo_collectives
from raphael_dist.parallel.gloo_collectives import Work

# Its name since torch 2.13, and before.
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Traffic:
    """Counter of the bytes that this rank sent to other ranks, by purpose.

    The bytes are computed on the host from the sizes of the tensors, not measured. For gathers and reductions a ring
    algorithm is assumed: for n ranks a rank sends (n - 1)/n of the whole tensor, and in an all-reduce twice as much. The
    two-stage collectives of the module `gloo_collectives` send equally many bytes.

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
        """Return the bytes sent since the last call of `take`, as a new `Traffic`, and set the counters of `self` to 0."""
        taken = replace(self)
        self.experts = self.gradients = self.weights = 0
        return taken


def reduce_scatter(out: Tensor, rows: Tensor, group: dist.ProcessGroup | None) -> Work:
    """Start to sum the tensors `rows` of all ranks of a group; each rank gets an equal part of the sum in `out`.

    `rows` is [n R, ...] for n ranks, and `out` [R, ...]. Call `wait` of the returned handle before reading `out`. Several
    collectives of a group can be in progress, if all ranks start them in the same order and wait for them in the same order.
    `group`: None means all ranks.
    """
    members = group or _all_ranks()
    if dist.get_backend(members) == "gloo":
        return gloo_collectives.reduce_scatter(out, rows, members)
    return cast(Work, REDUCE_SCATTER(out, rows, group=members, async_op=True))


def all_gather(out: Tensor, part: Tensor, group: dist.ProcessGroup | None) -> Work:
    """Start to gather the tensors `part` of all n ranks of a group in `out`, in the order of the ranks.

    `out` has n times the size of `part`. `part` may be a view of the elements of `out` that this rank contributes. Call
    `wait` of the returned handle before reading `out`. `group`: None means all ranks.
    """
    members = group or _all_ranks()
    if dist.get_backend(members) == "gloo":
        return gloo_collectives.all_gather(out, part, members)
    return cast(Work, dist.all_gather_into_tensor(out, part, group=members, async_op=True))


def _all_ranks() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None, "there is no process group"
    return group


@dataclass(frozen=True)
class ExpertGroup:
    """A group of ranks that together have every expert once, as seen from one of these ranks.

    The methods start collectives. Each method returns its result and a `Work`; the result must not be read before the
    `Work`'s method `wait` was called.

    Attributes:
        process_group: the group in torch.distributed.
        size: number of ranks of the group.
        index: number of this rank within the group.
        traffic: counter to which the methods add the bytes that this rank sends.
    """

    process_group: dist.ProcessGroup
    size: int
    index: int
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def name(self) -> str:
        """The group's name in DeepSpeed's registry of process groups, "ep_size_" and the number of its ranks."""
        return f"ep_size_{self.size}"

    def all_to_all(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> tuple[Tensor, Work]:
        """Start to send `sent[p]` consecutive rows of the tensor `rows` to each rank p of the group.

        `received[p]` is the number of rows that rank p sends to this rank. Returns the tensor of received rows, in the order
        of the ranks, and the handle whose `wait` must be called before the tensor is read.
        """
        out, rows = rows.new_empty(sum(received), *rows.shape[1:]), rows.contiguous()
        if dist.get_backend(self.process_group) == "gloo":
            parts = torch.split(out, list(received)), torch.split(rows, list(sent))
            work = gloo_collectives.exchange(*parts, self.process_group)
        else:
            work = dist.all_to_all_single(out, rows, list(received), list(sent), group=self.process_group, async_op=True)
        self.traffic.experts += (sum(sent) - sent[self.index]) * rows.shape[1:].numel() * rows.element_size()
        return out, work

    def all_gather(self, rows: Tensor) -> tuple[Tensor, Work]:
        """Start to gather the tensors `rows` [R, ...] of all n ranks of the group on each rank. All ranks have equal R.

        Returns the tensor [n R, ...] of all rows, in the order of the ranks, and the handle whose `wait` must be called
        before the tensor is read.
        """
        out = rows.new_empty(self.size * rows.shape[0], *rows.shape[1:])
        work = all_gather(out, rows.contiguous(), self.process_group)
        self.traffic.experts += (self.size - 1) * rows.nbytes
        return out, work

    def reduce_scatter(self, rows: Tensor) -> tuple[Tensor, Work]:
        """Start to sum the tensors `rows` [n R, ...] of all n ranks of the group, and give each rank R rows of the sum.

        Returns this rank's rows [R, ...], and the handle whose `wait` must be called before they are read.
        """
        out = rows.new_empty(rows.shape[0] // self.size, *rows.shape[1:])
        work = reduce_scatter(out, rows.contiguous(), self.process_group)
        self.traffic.experts += (self.size - 1) * out.nbytes
        return out, work


Collective = Callable[[Tensor], tuple[Tensor, Work]]  # started with rows; returns the result, and a `Work` to wait for


class Exchange:
    """Sends tensor rows between ranks: `start` launches a collective, `finish` waits for its result.

    Between the two calls, the caller can compute something else. Both calls are differentiable: in the backward pass, the
    gradients are sent in the opposite direction.
    """

    def __init__(self, forward: Collective, backward: Collective) -> None:
        """Prepare an exchange.

        Args:
            forward: the collective of the forward pass, such as `ExpertGroup.all_gather` of a group.
            backward: the transposed collective, which the backward pass applies to the gradient, such as
                `ExpertGroup.reduce_scatter` of the same group.
        """
        self._forward, self._backward = forward, backward
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
        """Exchange `rows` [R, ...] with the other ranks of the group, and wait; return the result [R', ...].

        This is `start` and `finish` with nothing computed in between.
        """
        return self.finish(self.start(rows))

    def launch(self, rows: Tensor, forward: bool) -> Tensor:
        """Start the exchange of `rows` [R, ...] between ranks, without autograd. `start` and `finish` use this method.

        `forward`: True in the forward pass; False in the backward pass, where `rows` are gradients and the opposite exchange
        is started. Returns the tensor of the result, which must not be read before `wait`.
        """
        self._pending = self._forward(rows) if forward else self._backward(rows)
        return self._pending[0]

    def wait(self) -> Tensor:
        """Wait for the exchange that `launch` started and return its result, e.g. the received rows [R', ...]."""
        assert self._pending is not None
        (out, work), self._pending = self._pending, None
        work.wait()
        return out


def row_exchange(group: ExpertGroup, sent: Sequence[int], received: Sequence[int]) -> Exchange:
    """Return an exchange in which each rank of a group sends different rows of a tensor to each other rank.

    This rank sends `sent[p]` consecutive rows to rank p of the group, and receives `received[p]` rows from it. The result
    has the received rows in the order of the ranks. Gradients go in the opposite direction.
    """
    return Exchange(lambda rows: group.all_to_all(rows, sent, received), lambda grad: group.all_to_all(grad, received, sent))


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
