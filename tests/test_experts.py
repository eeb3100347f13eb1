"""The products of stacked experts: grouped, wide and MegaBlocks' equal a loop, and none waits or loses a gradient.

Shape legend: B samples, N image tokens, R rows, K experts, D width, F hidden width.
"""

import sys
import types

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.experts import Experts, add_bias, expert_of_rows
from raphael_dist.model.moe import FORMS, SpaceMoE, TimeMoE
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.training.measure import forward_flops
from tests.synthetic import synthetic_batch, tiny_config
from tests.test_moe import HIDDEN, B, D, K, close

torch.set_num_threads(1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("activation", ["gelu", "geglu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("counts", [[8, 8, 8, 0], [0, 13, 0, 11], [0, 0, 0, 24]])
def test_grouped_products_equal_the_loop_over_experts(counts, bias, activation, dtype, tolerance):
    torch.manual_seed(0)
    layer = Experts(4, 16, 32, activation).to(dtype)
    x_RD = torch.randn(24, 16, dtype=dtype, requires_grad=True)
    parameters = [x_RD, layer.w1, layer.b1, layer.w2, *([layer.b2] if bias else [])]
    loop, grouped = layer.apply_sorted(x_RD, torch.tensor(counts), bias), layer._grouped(x_RD, torch.tensor(counts), bias)
    close(grouped, loop, tolerance)
    for one, other in zip(*(torch.autograd.grad(o.square().sum(), parameters) for o in (grouped, loop)), strict=True):
        close(one, other, 2 * tolerance)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_experts_with_no_rows_at_all_still_give_every_weight_a_gradient(on_gpu, bias, monkeypatch):
    """Whatever the device: the grouped product fails in its backward then, and the counts must not be read to know it."""
    monkeypatch.setattr("raphael_dist.model.experts._use_grouped_mm", lambda x, hidden: on_gpu)
    layer = Experts(3, 16, 32)
    x_RD = torch.zeros(0, 16, requires_grad=True)
    unreadable_K = torch.zeros(3, dtype=torch.int64, device="meta")
    out = layer.apply_sorted(x_RD, unreadable_K, bias)
    assert out.shape == (0, 16)
    gradients = torch.autograd.grad(out.sum(), [x_RD, *layer.parameters()], allow_unused=True)
    assert [g is None for g in gradients] == [False] * 4 + [not bias]
    assert all(not g.any() for g in gradients if g is not None)
    with pytest.raises(RuntimeError, match="stride"):  # still so in this version of torch?
        layer.bfloat16()._grouped(x_RD.bfloat16(), torch.tensor([0, 0, 0]), bias).sum().backward()


def test_the_grouped_product_never_reads_its_counts():
    """On meta tensors, which have nothing to read, a whole layer runs as it does on a GPU."""
    with torch.device("meta"):
        layer = TimeMoE(4, 16, 32, "geglu").bfloat16()
        h_BND = torch.zeros(6, 3, 16, dtype=torch.bfloat16, requires_grad=True)
        expert_B, samples_K = torch.zeros(6, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
        out = layer(h_BND, expert_B, samples_K, torch.ones(6))
        space = SpaceMoE(4, 16, 32, "auto", seed=0).bfloat16()
        wide, _ = space(h_BND, torch.ones(6, 3, 5), torch.zeros(6, 5, 4))
    for result, module in ((out, layer), (wide, space)):
        gradients = torch.autograd.grad(result.float().sum(), [h_BND, *module.parameters()])
        assert [g.shape for g in gradients] == [h_BND.shape, *(p.shape for p in module.parameters())]


def test_the_gradient_of_a_bias_is_a_float32_sum_however_many_rows_share_it():
    torch.manual_seed(0)
    counts_K = torch.tensor([5000, 0, 3000, 192])
    grad_RF = (torch.randn(8192, 16) + 0.1).bfloat16()
    bias_KF = torch.zeros(4, 16, dtype=torch.bfloat16, requires_grad=True)
    onehot_RK = expert_of_rows(counts_K, 8192)
    exact_KF = onehot_RK.double().t() @ grad_RF.double()

    def error(out_RF: Tensor) -> float:
        (found_KF,) = torch.autograd.grad(out_RF, bias_KF, grad_RF)
        return float((found_KF.double() - exact_KF).norm() / exact_KF.norm())

    assert error(add_bias(torch.zeros_like(grad_RF), onehot_RK.bfloat16(), bias_KF)) < 3e-3  # the last rounding
    assert error(bias_KF[torch.repeat_interleave(counts_K)]) > 3e-2  # adding up in bfloat16


def test_rows_of_an_expert_are_those_between_its_neighbours():
    assert expert_of_rows(torch.tensor([2, 0, 1]), 4).int().tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_wide_form_keeps_one_hidden_activation_and_no_copy_of_its_weights(dtype):
    experts, rows = Experts(K, 32, 128).to(dtype), 50
    x_RD, w_RK = torch.randn(rows, 32, dtype=dtype), torch.rand(rows, K, dtype=dtype, requires_grad=True)
    known = {p.data_ptr() for p in experts.parameters()} | {x_RD.data_ptr()}
    kept = {}

    def keep(t: Tensor) -> Tensor:
        if t.data_ptr() not in known:
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        experts.wide(x_RD, w_RK)
    hidden = rows * K * 128 * x_RD.element_size()
    # Besides it the experts' outputs, for the gates, which are narrower, and the weights of a row.
    assert hidden <= sum(kept.values()) <= hidden + rows * K * (32 + 1) * x_RD.element_size()


def test_an_experts_initial_weights_depend_on_its_global_number_alone():
    whole, part = Experts(6, D, HIDDEN, seed=4), Experts(2, D, HIDDEN, seed=4, first_expert=3)
    for one, other in zip(whole.parameters(), part.parameters(), strict=True):
        assert torch.equal(one[3:5], other)
    assert not torch.equal(whole.w1[0], whole.w1[1])


def test_gradients_arrive_in_one_order_however_the_experts_run():
    """ZeRO reduces gradients in their order of arrival; ranks may run their experts in different ways, or on no rows."""
    orders = set()
    for backend in FORMS:
        for mask in (torch.ones(B, 4, 3), torch.zeros(B, 4, 3)):
            layer, order = SpaceMoE(K, D, HIDDEN, backend, seed=1), []
            for name, p in layer.named_parameters():
                p.register_post_accumulate_grad_hook(lambda _, name=name, order=order: order.append(name))
            weight = F.one_hot(torch.arange(3).expand(B, 3), K).float() / 3
            layer(torch.randn(B, 4, D, requires_grad=True), mask, weight)[0].sum().backward()
            orders.add(tuple(order))
    assert len(orders) == 1
    assert len(orders.pop()) == 6


def test_the_megablocks_backend_hands_over_rows_and_weights_as_its_product_takes_them(monkeypatch):
    def gmm(x, w, sizes, trans_b):  # consecutive rows times one [out, in] matrix each, transposed
        assert trans_b
        assert x.is_contiguous()
        assert (sizes.dtype, sizes.device) == (torch.int64, x.device)  # on the device: built with GROUPED_GEMM_CUTLASS=1
        return torch.cat([rows @ w[k].t() for k, rows in enumerate(x.split(sizes.tolist()))])

    monkeypatch.setitem(sys.modules, "grouped_gemm", types.ModuleType("grouped_gemm"))
    monkeypatch.setitem(sys.modules, "grouped_gemm.ops", types.SimpleNamespace(gmm=gmm))
    experts = Experts(3, 8, 16, "gelu", seed=1)
    x, counts = torch.randn(7, 8), torch.tensor([4, 0, 3])
    for bias in (False, True):
        experts.use_megablocks = False
        expected = experts.apply_sorted(x, counts, bias)
        experts.use_megablocks = True
        torch.testing.assert_close(experts.apply_sorted(x, counts, bias), expected)


def test_the_flops_of_a_product_that_torch_does_not_see_are_counted_too(monkeypatch):
    def unseen(*_, **__):
        raise AssertionError("while counting, torch's own product stands for it")

    monkeypatch.setitem(sys.modules, "grouped_gemm", types.ModuleType("grouped_gemm"))
    monkeypatch.setitem(sys.modules, "grouped_gemm.ops", types.SimpleNamespace(gmm=unseen))
    found = []
    for backend in ("wide", "megablocks"):
        config = tiny_config(model={"space_backend": backend})
        model = RaphaelUNet(config)
        batch = synthetic_batch(config, [(p, 1.0) for p in range(4)], model.num_blocks)
        found.append(forward_flops(model, batch, NoiseSchedule.create(config.diffusion), config, torch.float32))
    assert found[0] == found[1]
    assert all(m.use_megablocks for m in model.modules() if isinstance(m, Experts))


def test_the_megablocks_backend_without_grouped_gemm_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "grouped_gemm", None)
    command = r"GROUPED_GEMM_CUTLASS=1 pip install --no-build-isolation --no-deps grouped_gemm==0\.3\.0"
    with pytest.raises(UserError, match=rf"model.space_backend: megablocks needs the package grouped_gemm.*{command}"):
        RaphaelUNet(tiny_config(model={"space_backend": "megablocks"}))
