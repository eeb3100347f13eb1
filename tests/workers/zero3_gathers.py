"""Rank process: counts how often ZeRO-3 gathers the weights of the whole model in a step.

Usage: zero3_gathers.py OUT.json SPECS. SPECS is a JSON list of {"sections": changes of the tiny configuration, "distance":
DeepSpeed's stage3_max_reuse_distance, divided by the number of parameters}. OUT.json gets a number for each of them.
"""

import json
import sys
from pathlib import Path

import torch

from raphael_dist.engine.engine import Engine
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.losses import compute_losses
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.runtime.ranks import Ranks, discover, initialise
from tests.lib.launch import leave
from tests.lib.synthetic import synthetic_batch, tiny_config


def gathers(spec: dict, ranks: Ranks, device: torch.device) -> float:
    config = tiny_config(**spec["sections"])
    plan, schedule = BatchPlan.of(config, ranks.world_size), NoiseSchedule.create(config.diffusion)
    elements = sum(p.numel() for p in RaphaelUNet(config).parameters())
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": int(spec["distance"] * elements),
        "stage3_prefetch_bucket_size": 0,
    }
    engine = Engine(config, {"zero_optimization": zero}, plan, device)
    for step in range(3 if plan.accumulation == 1 else 2):  # DeepSpeed records the order of the modules first
        engine.traffic.take()
        for micro in range(plan.accumulation):
            slots = plan.slots(step * config.train.global_batch_size, ranks.rank, micro)
            batch = synthetic_batch(config, slots, engine.module.num_blocks)
            engine.backward(compute_losses(engine, batch, schedule, config, engine.dtype).total.sum() * plan.loss_scale)
        engine.step(config.optim.lr)
    sent = engine.traffic.take().weights
    return sent / (4 * elements * (ranks.world_size - 1) / ranks.world_size)


def main(out: str, specs: list[dict]) -> None:
    ranks = discover()
    device = initialise(ranks)
    torch.set_num_threads(1)
    counts = [gathers(spec, ranks, device) for spec in specs]
    if ranks.rank == 0:
        Path(out).write_text(json.dumps(counts))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
