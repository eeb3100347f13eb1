"""What only a GPU can show: NCCL, bfloat16 training, the grouped matrix product. Skipped elsewhere."""

from pathlib import Path

import pytest
import torch

from raphael_dist.model.moe import SpaceMoE, literal_space_moe
from raphael_dist.training.metrics import read_metrics
from tests.launch import run_ranks
from tests.test_training import arguments

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("backend", ["grouped", "wide", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_space_moe_on_a_gpu_equals_the_literal_formula_on_the_cpu(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = SpaceMoE(6, 64, 128, backend, seed=0)  # type: ignore[arg-type]
    h, mask = torch.randn(2, 50, 64), (torch.rand(2, 50, 9) < 0.3).float()
    weight = torch.nn.functional.one_hot(torch.randint(0, 6, (2, 9)), 6).float() / 9
    expected = literal_space_moe(layer, layer.norm(h), mask, weight)
    layer, inputs = layer.to("cuda", dtype), h.to("cuda", dtype).requires_grad_()
    out, _ = layer(inputs, mask.cuda(), weight.cuda())
    out.float().square().sum().backward()
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert (out.float().cpu() - expected).abs().max() <= tolerance * expected.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_gpu_trains_in_bfloat16_and_resumes(tmp_path: Path, stage: int) -> None:
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    more = ("train.dtype=bfloat16", "model.gate_noise=0")
    run_ranks(arguments(tmp_path / "run", cache, stage, "train.max_steps=6", *more), 1)
    output = run_ranks(arguments(tmp_path / "run", cache, stage, "train.max_steps=30", *more), 1)[0]
    assert "resumed at step 6" in output
    losses = [loss for _, loss in read_metrics(tmp_path / "run" / "metrics.jsonl")["train/loss"]]
    assert losses[-1] < losses[0]
