"""Simulates expert parallelism in a trace (trace.py): real layers run on one rank of a group whose other ranks do not exist.

Exchanges with the other ranks return tensors of the right shapes without data, and count bytes as real ones do. The trace
thus yields exactly the bytes that a rank sends, if samples are evenly divided over the time experts, and Space-MoE layers
gather all tokens on all ranks, as they do on a GPU by default.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from raphael_dist.config.schema import Config
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel import expert_dispatch
from raphael_dist.parallel.async_collectives import ExpertGroup, Traffic, Work
from raphael_dist.parallel.batch_plan import BatchPlan


class _Done:
    def wait(self) -> None:
        """Do nothing: simulated communication is complete at once."""


class DummyGroup(ExpertGroup):
    """A simulated expert-parallel group of which only this rank exists: nothing is sent, but bytes are counted."""

    def all_to_all(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> tuple[Tensor, Work]:
        self.traffic.experts += (sum(sent) - sent[self.index]) * rows.shape[1:].numel() * rows.element_size()
        return rows.new_empty(sum(received), *rows.shape[1:]), _Done()

    def all_gather(self, rows: Tensor) -> tuple[Tensor, Work]:
        self.traffic.experts += (self.size - 1) * rows.nbytes
        return rows.new_empty(self.size * rows.shape[0], *rows.shape[1:]), _Done()

    def reduce_scatter(self, rows: Tensor) -> tuple[Tensor, Work]:
        out = rows.new_empty(rows.shape[0] // self.size, *rows.shape[1:])
        self.traffic.experts += (self.size - 1) * out.nbytes
        return out, _Done()


def shard_for_trace(config: Config, plan: BatchPlan) -> Callable[[RaphaelUNet, int], Traffic]:
    """Return a function `shard(model, samples)` that shards a model's experts over a simulated group of ranks.

    In each sharded layer, `shard` removes all experts but those of the group's first rank. Its argument `samples` is the
    number of samples per rank. It returns a counter of the bytes that this rank would send to the others.

    Args:
        config: the run's configuration. `config.parallel` states over how many ranks experts are sharded.
        plan: how the batch is divided over ranks. This determines on which U-Net levels sharding saves communication.
    """

    def shard(model: RaphaelUNet, samples: int) -> Traffic:
        def create_group(size: int, traffic: Traffic) -> ExpertGroup:
            return DummyGroup(None, size, 0, traffic)  # type: ignore[arg-type]

        traffic = expert_dispatch.shard_experts(model, config, plan, create_group)
        sharded = expert_dispatch.sharded_time_layers(model)
        if any(sharded):
            group = create_group(config.parallel.time_ep, traffic)
            model.count_samples = lambda onehot_LBK: _even_counts(onehot_LBK, group, samples, sharded)
        return traffic

    return shard


def _even_counts(
    onehot_LBK: Tensor, group: ExpertGroup, samples: int, sharded: Sequence[bool]
) -> list[expert_dispatch.SampleCounts]:
    """Return what `expert_dispatch.count_samples` returns if all time experts get equally many samples.

    Args:
        onehot_LBK: one-hot time expert of each sample in each layer, [layers, samples, experts]. Only its shape is used.
        group: the simulated group.
        samples: samples per rank.
        sharded: for each layer, whether its time experts are sharded.
    """
    group.all_gather(onehot_LBK.sum(dim=1).unsqueeze(0))
    experts = onehot_LBK.shape[-1]
    counts = torch.zeros(group.size, experts, dtype=torch.long)
    for number in range(group.size * samples):
        counts[number // samples, number % experts] += 1
    host = torch.unflatten(counts, 1, (group.size, -1))
    even = expert_dispatch.GroupSamples(host, host.to("meta"))
    return [even if moves else host[group.index].flatten().to("meta") for moves in sharded]
