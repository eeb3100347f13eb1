"""Which fields decide the numbers of a run: when the run goes on, these must not change unnoticed."""

from collections.abc import Mapping
from typing import Any

from raphael_dist.config import ARCHITECTURE_FIELDS, Config
from raphael_dist.config_recipes import ENDLESS
from raphael_dist.errors import UserError
from raphael_dist.stages import staged_keys

# How a run is carried out and watched, not what it computes: free to change whenever it starts again. Everything else is
# compared, a new field too until it is named here. Encoders, and shards, are compared by what is in them (data/source.py).
FREE_SECTIONS = {"checkpoint", "parallel", "sample"}
FREE = {
    "run.dir", "run.fresh", "run.init_from", "run.init_missing", "run.hang_timeout_s", "run.lock_wait_s",
    "run.log_level", "run.trackers", "run.project", "run.allow_change",
    "model.space_backend", "model.checkpoint_activations", "text.encoder", "text.layer", "image.encoder",
    "data.shards", "data.sources", "data.val_shards", "data.features", "data.cache_fill", "data.cached_text",
    "data.hed_weights", "data.cache_dir", "data.prefetch", "data.max_bad_fraction",
    "data.workers", "data.on_error", "data.shard_cache", "data.shard_cache_gb", "data.retries", "data.timeout_s",
    "train.max_steps", "train.micro_batch", "train.compile", "train.cuda_graphs", "train.check_gradients",
    "train.max_skipped", "train.spike_sigma", "train.spike_window", "train.spike_action", "train.log_every",
    "train.val_every", "train.sample_every", "train.load_scalars", "upscale.back_projections",
}  # fmt: skip
CLEANING = "data.caption_from (cleaning)"
OTHER_DATA = {
    "data.shards": "other shards, and the order of samples would change",
    "data.shards (captions)": "other captions in shards of the same names",
    "run.init_from": "another model beside it, of other weights",
    CLEANING: "captions that another version cleaned by other rules",
}
ARCHITECTURE = set(ARCHITECTURE_FIELDS)


def changes(was: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """Return the fields that decide a run's numbers and differ, each with both values."""
    old, new = was.model_dump(mode="json"), now.model_dump(mode="json")
    names = [f"{section}.{field}" for section, fields in new.items() for field in fields if section not in FREE_SECTIONS]
    # Most schedules end at max_steps: another end is another learning rate at every step.
    free = FREE if now.optim.decay in ENDLESS else FREE - {"train.max_steps"}
    free = free | staged_keys(was) | staged_keys(now)  # the stages themselves are compared
    pairs = {name: (_value(old, name), _value(new, name)) for name in names if name not in free}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _value(tree: dict[str, Any], name: str) -> Any:
    section, field = name.split(".")
    return tree[section][field]


def check_same_run(was: Config, now: Config, where: str) -> list[str]:
    """Return a line for each change that `run.allow_change` allows; UserError for one that it does not.

    Nothing allows weights of another shape.
    """
    changed = changes(was, now)
    told = [f"{name} was {a} there and is {b} here" for name, (a, b) in changed.items()]
    if final := sorted(ARCHITECTURE & changed.keys()):
        first = final[0]
        raise UserError(
            f"run.dir: {where} holds another run: {'; '.join(told)}; choose another run.dir, or "
            f"{first}={changed[first][0]} to continue it"
        )
    if missing := [name for name in changed if name not in now.run.allow_change]:
        wanted = sorted({*now.run.allow_change, *missing})
        raise UserError(
            f"run.dir: {where} holds another run: {'; '.join(told)}; give what it had, another run.dir, or "
            f"run.allow_change=[{', '.join(wanted)}] to go on with the change"
        )
    return [f"{line} (run.allow_change)" for line in told]


def check_same_data(manifest: Mapping[str, Any], now: Mapping[str, str], config: Config, where: str) -> list[str]:
    """Compare the fingerprints of shards, captions and encoders with those that a checkpoint's manifest notes.

    Returns a line for each change that `run.allow_change` allows; UserError for one that it does not. Checkpoints that note
    no captions and encoders are compared by their shards alone.
    """
    was = {"data.shards": manifest["dataset"], **manifest.get("data", {})}
    changed = [name for name, mark in was.items() if now.get(name, mark) != mark]
    for name in changed:
        field = name.split()[0]
        if field not in config.run.allow_change:
            what = OTHER_DATA.get(name, "an encoder of other weights or settings")
            raise UserError(
                f"{field}: {where} was trained with {what}; give the same, another run.dir, or run.allow_change=[{field}]"
            )
    told = [f"{name} is not what it was in {where} (run.allow_change)" for name in changed]
    if CLEANING in now and CLEANING not in was:
        told.append(f"captions are cleaned by {now[CLEANING]} here; {where} is older, and saw them cleaned by version 1")
    return told
