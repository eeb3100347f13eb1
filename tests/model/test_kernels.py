"""The Triton kernels of `train.kernels` equal references in float64, and torch's parts of a whole model.

Without a GPU they run in Triton's interpreter (tests/conftest.py), with one the same tests run them compiled, and are marked
`gpu`. The interpreter cuts bfloat16 numbers off instead of rounding them, which doubles their error.

Shape legend: B samples, C channels, G groups, R rows, K experts, D width, F hidden width.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.kernels.selection import use_kernels
from raphael_dist.model.losses import compute_losses
from raphael_dist.model.moe import SpaceMoE, TimeMoE
from raphael_dist.model.unet import RaphaelUNet
from tests.lib.synthetic import synthetic_batch, tiny_config

pytest.importorskip("triton", reason="needs the package triton")

from raphael_dist.model.kernels import cross_attention, dense_experts, group_norm, layer_norm, pairs, sparse_experts
from raphael_dist.model.kernels.pairs import find_pairs

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
pytestmark = [pytest.mark.gpu] if HAS_GPU else []
ROOT = Path(__file__).parents[2]

DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale + shift).to(DEVICE, dtype)


def outcome(run: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return the output for inputs of a dtype, and the gradient of each input, in float64 on the CPU."""
    inputs = [x.to(device, dtype, copy=True).requires_grad_() for x in inputs]
    out = run(*inputs)
    out.backward(draw(*out.shape, dtype=torch.bfloat16).to(device, dtype))
    return [t.detach().double().cpu() for t in (out, *(x.grad for x in inputs))]


def compare(kernel: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor], tolerance: float) -> None:
    """Hold output and gradients to those of a reference in float64, by the norm of the difference."""
    actual = outcome(kernel, inputs, inputs[0].dtype, DEVICE)
    expected = outcome(reference, inputs, torch.float64, torch.device("cpu"))
    for i, (item, other) in enumerate(zip(actual, expected, strict=True)):
        assert (item - other).norm() <= tolerance * other.norm() + 1e-12, f"tensor {i}"


