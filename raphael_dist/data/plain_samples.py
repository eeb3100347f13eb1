"""Reads samples of shards one after the other, for evaluation and tools that do not train."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.shards.decode_sample import BadSampleError, DecodedSample, ImageDataset
from raphael_dist.data.shards.shard_names import expand_shards, name_option


def read_samples(
    patterns: Sequence[str], cache_dir: Path, size_hw: tuple[int, int], option: str = "data.shards", limit: int | None = None
) -> Iterator[DecodedSample]:
    """Decode and yield the samples of shards in the order in which they are stored. Unusable samples are skipped.

    Args:
        patterns: Paths, globs or URLs of the shards (tar files of samples).
        cache_dir: Folder for the index (table of all samples of the shards), which is built if it is missing.
        size_hw: (height, width) in pixels to which images are resized and cropped.
        option: Name of the option or setting in which the user named the shards, for messages.
        limit: Largest number of samples; None: all.

    Raises:
        UserError: The files do not exist, or contain no samples.
    """
    with name_option(option):
        index = build_index(expand_shards(patterns), cache_dir / "index")
    yield from itertools.islice(_good_samples(ImageDataset(index, [size_hw], "none")), limit)


def _good_samples(dataset: ImageDataset) -> Iterator[DecodedSample]:
    for sample_id in range(dataset.index.num_samples):
        with contextlib.suppress(BadSampleError):
            yield dataset.load(sample_id, 0)
