"""Opens the encoders and the streams of training and validation samples of a configuration."""

import logging

import numpy as np
import torch

from raphael_dist.config.schema import Config
from raphael_dist.config.upscale import check_small_images
from raphael_dist.data.buckets import factor_errors
from raphael_dist.data.captions import CaptionChoice
from raphael_dist.data.features.batch_encoder import Encoders
from raphael_dist.data.features.cache import FeatureCache
from raphael_dist.data.features.encoders import ImageEncoder, ImageFacts, TextEncoder, TextFacts
from raphael_dist.data.features.feature_source import FeatureSource, StoredFeatures
from raphael_dist.data.features.hed import EdgeEncoder
from raphael_dist.data.fetch.shard_cache import store_of
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.shards.dataset_index import DatasetIndex
from raphael_dist.data.shards.decode_sample import EdgeSource, ImageDataset
from raphael_dist.data.shards.open_index import find_shards, open_order
from raphael_dist.data.shards.sample_reader import SampleReader
from raphael_dist.data.stream import TrainStream
from raphael_dist.errors import UserError
from raphael_dist.runtime.long_work import run_on_all_ranks, run_on_rank0
from raphael_dist.runtime.progress_bar import Reporter
from raphael_dist.runtime.ranks import Ranks, gather_objects, raise_on_all_ranks
from raphael_dist.text import counted

_log = logging.getLogger(__name__)
_MAX_STORED_TEXT = 64 << 10  # bytes of a caption's tokens up to which data.cached_text=auto stores them


def open_encoders(config: Config, device: torch.device) -> Encoders:
    """Return the encoders of a run without their weights. Collective: all ranks call it.

    Rank 0 reads the encoders' widths and hashes for all ranks. A rank loads weights when it first encodes a sample.
    `device`: the device on which this rank's encoders run. Raises UserError on all ranks if files are missing or damaged, or
    if the encoders do not fit the configuration.
    """
    dtype, image_dtype = getattr(torch, config.train.dtype), getattr(torch, config.image.dtype)

    def read(_: Reporter) -> tuple[TextFacts, ImageFacts]:
        text = TextFacts.read(config.text.encoder, config.text.max_tokens, dtype, config.text.layer)
        return text, ImageFacts.read(config.image.vae, image_dtype)

    text_facts, image_facts = run_on_rank0("reading the encoders' configurations", read)
    text = TextEncoder.lazy(config.text.encoder, text_facts, device, dtype, config.text.layer)
    image = ImageEncoder.lazy(config.image.vae, image_facts, device, image_dtype)
    raise_on_all_ranks(lambda: check_encoders(config, text, image))
    return Encoders(text, image, raise_on_all_ranks(lambda: edge_encoder(config, device)), device, config.upscale.factor)


def edge_encoder(config: Config, device: torch.device) -> EdgeEncoder | None:
    """Return the edge detector HED if the configuration requires it, else None.

    Args:
        config: the run's configuration.
        device: where the network runs.

    Raises:
        UserError: the weights of HED are missing.
    """
    if config.edge.weight == 0 or config.data.features == "stored" or config.data.edge_maps not in ("auto", "hed"):
        return None
    return EdgeEncoder(config.data.hed_weights, device)


def load_encoders(config: Config, device: torch.device, dtype: torch.dtype) -> tuple[TextEncoder, ImageEncoder]:
    """Load the text encoder and the image encoder that a configuration names, with weights. This is not collective.

    `device`: the device on which they run. `dtype`: the dtype in which the text encoder computes; the image encoder computes
    in image.dtype. Raises UserError if files of an encoder cannot be read, or if the encoders do not fit the configuration.
    """
    text = TextEncoder.load(config.text.encoder, config.text.max_tokens, device, dtype, config.text.layer)
    image = ImageEncoder.load(config.image.vae, device, getattr(torch, config.image.dtype))
    check_encoders(config, text, image)
    return text, image


