"""Decodes one sample of a shard (image, captions, edge map) within limits, or rejects it with a reason."""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image

from raphael_dist.data.buckets import fit, nearest_buckets, resize_and_crop
from raphael_dist.data.captions import CaptionChoice, read_captions
from raphael_dist.data.fetch.remote import is_remote
from raphael_dist.data.fetch.shard_cache import ShardError
from raphael_dist.data.image import MAX_PIXELS, decode_image, reason_of
from raphael_dist.data.shards.dataset_index import BadSampleError, DatasetIndex
from raphael_dist.data.shards.tar_scan import EDGE_EXT, EXTS, FEATURES_EXT, IMAGE_EXTS, MAX_SAMPLE_BYTES, members_of

EdgeSource = Literal["stored", "auto", "hed", "none"]
RAW_EXTS = [ext for ext in EXTS if ext != FEATURES_EXT]
_OPEN_FILES = 64
RETRY_AFTER_S = 600.0  # until a shard that could not be read is tried again


@dataclass(frozen=True, eq=False)
class DecodedSample:
    """A decoded sample, resized and cropped to an image size.

    Attributes:
        image: RGB image, uint8 [3, h, w].
        captions: Cleaned captions, at least one.
        edge: Edge map, uint8 [h, w], or None.
        key: Name of the sample in its shard.
        weights: Relative probability of each caption.
        seconds: Seconds spent, with the keys "reading" and "decoding".
    """

    image: np.ndarray
    captions: list[str]
    edge: np.ndarray | None
    key: str
    weights: list[float]
    seconds: dict[str, float]


Request = tuple[int, int, bool]  # sample id, bucket, flip


