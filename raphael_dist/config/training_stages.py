"""Stages of a run (`train.stages`): consecutive ranges of steps with their own image sizes, batches or learning rates."""

from typing import NamedTuple

from raphael_dist.config.key_suggestions import known_key
from raphael_dist.config.schema import Config, config_from_tree
from raphael_dist.errors import UserError, did_you_mean
from raphael_dist.text import JsonObject

# Weights, data and encoders belong to the whole run.
KEYS_OF_STAGES = (
    "image.buckets", "data.bucket_run", "data.flip", "data.window_shards", "train.global_batch_size",
    "train.micro_batch_size",
    "train.caption_dropout", "optim.lr", "optim.weight_decay", "optim.max_grad_norm", "edge.max_timestep",
    "model.gate_noise", "model.balance_weight", "model.checkpoint_activations", "ema.decay",
)  # fmt: skip


def staged_keys(config: Config) -> set[str]:
    """Return the keys (such as optim.lr) that at least one stage of the run (an entry of train.stages) sets."""
    return {key for stage in config.train.stages for key in stage.set}


class StageSpan(NamedTuple):
    """A stage of a run (an entry of train.stages). A run without stages is one stage.

    Attributes:
        config: the run's configuration with the settings of this stage.
        since: number of steps before the stage: its first step is since + 1, counted from 1.
        until: number of its last step.
    """

    config: Config
    since: int
    until: int


def stage_at(config: Config, step: int) -> StageSpan:
    """Return the stage of the run (entry of train.stages) to which step number `step` + 1, counted from 1, belongs.

    Raises UserError if the settings of the stage are not valid.
    """
    since, last = 0, config.train.max_steps
    for number, stage in enumerate(config.train.stages, start=1):
        until = last if stage.until is None else min(last, stage.until)
        if step < until or stage is config.train.stages[-1]:
            return StageSpan(_with_values(config, stage.set, number), since, until)
        since = until
    return StageSpan(config, 0, last)


def every_stage(config: Config) -> list[Config]:
    """Return the configuration of each stage (entry of train.stages), or [config] for a run without stages.

    Raises UserError if the settings of a stage are not valid.
    """
    stages = config.train.stages
    return [_with_values(config, stage.set, number) for number, stage in enumerate(stages, start=1)] or [config]


def _with_values(config: Config, values: JsonObject, number: int) -> Config:
    tree = config.model_dump(mode="json")
    for key, value in values.items():
        if key not in KEYS_OF_STAGES:
            hint = did_you_mean(known_key(key, Config) or key, KEYS_OF_STAGES)
            raise UserError(
                f"train.stages: stage {number} sets {key!r}{hint}, which must not differ between stages. Remove it; a "
                f"stage may set {', '.join(KEYS_OF_STAGES)}."
            )
        section, _, name = key.partition(".")
        tree[section][name] = value
    try:
        return config_from_tree(tree)
    except UserError as error:
        raise UserError(f"train.stages: the settings of stage {number} are not valid: {error}") from None
