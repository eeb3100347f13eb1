"""What training needs of a sample, and the three places it may come from.

*online*: nothing but the shard; images and captions are encoded ahead of each step (`encoding.py`). *cached*: a file for
each shard (`cache.py`), and online what it lacks. *stored*: a member of each sample, written by tools/prepare_data.py. All
three give the same numbers up to rounding: `packing.py` says to how many bits.
"""

import json
import time
from collections.abc import Sequence
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from raphael_dist.data.dataset import BadSampleError, ImageDataset
from raphael_dist.data.encoders import ImageEncoder, TextFeatures
from raphael_dist.data.packing import Pick, SampleFeatures, pool_edges, unpack
from raphael_dist.data.shards import BadSample, DatasetIndex
from raphael_dist.data.tar_scan import FEATURES_EXT
from raphael_dist.errors import UserError


class FeatureSource(Protocol):
    """Where a stream of samples gets their features from; threads and forks may share one."""

    index: DatasetIndex
    buckets: tuple[tuple[int, int], ...]
    latent_factor: int
    latent_channels: int

    @property
    def known_bad(self) -> dict[int, BadSample]:
        """The samples that are known to be bad before they are read."""

    @property
    def null_text(self) -> TextFeatures | None:
        """The features of the empty caption, B = 1, where they are stored."""

    def get(self, sample_id: int, bucket: int, pick: Pick, flip: bool) -> SampleFeatures:
        """Return a sample fitted to a bucket, mirrored if `flip`. BadSampleError: it cannot be used; UserError."""

    def close(self) -> None:
        """End what is done beside training."""


def check_buckets(buckets: Sequence[tuple[int, int]], factor: int) -> None:
    """Raise UserError for a bucket that the image encoder's factor does not divide."""
    for height, width in buckets:
        if height % factor or width % factor:
            raise UserError(f"image.buckets: [{height}, {width}] is not a multiple of {factor}, the image encoder's factor")


class OnlineFeatures:
    """Decodes; everything that an encoder makes is left to be made ahead of the step."""

    known_bad: dict[int, BadSample] = {}  # noqa: RUF012  # never written: nothing is known before it is read
    null_text = None

    def __init__(self, dataset: ImageDataset, image: ImageEncoder) -> None:
        """UserError: see `check_buckets`."""
        check_buckets(dataset.buckets, image.factor)
        self.dataset, self.index, self.buckets = dataset, dataset.index, dataset.buckets
        self.latent_factor, self.latent_channels = image.factor, image.channels

    def close(self) -> None: ...

    def get(self, sample_id: int, bucket: int, pick: Pick, flip: bool) -> SampleFeatures:
        sample = self.dataset.load(sample_id, bucket, flip)
        began = time.monotonic()
        edge = None if sample.edge is None else pool_edges(torch.from_numpy(sample.edge)[None], self.latent_factor)[0]
        seconds = {**sample.seconds, "decoding": sample.seconds["decoding"] + time.monotonic() - began}
        caption = sample.captions[pick(sample.weights)]
        return SampleFeatures(image=torch.from_numpy(sample.image), caption=caption, edge=edge, seconds=seconds)


class StoredFeatures(OnlineFeatures):
    """Reads each sample's features from the member `.features` that lies beside its image."""

    def __init__(self, dataset: ImageDataset, image: ImageEncoder, made_of: dict[str, object]) -> None:
        """`made_of`: what the features must have been made with (`Encoders.made_of`)."""
        super().__init__(dataset, image)
        # Edge maps that a run does not want may be there.
        self._made_of = {name: value for name, value in made_of.items() if name != "data.edges" or dataset.edge != "none"}

    def get(self, sample_id: int, bucket: int, pick: Pick, flip: bool) -> SampleFeatures:
        began = time.monotonic()
        members = self.dataset.read(sample_id, [FEATURES_EXT])
        shard, number = self.index.locate(sample_id)
        where = self.index.shards[shard]
        if FEATURES_EXT not in members:
            raise UserError(
                f"data.features=stored: the sample {where.keys[number]!r} of {where.name} has no features; make them by "
                "tools/prepare_data.py --features, or set data.features=online"
            )
        try:
            found = self._unpack(members[FEATURES_EXT], pick, flip, where.name)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise BadSampleError(where.name, where.keys[number], f"features cannot be read ({error})") from error
        found.seconds = {"reading": time.monotonic() - began}
        return found

    def _unpack(self, data: bytes, pick: Pick, flip: bool, where: str) -> SampleFeatures:
        tensors = load(data)
        made = json.loads(bytes(tensors.pop("made_of").numpy()))
        wrong = [name for name, value in self._made_of.items() if made.get(name) != value]
        if wrong:
            raise UserError(
                f"data.features=stored: the features in {where} were made with other {', '.join(wrong)}; give the same, "
                "prepare the shards again, or set data.features=online"
            )
        if flip and "mean_flip" not in tensors:
            raise UserError(
                f"data.flip: true, but the features in {where} were made without data.flip=true; prepare them again"
            )
        return unpack(tensors, pick, flip)
