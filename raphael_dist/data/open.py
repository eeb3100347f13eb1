"""From the configuration to streams of training and validation samples: encoders, index, cache, order."""

import logging

import torch

from raphael_dist.config import Config
from raphael_dist.data.cache import FeatureCache
from raphael_dist.data.dataset import ImageDataset
from raphael_dist.data.encoders import ImageEncoder, ImageFacts, TextEncoder, TextFacts
from raphael_dist.data.index import DatasetIndex
from raphael_dist.data.open_index import find_shards, open_order
from raphael_dist.data.reading import Reading
from raphael_dist.data.shard_store import store_of
from raphael_dist.data.shards import build_index
from raphael_dist.data.stream import TrainStream
from raphael_dist.errors import UserError
from raphael_dist.parallel.long_work import Tell, from_main, together
from raphael_dist.parallel.ranks import Ranks, all_or_none

_log = logging.getLogger(__name__)


def open_encoders(config: Config, device: torch.device) -> tuple[TextEncoder, ImageEncoder]:
    """Return both encoders without their weights, which are loaded by the ranks that encode, when they do. Collective.

    Rank 0 reads configurations, tokenizer and fingerprints for all. Raises UserError on all ranks as `check_encoders` does.
    """
    dtype = getattr(torch, config.train.dtype)

    def look(_: Tell) -> tuple[TextFacts, ImageFacts]:
        text = TextFacts.read(config.text.encoder, config.text.max_tokens, dtype)
        return text, ImageFacts.read(config.image.encoder)

    text_facts, image_facts = from_main("reading what the encoders are", look)
    text = TextEncoder.lazy(config.text.encoder, text_facts, device, dtype)
    image = ImageEncoder.lazy(config.image.encoder, image_facts, device, torch.float32)
    all_or_none(lambda: check_encoders(config, text, image))
    return text, image


def load_encoders(config: Config, device: torch.device, dtype: torch.dtype) -> tuple[TextEncoder, ImageEncoder]:
    """Return both encoders with their weights, the text encoder in `dtype`, the image encoder in float32.

    For a process alone. Raises UserError as `check_encoders` does, and for files that cannot be read.
    """
    text = TextEncoder.load(config.text.encoder, config.text.max_tokens, device, dtype)
    image = ImageEncoder.load(config.image.encoder, device, torch.float32)
    check_encoders(config, text, image)
    return text, image


def check_encoders(config: Config, text: TextEncoder | TextFacts, image: ImageEncoder | ImageFacts) -> None:
    """Raise UserError when the encoders do not fit the model or the image sizes, naming both numbers."""
    if text.width != config.model.text_width:
        raise UserError(
            f"model.text_width is {config.model.text_width}, but text.encoder {config.text.encoder!r} is {text.width} wide; "
            f"set model.text_width={text.width}"
        )
    for height, width in config.image.buckets:
        if height % image.factor or width % image.factor:
            raise UserError(
                f"image.buckets: [{height}, {width}] is not a multiple of {image.factor}, the image encoder's factor"
            )
    if image.channels != config.model.latent_channels:
        raise UserError(
            f"model.latent_channels is {config.model.latent_channels}, but image.encoder {config.image.encoder!r} has "
            f"{image.channels} channels; set model.latent_channels={image.channels}"
        )


def open_stream(config: Config, ranks: Ranks, text: TextEncoder, image: ImageEncoder, *, training: bool) -> TrainStream:
    """Index the shards, compute what is not cached yet (each rank its part), and return the stream of samples.

    Collective. Raises UserError on all ranks for missing or empty shards, too many bad samples, missing edge maps.
    """
    d = config.data
    order = open_order(config, ranks, training=training)
    cache = all_or_none(lambda: _cache_of(config, order.index, text, image, training))
    missing = from_main("looking for cached features", lambda _: cache.missing())
    if missing and ranks.is_main:
        _log.info("computing embeddings and latents of %d of %d shards, once", len(missing), len(order.index.shards))

    def fill(tell: Tell) -> None:
        with Reading(config, cache.dataset):
            cache.build(missing[ranks.rank :: ranks.world_size], tell=tell)
        if ranks.is_main:  # here, since every rank that misses it would load the encoder for it
            _ = cache.null_text

    together("caching", fill)
    return together(
        "opening the cached features",
        lambda _: TrainStream(
            order,
            cache,
            seed=config.run.seed,
            caption_drop=config.train.caption_drop if training else 0.0,
            flip=cache.flip,
            max_bad_fraction=d.max_bad_fraction,
        ),
    )


def fill_cache(
    config: Config, text: TextEncoder, image: ImageEncoder, part: int, num_parts: int, *, training: bool
) -> tuple[int, int]:
    """Compute what is not cached of the shards part, part + num_parts, ...; return how many these were, and how many shards
    there are.

    For processes that do not know of each other (tools/prepare_data.py). Raises UserError as `open_stream` does.
    """
    d = config.data
    index = build_index(find_shards(config, training=training), store=store_of(d))
    cache = _cache_of(config, index, text, image, training)
    # By number, not by place in the list, which gets shorter while others work.
    mine = [shard for shard in cache.missing() if shard % num_parts == part]
    with Reading(config, cache.dataset):
        cache.build(mine)
    return len(mine), len(index.shards)


def _cache_of(config: Config, index: DatasetIndex, text: TextEncoder, image: ImageEncoder, training: bool) -> FeatureCache:
    """Return the cache of indexed shards as it is configured, filled or not. UserError: edge maps are wanted, not there."""
    d, wants_edges = config.data, config.edge.weight > 0
    dataset = ImageDataset(index, config.image.buckets, d.edges if wants_edges else "none")
    if wants_edges and not dataset.has_edges:
        raise UserError(
            f"edge.weight is {config.edge.weight}, but the shards of data.{'shards' if training else 'val_shards'} hold no "
            "edge.png (or data.edges is none); add edge maps (tools/make_emoji_dataset.py shows how) or set edge.weight=0"
        )
    return FeatureCache(d.cache_dir, dataset, text, image, d.flip and training)
