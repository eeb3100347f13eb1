"""Opening the index of a run: what is missing is divided over the ranks, or refused where it is too much. Collective."""

import logging
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from raphael_dist.config import Config
from raphael_dist.data import shards
from raphael_dist.data.index import DatasetIndex, open_table
from raphael_dist.data.mixture import MixedOrder
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.shard_store import ShardError, store_of
from raphael_dist.data.view import View, columns_of, open_view
from raphael_dist.errors import UserError
from raphael_dist.parallel.batch_plan import run_of
from raphael_dist.parallel.long_work import Tell, from_main, together
from raphael_dist.parallel.ranks import Ranks

_log = logging.getLogger(__name__)
Order = SampleOrder | MixedOrder


def patterns_of(config: Config, training: bool) -> list[tuple[tuple[str, ...], float]]:
    """Return the sources of a run's samples, each as (patterns, weight)."""
    d = config.data
    if not training:
        return [(d.val_shards, 1.0)]
    return [(source.shards, source.weight) for source in d.sources] or [(d.shards, 1.0)]


@contextmanager
def naming(training: bool) -> Iterator[None]:
    """Let errors of the shards name the field that named these."""
    try:
        yield
    except UserError as error:
        if training or isinstance(error, ShardError):
            raise
        raise UserError(re.sub(r"^data(\.shards)?:", "data.val_shards:", str(error))) from None


def names_of(config: Config, training: bool) -> list[list[str]]:
    """Return the shards of each source. UserError as `expand_shards`, naming the field."""
    patience = store_of(config.data).patience
    with naming(training):
        return [shards.expand_shards(patterns, patience) for patterns, _ in patterns_of(config, training)]


def find_shards(config: Config, *, training: bool) -> list[str]:
    """Return the paths and URLs of all shards that data.shards or data.sources, or data.val_shards, name. UserError."""
    return [name for source in names_of(config, training) for name in source]


def command_of(config: Config, training: bool) -> str:
    """Return the command that indexes these shards."""
    given = [pattern for patterns, _ in patterns_of(config, training) for pattern in patterns]
    columns = columns_of(config.data.filters)
    words = ["python", "tools/index_shards.py", *given, "--cache-dir", str(config.data.cache_dir)]
    return shlex.join([*words, *(["--columns", *columns] if columns else [])])


def open_order(config: Config, ranks: Ranks, *, training: bool) -> Order:
    """Index the shards as far as they are not, each rank its part, and return the order of their samples. Collective.

    Raises UserError on all ranks: missing shards, no usable sample, too much to index within a run, too many damaged shards,
    filters that drop everything.
    """
    with naming(training):
        return _open_order(config, ranks, training=training)


def _open_order(config: Config, ranks: Ranks, *, training: bool) -> Order:
    d, store = config.data, store_of(config.data)
    columns = columns_of(d.filters) if training else []
    by_source = from_main("looking for shards", lambda _: names_of(config, training))
    names = [name for source in by_source for name in source]

    def look(tell: Tell) -> tuple[Path | None, list[tuple[str, int]]]:
        index = shards.open_index(names, store, columns)
        if index is not None:
            return index.folder, []
        missing = shards.unindexed(names, store, tell)
        shards.check_index_in_run(missing, command_of(config, training))
        return None, missing

    folder, missing = from_main("looking for the index", look)
    if folder is None:
        mine = [name for name, _ in missing[ranks.rank :: ranks.world_size]]
        together("indexing", lambda tell: shards.scan_shards(mine, store, tell) and None)
        folder = from_main("joining the index", lambda tell: shards.join_records(names, store, columns, tell).folder)
    assert folder is not None
    index = together("reading the index", lambda _: open_table(folder, store))
    filters = d.filters if training else ()
    # One process writes it; the others map what it wrote.
    from_main("looking at the samples", lambda _: open_view(index, config.image.buckets, filters) and None)
    view = together("reading the view", lambda _: open_view(index, config.image.buckets, filters))
    together("checking the shards", lambda _: check_damage(index, d.on_error, d.max_bad_fraction))
    weights = [weight for _, weight in patterns_of(config, training)]
    order = together("ordering the samples", lambda _: order_of(config, index, view, by_source, weights, training=training))
    if ranks.is_main:
        for line in describe(index, view, order):
            _log.info("%s: %s", "data.shards" if training else "data.val_shards", line)
    return order


def order_of(
    config: Config,
    index: DatasetIndex,
    view: View,
    by_source: Sequence[Sequence[str]],
    weights: Sequence[float],
    *,
    training: bool,
) -> Order:
    """Return the order of an index's samples as it is configured. UserError as `SampleOrder`."""
    # A micro-batch holds one image size, so samples of one size come in runs.
    seed, window, run = config.run.seed, config.data.window_shards, run_of(config, training) or 1
    if len(by_source) == 1:
        return SampleOrder(index, config.image.buckets, seed, window, run, view)
    parts, first = [], 0
    for names in by_source:
        part = range(first, first + len(names))
        parts.append(SampleOrder(index, config.image.buckets, seed, window, run, view, part))
        first += len(names)
    return MixedOrder(parts, weights, seed)


def describe(index: DatasetIndex, view: View, order: Order) -> list[str]:
    """Return lines on what there is to train on, and what is dropped."""
    lines = [f"{index.num_samples:,} samples in {len(index.shards):,} shards, {index.num_bad:,} bad ones left out"]
    lines += [f"{index.shards[n].name} {why}; its other samples are left out" for n, why in list(index.damaged.items())[:3]]
    lines += view.describe()
    if order.dropped_per_epoch:
        lines.append(
            f"{order.dropped_per_epoch:,} samples of each epoch do not fill a run of {order.run_length} of one size"
        )
    return lines


def check_damage(index: DatasetIndex, on_error: str, max_bad_fraction: float) -> None:
    """Raise UserError when shards or samples are bad and must not be, or too many shards; one of several may be."""
    if on_error == "stop" and index.num_bad:
        raise UserError(
            f"data.on_error=stop: {index.num_bad} samples are bad, the first {next(index.iter_bad())}; repair them"
        )
    if not index.damaged:
        return
    number, why = next(iter(index.damaged.items()))
    first = f"the first {index.shards[number].source}: {why}"
    if on_error == "stop":
        raise UserError(f"data.on_error=stop: {len(index.damaged)} shards are damaged, {first}; repair or leave them out")
    if len(index.damaged) > max(1.0, max_bad_fraction * len(index.shards)):
        raise UserError(
            f"data.max_bad_fraction: {len(index.damaged)} of {len(index.shards)} shards are damaged, {first}; repair "
            "them or raise the limit"
        )
