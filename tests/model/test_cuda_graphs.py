"""Requirements of `train.cuda_graphs`. tests/engine/test_gpu.py compares replayed with eager steps."""

import pytest
import torch

from raphael_dist.engine.ds_config import merge
from raphael_dist.engine.engine import Engine
from raphael_dist.errors import UserError
from raphael_dist.model.cuda_graphs import replay_cuda_graphs
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel.batch_plan import BatchPlan
from tests.lib.synthetic import tiny_config

ZERO_2 = {"stage": 2}
FITS = {"expert_width": [24, 32]}


@pytest.mark.parametrize(
    ("zero", "sections", "message"),
    [
        ({"stage": 3}, {}, "ZeRO stage 1 or 2, but the DeepSpeed config has stage 3. Use ds_configs/zero2.json"),
        ({"stage": 2, "overlap_comm": True}, {}, "overlap_comm=false, but it is true"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, {}, "offload_optimizer.device=cpu"),
        (
            {"stage": 1},
            {"train": {"global_batch_size": 12, "micro_batch_size": 3}},
            "ZeRO stage 2 if a step has several micro-steps, but the DeepSpeed config has stage 1",
        ),
        (
            ZERO_2,
            {"parallel": {"space_ep": 2, "placement": ["shard"]}},
            "all experts on every rank, but parallel.space_ep=2",
        ),
        (ZERO_2, {"train": {"dtype": "float32"}}, "train.dtype=bfloat16, .* but .* train.dtype=float32"),
        (ZERO_2, {"train": {"check_gradients": True}}, "train.check_gradients=false"),
        (ZERO_2, {"model": {"expert_width": [20, 28]}}, r"multiples of 8 .* model.expert_width=\[20, 28\]"),
        (ZERO_2, {"model": {**FITS, "expert_backend": "grouped"}}, "model.expert_backend=auto or dense, but it is grouped"),
    ],
)
def test_cuda_graphs_are_refused_if_a_requirement_is_not_met(zero, sections, message):
    train = {
        "dtype": "bfloat16",
        "micro_batch_size": 6,
        "global_batch_size": 12,
        "cuda_graphs": True,
        **sections.get("train", {}),
    }
    config = tiny_config(**{"model": FITS, **sections, "train": train})
    with pytest.raises(UserError, match=f"train.cuda_graphs=true requires .*{message}.* or set train.cuda_graphs=false"):
        merge(config, {"zero_optimization": zero}, BatchPlan.of(config, 2).accumulation, 2)


def test_cuda_graphs_are_accepted_and_sampling_runs_without_them():
    sizes = {"image": {"buckets": [[64, 64], [64, 128]]}, "data": {"bucket_run": 12}}
    config = tiny_config(model=FITS, train={"dtype": "bfloat16", "micro_batch_size": 12, "cuda_graphs": True}, **sizes)
    unet = RaphaelUNet(config)
    merge(config, {"zero_optimization": ZERO_2}, 1, 1)
    with pytest.raises(UserError, match="requires a GPU, but the device is cpu"):
        Engine(config, {"zero_optimization": ZERO_2}, BatchPlan.of(config, 1), torch.device("cpu"), unet)
    replay_cuda_graphs(unet, {})
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 12)
    arguments = (x, torch.tensor([3]), text, torch.ones(1, 7, dtype=torch.bool), torch.tensor([6]))
    with torch.no_grad():
        assert torch.equal(unet(*arguments).prediction, RaphaelUNet.forward(unet, *arguments).prediction)
