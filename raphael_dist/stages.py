"""Runs in stages (`recipe.stages`): steps trained one after another with other image sizes, batches or learning rates."""

from typing import Any, NamedTuple

from raphael_dist.config import Config, config_from_tree
from raphael_dist.errors import UserError, did_you_mean

# What a stage may set. Weights, data and encoders are the run's.
MAY_SET = (
    "image.buckets", "data.bucket_run", "data.flip", "data.window_shards", "train.global_batch", "train.micro_batch",
    "train.caption_drop", "optim.lr", "optim.weight_decay", "optim.clip", "edge.max_timestep", "model.gate_noise",
    "model.balance_weight", "model.checkpoint_activations", "ema.decay",
)  # fmt: skip


def staged_keys(config: Config) -> set[str]:
    """Return the keys that stages set: their values follow from the step, not from the rest of the configuration."""
    return {key for stage in config.recipe.stages for key in stage.set}


class Part(NamedTuple):
    """A stage of a run, or a run without stages: its configuration, and the steps after which it begins and ends."""

    config: Config
    since: int
    until: int


def stage_at(config: Config, step: int) -> Part:
    """Return the stage that goes on after `step` steps.

    UserError: the stage sets a key that it may not, or makes a configuration that is wrong.
    """
    since, last = 0, config.train.max_steps
    for number, stage in enumerate(config.recipe.stages, start=1):
        until = last if stage.until is None else min(last, stage.until)
        if step < until or stage is config.recipe.stages[-1]:
            return Part(_with(config, stage.set, number), since, until)
        since = until
    return Part(config, 0, last)


def every_stage(config: Config) -> list[Config]:
    """Return the configuration of each stage; of a run without stages its own. UserError as `stage_at`."""
    stages = config.recipe.stages
    return [_with(config, stage.set, number) for number, stage in enumerate(stages, start=1)] or [config]


def _with(config: Config, values: dict[str, Any], number: int) -> Config:
    tree = config.model_dump(mode="json")
    for key, value in values.items():
        if key not in MAY_SET:
            raise UserError(
                f"recipe.stages: stage {number} sets {key!r}{did_you_mean(key, MAY_SET)}; it may set {', '.join(MAY_SET)}"
            )
        section, _, name = key.partition(".")
        tree[section][name] = value
    try:
        return config_from_tree(tree)
    except UserError as error:
        raise UserError(f"recipe.stages: stage {number}: {error}") from None
