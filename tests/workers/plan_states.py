"""Rank process: measures the memory of weights, gradients, moments and average in several configurations.

Tests compare it with the planner. For each configuration two steps are taken, and the engine's tensors are counted.
Usage: plan_states.py OUT SPECS. SPECS is a JSON list of {"stage": ZeRO stage, "sections": changes of the tiny config}. For
each of them, {kind of tensor: bytes} is written to OUT.RANK.json.
"""

import json
import sys
from pathlib import Path

import torch

from raphael_dist.engine.ema import Ema
from raphael_dist.engine.engine import Engine
from raphael_dist.engine.fragments import MOMENTS
from raphael_dist.engine.zero import Zero3, Zero12Contiguous
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.losses import compute_losses
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.runtime.ranks import Ranks, discover, initialise
from tests.lib.launch import leave
from tests.lib.synthetic import synthetic_batch, tiny_config


def held(tensors: list) -> int:
    """Return the total size of the storages of `tensors` in bytes. A storage that several tensors share counts once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def kinds(engine: Engine, ema: Ema, gradients: int) -> dict[str, int]:
    owners = list({id(f.owner): f.owner for f in engine.fragments}.values())
    optimizer = engine.fragments._optimizer
    zero = engine._engine.optimizer
    if isinstance(engine._zero, Zero3):
        weights = held(list(zero.fp16_partitioned_groups_flat))
        owners = list(zero.fp32_partitioned_groups_flat)
    else:
        weights = held(list(engine.module.parameters()))
    return {
        "weights": weights,
        "master": 0 if engine.stage == 0 else held([o.data for o in owners]),
        "moments": held([s for state in optimizer.state.values() for kind, s in state.items() if kind in MOMENTS]),
        "ema": held(ema.values),
        "gradients": gradients,
    }


def run(spec: dict, ranks: Ranks, device: torch.device) -> dict[str, int]:
    config = tiny_config(**spec["sections"])
    plan = BatchPlan.of(config, ranks.world_size)
    zero = {"stage": spec["stage"], "reduce_bucket_size": spec.get("bucket", 100_000)}
    engine = Engine(config, {"zero_optimization": zero}, plan, device)
    ema, schedule = Ema(engine.fragments, config.ema), NoiseSchedule.create(config.diffusion)
    gradients = 0
    for step in (1, 2):
        for micro in range(plan.accumulation):
            slots = plan.slots((step - 1) * config.train.global_batch_size, ranks.rank, micro)
            batch = synthetic_batch(config, slots, engine.module.num_blocks)
            engine.backward(compute_losses(engine, batch, schedule, config, engine.dtype).total.sum() * plan.loss_scale)
        gradients = _gradients(engine)
        engine.step(config.optim.lr)
        ema.update(step)
    return kinds(engine, ema, gradients)


def _gradients(engine: Engine) -> int:
    zero = engine._engine.optimizer
    own = [p.grad for p in engine.module.parameters() if p.grad is not None and p.grad.numel() > 0]
    if hasattr(zero, "fp32_groups_gradients_flat"):  # of BF16_Optimizer
        return held(list(zero.fp32_groups_gradients_flat)) + sum(g.nbytes for g in own)
    parts = list(engine._zero.gradients()) if engine.stage else []
    if isinstance(engine._zero, Zero12Contiguous):
        return held([*engine._zero.buffers, *parts])
    flat = {g.untyped_storage()._cdata for g in parts}
    alone = [g for g in own if g.untyped_storage()._cdata not in flat]
    return (sum(g.nbytes for g in parts) if engine.stage else 0) + sum(g.nbytes for g in alone)


def main(out: str, specs: list[dict]) -> None:
    ranks = discover()
    device = initialise(ranks)
    torch.set_num_threads(1)
    Path(f"{out}.{ranks.rank}.json").write_text(json.dumps([run(spec, ranks, device) for spec in specs]))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
