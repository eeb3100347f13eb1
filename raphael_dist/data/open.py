"""From the configuration to streams of training and validation samples: index, cache, order."""

import logging
from collections.abc import Sequence

from raphael_dist.config import Config
from raphael_dist.data.cache import FeatureCache
from raphael_dist.data.dataset import ImageDataset
from raphael_dist.data.encoders import ImageEncoder, TextEncoder
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.shards import build_index, expand_shards
from raphael_dist.data.stream import TrainStream
from raphael_dist.errors import UserError
from raphael_dist.parallel.batch_plan import run_of
from raphael_dist.parallel.ranks import Ranks, all_or_none, main_first

_log = logging.getLogger(__name__)


def check_encoders(config: Config, text: TextEncoder, image: ImageEncoder) -> None:
    """Raise UserError when the encoders do not fit the model, naming both numbers."""
    if text.width != config.model.text_width:
        raise UserError(
            f"model.text_width is {config.model.text_width}, but text.encoder {config.text.encoder!r} is {text.width} wide; "
            f"set model.text_width={text.width}"
        )
    if image.channels != config.model.latent_channels:
        raise UserError(
            f"model.latent_channels is {config.model.latent_channels}, but image.encoder {config.image.encoder!r} has "
            f"{image.channels} channels; set model.latent_channels={image.channels}"
        )


def open_stream(
    config: Config, patterns: Sequence[str], ranks: Ranks, text: TextEncoder, image: ImageEncoder, *, training: bool
) -> TrainStream:
    """Index the shards, compute what is not cached yet (each rank its part), and return the stream of samples.

    Collective. Raises UserError on all ranks for missing or empty shards, too many bad samples, missing edge maps.
    """
    d, flip = config.data, config.data.flip and training
    paths = all_or_none(lambda: expand_shards(patterns))
    index = main_first(ranks, lambda: build_index(paths, d.cache_dir / "index"))
    edges = d.edges if config.edge.weight > 0 else "none"
    dataset = ImageDataset(index, config.image.buckets, edges)
    if config.edge.weight > 0 and not dataset.has_edges:
        raise UserError(
            f"edge.weight is {config.edge.weight}, but the shards of data.{'shards' if training else 'val_shards'} hold no "
            "edge.png (or data.edges is none); add edge maps (tools/make_emoji_dataset.py shows how) or set edge.weight=0"
        )
    cache = all_or_none(lambda: FeatureCache(d.cache_dir, index, dataset, text, image, config.image.buckets, flip))
    missing = all_or_none(cache.missing)  # all ranks look before any builds
    if missing and ranks.is_main:
        _log.info("computing embeddings and latents of %d of %d shards, once", len(missing), len(index.shards))
    all_or_none(lambda: cache.build(missing[ranks.rank :: ranks.world_size]))
    # A micro-batch holds one image size, so the pairs of a bucket come in runs.
    run = run_of(config, training) or 1
    order = all_or_none(
        lambda: SampleOrder(index, config.image.buckets, config.run.seed, window_shards=d.window_shards, run_length=run)
    )
    return all_or_none(
        lambda: TrainStream(
            order,
            cache,
            seed=config.run.seed,
            caption_drop=config.train.caption_drop if training else 0.0,
            flip=flip,
            max_bad_fraction=d.max_bad_fraction,
        )
    )


def fill_cache(
    config: Config, text: TextEncoder, image: ImageEncoder, part: int, num_parts: int, *, training: bool
) -> tuple[int, int]:
    """Compute what is not cached of every `num_parts`-th shard; return how many that were, and all shards there are.

    For processes that do not know of each other. Raises UserError as `open_stream` does.
    """
    d, flip = config.data, config.data.flip and training
    index = build_index(expand_shards(d.shards if training else d.val_shards), d.cache_dir / "index")
    dataset = ImageDataset(index, config.image.buckets, d.edges if config.edge.weight > 0 else "none")
    cache = FeatureCache(d.cache_dir, index, dataset, text, image, config.image.buckets, flip)
    # By number, not by place in the list, which gets shorter while others work.
    mine = [shard for shard in cache.missing() if shard % num_parts == part]
    cache.build(mine)
    return len(mine), len(index.shards)
