"""Tests that require a GPU: NCCL, bfloat16 training, the grouped matrix product."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch

from raphael_dist.model.cuda_graphs import replay_cuda_graphs
from raphael_dist.model.moe import SpaceMoE, TimeMoE, reference_space_moe
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.training.metrics_files import read_metrics
from tests.lib.launch import run_ranks, train_many
from tests.lib.synthetic import synthetic_batch, tiny_config
from tests.training.test_training import arguments

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("backend", ["grouped", "dense", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_space_moe_on_a_gpu_equals_the_reference_on_the_cpu(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = SpaceMoE(6, 64, 128, backend, seed=0)  # type: ignore[arg-type]
    h, mask = torch.randn(2, 50, 64), (torch.rand(2, 50, 9) < 0.3).float()
    weight = torch.nn.functional.one_hot(torch.randint(0, 6, (2, 9)), 6).float() / 9
    expected = reference_space_moe(layer, layer.norm(h), mask, weight)
    layer, inputs = layer.to("cuda", dtype), h.to("cuda", dtype).requires_grad_()
    out, _ = layer(inputs, mask.cuda(), weight.cuda())
    out.float().square().sum().backward()
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert (out.float().cpu() - expected).abs().max() <= tolerance * expected.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def _time_layer(activation: str = "gelu") -> tuple[TimeMoE, list]:
    torch.manual_seed(0)
    layer = TimeMoE(4, 64, 128, activation, seed=1).to("cuda", torch.bfloat16)  # type: ignore[arg-type]
    expert = torch.tensor([3, 0, 3, 1, 0, 3], device="cuda")
    samples = torch.tensor([2, 1, 0, 3], device="cuda")
    h = torch.randn(6, 50, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return layer, [h, expert, samples, torch.ones(6, device="cuda")]


def test_expert_layers_wait_for_nothing_on_a_gpu() -> None:
    layer, inputs = _time_layer()
    space = SpaceMoE(4, 64, 128, "auto", seed=2).to("cuda", torch.bfloat16)
    mask, weight = torch.ones(6, 50, 9, device="cuda"), torch.full((6, 9, 4), 1 / 36, device="cuda")
    layer(*inputs).sum().backward()  # libraries may wait when they are first used
    space(inputs[0], mask, weight)[0].sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(*inputs).sum().backward()
        space(inputs[0], mask, weight)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("activation", ["gelu", "geglu"])
@pytest.mark.parametrize("package", ["torch", "grouped_gemm"])
def test_time_moe_on_a_gpu_equals_the_loop_in_float32(activation: str, package: str) -> None:
    if package == "grouped_gemm":
        pytest.importorskip("grouped_gemm")
    layer, inputs = _time_layer(activation)
    layer.use_megablocks = package == "grouped_gemm"
    exact = copy.deepcopy(layer).to("cpu", torch.float32)
    exact.use_megablocks = False
    actual = layer(*inputs)
    expected = exact(*(t.detach().cpu().float() if t.is_floating_point() else t.cpu() for t in inputs))
    assert (actual.float().cpu() - expected).abs().max() <= 3e-2 * expected.abs().max()
    actual.float().square().sum().backward()
    expected.square().sum().backward()
    for (name, p), q in zip(layer.named_parameters(), exact.parameters(), strict=True):
        assert p.grad is not None, name
        assert (p.grad.float().cpu() - q.grad).norm() <= 2e-2 * q.grad.norm(), name


def test_feature_maps_are_channels_last_at_every_convolution_on_a_gpu() -> None:
    config = tiny_config()
    model = RaphaelUNet(config).cuda()
    seen: dict[str, bool] = {}
    is_last = partial(torch.Tensor.is_contiguous, memory_format=torch.channels_last)
    for name, m in model.named_modules():
        if isinstance(m, torch.nn.Conv2d) and ".edge." not in name:
            m.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: is_last(x[0])}))
    batch = synthetic_batch(config, [(p, 1.0) for p in range(4)], model.num_blocks).to(torch.device("cuda"))
    model(batch.x0, batch.timestep, batch.text, batch.text_mask, batch.end)
    assert len(seen) > 20
    assert not [name for name, last in seen.items() if not last]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_gpu_trains_in_bfloat16_and_resumes(tmp_path: Path, stage: int) -> None:
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    extra = ("train.dtype=bfloat16", "model.gate_noise=0")
    run_ranks(arguments(tmp_path / "run", cache, stage, "train.max_steps=6", *extra), 1, gpus=True)
    output = run_ranks(arguments(tmp_path / "run", cache, stage, "train.max_steps=30", *extra), 1, gpus=True)[0]
    assert "resumed at step 6" in output
    losses = [loss for _, loss in read_metrics(tmp_path / "run" / "metrics.jsonl")["train/loss"]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("stage", "micro_steps", "model", "compiled"),
    [
        (1, 1, {}, False),
        (2, 1, {}, False),
        (2, 3, {}, False),
        (2, 1, {"checkpoint_activations": "blocks"}, False),
        (2, 1, {"checkpoint_activations": "all", "time_activation": "geglu", "shared_expert": 1.0}, False),
        (2, 1, {}, True),
    ],
)
def test_cuda_graphs_take_the_same_steps(tmp_path: Path, stage: int, micro_steps: int, model: dict, compiled: bool) -> None:
    train = {"global_batch_size": 12, "micro_batch_size": 12 // micro_steps, "dtype": "bfloat16"}
    specs = [
        {
            "sections": {
                "train": {**train, "compile": compiled, "cuda_graphs": graphs},
                "model": {"expert_width": [24, 32], **model},
            },
            "deepspeed": {"zero_optimization": {"stage": stage}},
            "steps": 4,
        }
        for graphs in (False, True)
    ]
    eager, replayed = train_many(tmp_path, 1, specs, gpus=True)
    assert replayed["losses"] == pytest.approx(eager["losses"], rel=1e-3)
    assert replayed["norms"] == pytest.approx(eager["norms"], rel=1e-2)
    for name, weight in eager["weights"].items():
        torch.testing.assert_close(replayed["weights"][name], weight, rtol=1e-2, atol=2e-5)


def test_cuda_graphs_of_several_sizes_share_memory_and_equal_eager() -> None:
    torch.manual_seed(0)
    config = tiny_config(model={"expert_width": [24, 32]}, train={"dtype": "bfloat16"})
    unet = RaphaelUNet(config).to("cuda", torch.bfloat16)
    views = {p: torch.zeros_like(p) for p in unet.parameters()}
    text, mask, end = torch.randn(6, 7, 12), torch.ones(6, 7, dtype=torch.bool), torch.full((6,), 6)

    def gradients(height: int, width: int) -> list[torch.Tensor]:
        x = torch.randn(6, 4, height, width, generator=torch.Generator().manual_seed(height * width))
        out = unet(
            x.to("cuda", torch.bfloat16),
            torch.arange(6, device="cuda") * 150,
            text.to("cuda", torch.bfloat16),
            mask.cuda(),
            end.cuda(),
        )
        torch._foreach_zero_(list(views.values()))  # after a capture, as the engine does
        (out.prediction.float().square().mean() + sum(e.float().square().mean() for e in out.edge_logits)).backward()
        return [views[p].clone() if p.grad is None else p.grad.clone() for p in unet.parameters()]

    sizes = [(8, 8), (8, 16), (16, 8)]
    plain = []
    for size in sizes:
        plain.append(gradients(*size))
        unet.zero_grad()
    replay_cuda_graphs(unet, views)
    taken = []
    for size in [*sizes, *reversed(sizes)]:
        actual = gradients(*size)
        for (name, _), local, reference in zip(unet.named_parameters(), actual, plain[sizes.index(size)], strict=True):
            torch.testing.assert_close(local, reference, rtol=1e-2, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        taken.append(torch.cuda.memory_reserved())
    assert taken[2] <= 2.2 * taken[0], "the second and the third size use the memory of the first"
