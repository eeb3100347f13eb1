"""What `train.cuda_graphs` refuses; that replayed steps equal the others is tests/test_gpu.py's."""

import pytest
import torch

from raphael_dist.engine.ds_config import merge
from raphael_dist.engine.engine import Engine
from raphael_dist.errors import UserError
from raphael_dist.model.graphs import replay
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel.batch_plan import BatchPlan
from tests.synthetic import tiny_config

ZERO_2 = {"stage": 2}
FITS = {"expert_width": [24, 32]}


@pytest.mark.parametrize(
    ("zero", "sections", "said"),
    [
        ({"stage": 3}, {}, "goes with ZeRO-1 and 2"),
        ({"stage": 2, "overlap_comm": True}, {}, "without overlap_comm and offload_optimizer"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, {}, "without overlap_comm and offload_optimizer"),
        ({"stage": 1}, {"train": {"global_batch": 12, "micro_batch": 3}}, "ZeRO-2 where a step has several micro-steps"),
        (ZERO_2, {"parallel": {"space_ep": 2, "placement": ["shard"]}}, "experts that every rank has"),
        (ZERO_2, {"train": {"dtype": "float32"}}, "train.dtype=bfloat16"),
        (ZERO_2, {"train": {"check_gradients": True}}, "without train.check_gradients"),
        (ZERO_2, {"recipe": {"gradient_noise": 0.1}}, "without recipe.gradient_noise"),
        (ZERO_2, {"model": {"expert_width": [20, 28]}}, "multiples of 8"),
        (ZERO_2, {"model": {**FITS, "space_backend": "grouped"}}, "model.space_backend=auto or wide"),
    ],
)
def test_graphs_are_refused_in_one_line_where_they_cannot_be_captured(zero, sections, said):
    train = {"dtype": "bfloat16", "micro_batch": 6, "global_batch": 12, "cuda_graphs": True, **sections.get("train", {})}
    config = tiny_config(**{"model": FITS, **sections, "train": train})
    with pytest.raises(UserError, match=f"train.cuda_graphs: given true, which .*{said}"):
        merge(config, {"zero_optimization": zero}, BatchPlan.of(config, 2).accumulation, 2)


def test_graphs_are_taken_where_everything_fits_and_a_pass_without_gradients_runs_as_it_is():
    sizes = {"image": {"buckets": [[64, 64], [64, 128]]}, "data": {"bucket_run": 12}}
    config = tiny_config(model=FITS, train={"dtype": "bfloat16", "micro_batch": 12, "cuda_graphs": True}, **sizes)
    unet = RaphaelUNet(config)
    merge(config, {"zero_optimization": ZERO_2}, 1, 1)
    with pytest.raises(UserError, match="which needs a GPU"):
        Engine(config, {"zero_optimization": ZERO_2}, BatchPlan.of(config, 1), torch.device("cpu"), unet)
    replay(unet, {})
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 12)
    given = (x, torch.tensor([3]), text, torch.ones(1, 7, dtype=torch.bool), torch.tensor([6]))
    with torch.no_grad():
        assert torch.equal(unet(*given).prediction, RaphaelUNet.forward(unet, *given).prediction)
