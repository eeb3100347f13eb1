"""Reduce-scatter and all-gather for gloo, made of direct messages between ranks.

Gloo's own reduce-scatter is an all-reduce, which sends every byte twice. In this module each rank sends each part of its
tensor to the rank that needs it, in one of two ways. Let n be the bytes of the tensor, N the number of nodes, and g the
number of ranks of each node:

- Flat: every rank sends a part to every other rank of the group. A node sends n g (N - 1) / N bytes to other nodes.
- In two stages, if N > 1 and g > 1: the ranks of a node sum their parts, and then send each sum to the other nodes once. A
  node sends n (N - 1) / N bytes to other nodes. An all-gather does the opposite: a part is sent to each other node once, and
  the ranks of that node send it to each other.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from raphael_dist.runtime.ranks import host_name

_TAGS = 1 << 16  # this many consecutive collectives of a group have different tags


class Work(Protocol):
    """The handle of a collective in progress, such as torch.distributed returns with async_op=True.

    The collective's result must not be read before `wait` was called.
    """

    def wait(self) -> object:
        """Wait until the result of the collective (the exchange between ranks) can be read. The return value has no use."""


def reduce_scatter(out: Tensor, rows: Tensor, group: dist.ProcessGroup) -> Work:
    """Start to sum the tensors `rows` [n R, ...] of the n ranks of a gloo group; each rank gets R rows of the sum in `out`.

    The first call of this function or of `all_gather` for a group waits until all its ranks have exchanged their host names.
    """
    nodes = _nodes(group)
    return _NodeSum(out, rows, group, nodes) if nodes else _FlatSum(out, rows, group)


def all_gather(out: Tensor, part: Tensor, group: dist.ProcessGroup) -> Work:
    """Start to gather the tensors `part` of all ranks of a gloo group in `out`, in the order of the ranks.

    In a group of two ranks each rank sends its part directly, because over a slow link gloo's all-gather takes 1.6 times as
    long.
    """
    if nodes := _nodes(group):
        return _NodeGather(out, part, group, nodes)
    if dist.get_world_size(group) == 2:
        return exchange(out.chunk(2), (part, part), group)
    work: Work = dist.all_gather_into_tensor(out, part, group=group, async_op=True)
    return work


def exchange(received: Sequence[Tensor], sent: Sequence[Tensor], group: dist.ProcessGroup) -> Work:
    """Start to send `sent[p]` to each rank p of a gloo group, and to receive `received[p]` from it. Skip empty tensors.

    Gloo's all-to-all starts to send before it starts to receive. Then a rank requests the data of another rank only after it
    has sent data, so that a link transfers in one direction after the other. This function starts to receive first, so that
    a link transfers in both directions at once.
    """
    size, own = len(sent), dist.get_rank(group)
    others = [(own + step) % size for step in range(1, size)]
    received[own].copy_(sent[own])
    return _Messages([(received[p], p) for p in others], [(sent[p], p) for p in others], group)


class _Messages:
    """Messages in progress between the ranks of a gloo group.

    Args:
        received: for each message to receive, a contiguous tensor and the rank of the group that sends it.
        sent: for each message to send, a contiguous tensor and the rank of the group that receives it.
        group: the group.
        tag: a number, equal on sender and receiver. Messages with the same tag between two ranks are matched in order.
    """

    def __init__(
        self,
        received: Iterable[tuple[Tensor, int]],
        sent: Iterable[tuple[Tensor, int]],
        group: dist.ProcessGroup,
        tag: int = 0,
    ) -> None:
        operations = [
            dist.P2POp(start, tensor, dist.get_global_rank(group, rank), group, tag)
            for start, messages in ((dist.irecv, received), (dist.isend, sent))
            for tensor, rank in messages
            if tensor.numel()
        ]
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> None:
        for work in self._works:
            work.wait()


class _FlatSum:
    """A reduce-scatter in which each rank receives its part of every other rank's tensor and adds up these parts.

    A bfloat16 sum is rounded only once. The arguments are those of `reduce_scatter`.
    """

    def __init__(self, out: Tensor, rows: Tensor, group: dist.ProcessGroup) -> None:
        size = dist.get_world_size(group)
        self._out, self._parts = out, rows.new_empty(size, *out.shape)
        self._messages = exchange(list(self._parts), rows.chunk(size), group)

    @torch.no_grad()
    def wait(self) -> None:
        self._messages.wait()
        torch.sum(self._parts, dim=0, out=self._out)


class _Nodes:
    """The nodes of a group, as seen from one of its ranks. There are at least two, with at least two ranks each.

    All ranks must start the collectives of the group in the same order, and wait for them in the same order. The messages of
    each collective have a tag of their own, so that messages of two collectives in progress cannot be confused.

    Args:
        ranks: for each node, the ranks of the group on this node. All nodes have equally many.
        own: this rank's number in the group.
    """

    def __init__(self, ranks: list[list[int]], own: int) -> None:
        self.ranks = ranks
        self.node = next(number for number, members in enumerate(ranks) if own in members)
        self.here = ranks[self.node]
        self.index = self.here.index(own)
        # The other ranks of the node and the other nodes, from the next one on, so that not all send to the first.
        self.neighbours = _following(self.index, len(self.here))
        self.others = _following(self.node, len(ranks))
        self.first_stage: _NodeSum | None = None  # the last sum, if its second stage has not started
        self._started = 0

    def next_tag(self) -> int:
        """Return the message tag of the collective that starts now.

        If the last reduce-scatter has not started its second stage, start this stage first.
        """
        if self.first_stage is not None:
            # The other ranks of the node have started it, so that the wait is short, and the network has something to do.
            self.first_stage.start_second()
        self._started += 1
        return 1 + self._started % _TAGS  # 0: messages of other collectives


class _NodeSum:
    """A reduce-scatter in two stages: between the ranks of a node, then between the ranks of equal index on all nodes.

    The second stage starts with the next collective of the group, or when `wait` is called. Each stage adds bfloat16 numbers
    in float32. So a bfloat16 result is rounded twice: the sum of a node before it is sent, and the sum over nodes. The order
    of additions depends only on which ranks share a node.
    """

    def __init__(self, out: Tensor, rows: Tensor, group: dist.ProcessGroup, nodes: _Nodes) -> None:
        self._out, self._group, self._nodes, self._tag = out, group, nodes, nodes.next_tag()
        parts = rows.chunk(dist.get_world_size(group))
        # [rank of the node, node, *out.shape]: from each rank the parts for the ranks of this index on all nodes.
        received = self._received = rows.new_empty(len(nodes.here), len(nodes.ranks), *out.shape)
        for node, members in enumerate(nodes.ranks):
            received[nodes.index, node].copy_(parts[members[nodes.index]])
        self._messages = _Messages(
            [(part, nodes.here[i]) for i in nodes.neighbours for part in received[i]],
            [(parts[members[i]], nodes.here[i]) for i in nodes.neighbours for members in nodes.ranks],
            group,
            self._tag,
        )
        nodes.first_stage = self

    @torch.no_grad()
    def start_second(self) -> None:
        """Wait for the first stage and start the second one, unless it has started."""
        nodes = self._nodes
        if nodes.first_stage is not self:
            return
        nodes.first_stage = None
        self._messages.wait()
        sums = torch.sum(self._received, dim=0)
        received = self._received = torch.empty_like(sums)
        received[nodes.node].copy_(sums[nodes.node])
        peers = [(node, nodes.ranks[node][nodes.index]) for node in nodes.others]
        self._messages = _Messages(
            [(received[node], peer) for node, peer in peers],
            [(sums[node], peer) for node, peer in peers],
            self._group,
            self._tag,
        )

    @torch.no_grad()
    def wait(self) -> None:
        self.start_second()
        self._messages.wait()
        torch.sum(self._received, dim=0, out=self._out)


class _NodeGather:
    """An all-gather in two stages: between the ranks of equal index on all nodes, then between the ranks of a node.

    The second stage starts when `wait` is called.
    """

    def __init__(self, out: Tensor, part: Tensor, group: dist.ProcessGroup, nodes: _Nodes) -> None:
        self._group, self._nodes, self._tag = group, nodes, nodes.next_tag()
        parts = self._parts = out.chunk(dist.get_world_size(group))
        parts[nodes.here[nodes.index]].copy_(part)
        peers = [nodes.ranks[node][nodes.index] for node in nodes.others]
        self._messages = _Messages([(parts[p], p) for p in peers], [(part, p) for p in peers], group, self._tag)

    def wait(self) -> None:
        nodes, parts = self._nodes, self._parts
        self._messages.wait()
        _Messages(
            [(parts[members[i]], nodes.here[i]) for i in nodes.neighbours for members in nodes.ranks],
            [(parts[members[nodes.index]], nodes.here[i]) for i in nodes.neighbours for members in nodes.ranks],
            self._group,
            self._tag,
        ).wait()


def _following(own: int, count: int) -> list[int]:
    """Return the numbers 0 .. count-1 without `own`, starting after `own`: for own=1 and count=4, [2, 3, 0]."""
    return [(own + step) % count for step in range(1, count)]


_nodes_of_groups: "WeakKeyDictionary[dist.ProcessGroup, _Nodes | None]" = WeakKeyDictionary()


def _nodes(group: dist.ProcessGroup) -> _Nodes | None:
    """Return the nodes of a group; None if it has only one node, one rank per node, or unequal numbers of ranks per node.

    The first call for a group is collective.
    """
    if group not in _nodes_of_groups:
        names: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(names, host_name(), group=group)
        ranks: dict[str | None, list[int]] = {}
        for rank, name in enumerate(names):
            ranks.setdefault(name, []).append(rank)
        counts = {len(members) for members in ranks.values()}
        regular = len(ranks) > 1 and len(counts) == 1 and counts != {1}
        _nodes_of_groups[group] = _Nodes(list(ranks.values()), dist.get_rank(group)) if regular else None
    return _nodes_of_groups[group]
