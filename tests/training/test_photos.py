"""The preset `photos`: a folder of images becomes shards and is trained on, from tiny files of Stable Diffusion's form."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from raphael_dist.convert.layouts import open_checkpoint
from raphael_dist.reporting.run_files import read_routes, read_run
from raphael_dist.training.metrics_files import read_metrics
from tests.data_prep.test_data_prep import folder_of
from tests.lib.launch import ROOT
from tests.lib.parts import WIDTH, save_text, save_vae

QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
PARTS = "models/stable-diffusion-2-base"  # where the preset expects the files
TINY = [
    "image.buckets=[[64,64]]", f"model.text_width={WIDTH}", "model.channels=[32,64]", "model.attention=[true,false]",
    "model.expert_width=[128,256]", "model.layers_per_block=1", "model.head_dim=8", "model.norm_groups=8",
    "model.gate_width=8", "edge.channels=4", "train.dtype=float32", "train.max_steps=2", "train.global_batch_size=4",
    "train.micro_batch_size=2", "train.val_every=2", "train.sample_every=0", "sample.steps=2",
    "data.val_shards=shards/val-*.tar", "data.shards=shards/train-*.tar", "sample.prompts=[my picture]",
]  # fmt: skip


def save_stable_diffusion(folder: Path) -> None:
    """Write VAE, text encoder, dense U-Net and scheduler as a diffusers pipeline's folder has them."""
    save_vae(folder / "vae", "sd")
    save_text(folder, "CLIP H")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=WIDTH, norm_num_groups=8,
        attention_head_dim=(4, 8), use_linear_projection=True,
    )  # fmt: skip
    unet.save_pretrained(folder / "unet")
    DDIMScheduler(beta_schedule="scaled_linear", prediction_type="epsilon").save_pretrained(folder / "scheduler")


def python(folder: Path, *words: str) -> None:
    """Run a program of the repository in a folder."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("weights", ["unet", pytest.param("none", marks=pytest.mark.slow)])
def test_photos_trains_on_a_folder_of_images(weights: str, tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="needs scikit-image (the extra `edges`)")
    save_stable_diffusion(tmp_path / PARTS)
    folder_of(tmp_path / "my-images", 8)
    python(tmp_path, "tools/prepare_data.py", "my-images", "--out", "shards", "--held-out", "0.2", "--edges", "canny")
    scratch = ["run.init_from=null", "optim.lr=1e-4"] if weights == "none" else []
    python(tmp_path, "raphael_dist/train.py", "--config", "photos", *TINY, *scratch)
    assert [step for step, _ in read_metrics(tmp_path / "runs/photos/metrics.jsonl")["val/loss"]] == [2]
    assert list(read_run(tmp_path / "runs/photos").samples) == [2]
    routes = read_routes(tmp_path / "runs/photos/samples/step-00000002.routes.json")
    assert len(routes["words"]) == len(routes["space"]) == len(routes["regions"]) > 0
    with (
        open_checkpoint("auto", tmp_path / "runs/photos") as run,
        open_checkpoint("auto", tmp_path / PARTS / "unet") as unet,
    ):
        trained, source = (each.read("master", QUERY, 0, 100) for each in (run, unet))
    assert torch.allclose(trained, source, atol=1e-3) == (weights == "unet")
