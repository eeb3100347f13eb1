"""Registers sharded experts with DeepSpeed: process groups, a marker module in the model, optimizer parameter groups."""

import hashlib
from typing import Any

import torch.distributed as dist
from torch import nn

from raphael_dist.engine.gradient_buckets import divide_into_buckets
from raphael_dist.parallel.async_collectives import ExpertGroup, Traffic
from raphael_dist.runtime.ranks import gather_objects, own_group

ParameterGroup = dict[str, Any]  # of an optimizer: "params", and settings


def create_groups(size: int, traffic: Traffic) -> ExpertGroup:
    """Create this rank's two process groups for experts that are sharded over `size` ranks each. Collective.

    - The first group has `size` consecutive ranks, which together have every expert once ("ep" in DeepSpeed).
    - The second group has every `size`-th rank. These ranks have the same experts and reduce the gradients of these experts
      over the group ("edp" in DeepSpeed).

    If the groups for `size` exist, they are used again. Both groups are put into DeepSpeed's registry, because groups that
    DeepSpeed creates itself have no timeout.

    Returns:
        The first group. Its methods add the bytes that this rank sends to the counter `traffic`.
    """
    from deepspeed.utils import groups

    name, world, me = f"ep_size_{size}", dist.get_world_size(), dist.get_rank()
    ep, edp = groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP
    if name not in ep:
        first = me // size * size
        ep_ranks, edp_ranks = list(range(first, first + size)), list(range(me % size, world, size))
        ep[name], groups._EXPERT_PARALLEL_GROUP_RANKS[name] = own_group(ep_ranks), ep_ranks
        edp[name], groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = own_group(edp_ranks), edp_ranks
    return ExpertGroup(ep[name], size, dist.get_rank(ep[name]), traffic)


def copies() -> dict[str, dist.ProcessGroup]:
    """Return the process groups of ranks that have the same sharded experts, such as {"ep_size_2": group}.

    The number in a key is the number of ranks over which the experts are sharded. A parameter of such an expert has the
    key as its attribute `group_name`. The result is {} if `create_groups`, which creates these groups, was not called.
    """
    from deepspeed.utils import groups

    return dict(groups._EXPERT_DATA_PARALLEL_GROUP)


def add_moe_marker(model: nn.Module, num_experts: int) -> None:
    """Add a module without parameters to `model`, by which DeepSpeed recognises that the model has sharded experts.

    Nothing is added if no trained experts are sharded. `num_experts`: the model's number of experts per block, which
    DeepSpeed reads from the module.
    """
    from deepspeed.moe.layer import MoE

    # Only trained experts: DeepSpeed requires a group of the optimizer for such a module.
    sharded = sorted({p.group_name for p in model.parameters() if hasattr(p, "group_name") and p.requires_grad})
    if not sharded:
        return

    class Marker(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = num_experts
            # DeepSpeed's save_checkpoint writes no expert files: the stacked layers are in the ZeRO files.
            self.num_local_experts, self.expert_group_name = 0, sharded[0]

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """Do nothing. DeepSpeed calls it to create the process groups, which `create_groups` has already created.

            The argument is DeepSpeed's and is not used.
            """

    model.add_module("deepspeed_marker", Marker())


def parameter_groups(model: nn.Module, bucket: int | None = None) -> list[ParameterGroup]:
    """Return the optimizer's parameter groups, in the same order on all ranks. Collective.

    The first group has the parameters that are on every rank. If experts are sharded, one group follows for each number of
    ranks over which experts are sharded, in ascending order. Frozen parameters are left out. (DeepSpeed's own function
    iterates over a set of strings, whose order can differ between ranks; the ranks would then wait for each other forever.)

    `bucket`: None if gradients are reduced after the backward pass. Otherwise they are reduced during that pass, in buckets
    of at most `bucket` elements; each bucket is a parameter group, and no experts may be sharded.
    """
    members: dict[str, list[tuple[str, nn.Parameter]]] = {"": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            members.setdefault(getattr(p, "group_name", ""), []).append((name, p))
    order = sorted(members, key=lambda name: (len(name), name))
    description = repr([(g, [(n, tuple(p.shape)) for n, p in members[g]]) for g in order])
    digests = gather_objects(hashlib.sha256(description.encode()).hexdigest())
    assert len(set(digests)) == 1, "the ranks have different parameter groups"
    if bucket is not None:
        assert len(order) == 1, "overlap_comm is refused with sharded experts"
        return [{"params": parameters} for parameters in divide_into_buckets(members[""], dist.get_world_size(), bucket)]
    groups: list[ParameterGroup] = [{"params": [p for _, p in members[g]]} for g in order]
    for group, name in zip(groups[1:], order[1:], strict=True):
        group |= {"moe": True, "name": name}
    return groups
