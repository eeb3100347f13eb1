"""Every backend of a layer of experts equals the paper's formula, in value and in every gradient.

Shape legend: B samples, N image tokens, Y text tokens, K experts, D width.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from raphael_dist.model import moe
from raphael_dist.model.experts import Experts
from raphael_dist.model.moe import SPACE_BACKENDS, SpaceMoE, TimeMoE
from raphael_dist.model.routing import balance_loss_B, choose, region_mask_BNY, space_weights_BYK

torch.set_num_threads(1)  # tiny products: threads that wait for each other cost ten times the work

B, K, D, HIDDEN = 2, 6, 8, 20
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])

# name: (image tokens, text tokens, allowed experts, mask)
SPACE_CASES = {
    "random masks": (12, 9, range(K), "random"),
    "empty experts": (12, 9, (1, 4), "random"),
    "one expert": (12, 9, (5,), "random"),
    "one image token": (1, 9, range(K), "full"),
    "one text token": (12, 1, range(K), "random"),
    "full masks": (12, 9, range(K), "full"),
    "masks one pixel wide": (12, 9, range(K), "pixel"),
    "one of everything": (1, 1, (2,), "full"),
}


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Compare relative to the largest entry, so that entries that cancel do not count."""
    scale = expected.abs().max().clamp(min=1e-3)
    assert (actual - expected).abs().max() <= tolerance * scale, what


def expert(moe: Experts, k: int, x: Tensor) -> Tensor:
    hidden = F.linear(x, moe.w1[k], moe.b1[k])
    if moe.activation == "geglu":
        value, gate = hidden[..., : moe.hidden], hidden[..., moe.hidden :]
        return F.linear(value * F.gelu(gate), moe.w2[k], moe.b2[k])
    return F.linear(F.gelu(hidden), moe.w2[k], moe.b2[k])


def paper_space_moe(moe: SpaceMoE, h_BND: Tensor, mask_BNY: Tensor, logits_BYK: Tensor) -> Tensor:
    """Compute the formula of Sec. 3.1: `1/n_y sum_i e_{route(y_i)}(h o Mhat_i)`, each term times p / p.detach()."""
    samples = []
    for h_ND, mask_NY, logits_YK in zip(h_BND, mask_BNY, logits_BYK, strict=True):
        h_ND = F.layer_norm(h_ND, (D,), moe.norm.weight, moe.norm.bias)
        total = torch.zeros_like(h_ND)
        for i in range(mask_NY.shape[1]):
            p_K = logits_YK[i].softmax(0)
            k = int(p_K.argmax())
            total = total + p_K[k] / p_K[k].detach() * expert(moe, k, h_ND * mask_NY[:, i, None])
        samples.append(total / mask_NY.shape[1])
    return torch.stack(samples)


def space_case(name: str, dtype: torch.dtype, backend: str) -> tuple[SpaceMoE, list[Tensor], Tensor]:
    """Return the layer, its differentiable inputs [h, logits], and the mask."""
    tokens, texts, allowed, kind = SPACE_CASES[name]
    torch.manual_seed(3)
    layer = SpaceMoE(K, D, HIDDEN, backend, seed=1).to(dtype)
    torch.nn.init.normal_(layer.norm.weight)
    torch.nn.init.normal_(layer.norm.bias)
    h_BND = torch.randn(B, tokens, D, dtype=dtype, requires_grad=True)
    logits_BYK = torch.randn(B, texts, K, dtype=dtype)
    logits_BYK[..., [k for k in range(K) if k not in allowed]] -= 20
    mask_BNY = (torch.rand(B, tokens, texts) < 0.4).to(dtype)
    if kind == "full":
        mask_BNY = torch.ones_like(mask_BNY)
    elif kind == "pixel":
        mask_BNY = F.one_hot(torch.randint(tokens, (B, texts)), tokens).transpose(1, 2).to(dtype)
    return layer, [h_BND, logits_BYK.requires_grad_()], mask_BNY


def run_space(layer: SpaceMoE, h_BND: Tensor, mask_BNY: Tensor, logits_BYK: Tensor) -> Tensor:
    return layer(h_BND, mask_BNY, space_weights_BYK(*choose(logits_BYK, None, "straight_through"), K, None))[0]


def gradients(out: Tensor, layer: torch.nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    loss = (out * torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)).sum()
    names = [*(f"input {i}" for i in range(len(inputs))), *dict(layer.named_parameters())]
    return dict(zip(names, torch.autograd.grad(loss, [*inputs, *layer.parameters()]), strict=True))


