"""Rank process: trains the tiny model for some steps on synthetic batches; writes losses, norms and the final tensors.

Usage: train_steps.py OUT.pt JSON. The results of a rank are written to OUT.pt.RANK. The file JSON has the keys
    sections, deepspeed: changes of the tiny configuration, and DeepSpeed's configuration
    steps: the step before which training ends
    last_experts_until: as in `synthetic_batch`
    checkpoint: if true, continue from the newest checkpoint in run.dir, and save at the end
    spoiled: if true, first run a warm-up step and a step with NaN gradients that are discarded. Neither may change results.
    ema: if true, also compute the moving average of the weights
JSON may also be a list of such objects, which are run in turn. The results of number i are written to OUT.pt.i.RANK.
"""

import json
import math
import sys
from pathlib import Path

import torch

from raphael_dist.checkpoint.progress import Progress
from raphael_dist.checkpoint.save import CheckpointStore
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.engine import Engine
from raphael_dist.engine.fragments import MOMENTS, Fragments
from raphael_dist.model.batch import Batch
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.losses import compute_losses
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.runtime.ranks import Ranks, all_reduce_on_device, all_reduce_sum, discover, initialise
from raphael_dist.training.throughput import warmup_step
from tests.lib.launch import leave
from tests.lib.synthetic import adapted_model, synthetic_batch, tiny_config


def state(fragments: Fragments, ema: Ema | None = None) -> list[tuple]:
    """Return copies of the parts of tensors that this rank owns: fp32 weights, moments and, with `ema`, their average.

    Each part is (parameter name, shape of the parameter, index of the first element, {kind: elements}).
    """
    actual = []
    for i, f in enumerate(fragments):
        moments = {kind: fragments.moment(f, kind) for kind in MOMENTS}
        if ema is not None:
            moments["ema"] = ema.values[i]
        values = {"master": f.master, **{kind: v for kind, v in moments.items() if v is not None}}
        actual.append((f.name, f.shape, f.start, {kind: v.detach().cpu().clone() for kind, v in values.items()}))
    return actual


def update(engine: Engine, ema: Ema | None, step: int) -> None:
    """Finish an optimizer step, which is counted from 1, unless a gradient is not finite."""
    lr = engine.config.optim.lr
    if not engine.defers_update:
        engine.step(lr, ema, step)
        return
    norm = all_reduce_on_device(engine.grad_square(), engine.device).sqrt()
    engine.update_if(norm < math.inf, lr, norm, ema, step)
    engine.grad_norm = float(norm)


def main(out: str, specs: dict | list[dict]) -> None:
    ranks = discover()
    device = initialise(ranks)
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # float32 is held to float32
    if isinstance(specs, dict):
        train(out, specs, ranks, device)
    else:
        for i, spec in enumerate(specs):
            train(f"{out}.{i}", spec, ranks, device)
    leave()


def train(out: str, spec: dict, ranks: Ranks, device: torch.device) -> None:
    config = tiny_config(**spec["sections"])
    plan = BatchPlan.of(config, ranks.world_size)
    engine = Engine(config, spec["deepspeed"], plan, device, adapted_model(config) if config.trains_adapter_only else None)
    ema = engine.create_ema() if spec.get("ema") else None
    schedule = NoiseSchedule.create(config.diffusion, device)
    store = (
        CheckpointStore(config, ranks, engine.fragments, None, {"data.shards": "synthetic"})
        if spec.get("checkpoint")
        else None
    )
    progress = store.resume() if store else None
    first = progress.step if progress else 0
    losses, norms, resumed = [], [], state(engine.fragments)

    def batch_of(step: int, micro: int) -> Batch:
        slots = plan.slots(step * config.train.global_batch_size, ranks.rank, micro)
        return synthetic_batch(config, slots, engine.module.num_blocks, spec.get("last_experts_until")).to(device)

    def accumulate(step: int, factor: float = 1.0) -> torch.Tensor:
        total = torch.zeros((), device=device)
        for micro in range(plan.accumulation):
            loss = compute_losses(engine, batch_of(step, micro), schedule, config, engine.dtype).total.sum()
            engine.backward(loss * plan.loss_scale * factor)
            total += loss.detach()
        return total

    if spec.get("spoiled"):
        warmup_step(engine, batch_of(8, 0), schedule)
        accumulate(9, float("nan"))
        update(engine, ema, 1)
    for step in range(first, spec["steps"]):
        total = accumulate(step)
        update(engine, ema, step + 1)
        losses.append(float(all_reduce_sum([float(total)], device)[0]) / config.train.global_batch_size)
        norms.append(engine.grad_norm)
    if store and spec["steps"] > first:
        store.save(Progress(spec["steps"], spec["steps"] * config.train.global_batch_size, spec["steps"], {}))
    result = {"losses": losses, "norms": norms, "resumed": resumed, "fragments": state(engine.fragments, ema)}
    sharded = [n for n, p in engine.module.named_parameters() if hasattr(p, "expert_slice") and n.endswith("space_moe.w1")]
    traffic = engine.traffic.take()
    result |= {"sent": traffic.experts, "gathered": traffic.weights, "spread": sharded}
    torch.save(result, f"{out}.{ranks.rank}")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
