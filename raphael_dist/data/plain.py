"""Samples of shards as they are, one after the other: pictures and captions, for those who look at data, not train on it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from raphael_dist.data.dataset import BadSampleError, DecodedSample, ImageDataset
from raphael_dist.data.shards import build_index, expand_shards
from raphael_dist.errors import UserError


def read_samples(
    patterns: Sequence[str], cache_dir: Path, size_hw: tuple[int, int], option: str = "data.shards", limit: int | None = None
) -> Iterator[DecodedSample]:
    """Yield the samples of shards in order, scaled and cut to a size; bad ones are passed over.

    option: what named the shards, for errors. limit: yield so many at most. UserError: no such files, or no shards.
    """
    try:
        index = build_index(expand_shards(patterns), cache_dir / "index")
    except UserError as error:
        raise UserError(str(error).replace("data.shards", option)) from None
    dataset = ImageDataset(index, [size_hw], "none")
    given = 0
    for sample_id in range(index.num_samples):
        if limit is not None and given >= limit:
            return
        try:
            sample = dataset.load(sample_id, 0)
        except BadSampleError:
            continue
        given += 1
        yield sample
