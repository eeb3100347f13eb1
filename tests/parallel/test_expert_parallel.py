"""Sharded experts compute what one process computes: outputs, gradients, clip norms, steps, checkpoints."""

from dataclasses import dataclass

import pytest
import torch

from raphael_dist.checkpoint.reader import open_newest
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.parallel.placement import choose_placement
from tests.engine.test_zero_parity import ADAM_EPS, EQUAL_SIZES, STEPS, one_process, same_steps
from tests.lib.launch import run_ranks, train_many, train_steps
from tests.lib.synthetic import tiny_config


@pytest.mark.parametrize("world_size", [2, 3])
def test_layers_equal_the_plain_layers_on_all_data_in_every_dispatch(world_size):
    run_ranks(["tests/workers/expert_layers.py"], world_size)


# (ranks, space_ep, time_ep, global batch, last_experts_until): 13 in micro-batches of 3 on 2 ranks is 3 micro-steps with 5
# empty slots; on 4 ranks all but rank 0 have none in the last micro-step. With last_experts_until 3 the last experts are
# used on rank 0 in step 1 and nowhere after, with 0 never.
CASES = [(2, 2, 2, 13, 3)]
SLOW = [
    (2, 2, 1, 13, None),
    (2, 2, 2, 12, 3),
    (2, 1, 2, 7, 0),
    (3, 3, 1, 13, 3),
    (4, 2, 2, 13, 0),
    (4, 2, 4, 13, 3),
    (6, 3, 2, 20, None),
    (12, 6, 4, 25, 3),
]


@pytest.mark.parametrize(
    ("world_size", "space_ep", "time_ep", "global_batch_size", "last_experts_until"),
    [*CASES, *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW)],
)
def test_sharded_experts_take_the_steps_of_one_process(
    world_size, space_ep, time_ep, global_batch_size, last_experts_until, tmp_path
):
    """ZeRO-1 and 2, SGD and AdamW, with clipping, gate noise, recomputation and another hash seed on every rank."""
    parallel = {"space_ep": space_ep, "time_ep": time_ep, "placement": ["shard"]}
    runs = [
        ShardedRun(stage, kind, equal)
        for stage in (1, 2)
        for kind, equal in (("sgd", False), ("adamw", True), ("grad", False))
    ]
    specs = [run.spec(global_batch_size, parallel, last_experts_until) for run in runs]
    for run, actual in zip(runs, train_many(tmp_path, world_size, specs, fresh=world_size == 2), strict=True):
        expected = run.expected(global_batch_size, last_experts_until)
        assert min(expected["norms"]) > CLIP, "clipping must be at work"
        assert all(sent > 0 for sent in actual["sent"])
        if run.kind == "grad":
            same_gradients(actual, expected)
            continue
        same_steps(actual, expected)
        for name, weight in expected["weights"].items():
            # Relative to the change: small gradients of the wrong scale are invisible next to the weights.
            moved = (weight - expected["start"][name]).abs().max()
            rounding = 3e-7 * weight.abs().max()
            assert (actual["weights"][name] - weight).abs().max() <= 1e-3 * moved + rounding, name


CLIP = 0.5
HUGE = 1e4  # a learning rate by which one step of SGD leaves little but the gradient in the weights


@dataclass(frozen=True)
class ShardedRun:
    """One run. "grad" is one step of SGD whose weights show the reduced and clipped gradient."""

    stage: int
    kind: str
    equal_sizes: bool

    def spec(self, global_batch_size: int, parallel: dict, last_experts_until: int | None) -> dict:
        # ZeRO-2 with small buckets reduces gradients between the exchanges of the backward pass; some parameters exceed one.
        zero = {"stage": self.stage, **({"reduce_bucket_size": 3000} if self.stage == 2 else {})}
        optim = {"kind": "adamw" if self.kind == "adamw" else "sgd", "max_grad_norm": CLIP, "eps": ADAM_EPS}
        if self.kind == "grad":
            optim["lr"] = HUGE
        sections = {
            "train": {"global_batch_size": global_batch_size, "check_gradients": self.stage == 1},
            "optim": optim,
            "parallel": parallel,
            "model": EQUAL_SIZES if self.equal_sizes else {},
        }
        steps = 1 if self.kind == "grad" else STEPS
        return {
            "sections": sections,
            "deepspeed": {"zero_optimization": zero},
            "steps": steps,
            "last_experts_until": last_experts_until,
        }

    def expected(self, global_batch_size: int, last_experts_until: int | None) -> dict:
        if self.kind == "grad":
            return one_process(global_batch_size, CLIP, "sgd", last_experts_until, HUGE, 1)
        return one_process(global_batch_size, CLIP, self.kind, last_experts_until, equal_sizes=self.equal_sizes)


