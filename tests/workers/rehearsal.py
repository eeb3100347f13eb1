"""Rank process: the rehearsal before training keeps in memory all that a step keeps, and changes nothing.

Compared are the bytes of live tensors where the rehearsed gradients are dropped and where the first step's are applied.
"""

import gc
from typing import Any

import torch

from raphael_dist.engine.engine import Engine
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.objective import compute_losses
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.parallel.ranks import discover, initialise
from raphael_dist.training.measure import rehearse
from tests.launch import leave
from tests.synthetic import synthetic_batch, tiny_config
from tests.workers.train_steps import state


def tensor_bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def watch_bytes(engine: Engine) -> dict[str, int]:
    """Return a dict that will hold the bytes at the first call of `discard` and of `update`."""
    held: dict[str, int] = {}

    def noted(name: str, real: Any) -> Any:
        def call(*args: Any) -> Any:
            held.setdefault(name, tensor_bytes())
            return real(*args)

        return call

    for name in ("discard", "update"):
        setattr(engine, name, noted(name, getattr(engine, name)))
    return held


def main() -> None:
    ranks = discover()
    device = initialise(ranks)
    torch.set_num_threads(1)
    for dtype, stage in (("float32", 1), ("float32", 2), ("bfloat16", 1), ("bfloat16", 2), ("float32", 3)):
        config = tiny_config(
            train={"global_batch": 6, "micro_batch": 3, "dtype": dtype}, optim={"kind": "adamw", "lr": 1e-3}
        )
        plan = BatchPlan.of(config, ranks.world_size)
        engine = Engine(config, {"zero_optimization": {"stage": stage}}, plan, device)
        schedule = NoiseSchedule.create(config.diffusion, device)
        batch = synthetic_batch(config, plan.slots(0, ranks.rank, 0), engine.module.num_blocks)
        before, held = state(engine.fragments), watch_bytes(engine)
        assert rehearse(engine, batch, schedule) > 0
        for (name, _, _, was), (_, _, _, now) in zip(before, state(engine.fragments), strict=True):
            assert torch.equal(was["master"], now["master"]), name
            assert not any(now[kind].any() for kind in now if kind != "master"), f"{name} has moments"
        for micro in range(plan.accumulation):
            batch = synthetic_batch(config, plan.slots(0, ranks.rank, micro), engine.module.num_blocks)
            losses = compute_losses(engine, batch, schedule, config, engine.dtype)
            engine.backward(losses.total.sum() * plan.loss_scale)
        assert engine.step(1e-3)
        assert held["update"] <= 1.02 * held["discard"], f"{dtype}, stage {stage}: {held}"
    leave()


if __name__ == "__main__":
    main()
