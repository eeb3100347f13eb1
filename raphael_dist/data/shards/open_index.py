"""Opens the index of a run's shards. The ranks share the work of indexing shards that are not indexed yet."""

import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from raphael_dist.config.schema import Config
from raphael_dist.data.fetch.shard_cache import store_of
from raphael_dist.data.mixture import MixedOrder
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.shards import build_index
from raphael_dist.data.shards.dataset_index import DatasetIndex, open_table
from raphael_dist.data.shards.shard_names import expand_shards, name_option
from raphael_dist.data.shards.view import View, columns_of, open_view
from raphael_dist.errors import UserError
from raphael_dist.parallel.batch_plan import bucket_run_length
from raphael_dist.runtime.long_work import run_on_all_ranks, run_on_rank0
from raphael_dist.runtime.progress_bar import Reporter
from raphael_dist.runtime.ranks import Ranks
from raphael_dist.text import counted, hide_secrets

_log = logging.getLogger(__name__)
Order = SampleOrder | MixedOrder


def patterns_of(config: Config, training: bool) -> list[tuple[tuple[str, ...], float]]:
    """Return, for each source of samples, (patterns of the source's shards, weight of the source in the mixture).

    For training, these are the sources in data.sources, or without them data.shards as one source of weight 1. For
    validation (`training` is False), data.val_shards is the only source.
    """
    d = config.data
    if not training:
        return [(d.val_shards, 1.0)]
    return [(source.shards, source.weight) for source in d.sources] or [(d.shards, 1.0)]


def _field(training: bool) -> str:
    return "data.shards" if training else "data.val_shards"


def names_of(config: Config, training: bool) -> list[list[str]]:
    """Return, for each source of samples, the paths and URLs of its shards (tar files).

    `training`: return the shards for training; False: those for validation. Raises UserError if a shard is missing, a
    pattern is invalid, or a validation shard is also a training shard.
    """
    retry = store_of(config.data).retry
    with name_option(_field(training)):
        names = [expand_shards(patterns, retry) for patterns, _ in patterns_of(config, training)]
    if not training:
        _check_held_out(config, names[0])
    return names


def _check_held_out(config: Config, names: Sequence[str]) -> None:
    """Raise UserError if shards are used for both training and validation."""
    try:
        training = {os.path.realpath(name) for source in names_of(config, True) for name in source}
    except UserError:
        return  # reported where the training shards are opened
    both = [name for name in names if os.path.realpath(name) in training]
    if both:
        raise UserError(
            f"data.val_shards={both[0]} must not be in data.shards too, since the validation loss requires images that are "
            f"not trained on. {len(both)} of the {len(names)} shards in data.val_shards are in both. Name other shards, "
            "or set data.val_shards=[]."
        )


def require_shards(config: Config) -> None:
    """Raise UserError if the configuration names no training data: data.shards and data.sources are both empty."""
    if not config.data.shards and not config.data.sources:
        raise UserError("data.shards=[] must name the training data. Set, for example, data.shards='data/emoji/train-*'.")


def find_shards(config: Config, *, training: bool) -> list[str]:
    """Return the paths and URLs of all training shards (tar files) or, if `training` is False, of all validation shards.

    Raises UserError if a shard is missing, a pattern is invalid, or a validation shard is also a training shard.
    """
    return [name for source in names_of(config, training) for name in source]


def command_of(config: Config, training: bool) -> str:
    """Return the command line with which the user can index the training or validation shards before a run, for messages."""
    patterns = [hide_secrets(pattern) for patterns, _ in patterns_of(config, training) for pattern in patterns]
    columns = columns_of(config.data.filters)
    words = ["python", "tools/index_shards.py", *patterns, "--cache-dir", str(config.data.cache_dir)]
    return shlex.join([*words, *(["--columns", *columns] if columns else [])])


def open_order(config: Config, ranks: Ranks, *, training: bool) -> Order:
    """Index the shards (tar files) that are not indexed yet, and return the order in which their samples are read.

    Indexing lists the samples of a shard. Collective: all ranks call it, and each indexes a part of the shards. `training`:
    use the training shards; False: the validation shards.

    Raises:
        UserError: On all ranks, if shards are missing, or too many of them are damaged; no sample can be used; the shards
            that are not indexed yet are too large to index within a run; or the filters drop every sample.
    """
    with name_option(_field(training)):
        by_source = run_on_rank0("finding shards", lambda _: names_of(config, training))
        index = _open_index(config, ranks, [name for source in by_source for name in source], training)
        view = _open_view(config, index, training)
        d = config.data
        run_on_all_ranks("checking the shards", lambda _: check_damage(index, d.on_error, d.max_bad_fraction))
        weights = [weight for _, weight in patterns_of(config, training)]
        order = run_on_all_ranks(
            "ordering the samples", lambda _: order_of(config, index, view, by_source, weights, training=training)
        )
    if ranks.is_main:
        for line in describe(index, view, order):
            _log.info("%s: %s", _field(training), line)
    return order


