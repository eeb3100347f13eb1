"""Divides gradients into buckets in the order of the backward pass, and starts a bucket's reduction when it is complete.

A bucket is a parameter group of the optimizer, so ZeRO-1 and 2 store it in a flat buffer of its own, of which every rank
owns an equal part. All ranks therefore send equally much for each bucket, and a bucket is reduced without a copy.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raphael_dist.engine.deepspeed_comm import deepspeed_comm
from raphael_dist.engine.ds_config import CONTIGUOUS_BUCKET, reduces_in_backward
from raphael_dist.engine.ds_keys import Tree
from raphael_dist.model.routing import gate_kind
from raphael_dist.parallel.gloo_collectives import Work

BUCKETS = 16  # the last bucket is complete only at the end of the backward pass; more buckets cost a latency each
SMALLEST_PART = 2**18  # elements of a bucket that a rank owns. A ring sends them in one hop, as long as its latency.


def bucket_elements(elements: int, ranks: int, limit: int = CONTIGUOUS_BUCKET) -> int:
    """Return the largest size of a bucket, in elements. A parameter that is larger gets a bucket of its own.

    `elements`: number of elements of all trained parameters. `ranks`: number of ranks. `limit`: reduce_bucket_size of the
    DeepSpeed JSON, in elements.
    """
    return min(limit, max(-(-elements // BUCKETS), SMALLEST_PART * ranks))


def bucket_count(elements: int, ranks: int, limit: int = CONTIGUOUS_BUCKET) -> int:
    """Return about how many buckets a model has; the arguments are those of `bucket_elements`."""
    return max(1, -(-elements // bucket_elements(elements, ranks, limit)))


def overlap_bucket(tree: Tree, world_size: int) -> int | None:
    """Return the largest bucket size, in elements, if ZeRO-1 or 2 reduces gradients during the backward pass; else None.

    `tree`: the full DeepSpeed configuration (`ds_config.merge`). `world_size`: number of ranks.
    """
    return int(tree["zero_optimization"]["reduce_bucket_size"]) if reduces_in_backward(tree, world_size) else None


def divide_into_buckets(named: Iterable[tuple[str, nn.Parameter]], ranks: int, limit: int) -> list[list[nn.Parameter]]:
    """Divide trained parameters into buckets, in about the order in which the backward pass computes their gradients.

    This is the reverse of the model's order, with gates at the end: gates select the experts of all blocks before the U-Net
    runs. The order affects only when the gradients of a bucket are complete, not the result.

    Args:
        named: names and parameters, in the model's order.
        ranks: number of ranks.
        limit: reduce_bucket_size of the DeepSpeed JSON, in elements.
    """
    reverse = list(named)[::-1]
    order = [p for gates in (False, True) for name, p in reverse if (gate_kind(name) is not None) == gates]
    size = bucket_elements(sum(p.numel() for p in order), ranks, limit)
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for p in order:
        if p.numel() > room or not buckets:
            buckets.append([])
            room = size
        buckets[-1].append(p)
        room -= p.numel()
    return buckets


class ReadyBuckets:
    """Calls `launch(i)` for buckets 0, 1, 2, ... during a backward pass, on every rank in this order.

    A bucket is launched as soon as all its parameters, and those of all earlier buckets, have their gradients. If a
    parameter gets no gradient, its bucket and all later buckets are not launched. The attribute `launched` is the number of
    launched buckets.

    Args:
        buckets: for each bucket, its parameters.
        launch: function that starts the reduction of the bucket with the given number.
    """

    def __init__(self, buckets: Sequence[Sequence[nn.Parameter]], launch: Callable[[int], None]) -> None:
        self._sizes, self._launch = [len(bucket) for bucket in buckets], launch
        self._missing = list(self._sizes)
        self._streams: set[torch.cuda.Stream] = set()
        self._active, self.launched = False, 0
        for i, bucket in enumerate(buckets):
            for p in bucket:
                p.register_post_accumulate_grad_hook(partial(self._count, i))

    def begin(self, active: bool) -> None:
        """Prepare for a backward pass. `active`: whether the gradients of this pass are reduced over ranks."""
        self._missing, self._active, self.launched = list(self._sizes), active, 0
        self._streams.clear()

    def _count(self, bucket: int, p: Tensor) -> None:
        if not self._active:
            return
        assert bucket >= self.launched, "a gradient changed after its bucket was reduced"
        self._missing[bucket] -= 1
        if p.is_cuda:
            self._streams.add(torch.cuda.current_stream(p.device))
        while self.launched < len(self._sizes) and not self._missing[self.launched]:
            self._wait_for_gradients(p)
            self.launched += 1
            self._launch(self.launched - 1)

    def _wait_for_gradients(self, p: Tensor) -> None:
        """Make the current CUDA stream, from which the reduction starts, wait for other streams that wrote gradients.

        `p`: a parameter, which determines the device. On the CPU nothing is done.
        """
        if p.is_cuda:
            current = torch.cuda.current_stream(p.device)
            for stream in self._streams - {current}:
                current.wait_stream(stream)


class Reduction:
    """A reduce-scatter in progress: `whole` is summed over the ranks of `group`, and each rank gets an equal part.

    The sum is sent and computed in `dtype`. The object keeps the tensors alive until `wait` has been called.
    """

    def __init__(self, whole: Tensor, group: dist.ProcessGroup, dtype: torch.dtype) -> None:
        ranks = dist.get_world_size(group)
        self._part = whole
        self._work: Work | None = None
        if ranks > 1:
            self._sent = whole.to(dtype)
            self._part = self._sent.new_empty(self._sent.numel() // ranks)
            self._work = deepspeed_comm().reduce_scatter_tensor(self._part, self._sent, group=group, async_op=True)

    def wait(self) -> Tensor:
        """Return this rank's part of the sum; `whole` if the group has one rank. With a GPU the host does not wait."""
        if self._work is not None:
            self._work.wait()
        return self._part
