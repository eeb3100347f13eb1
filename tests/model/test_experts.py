"""Products of stacked experts: grouped, dense and MegaBlocks' equal a loop, without waits and with all gradients.

Shape legend: B samples, N image tokens, R rows, K experts, D width, F hidden width.
"""

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.experts import Experts, add_bias, expert_of_rows
from raphael_dist.model.moe import SPACE_BACKENDS, SpaceMoE, TimeMoE
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.training.startup import expert_loop_warnings
from raphael_dist.training.throughput import forward_flops
from tests.lib.synthetic import synthetic_batch, tiny_config
from tests.model.test_moe import HIDDEN, B, D, K, close

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
    for item, other in zip(*(torch.autograd.grad(o.square().sum(), parameters) for o in (grouped, loop)), strict=True):
        close(item, other, 2 * tolerance)


@pytest.mark.parametrize("bias", [False, True])
def test_experts_with_no_rows_at_all_still_give_every_weight_a_gradient(bias):
    """The backward pass of the grouped product fails without rows, and the counts must not be read."""
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
    """Meta tensors have no values to read. A whole layer runs on them as on a GPU."""
    with torch.device("meta"):
        layer = TimeMoE(4, 16, 32, "geglu").bfloat16()
        h_BND = torch.zeros(6, 3, 16, dtype=torch.bfloat16, requires_grad=True)
        expert_B, samples_K = torch.zeros(6, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
        out = layer(h_BND, expert_B, samples_K, torch.ones(6))
        space = SpaceMoE(4, 16, 32, "auto", seed=0).bfloat16()
        dense, _ = space(h_BND, torch.ones(6, 3, 5), torch.zeros(6, 5, 4))
    for result, module in ((out, layer), (dense, space)):
        gradients = torch.autograd.grad(result.float().sum(), [h_BND, *module.parameters()])
        assert [g.shape for g in gradients] == [h_BND.shape, *(p.shape for p in module.parameters())]


def test_bias_gradient_is_summed_in_float32_over_many_rows():
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
def test_dense_backend_saves_one_hidden_activation_and_no_weights(dtype):
    experts, rows = Experts(K, 32, 128).to(dtype), 50
    x_RD, w_RK = torch.randn(rows, 32, dtype=dtype), torch.rand(rows, K, dtype=dtype, requires_grad=True)
    known = {p.data_ptr() for p in experts.parameters()} | {x_RD.data_ptr()}
    saved = {}

    def keep(t: Tensor) -> Tensor:
        if t.data_ptr() not in known:
            saved[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        experts.dense(x_RD, w_RK)
    hidden = rows * K * 128 * x_RD.element_size()
    # Besides it the experts' outputs, for the gates, which are narrower, and the weights of a row.
    assert hidden <= sum(saved.values()) <= hidden + rows * K * (32 + 1) * x_RD.element_size()


def test_initial_weights_do_not_depend_on_the_number_of_experts():
    whole, part = Experts(6, D, HIDDEN, seed=4), Experts(3, D, HIDDEN, seed=4)
    for item, other in zip(whole.parameters(), part.parameters(), strict=True):
        assert torch.equal(item[:3], other)
    assert not torch.equal(whole.w1[0], whole.w1[1])


def test_gradients_arrive_in_one_order_however_the_experts_run():
    """ZeRO reduces gradients in the order of their computation, and ranks can use different backends or have no rows."""
    orders = set()
    for backend in SPACE_BACKENDS:
        for mask in (torch.ones(B, 4, 3), torch.zeros(B, 4, 3)):
            layer, order = SpaceMoE(K, D, HIDDEN, backend, seed=1), []
            for name, p in layer.named_parameters():
                p.register_post_accumulate_grad_hook(lambda _, name=name, order=order: order.append(name))
            weight = F.one_hot(torch.arange(3).expand(B, 3), K).float() / 3
            layer(torch.randn(B, 4, D, requires_grad=True), mask, weight)[0].sum().backward()
            orders.add(tuple(order))
    assert len(orders) == 1
    assert len(orders.pop()) == 6


def test_megablocks_backend_passes_rows_and_weights_in_the_right_form(monkeypatch):
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


BFLOAT16 = {"dtype": "bfloat16"}

MEGABLOCKS = {  # the layout of a kernel that the package `kernels` loads, with a product of our own
    "__init__.py": "from . import gg_ops\n",
    "gg_ops.py": """import torch

def gmm(x, w, sizes, trans_b):
    assert trans_b
    return torch.cat([rows @ w[k].t() for k, rows in enumerate(x.split(sizes.tolist()))])
""",
    "metadata.json": '{"name": "megablocks", "id": "megablocks", "version": 1, "license": "x", "python-depends": [], '
    '"backend": {"type": "cpu"}}',
}


def write_kernel(folder: Path) -> Path:
    build = folder / "build" / "torch-cpu"
    build.mkdir(parents=True)
    for name, text in MEGABLOCKS.items():
        (build / name).write_text(text)
    return folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="the folder of this test is for CPUs")
def test_megablocks_from_a_local_folder_equals_the_loop(tmp_path):
    pytest.importorskip("kernels", reason="needs the package kernels")
    config = tiny_config(
        model={"expert_backend": "megablocks", "megablocks_folder": str(write_kernel(tmp_path)), "time_experts": 2},
        train=BFLOAT16,
    )
    layers = [m for m in RaphaelUNet(config).modules() if isinstance(m, TimeMoE)]
    assert all(layer.use_megablocks and layer.megablocks_folder == str(tmp_path) for layer in layers)
    x, counts, gradients = torch.randn(7, layers[0].dim), torch.tensor([4, 3]), []
    for layers[0].use_megablocks in (False, True):
        layers[0].zero_grad()
        out = layers[0].apply_sorted(x, counts)
        out.square().sum().backward()
        gradients.append([out, *(p.grad.clone() for p in layers[0].parameters())])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_folder_without_the_kernel_is_refused_in_one_line(tmp_path, monkeypatch):
    def get_local_kernel(folder: Path) -> None:
        raise FileNotFoundError(f"Cannot find a build variant for this system in {folder}:\n\nmore lines")

    model = {"expert_backend": "megablocks", "megablocks_folder": str(tmp_path)}
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(UserError, match=r"requires the package kernels, which is not installed\. Run `pip install kernels"):
        RaphaelUNet(tiny_config(model=model, train=BFLOAT16))
    monkeypatch.setitem(sys.modules, "kernels", types.SimpleNamespace(get_local_kernel=get_local_kernel))
    with pytest.raises(UserError, match=r"must hold a build of .* fails: Cannot find a build variant .*Download") as error:
        RaphaelUNet(tiny_config(model=model, train=BFLOAT16))
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(
        UserError, match=r"model.megablocks_folder=.* requires model.expert_backend=megablocks, but it is auto"
    ):
        tiny_config(model={**model, "expert_backend": "auto"})


def test_flops_of_megablocks_product_are_counted(monkeypatch):
    def unseen(*_, **__):
        raise AssertionError("while counting, torch's own product replaces it")

    monkeypatch.setitem(sys.modules, "grouped_gemm", types.ModuleType("grouped_gemm"))
    monkeypatch.setitem(sys.modules, "grouped_gemm.ops", types.SimpleNamespace(gmm=unseen))
    actual = []
    for backend in ("dense", "megablocks"):
        config = tiny_config(model={"expert_backend": backend}, train=BFLOAT16)
        model = RaphaelUNet(config)
        batch = synthetic_batch(config, [(p, 1.0) for p in range(4)], model.num_blocks)
        actual.append(forward_flops(model, batch, NoiseSchedule.create(config.diffusion), config, torch.float32))
    assert actual[0] == actual[1]
    assert all(m.use_megablocks for m in model.modules() if isinstance(m, Experts))


def test_megablocks_in_float32_is_refused():
    message = "model.expert_backend=megablocks requires train.dtype=bfloat16, but it is float32.*model.expert_backend=auto"
    with pytest.raises(UserError, match=message):
        tiny_config(model={"expert_backend": "megablocks"})


def test_megablocks_without_grouped_gemm_is_refused_with_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "grouped_gemm", None)
    command = r"GROUPED_GEMM_CUTLASS=1 pip install --no-build-isolation --no-deps grouped_gemm==0\.3\.0"
    with pytest.raises(UserError, match=rf"model.expert_backend=megablocks requires the package grouped_gemm.*{command}"):
        RaphaelUNet(tiny_config(model={"expert_backend": "megablocks"}, train=BFLOAT16))


def test_experts_that_run_one_after_another_on_a_gpu_are_reported():
    aligned = {"model": {"channels": [16, 32], "expert_width": [24, 32]}, "train": BFLOAT16}
    assert expert_loop_warnings(tiny_config(**aligned), torch.device("cuda")) == []
    assert expert_loop_warnings(tiny_config(**aligned | {"train": {}}), torch.device("cpu")) == []
    for at_once in ({"train": {"kernels": ["time_moe"]}}, {"model": {"expert_backend": "megablocks"}, "train": BFLOAT16}):
        assert expert_loop_warnings(tiny_config(**at_once), torch.device("cuda")) == []
    for sections in (aligned | {"train": {}}, aligned | {"model": {"channels": [16, 32], "expert_width": [20, 32]}}):
        (line,) = expert_loop_warnings(tiny_config(**sections), torch.device("cuda"))
        assert "requires train.dtype=bfloat16, and multiples of 8 in model.channels and model.expert_width" in line