def check_encoders(config: Config, text: TextEncoder | TextFacts, image: ImageEncoder | ImageFacts) -> None:
    """Check that the encoders fit the configuration of the model: text width, latent channels and image sizes.

    Args:
        config: The configuration of the run.
        text: The text encoder, or the facts about it (width, ...) that are known without loading its weights.
        image: The image encoder, or the facts about it.

    Raises:
        UserError: The encoders do not fit the configuration. The error has a message for each mismatch.
    """
    lines = []
    if text.width != config.model.text_width:
        lines.append(
            f"model.text_width={config.model.text_width} must be {text.width}, the width of the embeddings of "
            f"text.encoder={config.text.encoder}. Set model.text_width={text.width}."
        )
    lines += factor_errors(config.image.buckets, image.factor)
    try:
        check_small_images(config.upscale, image.factor, config.image.buckets)
    except UserError as error:
        lines += error.args
    if image.channels != config.model.latent_channels:
        lines.append(
            f"model.latent_channels={config.model.latent_channels} must be {image.channels}, the number of latent channels "
            f"of image.vae={config.image.vae}. Set model.latent_channels={image.channels}."
        )
    if lines:
        raise UserError(*lines)


def open_stream(config: Config, ranks: Ranks, encoders: Encoders, *, training: bool) -> TrainStream:
    """Return the stream of training or validation samples. Collective: all ranks call it, and divide the work.

    First the shards (tar files of samples) are indexed. With data.features=cached, samples that are not in the cache yet are
    encoded, now or (data.cache_fill=during) in a background thread.

    Args:
        config: The configuration of the run.
        ranks: The ranks of the run.
        encoders: The encoders of the run.
        training: Open the training data (data.shards or data.sources). False: the validation data (data.val_shards).

    Raises:
        UserError: On all ranks, if shards are missing or empty, too many samples are bad, or edge maps are missing.
    """
    d = config.data
    order = open_order(config, ranks, training=training)
    source = raise_on_all_ranks(lambda: source_of(config, order.index, encoders, training))
    reader = None
    if isinstance(source, FeatureCache):
        _fill(source, encoders, config, ranks)
    else:
        reader = SampleReader(config, source.dataset, order, ranks.local_rank)
    return run_on_all_ranks(
        "opening the features",
        lambda _: TrainStream(
            order,
            source,
            seed=config.run.seed,
            caption_dropout=config.train.caption_dropout if training else 0.0,
            flip=d.flip and training,
            max_bad_fraction=d.max_bad_fraction,
            on_error=d.on_error,
            reader=reader,
        ),
    )


def _fill(cache: FeatureCache, encoders: Encoders, config: Config, ranks: Ranks) -> None:
    """Compute the missing files of the feature cache, now or (data.cache_fill=during) in a background thread.

    Collective: all ranks call it, and each computes a part of the files.
    """
    present = ranks.share(cache.index.num_shards)
    run_on_all_ranks("checking cached features", lambda report: cache.verify(present, report))
    missing = run_on_rank0("finding cached features", lambda _: cache.missing())
    local_missing = missing[ranks.rank :: ranks.world_size]
    in_background = config.data.cache_fill == "during"
    if missing and ranks.is_main:
        when = "during training" if in_background else "once"
        _log.info(
            "computing embeddings and latents of %d of %s, %s", len(missing), counted(cache.index.num_shards, "shard"), when
        )

    def fill(report: Reporter) -> None:
        if not in_background:
            with SampleReader(config, cache.dataset):
                cache.build(local_missing, report=report)
        elif local_missing:
            # Now, not while the model's weights are initialized: both draw from the same random generator.
            encoders.load_weights()
        if ranks.is_main:  # only on rank 0: otherwise each rank would load the text encoder to encode it
            _ = cache.null_text

    run_on_all_ranks("caching", fill)
    if missing and not in_background:
        counter = encoders.text.counter
        counts = np.sum(gather_objects((counter.truncated, counter.total)), axis=0).tolist()
        if ranks.is_main:
            counter.warn("captions", *counts)
    if in_background and local_missing:
        cache.fill_in_background(local_missing)


