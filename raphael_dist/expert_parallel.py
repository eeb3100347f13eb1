"""Expert parallelism: P ranks share one set of experts, each holds K/P of them, and the data travels to the experts.

Space-MoE, in three phases. (1) Dispatch: an image token goes once to each *rank* that holds an expert it needs, as a row of
its D values and its weights for that rank's K/P experts. (2) There the weighted sum over those experts is formed, as on one
rank. (3) Combine: one row of D values comes back and is added up. With 6 experts on 2 ranks that is a third of the rows of
sending (token, expert) pairs. Where nearly every token needs every rank, the same is done with fixed sizes: all tokens are
gathered everywhere, and the outputs are added up on their way back (reduce-scatter).

Time-MoE moves whole samples, to the one rank that holds their expert and back. How many go where is known for all layers
before the first runs: one small all-gather per forward pass, the only wait for the device.

Every exchange is differentiable and its gradient is the exchange backwards. One rank is the degenerate case: the layers'
own code runs between dispatch and combine. Ranks of a group must run the same layers on equally many samples of equal size.

Shape legend: B samples, N image tokens, K experts, D width, R rows here, S rows received, P ranks that share the experts,
L transformer blocks.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raphael_dist import parallel
from raphael_dist.config import Config, Dispatch
from raphael_dist.model.experts import Experts
from raphael_dist.model.layers import TransformerBlock
from raphael_dist.model.moe import SpaceMoE, TimeMoE
from raphael_dist.model.unet import RaphaelUNet

STACKED = ("w1", "b1", "w2", "b2")  # the parameters of `Experts`, one slice per expert
# Above this share of (token, other rank) pairs in use, fixed sizes cost few bytes more and spare the sorting.
STATIC_DENSITY = 0.9


@dataclass
class Traffic:
    """Bytes that this rank's expert exchanges sent to other ranks: forward, recomputed and backward."""

    sent: int = 0

    def take(self) -> int:
        """Return the bytes since the last call."""
        taken, self.sent = self.sent, 0
        return taken


