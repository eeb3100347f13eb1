"""Checks on resume that settings and data which affect a run's results are unchanged, or the change is allowed."""

from collections.abc import Mapping

from raphael_dist.config.lr_schedule_arguments import ENDLESS
from raphael_dist.config.schema import ARCHITECTURE_FIELDS, Config, stored_tree
from raphael_dist.config.training_stages import staged_keys
from raphael_dist.config.types import FREE, keys_marked, keys_of
from raphael_dist.errors import UserError
from raphael_dist.text import JsonObject

FREE_FIELDS = frozenset(keys_marked(Config, FREE))
# Fingerprints of data and encoders in a manifest (data/run_data.py), and what differs when they do.
CLEANING = "data.caption_from (cleaning)"
FINGERPRINTS = {
    "data.shards": "other shards, which changes the order of samples",
    "data.shards (captions)": "other captions in shards of the same names",
    "run.init_from": "a base model with other weights",
    CLEANING: "captions that were cleaned by the rules of another version",
}


def changed_fields(old: Config, new: Config) -> dict[str, tuple[object, object]]:
    """Return the settings that differ and affect the results of a run, as {section.key: (old value, new value)}.

    `old`: the configuration of a checkpoint. `new`: that of the run that resumes from it.
    """
    free = FREE_FIELDS | staged_keys(old) | staged_keys(new)  # train.stages itself is compared
    if new.optim.lr_schedule not in ENDLESS:
        free -= {"train.max_steps"}  # another last step changes the learning rate of every step
    old_tree, new_tree = stored_tree(old), stored_tree(new)
    changed = {}
    for key in keys_of(Config):
        section, _, name = key.partition(".")
        values = old_tree[section][name], new_tree[section][name]
        if key not in free and values[0] != values[1]:
            changed[key] = values
    return changed


def check_same_run(old: Config, new: Config, folder: str) -> list[str]:
    """Check that a resumed run keeps the settings that affect its results.

    Args:
        old: the settings that a checkpoint was saved with.
        new: the settings of the run that resumes it.
        folder: name of the checkpoint in messages.

    Returns:
        A line for each change that `run.allow_change` allows.

    Raises:
        UserError: a change is not allowed. Changes that alter the shapes of weights are never allowed.
    """
    changed = changed_fields(old, new)
    lines = [f"{name} was {before} and is now {after}" for name, (before, after) in changed.items()]
    refusal = f"run.dir: {folder} was created with different settings: {'; '.join(lines)}."
    shapes = sorted(set(ARCHITECTURE_FIELDS) & changed.keys())
    if shapes:
        name = shapes[0]
        reason = f"The shapes of the weights depend on {name}."
        raise UserError(f"{refusal} {reason} Restore {name}={changed[name][0]}, or choose a new run.dir.")
    refused = changed.keys() - set(new.run.allow_change)
    if refused:
        allowed = ", ".join(sorted({*new.run.allow_change, *refused}))
        raise UserError(
            f"{refusal} Restore them, choose a new run.dir, or allow the change with run.allow_change=[{allowed}]."
        )
    return [f"{line} (run.allow_change)" for line in lines]


def check_same_data(manifest: JsonObject, current: Mapping[str, str], config: Config, folder: str) -> list[str]:
    """Check that a resumed run has the data and encoders with which its checkpoint was trained.

    Fingerprints (hashes) of shards, captions and encoders are compared, if both `manifest` and `current` have them.

    Args:
        manifest: the checkpoint's manifest. After a conversion it has only the fingerprint of the shards.
        current: the fingerprints of this run's data and encoders, by the setting that names them (such as data.shards).
        config: this run's configuration.
        folder: name of the checkpoint in messages.

    Returns:
        A line for each change that `run.allow_change` allows.

    Raises:
        UserError: a change is not allowed.
    """
    old = {"data.shards": manifest["dataset"], **manifest.get("data", {})}
    changed = [name for name, fingerprint in old.items() if current.get(name, fingerprint) != fingerprint]
    for name in changed:
        field = name.split()[0]
        if field not in config.run.allow_change:
            difference = FINGERPRINTS.get(name, "an encoder with other weights or settings")
            raise UserError(
                f"{field} must be the same as before, but {folder} was trained with {difference}. Restore the earlier data "
                f"or weights, choose a new run.dir, or allow the change with run.allow_change=[{field}]."
            )
    return [f"{name} differs from {folder} (run.allow_change)" for name in changed]
