"""Rank process: checks that expert-parallel layers compute the same as layers with all experts on one rank, in float64.

The layers with all experts get the data of all ranks at once. Outputs, gradients and the number of sent bytes are asserted.
Usage: start expert_layers.py as 2 or 3 ranks. It prints the bytes that were sent in each case.

Shape legend: B samples per rank, N image tokens, Y text tokens, K experts, D width.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from raphael_dist.model import moe
from raphael_dist.model.moe import SpaceMoE, TimeMoE
from raphael_dist.parallel.async_collectives import ExpertGroup
from raphael_dist.parallel.expert_dispatch import STACKED, ParallelSpaceMoE, ParallelTimeMoE, count_samples
from raphael_dist.runtime.ranks import discover, initialise

B, N, Y, K, D, HIDDEN = 3, 10, 7, 6, 8, 12

# name: (experts that text tokens of rank r are routed to, share of image tokens in a region)
CASES = {
    "random": (lambda r: range(K), 0.3),
    "dense": (lambda r: range(K), 1.0),
    "one expert, on rank 0 only": (lambda r: [0] if r == 0 else [K - 1], 0.5),
    "no expert of another rank": (lambda r: [r * (K // dist.get_world_size())], 0.5),
    "experts without tokens": (lambda r: [1, 4], 0.5),
    "empty regions on rank 1": (lambda r: range(K), 0.4),
}


def space_inputs(case: str, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return random inputs of Space-MoE on `rank`: image tokens [B, N, D], regions [B, N, Y], routing weights [B, Y, K]."""
    experts, share = CASES[case]
    draw = torch.Generator().manual_seed(rank)
    h_BND = torch.randn(B, N, D, generator=draw, dtype=torch.float64)
    mask_BNY = (torch.rand(B, N, Y, generator=draw) < share).double()
    if case.startswith("empty") and rank == 1:
        mask_BNY.zero_()
    chosen_BY = torch.tensor(list(experts(rank)))[torch.randint(len(experts(rank)), (B, Y), generator=draw)]
    return h_BND, mask_BNY, torch.nn.functional.one_hot(chosen_BY, K).double() / Y


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error < 1e-12, f"{what}: relative difference {error:.1e}"


def target_grad(shape: Sequence[int], rank: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(99 + rank), dtype=torch.float64)


def check_space(case: str, dispatch: str, backend: str, recompute: bool, group: ExpertGroup) -> int:
    """Assert that `ParallelSpaceMoE` gives the outputs and gradients of `SpaceMoE`; return the bytes that this rank sent.

    Args:
        case: which experts and regions the inputs have (CASES).
        dispatch, backend: how tokens are exchanged, and how experts are computed.
        recompute: whether the forward pass runs under activation checkpointing.
        group: the ranks over which experts are sharded.
    """
    whole = SpaceMoE(K, D, HIDDEN, backend, seed=4).double()
    layer = ParallelSpaceMoE(whole, group, dispatch)
    per_rank = [space_inputs(case, r) for r in range(group.size)]
    h, mask, weight = (torch.cat(parts) for parts in zip(*per_rank, strict=True))
    expected_in = [h.requires_grad_(), weight.requires_grad_()]
    expected, expected_used = whole(h, mask, weight)
    grad_out = torch.cat([target_grad((B, N, D), r) for r in range(group.size)])
    expected_grads = torch.autograd.grad(expected, [*expected_in, *whole.parameters()], grad_out, materialize_grads=True)

    h, mask, weight = (t.clone() for t in per_rank[group.index])
    inputs = [h.requires_grad_(), weight.requires_grad_()]
    group.traffic.take()
    if recompute:
        out, used = checkpoint(lambda h, w: layer(h, mask, w), h, weight, use_reentrant=False)
    else:
        out, used = layer(h, mask, weight)
    grads = torch.autograd.grad(out, [*inputs, *layer.parameters()], target_grad((B, N, D), group.index))
    sent = group.traffic.take().experts
    local, first = slice(group.index * B, (group.index + 1) * B), group.index * layer.num_experts
    close(out, expected[local], "output")
    assert torch.equal(used, expected_used[local])
    for result, reference, what in zip(grads[:2], expected_grads[:2], ("tokens", "weights"), strict=True):
        # Only the routed expert of a text token passes its gradient on (routing.space_weights_BYK).
        routed = (weight > 0) if what == "weights" else torch.ones_like(result)
        close(result * routed, reference[local] * routed, f"gradient of {what}")
    names = [n for n, _ in layer.named_parameters()]
    assert names == [n for n, _ in whole.named_parameters()]
    for name, result, reference in zip(names, grads[2:], expected_grads[2:], strict=True):
        if name in STACKED:
            close(result, reference[first : first + layer.num_experts], name)
        else:  # replicated: each rank has the share of its own samples
            dist.all_reduce(result)
            close(result, reference, name)
    return sent


