"""Expert parallelism: P ranks share one set of K experts, each rank has K/P experts, and tokens move to the experts.

Space-MoE moves image tokens, in three phases:
1. Dispatch: an image token goes once to each *other rank* that has an expert it needs. It is sent as a row with its D values
  and its weights for the K/P experts of that rank.
2. That rank computes the weighted sum over its experts, with the same code as on a single rank.
3. Combine: one row of D values returns and is added to the token's output.

A token that needs several experts of a rank is thus sent to this rank only once. The setting parallel.dispatch selects this
exchange ("all_to_all") or "all_gather": all tokens are gathered on all ranks, and outputs are added by a reduce-scatter.
"auto" selects "all_gather" on a GPU, because its sizes are fixed and the host need not wait for counts. On a CPU, "auto"
selects it if nearly every token needs every rank.

Time-MoE moves whole samples to the rank of their expert and back. One small all-gather before the first block exchanges the
number of samples per expert for all layers. In a forward pass the host waits for the device only in this all-gather, and
without sharded time experts it does not wait.

Tokens for experts of this rank are not sent. They are processed while the other tokens are in transit; the backward pass
does the same with gradients. With P = 1, only phase 2 runs. The ranks of a group must run the same layers on equally many
samples of equal size.

Shape legend: B samples, N image tokens, K experts, D width, R rows (tokens) of this rank, O rows that stay on this rank, S
rows sent or received, P ranks that share the experts, L transformer blocks.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raphael_dist.config.schema import Config
from raphael_dist.config.types import Dispatch
from raphael_dist.model.experts import Experts
from raphael_dist.model.layers import TransformerBlock
from raphael_dist.model.moe import SpaceMoE, TimeMoE
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel.async_collectives import Exchange, ExpertGroup, Traffic, row_exchange
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.parallel.placement import choose_placement

STACKED = ("w1", "b1", "w2", "b2")  # the parameters of `Experts` without adapters, one slice per expert
# Above this share of (token, other rank) pairs in use, fixed sizes send few bytes more and need no sorting.
STATIC_DENSITY = 0.9


class GroupSamples(NamedTuple):
    """Number of samples that each of P ranks sends to each expert in one Time-MoE layer, on the host and on the device.

    Both tensors are int64 [P, P, K/P]: element [p, q, k] counts the samples of rank p for expert k of rank q. The all-to-all
    reads the counts on the host, and the grouped matrix product of the experts reads them on the device.
    """

    host_PPK: Tensor
    device_PPK: Tensor


SampleCounts = GroupSamples | Tensor  # of a layer with and without sharded time experts


class ParallelTimeMoE(TimeMoE):
    """A Time-MoE layer whose K experts are sharded over P ranks: this rank has K/P of them.

    Samples move to the rank of their expert and back.
    """

    group: ExpertGroup

    def __init__(self, whole: TimeMoE, group: ExpertGroup) -> None:
        nn.Module.__init__(self)
        _take_slice(self, whole, group)

    def forward(self, h_BND: Tensor, expert_B: Tensor, samples: Any, factor_B: Tensor) -> Tensor:
        """Run each sample's image tokens through its expert, which may be on another rank; return the outputs, [B, N, D].

        Collective among the ranks that share the experts.

        Args:
            h_BND: N image tokens of width D for each of this rank's B samples.
            expert_B: global index of each sample's expert, int64.
            samples: a `GroupSamples`: the number of samples that each rank of the group sends to each expert.
            factor_B: factor on each sample's output, through which the gate gets its gradient.
        """
        me, (host_PPK, device_PPK) = self.group.index, samples
        sent, received = host_PPK[me].sum(dim=1).tolist(), host_PPK[:, me].sum(dim=1).tolist()
        stays, sent[me], received[me] = sent[me], 0, 0
        # Samples sorted by expert are sorted by its rank, so those that stay are consecutive.
        order_B = torch.argsort(expert_B, stable=True)
        first = sum(sent[:me])
        stay_O = order_B[first : first + stays]
        leave_S = torch.cat([order_B[:first], order_B[first + stays :]])
        there, back = row_exchange(self.group, sent, received), row_exchange(self.group, received, sent)
        pending = there.start(h_BND[leave_S])
        out_OND = self._by_expert(h_BND[stay_O], device_PPK[me, me])
        others = [p for p in range(self.group.size) if p != me]
        arrived_K = device_PPK[:, me].sum(dim=0) - device_PPK[me, me]
        out_SND = back(self._apply_blocks(there.finish(pending), host_PPK[others, me], arrived_K))
        out_BND = torch.empty_like(h_BND).index_copy(0, torch.cat([stay_O, leave_S]), torch.cat([out_OND, out_SND]))
        return out_BND * factor_B.to(out_BND.dtype)[:, None, None]

    def _by_expert(self, h_SND: Tensor, samples_K: Tensor) -> Tensor:
        """Return the outputs [S, N, D] of this rank's experts for S samples `h_SND`, which are sorted by expert.

        `samples_K`: number of samples of each expert, int64, on the device.
        """
        return self.apply_sorted(h_SND.flatten(0, 1), samples_K * h_SND.shape[1]).view_as(h_SND)

    def _apply_blocks(self, h_SND: Tensor, host_PK: Tensor, samples_K: Tensor) -> Tensor:
        """Return the outputs [S, N, D] of this rank's experts for samples that other ranks sent, in the same order.

        Args:
            h_SND: the samples, sorted by sending rank, and those of a rank by expert.
            host_PK: number of samples that each sending rank has for each expert, int64, on the host.
            samples_K: number of samples of each expert, int64, on the device.
        """
        sizes_PK, sizes_KP = host_PK.flatten().tolist(), host_PK.t().flatten().tolist()
        senders, experts = host_PK.shape
        blocks = torch.split(h_SND, sizes_PK)
        by_expert_SND = torch.cat([blocks[p * experts + k] for k in range(experts) for p in range(senders)])
        blocks = torch.split(self._by_expert(by_expert_SND, samples_K), sizes_KP)
        return torch.cat([blocks[k * senders + p] for p in range(senders) for k in range(experts)])


class ParallelSpaceMoE(SpaceMoE):
    """A Space-MoE layer whose K experts are sharded over P ranks: this rank has K/P of them.

    Image tokens move to the ranks of the experts that they need, and back.
    """

    group: ExpertGroup

    def __init__(self, whole: SpaceMoE, group: ExpertGroup, dispatch: Dispatch) -> None:
        nn.Module.__init__(self)
        _take_slice(self, whole, group)
        self.norm, self.shared, self.backend, self.dispatch = whole.norm, whole.shared, whole.backend, dispatch

    def routed_sum(self, x_RD: Tensor, w_RK: Tensor, zero_KD: Tensor) -> Tensor:
        """Return `sum_k w[r,k] (e_k(x[r]) - e_k(0))` over the experts of all P ranks, [R, D]. Collective among these ranks.

        e_k is the function of expert k. `x_RD`: this rank's image tokens. `w_RK`: their weights for all K experts, at least
        0. `zero_KD`: `e_k(0) - b2_k` for this rank's experts, where b2_k is the bias of the expert's last layer.
        """
        w_RPK = torch.unflatten(w_RK, 1, (self.group.size, self.num_experts))
        needed_PR = (w_RPK.detach() > 0).any(dim=2).t()
        counts_PP = self._rows_between_ranks(needed_PR)
        if counts_PP is None:
            return self._all_gather(x_RD, w_RPK, zero_KD)
        return self._all_to_all(x_RD, w_RPK, zero_KD, needed_PR, counts_PP)

    def gathered(self, own_KD: Tensor) -> Tensor:
        """Gather one vector for each of the layer's K experts from the P ranks that share them, [K, D]. Collective.

        `own_KD`: the vectors of this rank's K/P experts. They are the experts' outputs for a token of zeros.
        """
        return Exchange(self.group.all_gather, self.group.reduce_scatter)(own_KD)

    def _rows_between_ranks(self, needed_PR: Tensor) -> list[list[int]] | None:
        """Return how many rows (tokens) rank p of the group sends to rank q, as [p][q]; equal on all ranks of the group.

        Returns None if all tokens should be gathered on all ranks instead. `needed_PR`: bool, whether this rank's token r
        needs an expert of rank p.
        """
        # With counts the host would wait for a GPU in every layer.
        if self.dispatch == "all_gather" or (self.dispatch == "auto" and needed_PR.device.type != "cpu"):
            return None
        counts_PP, work = self.group.all_gather(needed_PR.sum(dim=1).unsqueeze(0))
        work.wait()
        others = (counts_PP.sum() - counts_PP.trace()).item()
        dense = others > STATIC_DENSITY * self.group.size * (self.group.size - 1) * needed_PR.shape[1]
        return None if self.dispatch == "auto" and dense else counts_PP.fill_diagonal_(0).tolist()

    def _all_to_all(
        self, x_RD: Tensor, w_RPK: Tensor, zero_KD: Tensor, needed_PR: Tensor, counts_PP: list[list[int]]
    ) -> Tensor:
        me = self.group.index
        sent, received = counts_PP[me], [row[me] for row in counts_PP]
        there, back = row_exchange(self.group, sent, received), row_exchange(self.group, received, sent)
        own_O = needed_PR[me].nonzero().squeeze(1)
        elsewhere_PR = needed_PR.clone()
        elsewhere_PR[me] = False
        rank_S, row_S = elsewhere_PR.nonzero(as_tuple=True)
        pending = there.start(torch.cat([x_RD[row_S], w_RPK[row_S, rank_S]], dim=1))
        out_OD = super().routed_sum(x_RD[own_O], w_RPK[own_O, me], zero_KD)
        rows = there.finish(pending)
        pending = back.start(super().routed_sum(rows[:, : self.dim], rows[:, self.dim :], zero_KD))
        out_RD = torch.zeros_like(x_RD).index_add(0, own_O, out_OD)
        return out_RD.index_add(0, row_S, back.finish(pending))

    def _all_gather(self, x_RD: Tensor, w_RPK: Tensor, zero_KD: Tensor) -> Tensor:
        me, each = self.group.index, [x_RD.shape[0]] * self.group.size
        tokens, weights = Exchange(self.group.all_gather, self.group.reduce_scatter), row_exchange(self.group, each, each)
        pending = tokens.start(x_RD), weights.start(w_RPK.transpose(0, 1).flatten(0, 1))
        out_RD = super().routed_sum(x_RD, w_RPK[:, me], zero_KD)
        x_PRD, w_PRK = (torch.split(t, each) for t in (tokens.finish(pending[0]), weights.finish(pending[1])))
        others = [p for p in range(self.group.size) if p != me]
        x_SD, w_SK = torch.cat([x_PRD[p] for p in others]), torch.cat([w_PRK[p] for p in others])
        y_SD = super().routed_sum(x_SD, w_SK, zero_KD)
        y_PRD = list(torch.split(y_SD, each[1:]))
        y_PRD.insert(me, torch.zeros_like(x_RD))
        return out_RD + Exchange(self.group.reduce_scatter, self.group.all_gather)(torch.cat(y_PRD))


def count_samples(onehot_LBK: Tensor, group: ExpertGroup, sharded: Sequence[bool]) -> list[SampleCounts]:
    """Return the number of samples of each time expert in each of L Time-MoE layers. Collective.

    It is called once for all layers, because the host waits for a GPU in this function.

    Args:
        onehot_LBK: which of K time experts each of this rank's samples has in each layer, one-hot, bool.
        group: the ranks that share the experts.
        sharded: for each layer, whether its time experts are sharded.

    Returns:
        For a sharded layer the counts of all ranks of the group (`GroupSamples`), else those of this rank, int64 [K].
    """
    counts_PLK, work = group.all_gather(onehot_LBK.sum(dim=1).unsqueeze(0))
    work.wait()
    device_LPPK = torch.unflatten(counts_PLK.transpose(0, 1), 2, (group.size, -1))
    host_LPPK = device_LPPK.cpu()
    return [
        GroupSamples(host_LPPK[i], device_LPPK[i]) if moves else device_LPPK[i, group.index].flatten()
        for i, moves in enumerate(sharded)
    ]


def _take_slice(layer: Any, whole: Experts, group: ExpertGroup) -> None:
    """Copy this rank's experts from `whole` (a layer with all experts) to the new, empty layer `layer`.

    The parameters get the attributes that DeepSpeed and `engine.fragments` read. `group`: the ranks that share the experts.
    """
    layer.num_experts, layer.group = whole.num_experts // group.size, group
    layer.dim, layer.hidden, layer.activation = whole.dim, whole.hidden, whole.activation
    layer.use_megablocks, layer.megablocks_folder = whole.use_megablocks, whole.megablocks_folder
    layer.lora_scale = whole.lora_scale
    first = group.index * layer.num_experts
    for name, stack in whole.named_parameters(recurse=False):  # including adapters
        p: Any = nn.Parameter(stack.detach()[first : first + layer.num_experts].clone(), stack.requires_grad)
        p.expert_slice = (first, whole.num_experts)
        p.allreduce, p.group_name = False, group.name  # DeepSpeed reduces it only over ranks with the same experts
        setattr(layer, name, p)


def shard_experts(
    model: RaphaelUNet, config: Config, plan: BatchPlan, create_groups: Callable[[int, Traffic], ExpertGroup]
) -> Traffic:
    """Shard the experts on some U-Net levels: keep only this rank's share of them. Collective.

    `placement.choose_placement` decides on which levels; the other levels keep all experts. Call this function before the
    optimizer is created, on models with equal weights on all ranks.

    Args:
        model: the U-Net, changed in place.
        config: the run's configuration.
        plan: how the batch is divided over ranks.
        create_groups: called with a number of ranks and a counter of bytes; creates this rank's process group of that size.

    Returns:
        A counter to which all expert exchanges add the bytes that this rank sends.
    """
    traffic = Traffic()
    costs = [cost for cost in choose_placement(config, plan) if cost.shard]
    # Every rank creates all groups in the same order.
    groups = {size: create_groups(size, traffic) for size in sorted({cost.ep for cost in costs})}
    blocks = [m for m in model.modules() if isinstance(m, TransformerBlock)]
    for cost in costs:
        for level, block in zip(model.block_levels, blocks, strict=True):
            if level == cost.level and cost.kind == "space":
                assert block.space_moe is not None
                block.space_moe = ParallelSpaceMoE(block.space_moe, groups[cost.ep], config.parallel.dispatch)
            elif level == cost.level:
                block.time_moe = ParallelTimeMoE(block.time_moe, groups[cost.ep])
    sharded = [isinstance(getattr(block, "time_moe", None), ParallelTimeMoE) for block in blocks]
    if any(sharded):
        model.count_samples = partial(count_samples, group=groups[config.parallel.time_ep], sharded=sharded)
    return traffic