class ImageDataset:
    """Loads samples by id, decoded, resized and cropped to an image size (bucket). Threads and forks may share it."""

    def __init__(
        self,
        index: DatasetIndex,
        buckets: Sequence[tuple[int, int]],
        edge: EdgeSource,
        max_pixels: int = MAX_PIXELS,
        captions: CaptionChoice = CaptionChoice(),  # noqa: B008  # frozen
    ) -> None:
        """Create a data set; no file is opened before the first sample.

        Args:
            index: A table of all samples of the shards (tar files).
            buckets: (height, width) of each bucket (image size) in pixels.
            edge: Whether to read edge maps from the shard: from all samples ("stored"), from those that have one ("auto"),
                or from none ("hed": they are computed later; "none": they are not used).
            max_pixels: Largest number of pixels that the header of an image may state.
            captions: Which texts of a sample are its captions.
        """
        self.index, self.edge, self.max_pixels, self.captions = index, edge, max_pixels, captions
        self.buckets = tuple((int(height), int(width)) for height, width in buckets)
        self._file = lru_cache(maxsize=_OPEN_FILES)(self._open)  # the most recently used local shards stay open
        self._failed_shards: dict[int, tuple[float, ShardError]] = {}
        self._decode_elsewhere: Callable[[Request], DecodedSample] | None = None

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.index, self.buckets, self.edge, self.max_pixels, self.captions)

    def buckets_of(self, first: int, end: int) -> list[int]:
        """Return, for each sample id from `first` to `end` - 1, the number of the bucket nearest to the image's size."""
        sizes = np.asarray(self.index.arrays["size"][first:end])
        return nearest_buckets(sizes[:, 0], sizes[:, 1], self.buckets).tolist()

    def set_decoder(self, decode: Callable[[Request], DecodedSample] | None) -> None:
        """Set the function that `load` calls to decode a sample, such as `DecodePool.load`. None: decode in this process.

        The function gets one tuple with the arguments of `load`: (sample id, number of the image size, whether to mirror).
        """
        self._decode_elsewhere = decode

    def read(self, sample_id: int, exts: Iterable[str] = RAW_EXTS) -> dict[str, bytes]:
        """Return the content of a sample's files, by extension, without decoding it.

        `sample_id`: number of the sample, counted over all shards. `exts`: extensions of the files to return, if they exist.

        Raises:
            BadSampleError: The files are not where they were when the shard was indexed.
            ShardError: The shard (tar file) is missing, cannot be read, or has changed.
        """
        data = self._read_span(sample_id)
        try:
            members = members_of(data, self.index.key(sample_id))
        except ValueError as error:
            raise BadSampleError(self.index.bad_sample(sample_id, str(error))) from error
        return {ext: members[ext] for ext in exts if ext in members}

    def _read_span(self, sample_id: int) -> bytes:
        """Return the part of a shard that contains all files of a sample. ShardError: the shard cannot be read.

        In the 600 s after a ShardError, this method raises the error again without trying to read the shard.
        """
        number, _ = self.index.locate(sample_id)
        failed_at, error = self._failed_shards.get(number, (0.0, None))
        if error is not None and time.monotonic() - failed_at < RETRY_AFTER_S:
            raise error
        try:
            return self._pread(number, *self.index.span(sample_id))
        except ShardError as error:
            self._failed_shards[number] = (time.monotonic(), error)
            raise

    def _pread(self, number: int, offset: int, size: int) -> bytes:
        """Return `size` bytes at an offset of the shard `number`, or fewer at its end. ShardError: it cannot be read.

        The offset is passed to the system (pread), so threads and forked processes do not share a file position.
        """
        shard = self.index.shard(number)
        # A fetched file is opened for each read: a descriptor would keep its disk space after the cache has removed it.
        file = self._open(number) if is_remote(shard.source) else self._file(number)
        try:
            return file.read(offset, size)
        except OSError as error:
            self._file.cache_clear()  # a descriptor of a network file system stays useless after it has gone stale
            raise ShardError(
                shard.name, f"{shard.source} cannot be read at byte {offset}: {error.strerror or error}"
            ) from error

    def _open(self, number: int) -> "_OpenFile":
        shard = self.index.shard(number)
        return _OpenFile(self.index.store.open(shard.source, shard.stamp))

    def load(self, sample_id: int, bucket: int, flip: bool = False) -> DecodedSample:
        """Return a decoded sample at the image size `buckets[bucket]`, mirrored left to right if `flip`.

        `sample_id`: number of the sample, counted over all shards. If `set_decoder` has set a function, this function
        decodes the sample.

        Raises:
            BadSampleError: The image cannot be decoded or has too many pixels, there is no caption, or the sample lacks the
                edge map that edge="stored" requires.
            ShardError: The shard (tar file) is missing, cannot be read, or has changed.
        """
        if self._decode_elsewhere is None:
            return self.decode(sample_id, bucket, flip)
        return self._decode_elsewhere((sample_id, bucket, flip))

    def decode(self, sample_id: int, bucket: int, flip: bool = False) -> DecodedSample:
        """Return a decoded sample at the image size `buckets[bucket]`, mirrored left to right if `flip`.

        Unlike `load`, it always decodes in this process. It raises the same errors, and MemoryError if the machine has too
        little memory. `sample_id`: number of the sample, counted over all shards.
        """
        began = time.monotonic()
        members = self.read(sample_id)
        read = time.monotonic()
        try:
            image, edge = self._decode_images(members, self.buckets[bucket], flip)
            captions, weights = read_captions(members, self.captions)
        except MemoryError:
            raise
        except Exception as error:  # decoders raise nearly anything; whatever it is, this sample is bad
            raise BadSampleError(self.index.bad_sample(sample_id, reason_of(error))) from error
        seconds = {"reading": read - began, "decoding": time.monotonic() - read}
        return DecodedSample(image, captions, edge, self.index.key(sample_id), weights, seconds)

    def _decode_images(
        self, members: dict[str, bytes], size: tuple[int, int], flip: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        image = decode_image(next(members[ext] for ext in IMAGE_EXTS if ext in members), self.max_pixels)
        has_edge = self.edge == "stored" or (self.edge == "auto" and EDGE_EXT in members)
        edge = self._decode_edge(members, size, flip) if has_edge else None
        return resize_and_crop(image, size, flip), edge

    def _decode_edge(self, members: dict[str, bytes], size: tuple[int, int], flip: bool) -> np.ndarray:
        if EDGE_EXT not in members:
            raise ValueError(f"no {EDGE_EXT}")
        edge = decode_image(members[EDGE_EXT], self.max_pixels, background="black").convert("L")
        # Pillow's bilinear filter averages over the area when it shrinks: thin edges fade, they do not vanish.
        return np.array(fit(edge, size, flip, Image.Resampling.BILINEAR), np.uint8)


class _OpenFile:
    """A file descriptor that is closed when this object is garbage-collected, so never while a thread reads from it."""

    def __init__(self, descriptor: int) -> None:
        self._fd = descriptor

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._fd, min(size, MAX_SAMPLE_BYTES), offset)

    def __del__(self) -> None:
        os.close(self._fd)
