"""Rank process: trains some steps of the tiny model on synthetic batches and writes what it ended with.

Usage: train_steps.py OUT.pt JSON, where JSON holds {"sections", "deepspeed", "steps", "last_experts_until"}.
"""

import json
import sys
from pathlib import Path

import torch

from raphael_dist import parallel
from raphael_dist.batch_plan import BatchPlan
from raphael_dist.diffusion import NoiseSchedule
from raphael_dist.engine import Engine
from raphael_dist.objective import compute_losses
from tests.synthetic import synthetic_batch, tiny_config


def main(out: str, spec: dict) -> None:
    ranks = parallel.discover()
    device = parallel.initialise(ranks)
    torch.set_num_threads(1)
    config = tiny_config(**spec["sections"])
    plan = BatchPlan(config.train.global_batch, ranks.world_size, config.train.micro_batch)
    engine = Engine(config, spec["deepspeed"], plan, device)
    schedule = NoiseSchedule.create(config.diffusion)
    losses, norms = [], []
    for step in range(spec["steps"]):
        total = torch.zeros(())
        for micro in range(plan.accumulation):
            slots = plan.slots(step * config.train.global_batch, ranks.rank, micro)
            batch = synthetic_batch(config, slots, engine.module.num_blocks, spec.get("last_experts_until"))
            loss = compute_losses(engine, batch, schedule, config, engine.dtype).total.sum()
            engine.backward(loss * plan.loss_scale)
            total += loss.detach()
        engine.step(config.optim.lr)
        losses.append(float(parallel.total([float(total)], device)[0]) / config.train.global_batch)
        norms.append(engine.grad_norm())
    fragments = [(f.name, f.shape, f.start, f.master.clone()) for f in engine.fragments]
    torch.save({"losses": losses, "norms": norms, "fragments": fragments, "sent": engine.traffic.take()}, f"{out}.{ranks.rank}")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