def reference_group_norm(x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    z_BCHW = F.group_norm(x_BCHW, groups, weight_C, bias_C, eps)
    return F.silu(z_BCHW) if silu else z_BCHW


# Sizes that fill no tile; groups of 3, 10 and 40 channels; more than one tile of pixels, and of channels.
@DTYPES
@pytest.mark.parametrize(
    ("samples", "channels", "height", "width", "groups", "silu"),
    [(2, 24, 9, 10, 8, True), (2, 24, 9, 10, 8, False), (1, 20, 5, 3, 2, True), (1, 80, 3, 3, 2, True)],
)
def test_group_norm(samples, channels, height, width, groups, silu, dtype, tolerance):
    x = draw(samples, channels, height, width, dtype=dtype, scale=3, shift=7)
    inputs = [x, draw(channels, dtype=dtype), draw(channels + 1, dtype=dtype)[1:]]
    kernel, reference = (
        lambda *args, run=run: run(*args, groups, 1e-5, silu) for run in (group_norm.group_norm, reference_group_norm)
    )
    compare(kernel, reference, inputs, tolerance)
    assert kernel(*inputs).is_contiguous(memory_format=torch.channels_last)


def test_group_norm_of_a_large_mean_loses_no_digits():
    """A mean of 1,000 deviations: squares of the values themselves would cancel to 2 digits."""
    inputs = [draw(1, 4, 9, 10, dtype=torch.float32, shift=1000), *(draw(4, dtype=torch.float32) for _ in range(2))]
    actual, *_ = outcome(lambda *args: group_norm.group_norm(*args, 2, 1e-5, False), inputs, torch.float32, DEVICE)
    expected = F.group_norm(inputs[0].double().cpu(), 2, *(x.double().cpu() for x in inputs[1:]))
    assert (actual - expected).abs().max() < 3e-4


@DTYPES
@pytest.mark.parametrize(("shape", "programs"), [((3, 50, 24), 512), ((1, 40), 512), ((7, 100, 24), 2)])
def test_layer_norm_backward(shape, programs, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(layer_norm, "_PROGRAMS", programs)  # 2: each takes several tiles
    width = shape[-1]
    inputs = [draw(*shape, dtype=dtype, scale=2, shift=5), draw(width, dtype=dtype), draw(width + 1, dtype=dtype)[1:]]
    kernel, reference = (
        lambda *args: layer_norm.layer_norm(*args, 1e-5),
        lambda x, *args: F.layer_norm(x, (width,), *args, 1e-5),
    )
    compare(kernel, reference, inputs, tolerance)


def reference_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    p = torch.softmax(q @ k.transpose(2, 3) * scale, dim=-1)
    return (p @ v).transpose(1, 2).flatten(2), p.mean(dim=1)


# Sizes that fill no tile; several tiles in a chunk, and several chunks; a gradient of one result, and of both.
@DTYPES
@pytest.mark.parametrize(("samples", "tokens", "words", "heads", "head"), [(2, 70, 19, 3, 24), (1, 9, 5, 1, 8)])
@pytest.mark.parametrize("results", ["out", "map", "both"])
def test_cross_attention(samples, tokens, words, heads, head, results, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(cross_attention, "_PROGRAMS", 6)  # two chunks, of two tiles at most in float32
    width = heads * head
    inputs = [draw(samples, n, width, dtype=dtype, scale=2) for n in (tokens, words)] + [
        draw(samples, words, width, dtype=dtype)
    ]

    def chosen(run: Callable[..., tuple[Tensor, Tensor]], *args: Tensor) -> Tensor:
        out, attention = run(*args, heads, head**-0.5)
        parts = {"out": [out], "map": [attention, 0 * args[2]], "both": [out, attention.to(out.dtype)]}[results]
        return torch.cat([part.flatten() for part in parts])

    kernel, reference = (partial(chosen, run) for run in (cross_attention.cross_attention, reference_attention))
    compare(kernel, reference, inputs, tolerance)


def reference_sparse_experts(x_RD: Tensor, w_RK: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    """Run every expert on every row."""
    h_RKF = F.gelu(torch.einsum("rd,kfd->rkf", x_RD, w1) + b1)
    return torch.einsum("rkf,kdf,rk->rd", h_RKF, w2, w_RK)


# name: (rows, the experts that a row may need, share of pairs)
PAIRS = {
    "some": (150, (0, 1, 2), 0.4),
    "none of one expert": (40, (0, 2), 0.5),
    "all": (9, (0, 1, 2), 1.0),
    "no pair": (5, (), 0.0),
    "one row": (1, (1,), 1.0),
}


def expert_inputs(name: str, dtype: torch.dtype) -> list[Tensor]:
    rows, allowed, share = PAIRS[name]
    experts, width, hidden = 3, 24, 40
    w_RK = torch.zeros(rows, experts, device=DEVICE, dtype=dtype)
    for k in allowed:
        drawn = torch.rand(2, rows, generator=torch.Generator().manual_seed(k)).to(DEVICE, dtype)
        w_RK[:, k] = (drawn[0] + 0.1) * (drawn[1] <= share)
    w1, w2 = draw(experts, hidden, width, dtype=dtype, scale=0.2), draw(experts, width, hidden, dtype=dtype, scale=0.2)
    return [draw(rows, width, dtype=dtype), w_RK, w1, draw(experts, hidden, dtype=dtype), w2]


@DTYPES
@pytest.mark.parametrize("name", PAIRS)
def test_sparse_experts(name, dtype, tolerance, monkeypatch):
    new_empty = Tensor.new_empty

    def nan(*args, **kwargs) -> Tensor:  # what lies behind the last pair must not matter
        made = new_empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", nan)
    inputs = expert_inputs(name, dtype)

    def reference(x: Tensor, w: Tensor, *weights: Tensor) -> Tensor:
        # Pairs of weight 0 are not computed, so their weight has no gradient.
        return reference_sparse_experts(x, torch.where(w > 0, w, w.detach()), *weights)

    def kernel(*args: Tensor) -> Tensor:
        return sparse_experts.sparse_experts(*args, per_row=max(1, len(PAIRS[name][1])))

    compare(kernel, reference, inputs, 1.5 * tolerance)


@DTYPES
@pytest.mark.parametrize("name", PAIRS)
def test_dense_experts(name, dtype, tolerance):
    compare(dense_experts.dense_experts, reference_sparse_experts, expert_inputs(name, dtype), 1.5 * tolerance)


def test_dense_experts_keep_no_hidden_units():
    kept: list[Tensor] = []
    inputs = [x.requires_grad_() for x in expert_inputs("some", torch.float32)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x), lambda x: x):
        dense_experts.dense_experts(*inputs)
    assert sum(x.numel() for x in kept) == sum(x.numel() for x in inputs)


@pytest.mark.parametrize("rows", [37, 16, 1])
def test_pairs_of_several_tiles(rows, monkeypatch):
    monkeypatch.setattr(pairs, "_ROWS", 16)
    needed = (torch.rand(rows, 3, generator=torch.Generator().manual_seed(rows)) < 0.5).to(DEVICE)
    needed[:, 1] = False
    found = find_pairs(needed.to(torch.bfloat16), per_row=2)
    expert_P, row_P = needed.t().nonzero(as_tuple=True)
    assert found.ends_K.tolist() == needed.sum(dim=0).cumsum(0).tolist()
    assert torch.equal(found.row_P[: len(row_P)], row_P.int())
    assert torch.equal(found.place_RK[row_P, expert_P], torch.arange(len(row_P), device=DEVICE, dtype=torch.int32))
    assert int((found.place_RK < 0).sum()) == rows * 3 - len(row_P)


def test_pairs_by_hand():
    needed = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 0, 0]], dtype=torch.bool, device=DEVICE)
    found = find_pairs(needed.float(), per_row=2)
    assert len(found.row_P) == 6
    assert found.row_P[:4].tolist() == [0, 2, 0, 1]
    assert found.place_RK.tolist() == [[0, -1, 2], [-1, -1, 3], [1, -1, -1]]
    assert found.ends_K.tolist() == [2, 2, 4]


