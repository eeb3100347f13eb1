"""Reads samples of shards one after the other, for evaluation and tools that do not train."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.shards.dataset_index import BadSample, BadSampleError, DatasetIndex
from raphael_dist.data.shards.decode_sample import DecodedSample, ImageDataset
from raphael_dist.data.shards.shard_names import expand_shards, name_option
from raphael_dist.runtime.launcher_env import rank_of
from raphael_dist.text import counted

_log = logging.getLogger(__name__)


def read_samples(
    patterns: Sequence[str], cache_dir: Path, size_hw: tuple[int, int], option: str = "data.shards", limit: int | None = None
) -> Iterator[DecodedSample]:
    """Decode and yield the samples of shards in the order in which they are stored.

    Unusable samples are skipped. At the end, rank 0 logs how many samples were skipped, and how many shards cannot be read
    to their end.

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
    unreadable: list[BadSample] = []
    yield from itertools.islice(_good_samples(ImageDataset(index, [size_hw], "none"), unreadable), limit)
    if rank_of() == "0":
        _warn(option, index, unreadable)


def _warn(option: str, index: DatasetIndex, unreadable: Sequence[BadSample]) -> None:
    """Log the number of damaged shards and the number of samples that cannot be used.

    `option`: where the user named the shards. `index`: lists the samples that were rejected when the shards were indexed.
    `unreadable`: further samples, which could not be decoded.
    """
    for shard, reason in itertools.islice(index.damaged.items(), 1):
        count = len(index.damaged)
        _log.warning(
            "%s: %d of %s cannot be read to the end, so samples are missing; the first such shard is %s: %s",
            option, count, counted(index.num_shards, "shard"), index.shard(shard).name, reason,
        )  # fmt: skip
    if bad := index.num_bad + len(unreadable):
        first = next(itertools.chain(index.iter_bad(), unreadable))
        _log.warning("%s: samples that cannot be used and are left out: %d; the first is %s", option, bad, first)


def _good_samples(dataset: ImageDataset, unreadable: list[BadSample]) -> Iterator[DecodedSample]:
    """Yield the samples of `dataset` that can be decoded, and append those that cannot to `unreadable`."""
    for sample_id in range(dataset.index.num_samples):
        try:
            yield dataset.load(sample_id, 0)
        except BadSampleError as error:
            unreadable.append(error.sample)
