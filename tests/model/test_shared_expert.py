"""Options that are off by default: a shared expert in each Space-MoE, and time experts with fixed boundaries."""

import math
from typing import Any, cast

import pytest
import torch

from raphael_dist.analysis.gate_routes import time_routes
from raphael_dist.config.schema import Config
from raphael_dist.convert.conversion import convert
from raphael_dist.convert.layouts import names
from raphael_dist.convert.layouts.diffusers import expert_json
from raphael_dist.convert.source_checkpoint import parameter_shapes
from raphael_dist.model.layers import TransformerBlock
from raphael_dist.model.moe import SPACE_BACKENDS, SpaceMoE
from raphael_dist.model.routing import band_of_timestep_B
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.pipeline import RaphaelUNet2D
from raphael_dist.planning.run_plan import active_parameters
from raphael_dist.planning.trace import trace
from tests.lib.checkpoints import KINDS, WHOLE, assert_same, handmade_canonical, options, random_state, read_state
from tests.lib.synthetic import TREE, synthetic_batch, tiny_config
from tests.model.test_moe import HIDDEN, D, K, close, gradients, paper_space_moe, run_space, space_case

torch.set_num_threads(1)  # tiny products: threads that wait for each other cost ten times the work

LATER = {"shared_expert": 0.5, "time_routing": "boundaries"}


def later(**sections: Any) -> Config:
    return tiny_config(**{**sections, "model": {**TREE["model"], **LATER, **sections.get("model", {})}})


@pytest.mark.parametrize("backend", ["reference", *SPACE_BACKENDS, "auto"])
def test_a_shared_expert_is_added_to_the_papers_formula_in_every_form(backend: str) -> None:
    layer, inputs, mask_BNY = space_case("random masks", torch.float64, backend)
    torch.manual_seed(1)
    with_shared = SpaceMoE(K, D, HIDDEN, backend, seed=1, shared=7).double()  # type: ignore[arg-type]
    with_shared.norm = layer.norm
    shared = cast(Any, with_shared.shared)
    assert [tuple(p.shape) for p in shared.parameters()] == [(7, D), (7,), (D, 7), (D,)]
    out = run_space(with_shared, inputs[0], mask_BNY, inputs[1])
    x_BND = torch.nn.functional.layer_norm(inputs[0], (D,), layer.norm.weight, layer.norm.bias)
    hidden = x_BND @ shared[0].weight.t() + shared[0].bias
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    expected = paper_space_moe(layer, inputs[0], mask_BNY, inputs[1]) + hidden @ shared[2].weight.t() + shared[2].bias
    close(out, expected, 1e-10)
    actual = gradients(out, with_shared, inputs)
    reference = gradients(expected, torch.nn.ModuleList([layer, shared]), inputs)
    assert len(actual) == len(reference) == 2 + 6 + 4
    for what, gradient in actual.items():
        name = what.replace("shared.", "1.") if "shared" in what else what if "input" in what else f"0.{what}"
        close(gradient, reference[name], 3e-10, what)


