"""`overlap_comm` with ZeRO-1 and 2: gradients are reduced in buckets during the backward pass, with the same results."""

import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from raphael_dist.engine.ds_config import merge
from raphael_dist.engine.gradient_buckets import SMALLEST_PART, ReadyBuckets, bucket_elements, divide_into_buckets
from raphael_dist.errors import UserError
from raphael_dist.model.routing import gate_kind
from raphael_dist.model.unet import RaphaelUNet
from tests.engine.test_zero_parity import ADAM_EPS, STEPS, one_process, same_steps
from tests.lib.launch import put_together, run_ranks, train_many, train_steps
from tests.lib.synthetic import synthetic_batch, tiny_config

BUCKET = 5_000  # elements; the tiny model has 40 thousand
OVERLAP = {"overlap_comm": True, "reduce_bucket_size": BUCKET}


# ---- buckets --------------------------------------------------------------------------------


def test_buckets_have_each_parameter_once_from_last_layer_to_gates() -> None:
    model = RaphaelUNet(tiny_config())
    named = list(model.named_parameters())
    buckets = divide_into_buckets(named, 2, BUCKET)
    names = {p: name for name, p in named}
    order = [names[p] for bucket in buckets for p in bucket]
    assert sorted(order) == sorted(names.values())
    assert order[0].startswith("conv_out.")
    gates = [gate_kind(name) is not None for name in order]
    assert gates == sorted(gates)
    sizes = [sum(p.numel() for p in bucket) for bucket in buckets]
    assert all(size <= BUCKET or len(bucket) == 1 for size, bucket in zip(sizes, buckets, strict=True))
    assert all(size + following[0].numel() > BUCKET for size, (_, following) in zip(sizes, pairwise(buckets), strict=False))


@pytest.mark.parametrize(
    ("elements", "limit", "size"),
    [(1000, 10**9, 2 * SMALLEST_PART), (16 * 10**7, 10**9, 10**7), (16 * 10**7, 5000, 5000)],
)
def test_bucket_is_a_sixteenth_of_the_model_within_limits(elements: int, limit: int, size: int) -> None:
    assert bucket_elements(elements, 2, limit) == size


def test_buckets_are_launched_in_order_when_their_gradients_are_complete() -> None:
    """Bucket 1 is complete before bucket 0, and bucket 2 gets only one of its two gradients."""
    a, b, c, d = (torch.nn.Parameter(torch.ones(1)) for _ in range(4))
    launched: list[int] = []
    ready = ReadyBuckets([[a], [b], [c, d]], launched.append)

    def backward(active: bool, *parameters: torch.nn.Parameter) -> list[int]:
        launched.clear()
        ready.begin(active)
        for p in parameters:
            p.sum().backward()
        return list(launched)

    assert backward(True, b, a) == [0, 1]
    assert ready.launched == 2
    assert backward(True, b) == []
    assert backward(True, a, b, d, c) == [0, 1, 2]
    assert backward(False, a, b, c, d) == []
    with pytest.raises(AssertionError, match="after its bucket was reduced"):
        backward(True, a, a)


# ---- training -------------------------------------------------------------------------------

CASES = [(stage, batch, world) for stage in (1, 2) for batch, world in ((13, 2), (6, 2), (12, 3))]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_take_the_steps_of_one_process(world_size: int, tmp_path: Path) -> None:
    """With 3 micro-steps and with one, and after a step of NaN that is dropped."""
    cases = [(stage, batch) for stage, batch, world in CASES if world == world_size]
    specs = [
        {
            "sections": {"train": {"global_batch_size": batch}, "optim": {"kind": "sgd", "max_grad_norm": 0.5}},
            "deepspeed": {"zero_optimization": {"stage": stage, **OVERLAP}, "communication_data_type": "fp32"},
            "steps": STEPS,
            "spoiled": batch == 6,
        }
        for stage, batch in cases
    ]
    for (_, batch), run in zip(cases, train_many(tmp_path, world_size, specs), strict=True):
        same_steps(run, one_process(batch, 0.5))