def _open_index(config: Config, ranks: Ranks, names: Sequence[str], training: bool) -> DatasetIndex:
    store = store_of(config.data)
    columns = columns_of(config.data.filters) if training else []

    def find(report: Reporter) -> tuple[Path | None, list[tuple[str, int]]]:
        index = build_index.open_index(names, store, columns)
        if index is not None:
            return index.folder, []
        missing = build_index.unindexed(names, store, report)
        build_index.check_index_in_run(missing, command_of(config, training))
        return None, missing

    folder, missing = run_on_rank0("finding the index", find)
    if folder is None:
        local_names = [name for name, _ in missing[ranks.rank :: ranks.world_size]]
        run_on_all_ranks("indexing", lambda report: build_index.scan_shards(local_names, store, report) and None)
        folder = run_on_rank0(
            "joining the index", lambda report: build_index.join_records(names, store, columns, report).folder
        )
    assert folder is not None
    return run_on_all_ranks("reading the index", lambda _: open_table(folder, store, names))


def _open_view(config: Config, index: DatasetIndex, training: bool) -> View:
    """Return which samples pass the filters, and their image sizes. Rank 0 computes this if it is not stored yet."""
    filters, buckets = config.data.filters if training else (), config.image.buckets
    run_on_rank0("filtering the samples", lambda _: open_view(index, buckets, filters) and None)
    return run_on_all_ranks("reading the view", lambda _: open_view(index, buckets, filters, check=False))


def order_of(
    config: Config,
    index: DatasetIndex,
    view: View,
    by_source: Sequence[Sequence[str]],
    weights: Sequence[float],
    *,
    training: bool,
) -> Order:
    """Return the order in which the samples of an index are used: that of one source, or a mixture of several.

    Args:
        config: The configuration of the run.
        index: The index: a table of the samples of all sources.
        view: Which samples pass the filters, and their image sizes (buckets).
        by_source: For each source, the names (paths or URLs) of its shards, in the order of the index.
        weights: For each source, its weight in the mixture.
        training: Whether these are the training samples, not those for validation.

    Raises:
        UserError: Samples of one image size are read in groups, since a micro-batch has one size, but no size has enough
            samples for a group; or the weight of a source is so small that none of its samples would be used.
    """
    # A micro-batch has one image size, so samples of one size come in runs.
    seed, window, run = config.run.seed, config.data.window_shards, bucket_run_length(config, training) or 1
    if len(by_source) == 1:
        return SampleOrder(index, config.image.buckets, seed, window, run, view)
    parts, first = [], 0
    for names in by_source:
        part = range(first, first + len(names))
        parts.append(SampleOrder(index, config.image.buckets, seed, window, run, view, part))
        first += len(names)
    return MixedOrder(parts, weights, seed)


def describe(index: DatasetIndex, view: View, order: Order) -> list[str]:
    """Return lines for the log: the number of usable samples, and how many are left out for which reason.

    `index`: the samples of all shards. `view`: which of them pass the filters. `order`: the order in which they are read.
    """
    lines = [
        f"{counted(index.num_samples, 'sample', ',')} in {counted(index.num_shards, 'shard', ',')}; "
        f"left out: {counted(index.num_bad, 'unusable sample', ',')}"
    ]
    lines += [
        f"{index.shard(n).name} {damage}; its other samples are left out" for n, damage in list(index.damaged.items())[:3]
    ]
    lines += [f"skipped: {line}" for line in index.skipped.lines()]
    lines += view.describe()
    if order.dropped_per_epoch:
        lines.append(
            f"left out: {counted(order.dropped_per_epoch, 'sample', ',')} per epoch, too few for a run of "
            f"{order.run_length} samples of one image size"
        )
    return lines


def check_damage(index: DatasetIndex, on_error: str, max_bad_fraction: float) -> None:
    """Raise UserError if more shards or samples are unreadable than the configuration allows.

    Args:
        index: The index: a table of all samples of the shards (tar files), with the shards that could not be read.
        on_error: data.on_error. "stop": no shard and no sample may be unreadable. "skip": `max_bad_fraction` of the shards
            may be unreadable; unreadable samples raise no error here, but `TrainStream` limits their number.
        max_bad_fraction: data.max_bad_fraction. One unreadable shard is always allowed with "skip".
    """
    if on_error == "stop" and index.num_bad:
        raise UserError(
            f"data.on_error=stop requires that every sample can be used, but {index.num_bad} of "
            f"{counted(index.num_samples + index.num_bad, 'sample')} cannot be used: the first one is "
            f"{next(index.iter_bad())}. Replace these samples, or set data.on_error=skip."
        )
    if not index.damaged:
        return
    number, damage = next(iter(index.damaged.items()))
    shards = f"{len(index.damaged)} of {counted(index.num_shards, 'shard')}"
    first = f"the first one is {hide_secrets(index.shard(number).source)}: {damage}"
    if on_error == "stop":
        raise UserError(
            f"data.on_error=stop requires that every shard can be read, but {shards} cannot be read: {first}. "
            "Write or copy these shards again, or remove them from data.shards."
        )
    if len(index.damaged) > max(1.0, max_bad_fraction * index.num_shards):
        raise UserError(
            f"data.max_bad_fraction={max_bad_fraction} is exceeded: {shards} cannot be read: {first}. Write or "
            "copy these shards again, or raise data.max_bad_fraction."
        )
