"""Checks some samples of a run's data: edge maps without edges, images that occur several times, captions too long."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from raphael_dist.config.schema import Config
from raphael_dist.data.captions import CaptionChoice
from raphael_dist.data.features.encoder_models import tokenizer_of
from raphael_dist.data.features.encoders import count_longer
from raphael_dist.data.fetch.remote import is_remote
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.shards.decode_sample import ImageDataset
from raphael_dist.data.shards.open_index import patterns_of
from raphael_dist.data.shards.shard_names import expand_shards, name_option
from raphael_dist.data_prep.inspect_data import Findings, find_duplicates, inspect
from raphael_dist.errors import UserError

COUNT, SHARDS = 256, 2
EDGE_LEVEL = 16  # of 255; a map without a brighter pixel is empty


@dataclass(frozen=True)
class DataSample:
    """Result of checking some samples of a run's data.

    Attributes:
        samples: number of checked samples.
        edges: number of samples with an edge map.
        empty_edges: number of samples whose edge map has no edges.
        duplicates: number of images that look like an earlier one of the checked images.
        captions: number of captions of these samples.
        truncated: number of captions with more tokens than text.max_tokens; None: they were not counted.
        notes: sentences about what was not checked, and why.
    """

    samples: int
    edges: int
    empty_edges: int
    duplicates: int
    captions: int = 0
    truncated: int | None = None
    notes: tuple[str, ...] = ()


def sample_data(config: Config) -> DataSample:
    """Check 256 samples of a run's data for empty edge maps, images that occur several times, and captions too long.

    The samples are divided among the sources of the data (data.sources, or data.shards as the only one) in proportion to
    their weights. The samples of a source's first two local shards count as one list. Samples at equal distances in this
    list are checked, so the shard with more samples contributes more.

    Args:
        config: the run's configuration.

    Raises:
        UserError: no source has local shards that can be read.
    """
    sources = patterns_of(config, training=True)
    total = sum(weight for _, weight in sources)
    findings: list[Findings] = []
    notes: list[str] = []
    for patterns, weight in sources:
        try:
            findings.append(_inspect(config, list(patterns), max(1, round(COUNT * weight / total))))
        except (UserError, OSError) as error:
            notes.append(f"Samples were not checked: {str(error).rstrip('.')}.")
    if not findings:
        raise UserError(" ".join(notes))
    edges = [sample.edge for part in findings for sample, _ in part.sheet if sample.edge is not None]
    empty = sum(bool(edge.max() < EDGE_LEVEL) for edge in edges)
    thumbnails = [thumbnail for part in findings for thumbnail in part.thumbnails]
    duplicates = sum(len(group) - 1 for group in find_duplicates(thumbnails))
    captions, truncated = [caption for part in findings for caption in part.captions], None
    try:
        truncated = count_longer(tokenizer_of(config.text.encoder), captions, config.text.max_tokens)
    except (UserError, OSError) as error:
        notes.append(f"The tokens of captions were not counted: {str(error).rstrip('.')}.")
    return DataSample(len(thumbnails), len(edges), empty, duplicates, len(captions), truncated, tuple(notes))


def _inspect(config: Config, patterns: list[str], count: int) -> Findings:
    """Decode `count` samples of the first two local shards of a source; return their thumbnails, captions and errors.

    `patterns`: paths or patterns of the source's shards. Raises UserError if all of them are remote addresses.
    """
    option = "data.sources" if config.data.sources else "data.shards"
    local = [pattern for pattern in patterns if not is_remote(pattern)]
    if not local:
        raise UserError(f"{option}={patterns} has only remote addresses, and only local files are examined")
    with name_option(option):
        names = expand_shards(local)[:SHARDS]
    choice = CaptionChoice(config.data.caption_from, tuple(sorted(config.data.caption_weights.items())))
    with TemporaryDirectory() as folder:
        dataset = ImageDataset(build_index(names, Path(folder)), config.image.buckets, "auto", captions=choice)
        return inspect(dataset, count, count)