def fill_cache(config: Config, encoders: Encoders, part: int, num_parts: int, *, training: bool) -> tuple[int, int]:
    """Encode the samples in one part of the shards (tar files) and store them in the feature cache.

    Shards that are in the cache already are skipped. No process group is needed: several processes can divide the work,
    each with another `part`.

    Args:
        config: The configuration of a run.
        encoders: The encoders of the run.
        part: Number of the part to encode, from 0 to `num_parts` - 1. It consists of the shards with the numbers `part`,
            `part + num_parts`, and so on. Shards are numbered from 0.
        num_parts: Number of parts into which the shards are divided.
        training: Use the training shards. False: the validation shards.

    Returns:
        (number of shards of this part that this call has encoded, number of shards of all parts together).

    Raises:
        UserError: Shards are missing or cannot be used, or the cache cannot be written.
    """
    d = config.data
    index = build_index(find_shards(config, training=training), store=store_of(d))
    cache = _cache_of(config, dataset_of(config, index, training=training), encoders, training)
    # Divided by shard number, since the list of missing shards gets shorter while other processes work.
    missing = [shard for shard in cache.missing() if shard % num_parts == part]
    with SampleReader(config, cache.dataset):
        cache.build(missing)
    encoders.text.counter.warn()
    return len(missing), index.num_shards


def dataset_of(config: Config, index: DatasetIndex, *, training: bool, edges: EdgeSource | None = None) -> ImageDataset:
    """Return the object that loads samples by id, with the configured image sizes, captions and edge maps.

    Args:
        config: The configuration of the run.
        index: The index: a table of all samples of the shards.
        training: Whether these are the training shards, for the error message.
        edges: Where edge maps come from, such as "stored", instead of data.edge_maps. None: data.edge_maps.

    Raises:
        UserError: edge.weight requires edge maps, but data.edge_maps=none.
    """
    d, needs_edges = config.data, config.edge.weight > 0
    if needs_edges and d.edge_maps == "none":
        raise UserError(
            f"edge.weight={config.edge.weight} requires edge maps for data.{'shards' if training else 'val_shards'}, but "
            "data.edge_maps is none. Set data.edge_maps=auto, which computes missing edge maps with HED, or set "
            "edge.weight=0."
        )
    choice = CaptionChoice(d.caption_from, tuple(sorted(d.caption_weights.items())))
    return ImageDataset(index, config.image.buckets, (edges or d.edge_maps) if needs_edges else "none", captions=choice)


def source_of(config: Config, index: DatasetIndex, encoders: Encoders, training: bool) -> FeatureSource:
    """Return the source of images and captions, raw or encoded, that data.features selects (online, cached or stored).

    A feature cache is opened, but not filled. Raises UserError if edge.weight requires edge maps, but data.edge_maps=none.
    `index`: the table of all samples of the shards. `training`: whether these are the training shards, not validation.
    """
    if config.data.features == "stored":
        # When the features were computed, edge maps were files in the shards, even if HED had made them.
        dataset = dataset_of(config, index, training=training, edges="stored")
        return StoredFeatures(dataset, encoders.image, encoders.provenance(dataset))
    dataset = dataset_of(config, index, training=training)
    if config.data.features == "online":
        return FeatureSource(dataset, encoders.image)
    return _cache_of(config, dataset, encoders, training)


def _cache_of(config: Config, dataset: ImageDataset, encoders: Encoders, training: bool) -> FeatureCache:
    return FeatureCache(
        config.data.cache_dir, dataset, encoders, config.data.flip and training, with_text=stores_text(config, encoders.text)
    )


def stores_text(config: Config, text: TextEncoder) -> bool:
    """Return whether the feature cache stores captions encoded, as tokens (data.cached_text). False: as strings.

    Strings need less disk space, but are encoded again in each step. With data.cached_text=auto, the result is true if the
    tokens of a caption have at most 64 KiB. `text`: the text encoder.
    """
    setting = config.data.cached_text
    return setting == "stored" or (setting == "auto" and 2 * text.max_tokens * text.width <= _MAX_STORED_TEXT)
