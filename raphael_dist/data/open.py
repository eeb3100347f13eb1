"""From the configuration to streams of training and validation samples: encoders, index, cache, order."""

import logging

import torch

from raphael_dist.config import Config
from raphael_dist.config_upscale import check_small_pictures
from raphael_dist.data.cache import FeatureCache
from raphael_dist.data.captions import CaptionChoice
from raphael_dist.data.dataset import EdgeSource, ImageDataset
from raphael_dist.data.encoders import ImageEncoder, ImageFacts, TextEncoder, TextFacts
from raphael_dist.data.encoding import Encoders
from raphael_dist.data.features import FeatureSource, OnlineFeatures, StoredFeatures
from raphael_dist.data.hed import EdgeEncoder
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
_SMALL_TEXT = 64 << 10  # bytes of a caption's tokens that data.cached_text=auto stores


def open_encoders(config: Config, device: torch.device) -> Encoders:
    """Return the encoders without their weights, which are loaded by the ranks that encode, when they do. Collective.

    Rank 0 reads configurations, tokenizer and fingerprints for all. Raises UserError on all ranks as `check_encoders` does.
    """
    dtype, image_dtype = getattr(torch, config.train.dtype), getattr(torch, config.image.dtype)

    def look(_: Tell) -> tuple[TextFacts, ImageFacts]:
        text = TextFacts.read(config.text.encoder, config.text.max_tokens, dtype, config.text.layer)
        return text, ImageFacts.read(config.image.encoder, image_dtype)

    text_facts, image_facts = from_main("reading what the encoders are", look)
    text = TextEncoder.lazy(config.text.encoder, text_facts, device, dtype, config.text.layer)
    image = ImageEncoder.lazy(config.image.encoder, image_facts, device, image_dtype)
    all_or_none(lambda: check_encoders(config, text, image))
    return Encoders(text, image, all_or_none(lambda: edge_encoder(config, device)), device, config.upscale.factor)


def edge_encoder(config: Config, device: torch.device) -> EdgeEncoder | None:
    """Return HED where the configuration has it make edge maps; stored features have theirs. UserError: no weights of it."""
    if config.edge.weight == 0 or config.data.features == "stored" or config.data.edges not in ("auto", "hed"):
        return None
    return EdgeEncoder(config.data.hed_weights, device)


def load_encoders(config: Config, device: torch.device, dtype: torch.dtype) -> tuple[TextEncoder, ImageEncoder]:
    """Return text and image encoder with their weights, the text encoder in `dtype`.

    For a process alone. Raises UserError as `check_encoders` does, and for files that cannot be read.
    """
    text = TextEncoder.load(config.text.encoder, config.text.max_tokens, device, dtype, config.text.layer)
    image = ImageEncoder.load(config.image.encoder, device, getattr(torch, config.image.dtype))
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
    check_small_pictures(config.upscale, image.factor, config.image.buckets)
    if image.channels != config.model.latent_channels:
        raise UserError(
            f"model.latent_channels is {config.model.latent_channels}, but image.encoder {config.image.encoder!r} has "
            f"{image.channels} channels; set model.latent_channels={image.channels}"
        )


def open_stream(config: Config, ranks: Ranks, encoders: Encoders, *, training: bool) -> TrainStream:
    """Index the shards, compute what is to be cached before step 1 (each rank its part), and return the stream of samples.

    Collective. Raises UserError on all ranks for missing or empty shards, too many bad samples, missing edge maps.
    """
    d = config.data
    order = open_order(config, ranks, training=training)
    source = all_or_none(lambda: source_of(config, order.index, encoders, training))
    if isinstance(source, FeatureCache):
        _fill(source, encoders, config, ranks)
    reading = Reading(config, source.dataset, order, ranks.local_rank) if isinstance(source, OnlineFeatures) else None
    return together(
        "opening the features",
        lambda _: TrainStream(
            order,
            source,
            seed=config.run.seed,
            caption_drop=config.train.caption_drop if training else 0.0,
            flip=d.flip and training,
            max_bad_fraction=d.max_bad_fraction,
            on_error=d.on_error,
            reading=reading,
        ),
    )


