"""Experts spread over ranks compute what one process computes: outputs, gradients, clip norms, steps, checkpoints."""

import pytest

from tests.launch import run_ranks, train_steps
from tests.test_zero_parity import STEPS, one_process, same_steps


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
        "optim": {"kind": kind, "clip": clip},
        "parallel": {"space_ep": space_ep, "time_ep": time_ep},
    }
    tree = {"zero_optimization": {"stage": stage}}
    found = train_steps(
        tmp_path, world_size, sections=sections, deepspeed=tree, steps=STEPS, last_experts_until=last_experts_until
    )
    same_steps(found, expected)
    assert all(sent > 0 for sent in found["sent"])
