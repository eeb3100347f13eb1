"""Rank process: trains the tiny model and writes checkpoints by DeepSpeed's own `save_checkpoint`, to test their conversion.

Usage: deepspeed_steps.py OUT.pt JSON. Losses and tensors are written to OUT.pt.RANK. The file JSON has the keys
    sections, deepspeed: changes of the tiny configuration, and DeepSpeed's configuration
    first, steps: the first step, and the step before which training ends
    load: optional: folder of a DeepSpeed checkpoint to continue from
    save: optional: folder for DeepSpeed's checkpoint of the last step
    run: optional: if true, also write a checkpoint of the trainer to run.dir
"""

import json
import sys
from pathlib import Path

import torch

from raphael_dist.checkpoint.progress import Progress
from raphael_dist.checkpoint.save import CheckpointStore
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.engine import Engine
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.losses import compute_losses
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.runtime.ranks import all_reduce_sum, discover, initialise
from tests.lib.launch import leave
from tests.lib.synthetic import synthetic_batch, tiny_config
from tests.workers.train_steps import state


def main(out: str, spec: dict) -> None:
    ranks = discover()
    device = initialise(ranks)
    torch.set_num_threads(1)
    config = tiny_config(**spec["sections"])
    plan = BatchPlan.of(config, ranks.world_size)
    engine = Engine(config, spec["deepspeed"], plan, device)
    if spec.get("load"):
        path, _ = engine._engine.load_checkpoint(spec["load"])
        assert path is not None
        engine.fragments.sync_model()  # DeepSpeed's file of the model knows the experts of rank 0 alone
    resumed = state(engine.fragments)
    schedule, losses = NoiseSchedule.create(config.diffusion), []
    ema = Ema(engine.fragments, config.ema)
    for step in range(spec["first"], spec["steps"]):
        total = torch.zeros(())
        for micro in range(plan.accumulation):
            slots = plan.slots(step * config.train.global_batch_size, ranks.rank, micro)
            batch = synthetic_batch(config, slots, engine.module.num_blocks)
            loss = compute_losses(engine, batch, schedule, config, engine.dtype).total.sum()
            engine.backward(loss * plan.loss_scale)
            total += loss.detach()
        engine.step(config.optim.lr)
        ema.update(step + 1)
        losses.append(float(all_reduce_sum([float(total)], device)[0]) / config.train.global_batch_size)
    if spec.get("save"):
        engine._engine.save_checkpoint(spec["save"], tag=f"global_step{spec['steps']}")
    if spec.get("run"):
        store = CheckpointStore(config, ranks, engine.fragments, ema, {"data.shards": "synthetic"})
        store.root.mkdir(parents=True, exist_ok=True)
        store.save(Progress(spec["steps"], spec["steps"] * config.train.global_batch_size, spec["steps"], {}))
    torch.save({"losses": losses, "resumed": resumed, "fragments": state(engine.fragments)}, f"{out}.{ranks.rank}")
    leave()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