def same_gradients(actual: dict, expected: dict) -> None:
    assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert actual["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    for name, weight in expected["weights"].items():
        reference = expected["start"][name] - weight  # HUGE times the clipped gradient
        difference = (expected["start"][name] - actual["weights"][name] - reference).abs().max()
        assert difference <= 1e-5 * reference.abs().max() + 1e-6 * HUGE * CLIP, name


def test_replicated_and_sharded_levels_train_together(tmp_path):
    actual = train_steps(
        tmp_path,
        2,
        sections={
            "train": {"global_batch_size": 12},
            "optim": {"kind": "sgd", "max_grad_norm": CLIP},
            "parallel": {"space_ep": 2, "time_ep": 2, "placement": ["replicate", "shard"]},
        },
        deepspeed={"zero_optimization": {"stage": 2}},
        steps=STEPS,
    )
    same_steps(actual, one_process(12, CLIP))
    assert actual["spread"] == ["mid_block.attentions.0.transformer_blocks.0.space_moe.w1"]


@pytest.mark.parametrize(
    ("stage", "parallel"),
    [
        (2, {"space_ep": 2, "time_ep": 2, "placement": ["shard"]}),
        *(pytest.param(stage, {}, marks=pytest.mark.slow) for stage in (0, 3)),
    ],
)
def test_sharded_run_with_shared_expert_and_boundaries_equals_one_process(stage, parallel, tmp_path):
    fields = {"shared_expert": 0.5, "time_routing": "boundaries"}
    actual = train_steps(
        tmp_path,
        2,
        sections={
            "train": {"global_batch_size": 13, "check_gradients": stage == 2},
            "optim": {"kind": "sgd", "max_grad_norm": CLIP},
            "model": fields,
            "parallel": parallel,
        },
        deepspeed={"zero_optimization": {"stage": stage}},
        steps=STEPS,
    )
    expected = one_process(13, CLIP, model_fields=tuple(fields.items()))
    assert any(".shared." in name for name in expected["weights"])
    same_steps(actual, expected, copies=2 if stage == 0 else 1)


@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_sent_bytes_of_space_experts_equal_those_of_placement(recompute, tmp_path):
    sections = {
        "train": {"global_batch_size": 13},
        "parallel": {"space_ep": 2, "placement": ["shard"], "dispatch": "all_gather"},
        "model": {"checkpoint_activations": recompute},
        "image": {"buckets": [[8, 8]]},  # in pixel space, as the synthetic batches
    }
    tree = {"zero_optimization": {"stage": 1}}
    actual = train_steps(tmp_path, 2, sections=sections, deepspeed=tree, steps=1)
    config = tiny_config(**sections)
    costs = choose_placement(config, BatchPlan.of(config, 2))
    predicted = sum(c.sharded_bytes for c in costs)  # no weights: each expert is on one rank alone
    if recompute == "none":
        assert actual["sent"] == [predicted, predicted]
    else:  # recomputation stops before the last exchange
        assert 0.8 * predicted < actual["sent"][0] < predicted


def test_the_debug_mode_finds_a_parameter_without_a_gradient_on_one_rank():
    outputs = run_ranks(["tests/workers/missing_gradient.py"], 2)
    assert "found: rank 1 failed:" in outputs[0]
    assert "the first is time_embedding.linear_1.weight" in outputs[1]


def test_checkpoint_of_sharded_experts_loads_on_one_rank_and_back(tmp_path):
    optim = {"kind": "adamw", "max_grad_norm": 0.5, "eps": ADAM_EPS}
    sections = {"optim": optim, "train": {"global_batch_size": 12}, "run": {"dir": str(tmp_path / "run")}}
    sharded = {**sections, "parallel": {"space_ep": 2, "time_ep": 2, "placement": ["shard"]}}
    expected = one_process(12, 0.5, "adamw")
    shapes = {n: tuple(p.shape) for n, p in RaphaelUNet(tiny_config()).named_parameters()}

    def run(folder: str, world_size: int, stage: int, **spec) -> dict:
        tree = {"zero_optimization": {"stage": stage}}
        return train_steps(tmp_path / folder, world_size, deepspeed=tree, checkpoint=True, **spec)

    first = run("first", 2, 2, sections=sharded, steps=1)
    reader = open_newest(tmp_path / "run")
    assert reader.shapes == shapes
    for name, weight in first["weights"].items():
        assert torch.equal(reader.whole("master", name).flatten(), weight), name
    alone = run("alone", 1, 1, sections=sections, steps=3)
    assert_same_state(alone["resumed"], first)
    assert first["losses"] + alone["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    same_steps({**alone, "losses": expected["losses"], "norms": first["norms"] + alone["norms"]}, expected)
    back = run("back", 2, 1, sections=sharded, steps=3)
    assert_same_state(back["resumed"], alone)


def assert_same_state(actual: dict, expected: dict) -> None:
    for name, weight in expected["weights"].items():
        assert torch.equal(actual["weights"][name], weight), name
    for kind, moments in expected["moments"].items():
        assert actual["moments"][kind].keys() == moments.keys() == expected["weights"].keys()
        assert all(torch.equal(actual["moments"][kind][name], moment) for name, moment in moments.items()), kind
