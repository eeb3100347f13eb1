"""The focal edge loss by hand, its range of timesteps, and what learns from it."""

import math

import pytest
import torch
from torch.nn import functional as F

from raphael_dist.config.model_sections import Edge
from raphael_dist.model.edge_supervision import EdgeModule, edge_loss_B, focal_loss, quality_focal_loss
from raphael_dist.model.unet import RaphaelUNet
from tests.lib.synthetic import synthetic_batch, tiny_config

torch.set_num_threads(1)  # tiny products: threads that wait for each other cost ten times the work

EDGE = Edge(max_timestep=500, focal_alpha=0.5, focal_gamma=2.0)
LN2, LN4 = math.log(2), math.log(4)


@pytest.mark.parametrize(
    ("logit", "target", "alpha", "gamma", "expected"),
    [
        # p = 1/2: 0.5 * 1 * (1/2)^2 * ln 2 = ln 2 / 8, for an edge and for none alike
        (0.0, 1.0, 0.5, 2.0, LN2 / 8),
        (0.0, 0.0, 0.5, 2.0, LN2 / 8),
        # a target of 0.3 takes 0.3 and 0.7 of the two halves, which are equal here
        (0.0, 0.3, 0.5, 2.0, LN2 / 8),
        # logit ln 3: p = 3/4. Edge: 0.5 * (1/4)^2 * ln(4/3); no edge: 0.5 * (3/4)^2 * ln 4
        (math.log(3), 1.0, 0.5, 2.0, 0.5 / 16 * math.log(4 / 3)),
        (math.log(3), 0.0, 0.5, 2.0, 0.5 * 9 / 16 * LN4),
        # alpha 0.25, gamma 1, target 0.4: 0.25 * 0.4 * 1/4 * ln(4/3) + 0.75 * 0.6 * 3/4 * ln 4
        (math.log(3), 0.4, 0.25, 1.0, 0.025 * math.log(4 / 3) + 0.3375 * LN4),
        # far out: log p must not overflow. Edge missed by logit -200: 0.5 * 1 * 200
        (-200.0, 1.0, 0.5, 2.0, 100.0),
        (200.0, 1.0, 0.5, 2.0, 0.0),
    ],
)
def test_the_focal_loss_has_the_values_worked_by_hand(logit, target, alpha, gamma, expected):
    logits = torch.tensor([logit], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([target]), alpha, gamma)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-12)
    loss.backward()
    assert logits.grad.isfinite().all()


def test_without_focusing_it_is_half_the_binary_cross_entropy():
    torch.manual_seed(0)
    logits, target = torch.randn(50), torch.rand(50)
    expected = 0.5 * F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    torch.testing.assert_close(focal_loss(logits, target, 0.5, 0.0), expected)


def test_the_loss_is_off_at_and_above_the_largest_timestep():
    logits, edge = [torch.randn(4, 3, 3)], torch.rand(4, 6, 6)
    loss = edge_loss_B(logits, edge, torch.tensor([0, 499, 500, 999]), EDGE)
    assert (loss > 0).tolist() == [True, True, False, False]
    off = [torch.randn(4, 3, 3, requires_grad=True)]
    loss = edge_loss_B(off, edge, torch.full((4,), 500), EDGE)
    loss.sum().backward()
    assert loss.tolist() == [0] * 4
    assert not off[0].grad.any()


def test_blocks_count_alike_whatever_the_size_of_their_maps():
    # Logits of 0 give ln 2 / 8 anywhere; logits of ln 3 without edges 9/32 ln 4. One large map, one small one.
    logits = [torch.zeros(1, 8, 6), torch.full((1, 2, 2), math.log(3))]
    loss = edge_loss_B(logits, torch.zeros(1, 16, 12), torch.tensor([3]), EDGE)
    assert loss.item() == pytest.approx((LN2 / 8 + 9 / 32 * LN4) / 2)