def _fill(cache: FeatureCache, encoders: Encoders, config: Config, ranks: Ranks) -> None:
    """Compute what the cache lacks, each rank its part: now, or beside training. Collective."""
    present = range(len(cache.index.shards))[ranks.rank :: ranks.world_size]
    together("checking cached features", lambda tell: cache.verify(present, tell))
    missing = from_main("looking for cached features", lambda _: cache.missing())
    mine, of = missing[ranks.rank :: ranks.world_size], len(cache.index.shards)
    aside = config.data.cache_fill == "during"
    if missing and ranks.is_main:
        when = "while training goes on" if aside else "once"
        _log.info("computing embeddings and latents of %d of %d shards, %s", len(missing), of, when)
        if cache.former_folder().is_dir():
            _log.info("data.cache_dir: %s is of an older format and not used any more", cache.former_folder())

    def fill(tell: Tell) -> None:
        if not aside:
            with Reading(config, cache.dataset):
                cache.build(mine, tell=tell)
        elif mine:
            # Not beside the drawing of the model's first weights: loading draws from the same generator.
            encoders.ready()
        if ranks.is_main:  # here, since every rank that misses it would load the encoder for it
            _ = cache.null_text

    together("caching", fill)
    if aside and mine:
        cache.fill_aside(mine)


def fill_cache(config: Config, encoders: Encoders, part: int, num_parts: int, *, training: bool) -> tuple[int, int]:
    """Compute what is not cached of the shards part, part + num_parts, ...; return how many these were, of how many.

    For processes that do not know of each other (tools/prepare_data.py). Raises UserError as `open_stream` does.
    """
    d = config.data
    index = build_index(find_shards(config, training=training), store=store_of(d))
    cache = _cache_of(config, dataset_of(config, index, training=training), encoders, training)
    # By number, not by place in the list, which gets shorter while others work.
    mine = [shard for shard in cache.missing() if shard % num_parts == part]
    with Reading(config, cache.dataset):
        cache.build(mine)
    return len(mine), len(index.shards)


def dataset_of(config: Config, index: DatasetIndex, *, training: bool, edges: EdgeSource | None = None) -> ImageDataset:
    """Return what decodes the samples as it is configured; `edges` takes the place of data.edges.

    UserError: edge maps are wanted, and there are none.
    """
    d, wants_edges = config.data, config.edge.weight > 0
    if wants_edges and d.edges == "none":
        patterns = f"data.{'shards' if training else 'val_shards'}"
        raise UserError(
            f"edge.weight is {config.edge.weight}, but data.edges is none for {patterns}; set data.edges=auto, which makes "
            "edge maps by HED where there are none, or edge.weight=0"
        )
    choice = CaptionChoice(d.caption_from, tuple(sorted(d.caption_weights.items())))
    return ImageDataset(index, config.image.buckets, (edges or d.edges) if wants_edges else "none", captions=choice)


def source_of(config: Config, index: DatasetIndex, encoders: Encoders, training: bool) -> FeatureSource:
    """Return where features come from as it is configured; a cache filled or not. UserError as for `dataset_of`."""
    if config.data.features == "stored":
        # However their edge maps were made, they lay beside the pictures when the features were.
        dataset = dataset_of(config, index, training=training, edges="stored")
        return StoredFeatures(dataset, encoders.image, encoders.made_of(dataset))
    dataset = dataset_of(config, index, training=training)
    if config.data.features == "online":
        return OnlineFeatures(dataset, encoders.image)
    return _cache_of(config, dataset, encoders, training)


def _cache_of(config: Config, dataset: ImageDataset, encoders: Encoders, training: bool) -> FeatureCache:
    return FeatureCache(
        config.data.cache_dir, dataset, encoders, config.data.flip and training, with_text=stores_text(config, encoders.text)
    )


def stores_text(config: Config, text: TextEncoder) -> bool:
    """Return whether captions are cached as tokens; else as text, and encoded ahead of each step."""
    given = config.data.cached_text
    return given == "stored" or (given == "auto" and 2 * text.max_tokens * text.width <= _SMALL_TEXT)