@PRECISIONS
@pytest.mark.parametrize("name", SPACE_CASES)
@pytest.mark.parametrize("backend", ["reference", *SPACE_BACKENDS, "auto"])
def test_space_moe_is_the_papers_formula_in_value_and_every_gradient(name, backend, dtype, tolerance):
    layer, inputs, mask_BNY = space_case(name, dtype, backend)
    out = run_space(layer, inputs[0], mask_BNY, inputs[1])
    expected = paper_space_moe(layer, inputs[0], mask_BNY, inputs[1])
    close(out, expected, tolerance)
    reference = gradients(expected, layer, inputs)
    for what, gradient in gradients(out, layer, inputs).items():
        close(gradient, reference[what], 3 * tolerance, what)


@pytest.mark.parametrize("backend", ["reference", *SPACE_BACKENDS])
def test_space_moe_by_hand(backend):
    """Experts made to be e_k(x) = (k + 1) x: out[j] is x[j] times the mean over tokens i whose region has j of k_i + 1."""
    layer = SpaceMoE(3, 1, 1, backend, seed=0)
    layer.norm = torch.nn.Identity()
    for p, values in ((layer.w1, [1, 1, 1]), (layer.b1, [100] * 3), (layer.w2, [1, 2, 3]), (layer.b2, [-100, -200, -300])):
        p.data = torch.tensor(values, dtype=torch.float32).view_as(p)
    x_BND = torch.tensor([[1.0, 2.0, 4.0], [1.0, 1.0, 3.0]]).unsqueeze(2)
    route_BY = torch.tensor([[2, 0], [1, 1]])
    # columns are text tokens: sample 0 token 0 covers pixels 0 and 2, token 1 pixel 2; sample 1 token 0 pixel 1, token 1 all
    mask_BNY = torch.tensor([[[1.0, 0], [0, 0], [1, 1]], [[0, 1], [1, 1], [0, 1]]])
    out, used_BK = layer(x_BND, mask_BNY, space_weights_BYK(route_BY, torch.ones(2, 2), 3, None))
    # sample 0: pixel 0 gets 3 * 1 / 2, pixel 1 nothing, pixel 2 (3 + 1) * 4 / 2; sample 1: 2 / 2, (2 + 2) / 2, 2 * 3 / 2
    torch.testing.assert_close(out.squeeze(2), torch.tensor([[1.5, 0, 8], [1, 2, 3]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(used_BK, torch.tensor([[1 / 3, 0, 2 / 3], [0, 1, 0]]))


@pytest.mark.parametrize("backend", ["reference", *SPACE_BACKENDS])
def test_padding_left_out_equals_a_shorter_caption(backend):
    layer, (h_BND, logits_BYK), mask_BNY = space_case("random masks", torch.float64, backend)
    taking_part_BY = torch.arange(9).expand(B, 9) < torch.tensor([[4], [4]])
    chosen = choose(logits_BYK, None, "straight_through")
    padded, _ = layer(h_BND, mask_BNY, space_weights_BYK(*chosen, K, taking_part_BY))
    short, _ = layer(h_BND, mask_BNY[..., :4], space_weights_BYK(chosen[0][:, :4], chosen[1][:, :4], K, None))
    close(padded, short, 1e-12)


def test_auto_backend_depends_on_density():
    layer = SpaceMoE(K, D, HIDDEN, "auto", seed=1)
    assert layer._choose_backend(torch.full((B, K), moe.DENSE_DENSITY - 0.01)) == "grouped"
    assert layer._choose_backend(torch.full((B, K), moe.DENSE_DENSITY + 0.01)) == "dense"


def test_region_mask_follows_the_threshold_and_has_no_gradient():
    map_BNY = torch.tensor([[[1.0, 0.03], [0.2, 0.01], [0.19, 0.1]]], requires_grad=True)
    mask_BNY = region_mask_BNY(map_BNY, 0.2)
    assert mask_BNY.tolist() == [[[1, 1], [1, 0], [0, 1]]]
    assert not mask_BNY.requires_grad
    assert region_mask_BNY(map_BNY.bfloat16(), 0.5).dtype == torch.float32


@PRECISIONS
@pytest.mark.parametrize("activation", ["gelu", "geglu"])
@pytest.mark.parametrize("route", [[3, 0, 2, 0, 1], [0, 0, 0, 0, 0], [3, 3, 1, 1, 3], [2]])
def test_time_moe_is_one_expert_per_sample_in_any_order(route, activation, dtype, tolerance):
    torch.manual_seed(0)
    layer = TimeMoE(4, D, HIDDEN, activation, seed=2).to(dtype)
    h_BND = torch.randn(len(route), 3, D, dtype=dtype, requires_grad=True)
    factor_B = torch.rand(len(route), dtype=dtype, requires_grad=True)
    out = layer(h_BND, torch.tensor(route), torch.tensor([route.count(k) for k in range(4)]), factor_B)
    expected = torch.stack([expert(layer, k, h_BND[b]) * factor_B[b] for b, k in enumerate(route)])
    close(out, expected, tolerance)
    result, reference = (gradients(o, layer, [h_BND, factor_B]) for o in (out, expected))
    for what, gradient in result.items():  # autograd.grad raises where a parameter has no gradient at all
        close(gradient, reference[what], 3 * tolerance, what)
    for k in set(range(4)) - set(route):
        assert not result["w1"][k].any()
        assert not result["b2"][k].any()


def test_time_moe_by_hand():
    """Experts made to return their own number: sample b gets the number of its expert."""
    layer = TimeMoE(4, 2, 3, "gelu", seed=0)
    layer.w2.data.zero_()
    layer.b2.data = torch.arange(4.0)[:, None].expand(4, 2).clone()
    out = layer(torch.randn(5, 3, 2), torch.tensor([3, 0, 2, 0, 1]), torch.tensor([2, 1, 1, 1]), torch.ones(5))
    assert out[:, 0, 0].tolist() == [3, 0, 2, 0, 1]
    assert (out == out[:, :1, :1]).all()


# ---- gates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["straight_through", "none", "scaled"])
def test_gate_gradient_depends_on_its_mode(gradient):
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 3.0]], requires_grad=True)
    noise = torch.tensor([[-3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    chosen, factor = choose(logits, noise, gradient)
    assert chosen.tolist() == [2, 2]  # noise moves the first from 0 to 2
    p = torch.softmax(logits.detach() + noise, dim=-1)
    if gradient == "scaled":
        torch.testing.assert_close(factor, p[:, 2])
    else:
        assert factor.tolist() == [1, 1]
    if gradient == "none":
        assert not factor.requires_grad
        return
    factor.sum().backward()
    # d p_2 / d l_j = p_2 (1[j = 2] - p_j), and straight-through divides by p_2.
    expected = torch.tensor([0.0, 0.0, 1.0]) - p
    torch.testing.assert_close(logits.grad, expected if gradient == "straight_through" else p[:, 2:] * expected)


@pytest.mark.parametrize("backend", ["reference", *SPACE_BACKENDS])
@pytest.mark.parametrize("gradient", ["straight_through", "none"])
def test_the_gates_gradient_does_not_change_the_value(backend, gradient):
    layer, (h_BND, logits_BYK), mask_BNY = space_case("random masks", torch.float32, backend)
    chosen_BY, factor_BY = choose(logits_BYK, None, gradient)
    onehot = F.one_hot(chosen_BY, K).float() / chosen_BY.shape[1]
    out, _ = layer(h_BND, mask_BNY, space_weights_BYK(chosen_BY, factor_BY, K, None))
    assert torch.equal(out, layer(h_BND, mask_BNY, onehot)[0])
    gate = torch.autograd.grad(out.square().sum(), logits_BYK, allow_unused=True)[0]
    assert gate is None if gradient == "none" else gate.abs().max() > 0


def test_the_balance_loss_is_one_when_balanced_and_grows_with_imbalance():
    even = torch.zeros(1, 6, 3)
    assert balance_loss_B(even, torch.tensor([[0, 1, 2, 0, 1, 2]])).item() == pytest.approx(1.0)
    # All six tokens to expert 0 with probability e/(e+2): 3 * 1 * 0.57612.
    skewed = torch.tensor([1.0, 0.0, 0.0]).expand(1, 6, 3).clone().requires_grad_()
    loss = balance_loss_B(skewed, torch.zeros(1, 6, dtype=torch.int64))
    assert loss.item() == pytest.approx(3 * math.e / (math.e + 2), rel=1e-6)
    loss.sum().backward()
    assert skewed.grad is not None
    assert skewed.grad[0, 0, 0] > 0


def test_the_balance_loss_leaves_padding_out_as_the_space_weights_do():
    draw = torch.Generator().manual_seed(1)
    logits_BYK = torch.randn(2, 7, 3, generator=draw)
    chosen_BY, lengths = logits_BYK.argmax(dim=-1), (4, 7)
    taking_part_BY = torch.arange(7) < torch.tensor(lengths)[:, None]
    loss_B = balance_loss_B(logits_BYK, chosen_BY, taking_part_BY)
    alone = [balance_loss_B(logits_BYK[i, :n], chosen_BY[i, :n]) for i, n in enumerate(lengths)]
    torch.testing.assert_close(loss_B, torch.stack(alone))
    assert not torch.allclose(loss_B, balance_loss_B(logits_BYK, chosen_BY))


def test_megablocks_runs_the_space_moe_by_the_dense_backend(monkeypatch):
    layer, inputs, mask_BNY = space_case("random masks", torch.float32, "megablocks")
    expected = run_space(layer, inputs[0], mask_BNY, inputs[1])
    monkeypatch.setattr(Experts, "apply_sorted", None)
    torch.testing.assert_close(run_space(layer, inputs[0], mask_BNY, inputs[1]), expected, rtol=0, atol=0)
