"""What `train.cuda_graphs` refuses; that replayed steps equal the others is tests/test_gpu.py's."""

import pytest
import torch

from raphael_dist.engine import engine
from raphael_dist.errors import UserError
from raphael_dist.model.graphs import replay
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel.batch_plan import BatchPlan
from tests.synthetic import tiny_config

GPU = torch.device("cuda", 0)
FITS = {"expert_width": [24, 32]}


@pytest.mark.parametrize(
    ("device", "stage", "sections", "said"),
    [
        (torch.device("cpu"), 2, {}, "needs a GPU"),
        (GPU, 3, {}, "goes with ZeRO-1 and 2"),
        (GPU, 1, {"train": {"global_batch": 12, "micro_batch": 3}}, "ZeRO-2 where a step has several micro-steps"),
        (GPU, 2, {"train": {"dtype": "float32"}}, "train.dtype=bfloat16"),
        (GPU, 2, {"train": {"check_gradients": True}}, "without train.check_gradients"),
        (GPU, 2, {"recipe": {"gradient_noise": 0.1}}, "without recipe.gradient_noise"),
        (GPU, 2, {"model": {"expert_width": [20, 28]}}, "multiples of 8"),
        (GPU, 2, {"model": {**FITS, "space_backend": "grouped"}}, "model.space_backend=auto or wide"),
    ],
)
def test_graphs_are_refused_in_one_line_where_they_cannot_be_captured(device, stage, sections, said):
    sections = {"model": FITS, **sections, "train": {"dtype": "bfloat16", "micro_batch": 12, **sections.get("train", {})}}
    config = tiny_config(**sections)
    with pytest.raises(UserError, match=f"train.cuda_graphs: given true, which .*{said}"):
        engine._check_graphs(config, stage, BatchPlan.of(config, 1), device)


def test_graphs_are_taken_where_everything_fits_and_a_pass_without_gradients_runs_as_it_is():
    sizes = {"image": {"buckets": [[64, 64], [64, 128]]}, "data": {"bucket_run": 12}}
    config = tiny_config(model=FITS, train={"dtype": "bfloat16", "micro_batch": 12}, **sizes)
    unet = RaphaelUNet(config)
    engine._check_graphs(config, 2, BatchPlan.of(config, 1), GPU)
    replay(unet, {})
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 12)
    given = (x, torch.tensor([3]), text, torch.ones(1, 7, dtype=torch.bool), torch.tensor([6]))
    with torch.no_grad():
        assert torch.equal(unet(*given).prediction, RaphaelUNet.forward(unet, *given).prediction)
