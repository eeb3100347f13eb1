"""model.image_positions: attention can tell where in the image a token lies."""

import math
from pathlib import Path

import pytest
import torch

from raphael_dist.config.schema import Config
from raphael_dist.convert.conversion import convert
from raphael_dist.convert.layouts.diffusers import config_of_experts, expert_json
from raphael_dist.convert.source_checkpoint import parameter_shapes
from raphael_dist.errors import UserError
from raphael_dist.model.layers import SpatialTransformer, image_positions_ND
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.pipeline import RaphaelUNet2D
from tests.lib.checkpoints import KINDS, handmade_canonical, options, random_state
from tests.lib.synthetic import TREE, synthetic_batch, tiny_config

torch.set_num_threads(1)  # tiny products: threads that wait for each other cost ten times the work


def config(positions: bool, **model: object) -> Config:
    return tiny_config(model={**TREE["model"], "image_positions": positions, **model})


def test_sines_of_rows_and_columns() -> None:
    actual = image_positions_ND(2, 3, 2, torch.empty(16))
    rows, columns = [-1.0, 1.0], [-2.0, 0.0, 2.0]  # in cells of the latents, from the middle
    expected = []
    for row in rows:
        for column in columns:
            sines = []
            for place, periods in ((row, [4, 128]), (column, [4 * 32 ** (i / 5) for i in range(6)])):
                sines += [wave(2 * math.pi * place / period) for wave in (math.sin, math.cos) for period in periods]
            expected.append(sines)
    torch.testing.assert_close(actual, torch.tensor(expected))
    assert image_positions_ND(2, 3, 1, torch.empty(5, 13, dtype=torch.bfloat16)).shape == (6, 13)


def test_a_place_means_the_same_in_a_wider_image_and_on_every_level() -> None:
    narrow, wide = image_positions_ND(4, 8, 1, torch.empty(16)), image_positions_ND(4, 16, 1, torch.empty(16))
    assert torch.equal(narrow.view(4, 8, 16), wide.view(4, 16, 16)[:, 4:12])
    model = RaphaelUNet(config(True, attention=[True, True]))
    sizes = {m.proj_in.in_features: m.token_size for m in model.modules() if isinstance(m, SpatialTransformer)}
    assert sizes == {16: 1, 24: 2}


def test_tokens_of_a_flat_image_differ_only_with_positions() -> None:
    for positions in (False, True):
        torch.manual_seed(0)
        model = RaphaelUNet(config(positions))
        transformer = next(m for m in model.modules() if isinstance(m, SpatialTransformer))
        tokens_ND = transformer.to_tokens(torch.ones(1, 16, 4, 6))[0]
        distances = torch.cdist(tokens_ND, tokens_ND) + torch.eye(24)
        assert bool((distances > 0.1).all()) is positions
    assert parameter_shapes(config(False)) == parameter_shapes(config(True))


def test_an_exported_unet_has_its_positions() -> None:
    torch.manual_seed(0)
    model, exported = RaphaelUNet(config(True)), RaphaelUNet2D.from_config(expert_json(config(True), RaphaelUNet2D))
    exported.load_state_dict(model.state_dict())
    batch = synthetic_batch(config(True), [(p, 1.0) for p in range(2)], model.num_blocks)
    inputs = (batch.x0, batch.timestep, batch.text, batch.text_mask, batch.end)
    assert torch.equal(exported(*inputs).sample, model(*inputs).prediction)
    without = RaphaelUNet(config(False))
    without.load_state_dict(model.state_dict())
    assert not torch.allclose(without(*inputs).prediction, model(*inputs).prediction)


def test_exports_from_before_the_option_have_none() -> None:
    fields = expert_json(config(True), RaphaelUNet2D)
    assert config_of_experts(fields, Path("unet"), {}, None).model.image_positions
    del fields["image_positions"]
    assert not config_of_experts(fields, Path("unet"), {}, None).model.image_positions


def test_diffusers_has_no_class_for_a_dense_model_with_positions(tmp_path: Path) -> None:
    dense = tiny_config(
        model={**TREE["model"], "space_experts": 0, "time_experts": 0, "time_activation": "geglu",
               "expert_width": [64, 96], "image_positions": True},
        edge={"weight": 0.0},
    )  # fmt: skip
    handmade_canonical(tmp_path / "start", dense, random_state(dense, KINDS))
    with pytest.raises(UserError, match=r"model\.image_positions"):
        convert("canonical", tmp_path / "start", "dense", tmp_path / "dense", options("dense"))
