"""Latents, captions' features and edge maps, computed once per shard and read by sample through memory maps."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from raphael_dist.data.buckets import nearest_buckets
from raphael_dist.data.cache_build import ShardBuilder, encode_half
from raphael_dist.data.dataset import ImageDataset
from raphael_dist.data.encoders import ImageEncoder, TextEncoder, TextFeatures
from raphael_dist.data.shards import BadSample, DatasetIndex, atomic_path
from raphael_dist.errors import UserError

_VERSION = 1
_OPEN_FILES = 64


@dataclass(frozen=True, eq=False)
class CachedSample:
    """mean, std float32 [C, h, w]; tokens float32 [Y, D]; mask bool [Y]; end; edge uint8 [H, W] or None."""

    mean: Tensor
    std: Tensor
    tokens: Tensor
    mask: Tensor
    end: int
    edge: Tensor | None


class FeatureCache:
    """One safetensors file per shard under `root`/`fingerprint`, named by the shard and its content.

    The fingerprint covers both encoders, the buckets, flip and the kind of edges; a file's name covers the shard's
    content. So shards may be added or moved without computing the others again, and nothing stale is ever read.
    Several processes may build and read at once: files appear whole or not at all.
    """

    def __init__(
        self,
        root: Path,
        index: DatasetIndex,
        dataset: ImageDataset,
        text: TextEncoder,
        image: ImageEncoder,
        buckets: Sequence[tuple[int, int]],
        flip: bool,
    ) -> None:
        """UserError: a bucket that the image encoder's factor does not divide."""
        for height, width in buckets:
            if height % image.factor or width % image.factor:
                raise UserError(
                    f"image.buckets: [{height}, {width}] is not a multiple of {image.factor}, the image encoder's factor"
                )
        self.index, self.dataset, self.text, self.flip = index, dataset, text, flip
        self.buckets = tuple((int(height), int(width)) for height, width in buckets)
        self._builder = ShardBuilder(dataset, text, image, flip)
        parts = [_VERSION, text.fingerprint, image.fingerprint, self.buckets, flip, dataset.edge, dataset.max_pixels]
        self.fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        self.folder = Path(root) / self.fingerprint
        self._shard = lru_cache(maxsize=_OPEN_FILES)(self._open)
        self._bad_of = lru_cache(maxsize=None)(self._read_bad)

    def path(self, shard: int) -> Path:
        """Return the file of that shard number."""
        source = self.index.shards[shard]
        return self.folder / f"{source.path.stem[:100]}-{source.content[:16]}.safetensors"

    def missing(self) -> list[int]:
        """Return the numbers of the shards that have samples and no file yet."""
        return [n for n, shard in enumerate(self.index.shards) if shard.num_samples and not self.path(n).is_file()]

    def build(self, shards: Sequence[int], progress: Callable[[int, int], None] | None = None) -> None:
        """Compute and write the files of these shards; `progress(done, total)` is called after each.

        Corrupt samples are recorded, not raised. UserError: no room or right to write, features beyond float16.
        """
        for done, shard in enumerate(shards, start=1):
            sizes = self.index.shards[shard].sizes
            buckets = nearest_buckets(sizes[:, 0], sizes[:, 1], self.buckets).tolist()
            tensors, bad = self._builder.build(int(self.index.starts[shard]), buckets)
            self._write(self.path(shard), tensors, {"bad": json.dumps(bad)})
            if progress is not None:
                progress(done, len(shards))

    def get(self, sample_id: int, caption: int = 0, flip: bool = False) -> CachedSample:
        """Return a good sample with its caption number `caption`.

        KeyError for a bad sample; ValueError for `flip` in a cache without; UserError for a file missing or damaged.
        """
        if flip and not self.flip:
            raise ValueError("this cache was made without mirrored latents; make it with flip")
        number, local = self.index.locate(sample_id)
        return self._shard(number).get(local, caption, flip)

    def num_captions(self, sample_id: int) -> int:
        """Return how many captions a sample has; 0 for a bad one."""
        number, local = self.index.locate(sample_id)
        offsets = self._shard(number).offsets
        return int(offsets[local + 1] - offsets[local])

    @property
    def bad(self) -> list[BadSample]:
        """The samples found bad in the files there are; those found by the index are in `index.bad`."""
        return [bad for _, bad in self._all_bad()]

    @property
    def bad_ids(self) -> list[int]:
        """The sample ids of `bad`, in the same order."""
        return [sample_id for sample_id, _ in self._all_bad()]

    def null_text(self) -> TextFeatures:
        """Return the features of the empty caption, B = 1, on the CPU in float32."""
        return self._null_text

    @cached_property
    def _null_text(self) -> TextFeatures:
        path = self.folder / "null_text.safetensors"
        if not path.is_file():
            features = encode_half(self.text, [""])
            self._write(path, {"tokens": features.tokens, "mask": features.mask, "end": features.end}, {})
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise _damaged(path) from error
        return TextFeatures(tensors["tokens"].float(), tensors["mask"], tensors["end"])

    def _write(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        try:
            with atomic_path(path) as temporary:
                save_file(tensors, temporary, metadata)
        except (OSError, SafetensorError) as error:
            raise UserError(f"data.cache_dir: cannot write {path}: {error}; check space and rights") from error

    def _open(self, shard: int) -> "_ShardFile":
        return _ShardFile(self.path(shard))

    def _all_bad(self) -> list[tuple[int, BadSample]]:
        missing = set(self.missing())
        present = [n for n, shard in enumerate(self.index.shards) if shard.num_samples and n not in missing]
        return [bad for number in present for bad in self._bad_of(number)]

    def _read_bad(self, shard: int) -> list[tuple[int, BadSample]]:
        source, first = self.index.shards[shard], int(self.index.starts[shard])
        found = json.loads(_open_tensors(self.path(shard)).metadata()["bad"])
        return [(first + n, BadSample(source.name, source.keys[n], reason)) for n, reason in found]


class _ShardFile:
    """One shard's file: the small tables in memory, rows of the large ones read when asked for."""

    def __init__(self, path: Path) -> None:
        self._file = _open_tensors(path)
        self._names = set(self._file.keys())
        self._bucket, self._row, self.offsets, self._caption_rows = (
            self._file.get_tensor(name).numpy() for name in ("bucket", "row", "caption_offsets", "caption_rows")
        )

    def get(self, number: int, caption: int, flip: bool) -> CachedSample:
        bucket, row = int(self._bucket[number]), int(self._row[number])
        if bucket < 0:
            raise KeyError(f"sample {number} of this shard is a bad one")
        captions: np.ndarray = self._caption_rows[self.offsets[number] : self.offsets[number + 1]]
        text_row, suffix = int(captions[caption]), "_flip" if flip else ""
        mean = self._slice(f"mean{suffix}.{bucket}", row).float()
        std = self._slice(f"std{suffix}.{bucket}", row).float() if f"std.{bucket}" in self._names else None
        edge = self._slice(f"edge.{bucket}", row) if f"edge.{bucket}" in self._names else None
        return CachedSample(
            mean=mean,
            std=torch.zeros_like(mean) if std is None else std,
            tokens=self._slice("tokens", text_row).float(),
            mask=self._slice("mask", text_row),
            end=int(self._slice("end", text_row)),
            edge=edge.flip(-1) if edge is not None and flip else edge,
        )

    def _slice(self, name: str, row: int) -> Tensor:
        # The clone frees a row from the map; a view would let a later write into it go astray.
        return self._file.get_slice(name)[row : row + 1][0].clone()


def _open_tensors(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise UserError(f"data.cache_dir: {path} is missing; build the cache before training") from error
    except (OSError, SafetensorError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> UserError:
    return UserError(f"data.cache_dir: {path} cannot be read; delete it, it is computed again")