def space_bytes(case: str, dispatch: str, group: ExpertGroup) -> int:
    """Compute from the routing how many bytes this rank must send in a forward and backward pass of `check_space`.

    The rank sends tokens to experts, results back, the gradients of both, the numbers of tokens, and the experts' constants.
    """
    others, here = group.size - 1, K // group.size
    rows = []
    for p in range(group.size):
        _, mask, weight = space_inputs(case, p)
        needed = ((mask @ weight) > 0).view(B * N, group.size, here).any(dim=2)
        rows.append([int(n) for n in needed.sum(dim=0)])
    out = sum(n for q, n in enumerate(rows[group.index]) if q != group.index)
    into = sum(rows[p][group.index] for p in range(group.size) if p != group.index)
    total = 2 * others * here * D * 8  # the constants and their gradients
    full = sum(n for p in range(group.size) for q, n in enumerate(rows[p]) if p != q) == group.size * others * B * N
    if dispatch != "all_gather":
        total += others * group.size * 8
    if dispatch == "all_gather" or (dispatch == "auto" and full):
        return total + others * B * N * (4 * D + 2 * here) * 8
    return total + (out + into) * (2 * D + here) * 8


def check_time(experts: int, chosen: Sequence[Sequence[int]], activation: str, group: ExpertGroup) -> None:
    whole = TimeMoE(experts, D, HIDDEN, activation, seed=9).double()
    layer = ParallelTimeMoE(whole, group)
    expert = torch.tensor(chosen)
    h = torch.stack([space_inputs("random", r)[0] for r in range(group.size)])
    factor = torch.linspace(0.5, 1.5, group.size * B, dtype=torch.float64).view(group.size, B)
    inputs = [h.flatten(0, 1).requires_grad_(), factor.flatten().requires_grad_()]
    counts = torch.bincount(expert.flatten(), minlength=experts)
    expected = whole(inputs[0], expert.flatten(), counts, inputs[1])
    grad_out = torch.cat([target_grad((B, N, D), r) for r in range(group.size)])
    expected_grads = torch.autograd.grad(expected, [*inputs, *whole.parameters()], grad_out)

    local, me = slice(group.index * B, (group.index + 1) * B), group.index
    samples = count_samples(torch.nn.functional.one_hot(expert[None, me], experts), group, [True])
    inputs = [h[me].clone().requires_grad_(), factor[me].clone().requires_grad_()]
    group.traffic.take()
    out = layer(inputs[0], expert[me], samples[0], inputs[1])
    grads = torch.autograd.grad(out, [*inputs, *layer.parameters()], target_grad((B, N, D), me))
    here = experts // group.size
    crossing = int((expert[me] // here != me).sum()) + int((torch.cat([expert[:me], expert[me + 1 :]]) // here == me).sum())
    assert group.traffic.take().experts == 2 * crossing * N * D * 8
    close(out, expected[local], "output")
    for result, reference in zip(grads[:2], expected_grads[:2], strict=True):
        close(result, reference[local], "gradient of the inputs")
    for name, result, reference in zip(STACKED, grads[2:], expected_grads[2:], strict=True):
        close(result, reference[me * here : (me + 1) * here], name)


def check_saving(group: ExpertGroup) -> None:
    """Assert that a token is sent once to each rank, and not once to each expert there, if every expert needs every token.

    The layer has 6 experts of width 32 on 2 ranks.
    """
    width, experts_there = 32, K // 2
    layer = ParallelSpaceMoE(SpaceMoE(K, width, HIDDEN, "grouped", seed=4), group, "all_to_all")
    draw = torch.Generator().manual_seed(group.index)
    h_BND = torch.randn(B, N, width, generator=draw, requires_grad=True)
    weight_BYK = torch.nn.functional.one_hot(torch.arange(Y) % K, K).float().expand(B, Y, K) / Y
    group.traffic.take()
    out, used_BK = layer(h_BND, torch.ones(B, N, Y), weight_BYK)
    out.square().sum().backward()
    assert (used_BK == 1).all()
    # Every pair whose expert is elsewhere would send D numbers there and D back, and as many in the backward pass.
    pairs = B * N * experts_there * 2 * 2 * width * 4
    share = group.traffic.take().experts / pairs
    assert share <= 0.38, share  # with counts and constants, which these 30 tokens can hardly spread
    rows = B * N * 2 * (2 * width + experts_there) * 4
    assert rows / pairs <= 0.36
    print(f"bytes per (token, expert) pairs: {rows / pairs:.3f}, with counts and constants {share:.3f}")


def main() -> None:
    ranks = discover()
    initialise(ranks)
    torch.set_num_threads(1)
    group = ExpertGroup(dist.group.WORLD, ranks.world_size, ranks.rank)
    for case in CASES:
        for dispatch in ("auto", "all_to_all", "all_gather"):
            for backend in ("grouped", "dense"):
                sent = check_space(case, dispatch, backend, False, group)
                assert sent == space_bytes(case, dispatch, group), (case, dispatch, sent)
            # Each rank by its own density: ranks that run different products still agree about the exchanges.
            check_space(case, dispatch, "auto", True, group)
        print(f"{case}: {check_space(case, 'all_to_all', 'grouped', False, group)} bytes sent by rank {ranks.rank}")
    if group.size == 2:
        check_saving(group)
    moe.DENSE_DENSITY = 0.5 if ranks.is_main else 2.0
    check_space("random", "all_to_all", "auto", True, group)
    for activation in ("gelu", "geglu"):
        draw = torch.Generator().manual_seed(1)
        check_time(6, torch.randint(6, (group.size, B), generator=draw).tolist(), activation, group)
        check_time(6, [[5] * B] * group.size, activation, group)  # one expert for all, the last rank's
        check_time(6, [[0] * B] + [[3] * B] * (group.size - 1), activation, group)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