def test_checkpoint_resumes_with_overlap_turned_on_or_off(tmp_path: Path) -> None:
    sections = {
        "optim": {"kind": "adamw", "max_grad_norm": 0.5, "eps": ADAM_EPS},
        "train": {"global_batch_size": 12},
        "run": {"dir": str(tmp_path / "run")},
    }
    expected = one_process(12, 0.5, "adamw")
    losses, before = [], None
    for steps, (world_size, overlap) in enumerate(((2, OVERLAP), (1, {}), (3, OVERLAP)), start=1):
        tree = {"zero_optimization": {"stage": 2, **overlap}}
        folder = tmp_path / str(steps)
        run = train_steps(folder, world_size, sections=sections, deepspeed=tree, checkpoint=True, steps=steps)
        if before is not None:
            for kind, name in ((kind, name) for kind in before["moments"] for name in before["weights"]):
                assert torch.equal(run["resumed"]["moments"][kind][name], before["moments"][kind][name])
                assert torch.equal(run["resumed"]["weights"][name], before["weights"][name])
        before = run
        losses += run["losses"]
    assert losses == pytest.approx(expected["losses"], rel=1e-5)


def test_parameters_without_gradient_on_one_rank_change_nothing_else(tmp_path: Path) -> None:
    """Rank 1 has gradients of one layer only. All ranks launch buckets in one order; results are those without overlap."""
    run_ranks(["tests/engine/test_overlap.py", str(tmp_path)], 2)
    parts = [torch.load(tmp_path / f"{rank}") for rank in range(2)]
    (plain, plain_traffic, _), (overlapped, traffic, _) = (
        (put_together([part[i][0] for part in parts])["weights"], *parts[0][i][1:]) for i in range(2)
    )
    assert all(torch.equal(overlapped[name], weight) for name, weight in plain.items())
    assert traffic == pytest.approx(plain_traffic, rel=0.01)  # padding
    launched = [part[1][2] for part in parts]
    assert launched[0] > 5, "all buckets of rank 0 are launched during the backward pass"
    assert launched[1] < launched[0]


def _rank(folder: Path) -> None:
    """Rank process: take a step in which most parameters get no gradient on rank 1, without overlap and with it."""
    from raphael_dist.engine.engine import Engine
    from raphael_dist.model.diffusion import NoiseSchedule
    from raphael_dist.model.losses import compute_losses
    from raphael_dist.parallel.batch_plan import BatchPlan
    from raphael_dist.runtime.ranks import discover, initialise
    from tests.workers.train_steps import state

    ranks = discover()
    device = initialise(ranks)
    torch.set_num_threads(1)
    config = tiny_config(train={"global_batch_size": 6}, optim={"kind": "sgd", "max_grad_norm": 0.0})
    schedule, plan = NoiseSchedule.create(config.diffusion), BatchPlan.of(config, ranks.world_size)
    results = []
    for overlap in ({}, OVERLAP):
        engine = Engine(config, {"zero_optimization": {"stage": 2, **overlap}}, plan, device)
        engine.traffic.take()
        batch = synthetic_batch(config, plan.slots(0, ranks.rank, 0), engine.module.num_blocks)
        loss = compute_losses(engine, batch, schedule, config, engine.dtype).total.sum()
        engine.backward(loss if ranks.is_main else engine.module.conv_in(batch.x0).square().mean())
        launched = engine._zero._ready.launched if overlap else 0
        engine.step(0.05)
        results.append((state(engine.fragments), engine.traffic.take().gradients, launched))
    torch.save(results, folder / str(ranks.rank))


# ---- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero", "train", "message"),
    [
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, {}, "requires the optimizer on the GPU"),
        ({"stage": 1}, {"dtype": "bfloat16"}, "requires ZeRO stage 2 if a step has several micro-steps"),
    ],
)
def test_overlap_is_refused_where_deepspeed_stores_the_gradients(zero: dict, train: dict, message: str) -> None:
    error = partial(merge, tiny_config(train=train), {"zero_optimization": {**zero, "overlap_comm": True}}, 2, 2)
    with pytest.raises(UserError, match=f"overlap_comm=true .*{message}.* or set overlap_comm=false"):
        error()


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