@pytest.mark.parametrize(
    "kernel", ["group_norm", "layer_norm", "cross_attention", "space_moe", "space_moe_dense", "time_moe"]
)
def test_a_model_takes_the_same_gradients_with_a_kernel(kernel, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # float32 is held to float32
    config = tiny_config(
        model={"channels": [16, 24], "expert_width": [24, 32], "norm_groups": 2, "space_experts": 3, "time_experts": 2},
        train={"micro_batch_size": 2, "global_batch_size": 2},
    )
    torch.manual_seed(0)
    model = RaphaelUNet(config).to(DEVICE)
    batch = synthetic_batch(config, [(0, 1.0), (1, 1.0)], model.num_blocks).to(DEVICE)
    schedule = NoiseSchedule.create(config.diffusion, DEVICE)

    def gradients() -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses, and the gradients in the order of their computation."""
        order: dict[str, Tensor] = {}
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p, name=name: order.update({name: p.grad.clone()}))
            for name, p in model.named_parameters()
        ]
        model.zero_grad()
        losses = compute_losses(model, batch, schedule, config, torch.float32).total
        losses.sum().backward()
        for hook in hooks:
            hook.remove()
        return losses.detach(), order

    losses, expected = gradients()
    use_kernels(model, [kernel], DEVICE)
    other_losses, actual = gradients()
    torch.testing.assert_close(other_losses, losses, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
    assert actual.keys() == expected.keys()
    # ZeRO can reduce gradients in this order, and a rank without rows for its experts does not run their kernels.
    assert kernel != "space_moe" or list(actual) == list(expected)


def test_layers_of_experts_with_kernels_equal_those_without():
    torch.manual_seed(0)
    space, time = SpaceMoE(3, 16, 24, "dense", seed=1).to(DEVICE), TimeMoE(3, 16, 24, seed=2).to(DEVICE)
    h = draw(2, 5, 16, dtype=torch.float32)
    mask = (torch.rand(2, 5, 4) < 0.5).float().to(DEVICE)
    weight = F.one_hot(torch.randint(0, 3, (2, 4)), 3).float().to(DEVICE) / 4
    factor = torch.tensor([1.0, 0.5], device=DEVICE)
    expert, samples = torch.tensor([2, 0], device=DEVICE), torch.tensor([1, 0, 1], device=DEVICE)
    for layer, kernel, arguments in (
        (space, "space_moe", (h, mask, weight)),
        (space, "space_moe_dense", (h, mask, weight)),
        (time, "time_moe", (h, expert, samples, factor)),
    ):
        outs = [layer(*arguments)]
        layer = copy.deepcopy(layer)
        use_kernels(layer, [kernel], DEVICE)
        outs.append(layer(*arguments))
        first, second = (out[0] if isinstance(out, tuple) else out for out in outs)
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-5)
