"""Experts spread over ranks compute what one process computes: outputs, gradients, clip norms, steps, checkpoints."""

import pytest
import torch

from raphael_dist.checkpoint.reader import open_newest
from raphael_dist.model.unet import RaphaelUNet
from tests.launch import run_ranks, train_steps
from tests.synthetic import tiny_config
from tests.test_zero_parity import ADAM_EPS, STEPS, one_process, same_steps


@pytest.mark.parametrize("world_size", [2, 3])
def test_layers_equal_the_plain_layers_on_all_data_in_every_dispatch(world_size):
    run_ranks(["tests/workers/expert_layers.py"], world_size)


# (ranks, space_ep, time_ep, ZeRO stage, global batch, optimizer, last_experts_until): 13 in micro-batches of 3 on 2 ranks is
# 3 micro-steps with 5 empty slots. Each case has clipping, gate noise, recomputation and other hash seeds on every rank.
CASES = [
    (2, 2, 1, 1, 13, "sgd", None),
    (2, 1, 2, 2, 13, "sgd", None),
    (2, 2, 2, 2, 12, "sgd", 3),  # the last experts are used on rank 0 in step 1 and nowhere after
    (2, 2, 2, 1, 12, "sgd", 0),  # the last experts are never used
]
SLOW = [
    (2, 2, 2, 1, 13, "adamw", None),
    (2, 2, 2, 2, 7, "adamw", None),
    (3, 3, 1, 1, 13, "sgd", None),
    (3, 3, 1, 2, 12, "sgd", 3),
    (4, 2, 2, 1, 13, "sgd", None),
    (4, 2, 4, 2, 13, "sgd", 3),
    (6, 3, 2, 1, 20, "sgd", None),
    (6, 3, 2, 2, 20, "sgd", 3),
    (6, 3, 2, 2, 20, "adamw", None),
    (12, 6, 4, 2, 25, "sgd", None),
]


@pytest.mark.parametrize(
    ("world_size", "space_ep", "time_ep", "stage", "global_batch", "kind", "last_experts_until"),
    [*CASES, *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW)],
)
def test_spread_experts_take_the_steps_of_one_process(
    world_size, space_ep, time_ep, stage, global_batch, kind, last_experts_until, tmp_path
):
    clip = 0.5
    expected = one_process(global_batch, clip, kind, last_experts_until)
    assert min(expected["norms"]) > clip, "clipping must be at work"
    sections = {
        "train": {"global_batch": global_batch},
        "optim": {"kind": kind, "clip": clip, "eps": ADAM_EPS},
        "parallel": {"space_ep": space_ep, "time_ep": time_ep},
    }
    # ZeRO-2 with small buckets reduces gradients between the exchanges of the backward pass; some parameters exceed one.
    tree = {"zero_optimization": {"stage": stage, **({"reduce_bucket_size": 3000} if stage == 2 else {})}}
    found = train_steps(
        tmp_path, world_size, sections=sections, deepspeed=tree, steps=STEPS, last_experts_until=last_experts_until
    )
    same_steps(found, expected)
    for name, weight in expected["weights"].items():
        # Relative to the way gone: small gradients of the wrong scale do not show beside the weights.
        moved = (weight - expected["start"][name]).abs().max()
        rounding = 3e-7 * weight.abs().max()
        assert (found["weights"][name] - weight).abs().max() <= 1e-3 * moved + rounding, name
    assert all(sent > 0 for sent in found["sent"])


def test_a_checkpoint_goes_from_spread_experts_to_one_rank_and_back_bit_for_bit(tmp_path):
    optim = {"kind": "adamw", "clip": 0.5, "eps": ADAM_EPS}
    sections = {"optim": optim, "train": {"global_batch": 12}, "run": {"dir": str(tmp_path / "run")}}
    spread = {**sections, "parallel": {"space_ep": 2, "time_ep": 2}}
    expected = one_process(12, 0.5, "adamw")
    shapes = {n: tuple(p.shape) for n, p in RaphaelUNet(tiny_config()).named_parameters()}

    def run(folder: str, world_size: int, stage: int, **spec) -> dict:
        tree = {"zero_optimization": {"stage": stage}}
        return train_steps(tmp_path / folder, world_size, deepspeed=tree, checkpoint=True, **spec)

    first = run("first", 2, 2, sections=spread, steps=1)
    reader = open_newest(tmp_path / "run")
    assert reader.shapes == shapes
    for name, weight in first["weights"].items():
        assert torch.equal(reader.whole("master", name).flatten(), weight), name
    alone = run("alone", 1, 1, sections=sections, steps=3)
    assert_same_state(alone["resumed"], first)
    assert first["losses"] + alone["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    same_steps({**alone, "losses": expected["losses"], "norms": first["norms"] + alone["norms"]}, expected)
    back = run("back", 2, 1, sections=spread, steps=3)
    assert_same_state(back["resumed"], alone)


def assert_same_state(found: dict, expected: dict) -> None:
    for name, weight in expected["weights"].items():
        assert torch.equal(found["weights"][name], weight), name
    for kind, moments in expected["moments"].items():
        assert found["moments"][kind].keys() == moments.keys() == expected["weights"].keys()
        assert all(torch.equal(found["moments"][kind][name], moment) for name, moment in moments.items()), kind
