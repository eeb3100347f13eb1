"""Rank process: most parameters of rank 1 get no gradient, with train.check_gradients=true.

Prints the error that this setting makes `Engine.backward` raise.
"""

from raphael_dist.engine.engine import Engine
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.losses import compute_losses
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.runtime.ranks import discover, initialise
from tests.lib.launch import leave
from tests.lib.synthetic import synthetic_batch, tiny_config


def main() -> None:
    ranks = discover()
    device = initialise(ranks)
    config = tiny_config(train={"global_batch_size": 12, "check_gradients": True})
    plan = BatchPlan.of(config, ranks.world_size)
    assert plan.accumulation == 2  # nothing is reduced after the first micro-step
    engine = Engine(config, {"zero_optimization": {"stage": 1}}, plan, device)
    batch = synthetic_batch(config, plan.slots(0, ranks.rank, 0), engine.module.num_blocks)
    loss = compute_losses(engine, batch, NoiseSchedule.create(config.diffusion), config, engine.dtype).total.sum()
    try:
        engine.backward(loss if ranks.is_main else engine.module.conv_in(batch.x0).sum())
    except RuntimeError as error:
        print(f"found: {error}")
    leave()


if __name__ == "__main__":
    main()
