"""What DeepSpeed has to know of experts spread over ranks: process groups, a marker in the model, optimizer groups."""

import hashlib
from typing import Any

import torch.distributed as dist
from torch import nn

from raphael_dist.parallel import ranks as parallel
from raphael_dist.parallel.exchange import Peers, Traffic


def join(size: int, traffic: Traffic) -> Peers:
    """Create the groups of one size, of which every rank is a member, and return this rank's. Collective.

    Consecutive ranks share a set of experts (ep); ranks `size` apart hold the same experts and reduce their gradients
    (edp). DeepSpeed looks both up in its registry, and gives the groups it makes itself no time-out.
    """
    from deepspeed.utils import groups

    name, world, me = f"ep_size_{size}", dist.get_world_size(), dist.get_rank()
    ep, edp = groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP
    if name not in ep:
        consecutive = [list(range(first, first + size)) for first in range(0, world, size)]
        apart = [list(range(i, world, size)) for i in range(size)]
        ep_ranks, edp_ranks = groups._EXPERT_PARALLEL_GROUP_RANKS, groups._EXPERT_DATA_PARALLEL_GROUP_RANKS
        for division, group_of, ranks_of in ((consecutive, ep, ep_ranks), (apart, edp, edp_ranks)):
            for members in division:
                group = dist.new_group(members, timeout=parallel.TIMEOUT)
                if me in members:
                    group_of[name], ranks_of[name] = group, members
    return Peers(ep[name], size, dist.get_rank(ep[name]), traffic)


def marker(num_experts: int, ep: int) -> nn.Module:
    """Return a module without parameters by which DeepSpeed's engine knows of experts; `ep` is one of their sizes."""
    from deepspeed.moe.layer import MoE

    class Marker(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = num_experts
            # For DeepSpeed's save_checkpoint: no expert files of its own, our stacked layers are in the ZeRO files.
            self.num_local_experts, self.expert_group_name = 0, f"ep_size_{ep}"

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """Do nothing: the groups exist."""

    return Marker()


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the optimizer's groups: everything replicated, then one group per expert-parallel size, smallest first.

    DeepSpeed's own splitting iterates over a set of strings, so that ranks could disagree about the order and wait for each
    other for ever. Asserts that all ranks have the same groups.
    """
    found: dict[str, list[tuple[str, nn.Parameter]]] = {"": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            found.setdefault(getattr(p, "group_name", ""), []).append((name, p))
    order = sorted(found, key=lambda name: (len(name), name))
    described = repr([(g, [(n, tuple(p.shape)) for n, p in found[g]]) for g in order])
    digests = parallel.gather(hashlib.sha256(described.encode()).hexdigest())
    assert len(set(digests)) == 1, "the ranks have different parameter groups"
    groups: list[dict[str, Any]] = [{"params": [p for _, p in found[g]]} for g in order]
    for group, name in zip(groups[1:], order[1:], strict=True):
        group |= {"moe": True, "name": name}
    return groups
