"""Gate entropy and route stability, as logged at each validation."""

import pytest
import torch

from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.training.route_probe import RouteProbe
from tests.lib.synthetic import synthetic_batch, tiny_config


def test_probe_reports_entropy_and_changed_routes_without_noise() -> None:
    torch.manual_seed(0)
    config = tiny_config()
    model, probe = RaphaelUNet(config), RouteProbe()
    batch = synthetic_batch(config, [(p, 1.0) for p in range(3)], model.num_blocks)
    first = probe.measure(model, batch)
    assert set(first) == {"moe/space/gate_entropy", "moe/time/gate_entropy"}
    assert all(0.9 < value <= 1 for value in first.values()), "new gates are unsure"
    again = probe.measure(model, batch)
    assert again["moe/space/routes_changed"] == again["moe/time/routes_changed"] == 0
    with torch.no_grad():
        for gate in model.text_gates:
            gate.net[2].bias.copy_(50 * torch.arange(config.model.space_experts))
    chosen = [gate.argmax(-1) for gate in model.text_logits(batch.text[batch.text_mask])]
    assert all((route == config.model.space_experts - 1).all() for route in chosen)
    sure = probe.measure(model, batch)
    assert sure["moe/space/gate_entropy"] == pytest.approx(0, abs=1e-3)
    assert sure["moe/space/routes_changed"] > 0.5
    assert sure["moe/time/routes_changed"] == 0


def test_probe_leaves_out_fixed_boundaries_and_sharded_weights() -> None:
    config = tiny_config(model={"time_routing": "boundaries", "space_experts": 0})
    model, probe = RaphaelUNet(config), RouteProbe()
    batch = synthetic_batch(config, [(0, 1.0)], model.num_blocks)
    assert probe.measure(model, batch) == {}
    model = RaphaelUNet(tiny_config())
    model.gathers_weights = True
    assert probe.measure(model, batch) == {}