def test_the_edge_map_is_brought_to_the_blocks_size_by_averaging():
    edge = torch.tensor([[[1.0, 0, 0, 0], [1, 0, 0, 1]]])  # 2 x 4 to 1 x 2: means 1/2 and 1/4
    logits = torch.randn(1, 1, 2)
    expected = focal_loss(logits, torch.tensor([[[0.5, 0.25]]]), 0.5, 2.0).mean()
    torch.testing.assert_close(edge_loss_B([logits], edge, torch.tensor([0]), EDGE), expected[None])


def test_splitting_a_batch_changes_no_samples_loss():
    torch.manual_seed(1)
    logits, edge, t = [torch.randn(5, 4, 6), torch.randn(5, 2, 3)], torch.rand(5, 8, 12), torch.tensor([1, 700, 3, 4, 499])
    parts = [edge_loss_B([x[i] for x in logits], edge[i], t[i], EDGE) for i in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(torch.cat(parts), edge_loss_B(logits, edge, t, EDGE))


def test_the_module_reads_the_end_tokens_map_scaled_to_a_maximum_of_one():
    torch.manual_seed(0)
    module, map_BNY, end = EdgeModule(4), torch.rand(2, 6, 5), torch.tensor([3, 0])
    out = module(map_BNY, end, (2, 3))
    assert out.shape == (2, 2, 3)
    assert len([m for m in module.net if isinstance(m, torch.nn.Conv2d)]) == 5
    torch.testing.assert_close(module(map_BNY * 7, end, (2, 3)), out)
    expected = torch.stack([map_BNY[0, :, 3] / map_BNY[0, :, 3].max(), map_BNY[1, :, 0] / map_BNY[1, :, 0].max()])
    module.net = torch.nn.Identity()
    module.register_parameter("dtype", torch.nn.Parameter(torch.zeros(())))
    torch.testing.assert_close(module(map_BNY, end, (2, 3)), expected.view(2, 2, 3))
    assert module(torch.zeros(2, 6, 5), end, (2, 3)).isfinite().all()


def test_edge_modules_and_cross_attention_learn_from_the_edge_loss_alone():
    config = tiny_config()
    torch.manual_seed(0)
    model = RaphaelUNet(config)
    batch = synthetic_batch(config, [(0, 1.0), (1, 1.0)], model.num_blocks)
    out = model(batch.x0, torch.tensor([10, 20]), batch.text, batch.text_mask, batch.end, batch.gate_noise)
    assert len(out.edge_logits) == model.num_blocks
    edge_loss_B(out.edge_logits, batch.edge, torch.tensor([10, 20]), EDGE).sum().backward()
    learning = [n for n, p in model.named_parameters() if ".edge." in n or "attn2.to_q" in n or "attn2.to_k" in n]
    assert len(learning) == model.num_blocks * 12
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert all(grads[n].abs().max() > 0 for n in learning)
    assert all(
        grads[n] is None or not grads[n].any()
        for n in grads
        if n.startswith("conv_out") or "up_blocks.1.attentions.1.proj_out" in n
    )


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0, 2.0])
def test_gradients_are_finite_for_every_gamma_and_logit(gamma: float) -> None:
    logits = torch.tensor([-1e4, -200.0, -1.0, 0.0, 1.0, 200.0, 1e4]).repeat(3).requires_grad_()
    target = torch.tensor([0.0, 0.5, 1.0]).repeat_interleave(7)
    for loss in (focal_loss(logits, target, 0.5, gamma), quality_focal_loss(logits, target, gamma)):
        assert loss.isfinite().all()
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert gradient.isfinite().all()


def test_only_the_quality_form_has_its_minimum_at_a_soft_target() -> None:
    p = torch.linspace(0.001, 0.999, 999)
    for target in (0.1, 0.5, 0.8):
        answers = [
            float(p[loss.argmin()])
            for loss in (
                focal_loss(p.logit(), torch.full_like(p, target), 0.5, 2.0),
                quality_focal_loss(p.logit(), torch.full_like(p, target), 2.0),
            )
        ]
        assert answers[1] == pytest.approx(target, abs=2e-3)
        assert answers[0] == pytest.approx({0.1: 0.31, 0.5: 0.5, 0.8: 0.62}[target], abs=2e-2)
