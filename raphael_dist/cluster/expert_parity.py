"""Tests on the ranks of a cluster whether expert parallelism computes what one process computes."""

import torch

from raphael_dist.model.moe import SpaceMoE
from raphael_dist.parallel.async_collectives import ExpertGroup
from raphael_dist.parallel.expert_dispatch import STACKED, ParallelSpaceMoE


def expert_parity(expert_group: ExpertGroup, num_experts: int, device: torch.device) -> float:
    """Compare a Space-MoE layer whose experts are sharded over `expert_group` with the same layer on one rank. Collective.

    It tests whether expert parallelism computes correct results on this machine. Outputs and gradients are compared, for
    random inputs that are equal on all ranks.

    `num_experts`: number of experts of the layer. `device`: this rank's device, on which the layers run.

    Returns:
        The largest difference, relative to the largest absolute value of the compared tensor.
    """
    tokens, text, dim = 32, 7, 16
    whole = SpaceMoE(num_experts, dim, 24, "auto", seed=4).to(device)
    draw = torch.Generator().manual_seed(5)
    h_BND = torch.randn(expert_group.size, tokens, dim, generator=draw)
    mask_BNY = (torch.rand(expert_group.size, tokens, text, generator=draw) < 0.3).float()
    chosen_BY = torch.randint(num_experts, (expert_group.size, text), generator=draw)
    weight_BYK = torch.nn.functional.one_hot(chosen_BY, num_experts).float() / text
    grad_BND = torch.randn(expert_group.size, tokens, dim, generator=draw)
    h, mask, weight, grad = (t.to(device) for t in (h_BND, mask_BNY, weight_BYK, grad_BND))
    sample = slice(expert_group.index, expert_group.index + 1)

    expected, _ = whole(h.requires_grad_(), mask, weight)
    stacked = [getattr(whole, name) for name in STACKED]
    expected_grads = torch.autograd.grad(expected, [h, *stacked], grad, allow_unused=True, materialize_grads=True)
    layer = ParallelSpaceMoE(whole, expert_group, "auto")
    local_h = h[sample].detach().clone().requires_grad_()
    out, _ = layer(local_h, mask[sample], weight[sample])
    local_stacked = [getattr(layer, name) for name in STACKED]
    grads = torch.autograd.grad(out, [local_h, *local_stacked], grad[sample], allow_unused=True, materialize_grads=True)
    experts = slice(expert_group.index * layer.num_experts, (expert_group.index + 1) * layer.num_experts)
    expected_values = [expected[sample], expected_grads[0][sample], *(g[experts] for g in expected_grads[1:])]
    return max(
        float((value - reference).abs().max() / reference.abs().max().clamp(min=1e-3))
        for value, reference in zip([out.detach(), *grads], [e.detach() for e in expected_values], strict=True)
    )
