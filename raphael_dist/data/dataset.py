"""One sample from its shard: image, captions and edge map, decoded within bounds or refused with a reason."""

import io
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageFile, ImageOps

from raphael_dist.data.buckets import fit, resize_and_crop
from raphael_dist.data.captions import CaptionChoice, read_captions
from raphael_dist.data.shards import DatasetIndex
from raphael_dist.data.tar_scan import EDGE_EXT, EXTS, FEATURES_EXT, IMAGE_EXTS, IMAGE_FORMATS, MAX_MEMBER_BYTES
from raphael_dist.errors import UserError

MAX_PIXELS = 64 << 20
EdgeSource = Literal["stored", "auto", "hed", "none"]
_RAW = [ext for ext in EXTS if ext != FEATURES_EXT]
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}

# Half an image trained as a whole one is worse than one image fewer; some libraries turn this on.
ImageFile.LOAD_TRUNCATED_IMAGES = False


class BadSampleError(Exception):
    """A sample that cannot be used; `shard` (base name), `key` and `reason` say which and why."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"{shard}:{key!r}: {reason}")
        self.shard, self.key, self.reason = shard, key, reason


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
        self._file = lru_cache(maxsize=64)(_OpenTar)

    def read(self, sample_id: int, exts: Iterable[str] = _RAW) -> dict[str, bytes]:
        """Return the members of a sample that have one of these extensions, as they are.

        UserError: the shard is gone, or is not the file that was indexed.
        """
        number, row = self.index.locate(sample_id)
        shard = self.index.shards[number]
        file, members = self._file(shard.path, shard.num_bytes), shard.members(row)
        return {ext: file.read(*members[ext]) for ext in exts if ext in members}

    def load(self, sample_id: int, bucket: int, flip: bool = False) -> DecodedSample:
        """Return the sample fitted to `buckets[bucket]`, mirrored if `flip`.

        BadSampleError: it cannot be decoded, is over the pixel cap, or lacks an edge map where edges are "stored".
        UserError as for `read`.
        """
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


class _OpenTar:
    """An open shard, read at offsets only. Without a shared file position threads and forks do not disturb each other.

    It is closed with its last reference, so never while a thread reads from it.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            actual = os.fstat(self._fd).st_size
        except OSError as error:
            raise UserError(f"data.shards: {path}: {error.strerror}; it was there when it was indexed") from error
        if actual != num_bytes:
            raise UserError(f"data.shards: {path} has {actual} bytes, {num_bytes} when it was indexed; start again")

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._fd, min(size, MAX_MEMBER_BYTES), offset)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
