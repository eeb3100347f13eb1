"""Wraps DeepSpeed's collectives: counts the bytes sent, and on gloo uses the trainer's own reduce-scatter and all-gather.

DeepSpeed calls all collectives of every ZeRO stage through one object, `deepspeed.comm.comm.cdb`. This file, and no other,
replaces this object by a `CountedBackend`.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from raphael_dist.parallel.async_collectives import Traffic, all_gather, reduce_scatter
from raphael_dist.parallel.gloo_collectives import Work

DeepSpeedObject = Any  # DeepSpeed has no types
Group = dist.ProcessGroup | None
_BROADCAST_BYTES = 1 << 28  # of one call


def import_deepspeed() -> DeepSpeedObject:
    """Import and return the package `deepspeed`, with its shared-memory all-reduce turned off.

    That all-reduce is for CPUs. DeepSpeed would compile it on first use, which takes about a minute. Training uses gloo's
    all-reduce instead.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_comm() -> DeepSpeedObject:
    """Return the module `deepspeed.comm.comm`, through which DeepSpeed calls collectives."""
    import_deepspeed()
    from deepspeed.comm import comm

    return comm


def count_collectives(traffic: Traffic) -> "CountedBackend":
    """Make DeepSpeed's collectives add the bytes that this rank sends to the counter `traffic`, from now on.

    The bytes of reductions are added to `traffic.gradients`, those of gathers to `traffic.weights`. Returns the wrapper that
    does this; it has replaced DeepSpeed's communication backend.
    """
    comm = deepspeed_comm()
    comm.init_distributed(dist_init_required=False, verbose=False)
    backend = comm.cdb
    comm.cdb = CountedBackend(backend.backend if isinstance(backend, CountedBackend) else backend, traffic)
    return comm.cdb


def broadcast_weights(model: nn.Module, groups: Mapping[str, dist.ProcessGroup]) -> None:
    """Copy every parameter of `model` from the first rank that has it to the other ranks that have it. Collective.

    This takes a few large broadcasts instead of one per parameter.

    `groups`: for sharded experts, the process groups of ranks that have the same experts. The keys are the values of the
    parameters' attribute `group_name`. Parameters without this attribute are on all ranks.
    """
    members = defaultdict(list)
    for p in model.parameters():
        members[getattr(p, "group_name", "")].append(p.data)
    for name in sorted(members):
        group = groups.get(name) or dist.group.WORLD
        assert group is not None
        dist._broadcast_coalesced(group, members[name], _BROADCAST_BYTES, 0)


class CountedBackend:
    """DeepSpeed's communication backend for torch.distributed, which also counts the bytes that each collective sends.

    The methods have the arguments and results of DeepSpeed's backend.
    """

    def __init__(self, backend: DeepSpeedObject, traffic: Traffic) -> None:
        self.backend, self._traffic, self._skips_broadcasts = backend, traffic, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    @contextmanager
    def without_broadcasts(self) -> Iterator[None]:
        """Return a context manager inside which the broadcasts that DeepSpeed calls do nothing.

        When DeepSpeed is initialised it broadcasts every parameter in a call of its own, which takes minutes on a slow
        network. The caller sends the weights with `broadcast_weights` instead.
        """
        self._skips_broadcasts = True
        try:
            yield
        finally:
            self._skips_broadcasts = False

    def broadcast(self, tensor: Tensor, src: int, group: Group = None, async_op: bool = False) -> Work | None:
        return None if self._skips_broadcasts else self.backend.broadcast(tensor, src, group, async_op)

    def all_reduce(
        self, tensor: Tensor, op: object = dist.ReduceOp.SUM, group: Group = None, async_op: bool = False
    ) -> Work | None:
        self._traffic.gradients += 2 * _others(tensor.nbytes, group)
        return self.backend.all_reduce(tensor, op, group, async_op)

    def reduce_scatter_tensor(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        op: object = dist.ReduceOp.SUM,
        group: Group = None,
        async_op: bool = False,
    ) -> Work | None:
        assert self.backend._reduce_op(op) == dist.ReduceOp.SUM
        self._traffic.gradients += _others(input_tensor.nbytes, group)
        work = reduce_scatter(output_tensor, input_tensor, group)
        if async_op:
            return work
        work.wait()
        return None

    def all_gather_into_tensor(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Group = None, async_op: bool = False
    ) -> Work | None:
        self._traffic.weights += _others(output_tensor.nbytes, group)
        work = all_gather(output_tensor, input_tensor, group)
        if async_op:
            return work
        work.wait()
        return None

    def all_gather(
        self, tensor_list: list[Tensor], tensor: Tensor, group: Group = None, async_op: bool = False
    ) -> Work | None:
        self._traffic.weights += _others(sum(part.nbytes for part in tensor_list), group)
        return self.backend.all_gather(tensor_list, tensor, group, async_op)

    def all_gather_coalesced(
        self, output_tensors: list[Tensor], input_tensors: list[Tensor], group: Group = None, async_op: bool = False
    ) -> Work | None:
        self._traffic.weights += _others(sum(whole.nbytes for whole in output_tensors), group)
        return self.backend.all_gather_coalesced(output_tensors, input_tensors, group, async_op)


def _others(num_bytes: int, group: Group) -> int:
    """Return the size in bytes of a tensor's parts on the other ranks of a group, given the size of the whole tensor."""
    ranks = dist.get_world_size(group)
    return num_bytes * (ranks - 1) // ranks