@dataclass(frozen=True)
class Placement:
    """One kind of experts over the `size` ranks of one group, seen from its member `index`.

    The methods are the raw collectives. They count the bytes for other ranks by arithmetic on the host; gathers and
    reduce-scatters count as rings, where each part travels `size - 1` times.
    """

    group: dist.ProcessGroup
    size: int
    index: int
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def name(self) -> str:
        """The group's name in DeepSpeed, which reads the size out of it."""
        return f"ep_size_{self.size}"

    def all_to_all(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send the first `sent[0]` rows to member 0, and so on; return `received[p]` rows from each member p."""
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent), group=self.group)
        self.traffic.sent += (sum(sent) - sent[self.index]) * rows.shape[1:].numel() * rows.element_size()
        return out

    def all_gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all members, in their order; every member has equally many."""
        out = rows.new_empty(self.size * rows.shape[0], *rows.shape[1:])
        dist.all_gather_into_tensor(out, rows.contiguous(), group=self.group)
        self.traffic.sent += (self.size - 1) * rows.nbytes
        return out

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        """Return this member's part of the sum over all members' rows."""
        out = rows.new_empty(rows.shape[0] // self.size, *rows.shape[1:])
        dist.reduce_scatter_tensor(out, rows.contiguous(), group=self.group)
        self.traffic.sent += (self.size - 1) * out.nbytes
        return out


class _Exchange(torch.autograd.Function):
    """Placement.all_to_all; the gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: Sequence[int], received: Sequence[int], place: Placement) -> Tensor:
        ctx.sent, ctx.received, ctx.place = sent, received, place
        return place.all_to_all(rows, sent, received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.place.all_to_all(grad, ctx.received, ctx.sent), None, None, None


class _Gather(torch.autograd.Function):
    """Placement.all_gather; a row's gradient is the sum of what all members have for it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, place: Placement) -> Tensor:
        ctx.place = place
        return place.all_gather(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.place.reduce_scatter(grad), None


class _ScatterSum(torch.autograd.Function):
    """Placement.reduce_scatter; every member's summand has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, place: Placement) -> Tensor:
        ctx.place = place
        return place.reduce_scatter(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.place.all_gather(grad), None


class ParallelTimeMoE(TimeMoE):
    """TimeMoE with K/P of the experts here; samples travel to their expert and back."""

    place: Placement

    def __init__(self, whole: TimeMoE, place: Placement) -> None:
        nn.Module.__init__(self)
        _take_slice(self, whole, place)

    def forward(self, h_BND: Tensor, expert_B: Tensor, samples: Sequence[int], factor_B: Tensor) -> Tensor:
        """As `TimeMoE.forward`, but `samples[p * K + k]` counts the samples of member p for expert k (`count_samples`)."""
        # Sorted by expert, samples lie sorted by the rank that holds it.
        order_B = torch.argsort(expert_B, stable=True)
        counts_PPK = torch.tensor(samples).view(self.place.size, self.place.size, self.num_experts)
        sent = counts_PPK[self.place.index].sum(dim=1).tolist()
        received = counts_PPK[:, self.place.index].sum(dim=1).tolist()
        h_SND = _Exchange.apply(h_BND[order_B], sent, received, self.place)
        out_SND = self._apply_blocks(h_SND, counts_PPK[:, self.place.index])
        out_BND = _Exchange.apply(out_SND, received, sent, self.place)
        out_BND = torch.empty_like(h_BND).index_copy(0, order_B, out_BND)
        return out_BND * factor_B.to(out_BND.dtype)[:, None, None]

    def _apply_blocks(self, h_SND: Tensor, counts_PK: Tensor) -> Tensor:
        """Run samples that lie by sender and then expert, and return them so."""
        sizes_PK, sizes_KP = counts_PK.flatten().tolist(), counts_PK.t().flatten().tolist()
        senders, experts = counts_PK.shape
        blocks = h_SND.split(sizes_PK)
        by_expert_SND = torch.cat([blocks[p * experts + k] for k in range(experts) for p in range(senders)])
        rows = (counts_PK.sum(dim=0) * h_SND.shape[1]).tolist()
        out_SND = self.apply_sorted(by_expert_SND.flatten(0, 1), rows).view_as(by_expert_SND)
        blocks = out_SND.split(sizes_KP)
        return torch.cat([blocks[k * senders + p] for p in range(senders) for k in range(experts)])


class ParallelSpaceMoE(SpaceMoE):
    """SpaceMoE with K/P of the experts here; image tokens travel to the ranks of the experts they need."""

    place: Placement

    def __init__(self, whole: SpaceMoE, place: Placement, dispatch: Dispatch) -> None:
        nn.Module.__init__(self)
        _take_slice(self, whole, place)
        self.norm, self.backend, self.dispatch = whole.norm, whole.backend, dispatch

    def routed_sum(self, x_RD: Tensor, w_RK: Tensor) -> Tensor:
        """Return `sum_k w[r,k] (e_k(x[r]) - e_k(0))` over the experts of all ranks, [R, D]."""
        w_RPK = w_RK.unflatten(1, (self.place.size, self.num_experts))
        needed_PR = (w_RPK.detach() > 0).any(dim=2).t()
        counts_PP = self._rows_between_ranks(needed_PR)
        if counts_PP is None:
            return self._all_gather(x_RD, w_RPK)
        return self._all_to_all(x_RD, w_RPK, needed_PR, counts_PP)

    def constants_KD(self) -> Tensor:
        """Return `e_k(0)` of the experts of all ranks, [K, D]."""
        return _Gather.apply(self.at_zero_KD(), self.place)

    def _rows_between_ranks(self, needed_PR: Tensor) -> list[list[int]] | None:
        """Return how many rows each member sends to each, or None for fixed sizes; all members return the same."""
        # Knowing the counts stops the launch queue of a GPU in every layer.
        if self.dispatch == "all_gather" or (self.dispatch == "auto" and needed_PR.is_cuda):
            return None
        counts_PP = self.place.all_gather(needed_PR.sum(dim=1).unsqueeze(0))
        others = (counts_PP.sum() - counts_PP.trace()).item()
        dense = others > STATIC_DENSITY * self.place.size * (self.place.size - 1) * needed_PR.shape[1]
        return None if self.dispatch == "auto" and dense else counts_PP.tolist()

    def _all_to_all(self, x_RD: Tensor, w_RPK: Tensor, needed_PR: Tensor, counts_PP: list[list[int]]) -> Tensor:
        sent, received = counts_PP[self.place.index], [row[self.place.index] for row in counts_PP]
        rank_S, row_S = needed_PR.nonzero(as_tuple=True)
        rows = torch.cat([x_RD[row_S], w_RPK[row_S, rank_S]], dim=1)
        rows = _Exchange.apply(rows, sent, received, self.place)
        y_SD = super().routed_sum(rows[:, : self.dim], rows[:, self.dim :])
        y_SD = _Exchange.apply(y_SD, received, sent, self.place)
        return torch.zeros_like(x_RD).index_add(0, row_S, y_SD)

    def _all_gather(self, x_RD: Tensor, w_RPK: Tensor) -> Tensor:
        x_SD = _Gather.apply(x_RD, self.place)
        each = [x_RD.shape[0]] * self.place.size
        w_SK = _Exchange.apply(w_RPK.transpose(0, 1).flatten(0, 1), each, each, self.place)
        return _ScatterSum.apply(super().routed_sum(x_SD, w_SK), self.place)


def count_samples(onehot_LBK: Tensor, place: Placement) -> list[list[int]]:
    """Return, for each layer, the samples of each member for each expert, flattened [P * K], on the host. Collective."""
    counts_PLK = place.all_gather(onehot_LBK.sum(dim=1).unsqueeze(0))
    return counts_PLK.transpose(0, 1).flatten(1).tolist()


def _take_slice(layer: Any, whole: Experts, place: Placement) -> None:
    """Give `layer` this rank's experts of `whole`, marked for DeepSpeed and for `fragments`."""
    layer.num_experts, layer.place = whole.num_experts // place.size, place
    layer.dim, layer.hidden, layer.activation = whole.dim, whole.hidden, whole.activation
    layer.use_megablocks = whole.use_megablocks
    first = place.index * layer.num_experts
    for name in STACKED:
        stack = getattr(whole, name).detach()
        p: Any = nn.Parameter(stack[first : first + layer.num_experts].clone())
        p.expert_slice = (first, whole.num_experts)
        p.allreduce, p.group_name = False, place.name  # DeepSpeed: reduced over the ranks with the same experts alone
        setattr(layer, name, p)


# ---- what DeepSpeed has to know -------------------------------------------------------------------------------------


def apply(model: RaphaelUNet, config: Config) -> Traffic:
    """Swap the model's experts for this rank's share, as `parallel.space_ep` and `parallel.time_ep` say. Collective.

    Call before the optimizer is built, on equal models. With both sizes 1 the model stays as it is. Returns the counter of
    all exchanges.
    """
    sizes, traffic = {"space": config.parallel.space_ep, "time": config.parallel.time_ep}, Traffic()
    # Every rank creates every group, in the same order.
    groups = {size: _join(size) for size in sorted(set(sizes.values())) if size > 1}
    places = {kind: Placement(*groups[size], traffic) for kind, size in sizes.items() if size > 1}
    for block in [m for m in model.modules() if isinstance(m, TransformerBlock)]:
        if "space" in places:
            assert block.space_moe is not None
            block.space_moe = ParallelSpaceMoE(block.space_moe, places["space"], config.parallel.dispatch)
        if "time" in places:
            block.time_moe = ParallelTimeMoE(block.time_moe, places["time"])
    if "time" in places:
        model.count_samples = partial(count_samples, place=places["time"])
    if places:
        model.add_module("deepspeed_marker", _marker(config.model.space_experts + config.model.time_experts))
    return traffic


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
    digests: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(described.encode()).hexdigest())
    assert len(set(digests)) == 1, "the ranks have different parameter groups"
    groups: list[dict[str, Any]] = [{"params": [p for _, p in found[g]]} for g in order]
    for group, name in zip(groups[1:], order[1:], strict=True):
        group |= {"moe": True, "name": name}
    return groups


def _join(size: int) -> tuple[dist.ProcessGroup, int, int]:
    """Create the groups of one size and return (group, size, index) of this rank's.

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
    return ep[name], size, dist.get_rank(ep[name])


def _marker(num_experts: int) -> nn.Module:
    """Return a module without parameters by which DeepSpeed's engine knows that there are experts."""
    from deepspeed.moe.layer import MoE

    class Marker(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = num_experts

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """Do nothing: the groups exist."""

    return Marker()
