"""Spread experts in a trace: the layers of `expert_parallel` on a group of ranks that is not there.

Exchanges return tensors of the right shapes and count the bytes as the real ones do, so that a trace tells exactly what a
rank sends. Samples are dealt evenly over the time experts; space experts exchange with fixed sizes, as on a GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raphael_dist.config import Config
from raphael_dist.model.layers import TransformerBlock
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel import expert_parallel
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.parallel.exchange import ExpertGroup, Traffic


class _Done:
    def wait(self) -> None:
        """Do nothing: the work is done."""


class StandIn(ExpertGroup):
    """A group whose other members do not exist."""

    def all_to_all(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> tuple[Tensor, Any]:
        self.traffic.sent += (sum(sent) - sent[self.index]) * rows.shape[1:].numel() * rows.element_size()
        return rows.new_empty(sum(received), *rows.shape[1:]), _Done()

    def all_gather(self, rows: Tensor) -> tuple[Tensor, Any]:
        self.traffic.sent += (self.size - 1) * rows.nbytes
        return rows.new_empty(self.size * rows.shape[0], *rows.shape[1:]), _Done()

    def reduce_scatter(self, rows: Tensor) -> tuple[Tensor, Any]:
        out = rows.new_empty(rows.shape[0] // self.size, *rows.shape[1:])
        self.traffic.sent += (self.size - 1) * out.nbytes
        return out, _Done()


def stand_in(config: Config, plan: BatchPlan) -> Any:
    """Return what `trace` takes to spread the experts of a model as `plan` says, seen from the first rank of a group."""

    def spread(model: RaphaelUNet, samples: int) -> Traffic:
        found: dict[int, StandIn] = {}

        def join(size: int, traffic: Traffic) -> ExpertGroup:
            found[size] = StandIn(None, size, 0, traffic)  # type: ignore[arg-type]
            return found[size]

        traffic = expert_parallel.apply(model, config, plan, join)
        blocks = [m for m in model.modules() if isinstance(m, TransformerBlock)]
        moved = (
            [isinstance(block.time_moe, expert_parallel.ParallelTimeMoE) for block in blocks]
            if config.model.time_experts
            else []
        )
        if any(moved):
            group = found[config.parallel.time_ep]
            model.count_samples = lambda onehot_LBK: _evenly(onehot_LBK, group, samples, moved)
        return traffic

    return spread


def _evenly(onehot_LBK: Tensor, group: StandIn, samples: int, moved: Sequence[bool]) -> list[Any]:
    """Return each layer's samples as `expert_parallel.count_samples` does, dealt to the experts in turn."""
    group.all_gather(onehot_LBK.sum(dim=1).unsqueeze(0))
    experts = onehot_LBK.shape[-1]
    counts = torch.zeros(group.size, experts, dtype=torch.long)
    for number in range(group.size * samples):
        counts[number // samples, number % experts] += 1
    host = counts.unflatten(1, (group.size, -1))
    even = expert_parallel.GroupSamples(host, host.to("meta"))
    return [even if move else host[group.index].flatten().to("meta") for move in moved]
