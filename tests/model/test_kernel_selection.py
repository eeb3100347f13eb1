"""`train.kernels` refuses what a kernel cannot work with, and all kernels compile for GPUs without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raphael_dist.config.schema import Config
from raphael_dist.engine.ds_config import merge
from raphael_dist.errors import UserError
from raphael_dist.model.kernels.selection import use_kernels
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.training.dry_run import problems
from tests.lib.synthetic import tiny_config

pytest.importorskip("triton", reason="needs the package triton")

ROOT = Path(__file__).parents[2]

FITS = {"expert_width": [24, 32]}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"kernels": ["group_norm"], "compile": True}}, "train.compile=false, but it is true"),
        (
            {"train": {"kernels": ["cross_attention"]}, "text": {"max_tokens": 129}},
            "text.max_tokens up to 128, but it is 129",
        ),
        ({"train": {"kernels": ["space_moe"]}, "model": {"space_experts": 0}}, "model.space_experts above 0"),
        ({"train": {"kernels": ["space_moe"]}, "model": {"expert_backend": "grouped"}}, "backend=auto, but it is grouped"),
        ({"train": {"kernels": ["space_moe", "space_moe_dense"]}}, "train.kernels without space_moe, but both compute"),
        ({"train": {"kernels": ["time_moe"]}, "model": {"time_activation": "geglu"}}, "time_activation=gelu"),
        ({"train": {"kernels": ["time_moe"]}, "parallel": {"time_ep": 2}}, "parallel.time_ep=1, but it is 2"),
        ({"train": {"kernels": ["adamw"]}, "optim": {"kind": "sgd"}}, "optim.kind=adamw, but it is sgd"),
        ({"train": {"kernels": ["deferred_update"]}}, "train.kernels with adamw, but it has none"),
        (
            {"train": {"kernels": ["adamw", "deferred_update"], "spike_action": "skip"}},
            "train.spike_action=warn, but it is skip",
        ),
        (
            {"train": {"kernels": ["space_moe"]}, "lora": {"rank": 2, "targets": ["experts"]}, "run": {"init_from": "x"}},
            "lora.targets without experts",
        ),
    ],
)
def test_settings_that_a_kernel_cannot_work_with_are_refused(sections, message):
    pattern = rf"train.kernels=\[.*\]: the kernel \w+ requires .*{message}.*remove \w+ from train.kernels"
    with pytest.raises(UserError, match=pattern) as error:
        tiny_config(**sections)
    assert len(error.value.args) == 1


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 3}, "ZeRO stage 1 or 2, but the DeepSpeed config has stage 3"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer.device=cpu"),
    ],
)
def test_fused_update_is_refused_without_contiguous_gradients(zero, message):
    config = tiny_config(train={"kernels": ["adamw"]})
    with pytest.raises(
        UserError, match=f"train.kernels with adamw requires .*{message}.* or remove adamw from train.kernels"
    ):
        merge(config, {"zero_optimization": zero}, 1, 2)


def test_kernels_without_triton_are_refused_before_the_run(monkeypatch, tmp_path):
    config = tiny_config(train={"kernels": ["adamw"]}, run={"dir": str(tmp_path)})
    assert not [line for line in problems(config) if "train.kernels" in line]
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    message = r"train.kernels=['adamw'] requires the package triton, which is not installed. Run `pip install"
    assert [line for line in problems(config) if line.startswith(message)]


def test_kernels_are_refused_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="requires a GPU, but the device is cpu"):
        use_kernels(RaphaelUNet(tiny_config()), ["group_norm"], torch.device("cpu"))


def test_a_model_uses_no_kernel_by_default():
    assert Config().train.kernels == ()
    model = RaphaelUNet(tiny_config())
    use_kernels(model, (), torch.device("cpu"))
    assert not [
        name for name, m in model.named_modules() if getattr(m, "use_kernel", False) or getattr(m, "use_dense_kernel", False)
    ]


# ---- compilation for GPUs ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_compile_for_two_gpus_and_spill_no_registers():
    command = [sys.executable, "tools/bench.py", "kernels", "--targets", "80", "90"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:] if line]
    assert {row[0] for row in rows} == {
        "group_norm",
        "layer_norm",
        "space_moe",
        "space_moe_dense",
        "cross_attention",
        "adamw",
    }
    assert not [row for row in rows for cell in row[2:] if int(cell.split(", ")[1]) > 0]


def test_flops_of_kernels_are_counted_in_the_first_pass_of_a_process():
    program = """
import torch
from tests.lib.synthetic import synthetic_batch, tiny_config
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.kernels.selection import use_kernels
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.training.throughput import forward_flops

config = tiny_config()
model = RaphaelUNet(config)
use_kernels(model, ["space_moe", "cross_attention"], torch.device("cpu"))
batch = synthetic_batch(config, [(0, 1.0), (1, 1.0)], model.num_blocks)
for _ in range(2):
    print(forward_flops(model, batch, NoiseSchedule.create(config.diffusion), config, torch.float32))
"""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    first, second = done.stdout.split()
    assert first == second, done.stderr