def test_boundaries_divide_the_timesteps_into_bands_of_equally_many() -> None:
    def of(timesteps: list[float], experts: int, last: int) -> list[int]:
        return band_of_timestep_B(torch.tensor(timesteps), experts, last).tolist()

    assert of([0, 249, 250, 499, 500, 749, 750, 999], 4, 1000) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert of([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 3, 10) == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert of([249.0, 250.0], 4, 1000) == [0, 1], "as some schedulers of diffusers give them"
    model = RaphaelUNet(later())
    actual = time_routes(model, 1000)
    assert actual is not None
    assert torch.equal(actual, (torch.arange(1000) // 250).expand(model.num_blocks, -1))


def test_with_boundaries_a_sample_uses_only_the_expert_of_its_band() -> None:
    torch.manual_seed(0)
    config = later()
    model = RaphaelUNet(config)
    batch = synthetic_batch(config, [(p, 1.0) for p in range(8)], model.num_blocks)
    inputs = (batch.x0, batch.timestep, batch.text, batch.text_mask, batch.end)
    out = model(*inputs)
    bands = (batch.timestep // 250).tolist()
    assert set(bands) == {0, 1, 2, 3}
    assert all(expert.tolist() == bands for expert in out.time_expert)
    alone = RaphaelUNet(later(model={"time_experts": 1}))
    for b, k in enumerate(bands):
        state = {n: p[k : k + 1] if ".time_moe." in n else p for n, p in model.state_dict().items()}
        alone.load_state_dict(state)
        prediction = alone(*(x[b : b + 1] for x in inputs)).prediction
        torch.testing.assert_close(out.prediction[b : b + 1], prediction, rtol=1e-5, atol=1e-5)
    out.prediction.square().sum().backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(".edge." in n for n in unused), "all but the edge modules, whose loss is not in here, learn"


def test_options_add_and_remove_only_their_parameters() -> None:
    before, after = parameter_shapes(tiny_config()), parameter_shapes(later())
    assert {n for n in before if n.startswith("time_gates.")} == before.keys() - after.keys()
    new = after.keys() - before.keys()
    blocks = [n.removesuffix(".space_moe.w1") for n in before if n.endswith(".space_moe.w1")]
    leaves = [f"{i}.{what}" for i in (0, 2) for what in ("weight", "bias")]
    assert new == {f"{block}.space_moe.shared.{leaf}" for block in blocks for leaf in leaves}
    assert after[f"{blocks[0]}.space_moe.shared.0.weight"] == (10, 16)  # half of the expert's width
    assert not [n for n in parameter_shapes(later(model={"space_experts": 0})) if "space_moe" in n]


def test_the_model_goes_through_every_layout_bit_for_bit(tmp_path: Any) -> None:
    config = later(parallel={"placement": ["shard"]})
    state = random_state(config, KINDS)
    handmade_canonical(tmp_path / "start", config, state)
    for layout in names():
        if layout == "dense":
            continue
        whole = layout in WHOLE
        arguments = options(layout, (4, 2, 4, 1))
        convert("canonical", tmp_path / "start", layout, tmp_path / layout, arguments)
        expected = state if whole else {key: value for key, value in state.items() if key[0] == "master"}
        assert_same(read_state(layout, tmp_path / layout), expected)


def test_an_exported_unet_knows_the_boundaries_of_its_own_timesteps() -> None:
    config = later(diffusion={"num_timesteps": 400}, edge={"channels": 4, "max_timestep": 200})
    torch.manual_seed(0)
    model, exported = RaphaelUNet(config), RaphaelUNet2D.from_config(expert_json(config, RaphaelUNet2D))
    exported.load_state_dict(model.state_dict())
    batch = synthetic_batch(config, [(p, 1.0) for p in range(3)], model.num_blocks)
    timestep = torch.tensor([90, 110, 399])
    expected = model(batch.x0, timestep, batch.text, batch.text_mask, batch.end)
    assert expected.time_expert[0].tolist() == [0, 1, 3]
    actual = exported(batch.x0, timestep, batch.text, batch.text_mask, batch.end).sample
    assert torch.equal(actual, expected.prediction)


def test_planner_counts_a_shared_expert_for_every_token() -> None:
    size = {"buckets": [[8, 8]]}
    whole, without = (trace(later(model={"shared_expert": share}, image=size), 2, "none") for share in (0.5, 0.0))
    with torch.device("meta"):
        blocks = [m for m in RaphaelUNet(later()).modules() if isinstance(m, TransformerBlock)]
    # Two products forward and four backward, of 2 images of 64 tokens on the outer level and 16 in the middle.
    dims = [block.norm1.weight.shape[0] for block in blocks]
    hiddens = [cast(Any, block.space_moe).shared[0].out_features for block in blocks]
    sizes = [(2 * (64 if dim == 16 else 16), dim, hidden) for dim, hidden in zip(dims, hiddens, strict=True)]
    extra = whole.total(whole.flops, kind="space experts") - without.total(without.flops, kind="space experts")
    assert extra == sum(3 * 2 * 2 * t * dim * hidden for t, dim, hidden in sizes)

    def active(config: Config) -> int:
        return active_parameters(parameter_shapes(config))

    of_one = sum(2 * dim * hidden + dim + hidden for _, dim, hidden in sizes)
    assert active(later()) - active(later(model={"shared_expert": 0.0})) == of_one
