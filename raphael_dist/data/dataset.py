"""One sample from its shard: image, captions and edge map, decoded within bounds or refused with a reason."""

import io
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image, ImageFile, ImageOps

from raphael_dist.data.buckets import fit, resize_and_crop
from raphael_dist.data.captions import CaptionChoice, read_captions
from raphael_dist.data.index import DatasetIndex
from raphael_dist.data.remote import is_remote
from raphael_dist.data.shard_store import ShardError
from raphael_dist.data.tar_scan import (
    EDGE_EXT,
    EXTS,
    FEATURES_EXT,
    IMAGE_EXTS,
    IMAGE_FORMATS,
    MAX_SAMPLE_BYTES,
    members_of,
)  # fmt: skip

MAX_PIXELS = 64 << 20
EdgeSource = Literal["stored", "auto", "hed", "none"]
_RAW = [ext for ext in EXTS if ext != FEATURES_EXT]
_OPEN_FILES = 64
_TRY_AGAIN_S = 600.0
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}

# Half an image trained as a whole one is worse than one image fewer; some libraries turn this on.
ImageFile.LOAD_TRUNCATED_IMAGES = False


class BadSampleError(Exception):
    """A sample that cannot be used; `shard` (base name), `key` and `reason` say which and why."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(shard, key, reason)  # all three, so that it can be sent to another process
        self.shard, self.key, self.reason = shard, key, reason

    def __str__(self) -> str:
        return f"{self.shard}:{self.key!r}: {self.reason}"


@dataclass(frozen=True, eq=False)
class DecodedSample:
    """A decoded sample: image uint8 [3, h, w] (RGB); captions, cleaned, at least one; edge uint8 [h, w] or None; its key.

    weights: how likely each caption is to be drawn. seconds: what reading and decoding took.
    """

    image: np.ndarray
    captions: list[str]
    edge: np.ndarray | None
    key: str
    weights: list[float]
    seconds: dict[str, float]


Request = tuple[int, int, bool]  # sample id, bucket, flip


class Workers(Protocol):
    """What decodes samples elsewhere (workers.py)."""

    def ahead(self, requests: Iterable[Request]) -> None:
        """Begin what `load` will be called for."""

    def load(self, request: Request) -> "DecodedSample":
        """Return what `ImageDataset.load(*request)` returns, or raise what it raises."""


class ImageDataset:
    """Loads samples of an index by id, scaled and cut to a bucket (height, width). Threads and forks may share it."""

    def __init__(
        self,
        index: DatasetIndex,
        buckets: Sequence[tuple[int, int]],
        edge: EdgeSource,
        max_pixels: int = MAX_PIXELS,
        captions: CaptionChoice = CaptionChoice(),  # noqa: B008  # frozen
    ) -> None:
        """`edge`: edge maps are members of every sample (stored), of some (auto), or not read (hed, none).

        `max_pixels`: an image's header must not claim more.
        """
        self.index, self.edge, self.max_pixels, self.captions = index, edge, max_pixels, captions
        self.buckets = tuple((int(height), int(width)) for height, width in buckets)
        self._files = _OpenFiles(index)
        self._lost: dict[int, tuple[float, ShardError]] = {}
        self._workers: Workers | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Sent to another process it has no workers."""
        return {**vars(self), "_workers": None, "_lost": {}}

    def use(self, workers: "Workers | None") -> None:
        """Let `load` have its work done by these workers; None: by itself."""
        self._workers = workers

    def ahead(self, requests: Iterable[Request]) -> None:
        """Begin what `load(*request)` will be called for soon; each is to be called for. Without workers nothing happens."""
        if self._workers is not None:
            self._workers.ahead(requests)

    def read(self, sample_id: int, exts: Iterable[str] = _RAW) -> dict[str, bytes]:
        """Return the members of a sample that have one of these extensions, as they are.

        BadSampleError: they are not where they were indexed. ShardError: the shard is gone, or is another file.
        """
        number, row = self.index.locate(sample_id)
        shard = self.index.shards[number]
        key, stretch = shard.keys[row], self._stretch(number, row)
        try:
            members = members_of(stretch, key)
        except ValueError as error:
            raise BadSampleError(shard.name, key, str(error)) from error
        return {ext: members[ext] for ext in exts if ext in members}

    def _stretch(self, number: int, row: int) -> bytes:
        """Return the bytes of a sample in its shard. A shard that could not be read is not tried again for a while."""
        when, error = self._lost.get(number, (0.0, None))
        if error is not None and time.monotonic() - when < _TRY_AGAIN_S:
            raise error
        try:
            return self._files.read(number, *self.index.shards[number].span(row))
        except ShardError as error:
            self._lost[number] = (time.monotonic(), error)
            raise

    def load(self, sample_id: int, bucket: int, flip: bool = False) -> DecodedSample:
        """Return the sample fitted to `buckets[bucket]`, mirrored if `flip`.

        BadSampleError: it cannot be decoded, is over the pixel cap, or lacks an edge map where edges are "stored".
        ShardError as for `read`.
        """
        if self._workers is None:
            return self._load(sample_id, bucket, flip)
        return self._workers.load((sample_id, bucket, flip))

    def _load(self, sample_id: int, bucket: int, flip: bool) -> DecodedSample:
        began = time.monotonic()
        members = self.read(sample_id)
        read = time.monotonic()
        number, row = self.index.locate(sample_id)
        shard = self.index.shards[number]
        try:
            fitted, edge, captions, weights = self._decoded(members, self.buckets[bucket], flip)
        except Exception as error:  # decoders raise nearly anything; whatever it is, this sample is bad
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise BadSampleError(shard.name, shard.keys[row], reason) from error
        seconds = {"reading": read - began, "decoding": time.monotonic() - read}
        return DecodedSample(fitted, captions, edge, shard.keys[row], weights, seconds)

    def _decoded(
        self, members: dict[str, bytes], size: tuple[int, int], flip: bool
    ) -> tuple[np.ndarray, np.ndarray | None, list[str], list[float]]:
        image = self._image(next(members[ext] for ext in IMAGE_EXTS if ext in members))
        is_there = self.edge == "stored" or (self.edge == "auto" and EDGE_EXT in members)
        edge = self._edge(members, size, flip) if is_there else None
        return resize_and_crop(image, size, flip), edge, *read_captions(members, self.captions)

    def _image(self, data: bytes) -> Image.Image:
        return decode_image(data, self.max_pixels)

    def _edge(self, members: dict[str, bytes], size: tuple[int, int], flip: bool) -> np.ndarray:
        if EDGE_EXT not in members:
            raise ValueError(f"no {EDGE_EXT}")
        edge = _open_image(members[EDGE_EXT], self.max_pixels).convert("L")
        # Pillow's bilinear filter averages over the area when it shrinks: thin edges fade, they do not vanish.
        return np.array(fit(edge, size, flip, Image.Resampling.BILINEAR), np.uint8)


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the RGB image that these bytes hold, upright, what is transparent on white.

    Raises nearly anything for what is none; ValueError for a header that claims more than `max_pixels`, before it decodes.
    """
    image = ImageOps.exif_transpose(_open_image(data, max_pixels))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _open_image(data: bytes, max_pixels: int) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    if image.width * image.height > max_pixels:
        raise ValueError(f"image of {image.width} x {image.height} pixels, at most {max_pixels} allowed")
    if image.mode not in _MODES:
        raise ValueError(f"image mode {image.mode}, not one of {', '.join(sorted(_MODES))}")
    return image


class _OpenFiles:
    """The shards that are open, read at offsets only: without a shared file position threads and forks do not disturb each
    other. Sent to another process it arrives empty.
    """

    def __init__(self, index: DatasetIndex) -> None:
        self._index = index
        self._file = lru_cache(maxsize=_OPEN_FILES)(self._open)

    def __reduce__(self) -> Any:
        return _OpenFiles, (self._index,)

    def _open(self, shard: int) -> "_OpenFile":
        source = self._index.shards[shard]
        return _OpenFile(self._index.store.open(source.source, source.stamp))

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Return the bytes at an offset of a shard, fewer at its end."""
        # A file that was fetched is opened anew each time: an open one would take its room on the disk after it had to go.
        is_kept = not is_remote(self._index.shards[shard].source)
        return (self._file(shard) if is_kept else self._open(shard)).read(offset, size)


class _OpenFile:
    """It is closed with its last reference, so never while a thread reads from it."""

    def __init__(self, descriptor: int) -> None:
        self._fd = descriptor

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._fd, min(size, MAX_SAMPLE_BYTES), offset)

    def __del__(self) -> None:
        os.close(self._fd)
