"""What DeepSpeed has to know of experts spread over ranks: process groups, a marker in the model, optimizer groups."""

import hashlib
from typing import Any

import torch.distributed as dist
from torch import nn

from raphael_dist.parallel.exchange import ExpertGroup, Traffic
from raphael_dist.parallel.ranks import gather_objects, own_group


def join(size: int, traffic: Traffic) -> ExpertGroup:
    """Create this rank's two groups of one size, where they do not exist, and return its view of the first. Collective.

    Consecutive ranks share a set of experts (ep); ranks `size` apart hold the same experts and reduce their gradients
    (edp). DeepSpeed looks both up in its registry, and gives the groups it makes itself no time-out.
    """
    from deepspeed.utils import groups

    name, world, me = f"ep_size_{size}", dist.get_world_size(), dist.get_rank()
    ep, edp = groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP
    if name not in ep:
        first = me // size * size
        consecutive, apart = list(range(first, first + size)), list(range(me % size, world, size))
        ep[name], groups._EXPERT_PARALLEL_GROUP_RANKS[name] = own_group(consecutive), consecutive
        edp[name], groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = own_group(apart), apart
    return ExpertGroup(ep[name], size, dist.get_rank(ep[name]), traffic)


def mark(model: nn.Module, num_experts: int) -> None:
    """Give a model whose experts are spread a module without parameters, by which DeepSpeed's engine knows of experts."""
    from deepspeed.moe.layer import MoE

    # Trained ones: DeepSpeed wants an optimizer's group of experts for such a module.
    spread = sorted({p.group_name for p in model.parameters() if hasattr(p, "group_name") and p.requires_grad})
    if not spread:
        return

    class Marker(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = num_experts
            # For DeepSpeed's save_checkpoint: no expert files of its own, our stacked layers are in the ZeRO files.
            self.num_local_experts, self.expert_group_name = 0, spread[0]

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """Do nothing: the groups exist."""

    model.add_module("deepspeed_marker", Marker())


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
    digests = gather_objects(hashlib.sha256(described.encode()).hexdigest())
    assert len(set(digests)) == 1, "the ranks have different parameter groups"
    groups: list[dict[str, Any]] = [{"params": [p for _, p in found[g]]} for g in order]
    for group, name in zip(groups[1:], order[1:], strict=True):
        group |= {"moe": True, "name": name}
    return groups
