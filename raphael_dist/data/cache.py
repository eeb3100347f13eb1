"""The cache of latents, encoded captions and edge maps: computed once per shard, read a sample at a time by memory map."""

import hashlib
import json
from collections.abc import Sequence
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
from raphael_dist.data.index import BadSample
from raphael_dist.errors import UserError
from raphael_dist.parallel.long_work import Tell, quiet
from raphael_dist.storage.files import atomic_path

_VERSION = 1
_OPEN_FILES = 64


@dataclass(frozen=True, eq=False)
class CachedSample:
    """A sample with one of its captions.

    mean, std float32 [C, h, w]: the distribution of its latents; tokens float32 [Y, D]; mask bool [Y]; end: index of the
    end-of-text token; edge uint8 [H, W] or None.
    """

    mean: Tensor
    std: Tensor
    tokens: Tensor
    mask: Tensor
    end: int
    edge: Tensor | None


class FeatureCache:
    """One safetensors file per shard under `root`/`fingerprint`, named by the shard and its content.

    The fingerprint follows from both encoders, the buckets, flip and the kind of edges; a file's name from the shard's
    content. So shards may be added or moved without computing the others again, and no file is read for data that has
    changed. Several processes may build and read at once: a file appears whole or not at all.
    """

    def __init__(self, root: Path, dataset: ImageDataset, text: TextEncoder, image: ImageEncoder, flip: bool) -> None:
        """With `flip` it holds the latents of mirrored images too.

        UserError: a bucket that the image encoder's factor does not divide.
        """
        for height, width in dataset.buckets:
            if height % image.factor or width % image.factor:
                raise UserError(
                    f"image.buckets: [{height}, {width}] is not a multiple of {image.factor}, the image encoder's factor"
                )
        self.dataset, self.index, self.buckets, self.flip = dataset, dataset.index, dataset.buckets, flip
        self._text, self._builder = text, ShardBuilder(dataset, text, image, flip)
        parts = [_VERSION, text.fingerprint, image.fingerprint, self.buckets, flip, dataset.edge, dataset.max_pixels]
        self.fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        self.folder = Path(root) / self.fingerprint
        self._shard = lru_cache(maxsize=_OPEN_FILES)(lambda shard: _CachedShard(self.path(shard)))
        self._bad_of = lru_cache(maxsize=None)(self._read_bad)

    def path(self, shard: int) -> Path:
        """Return the file of that shard number."""
        source = self.index.shards[shard]
        return self.folder / f"{source.path.stem[:100]}-{source.content[:16]}.safetensors"

    def missing(self) -> list[int]:
        """Return the numbers of the shards that have samples and no file yet."""
        return [n for n, shard in enumerate(self.index.shards) if shard.num_samples and not self.path(n).is_file()]

    def build(self, shards: Sequence[int], tell: Tell = quiet) -> None:
        """Compute and write the files of these shards; `tell` is told of every batch (`parallel.long_work`).

        Corrupt samples are recorded, not raised. UserError: no room or right to write, features beyond float16.
        """
        for number, shard in enumerate(shards, start=1):
            self._build_one(shard, f"shard {number} of {len(shards)}", tell)

    def _build_one(self, shard: int, which: str, tell: Tell) -> None:
        sizes, first = self.index.shards[shard].sizes, int(self.index.starts[shard])
        buckets = nearest_buckets(sizes[:, 0], sizes[:, 1], self.buckets).tolist()
        tensors, bad = self._builder.build(first, buckets, lambda words: tell(f"{which}, {words}"))
        self._write(self.path(shard), tensors, {"bad": json.dumps(bad)})

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
    def bad(self) -> dict[int, BadSample]:
        """Sample id -> what is wrong, of the samples that could not be encoded; what the index refused is in `index.bad`."""
        missing = set(self.missing())
        present = [n for n, shard in enumerate(self.index.shards) if shard.num_samples and n not in missing]
        return {sample_id: bad for number in present for sample_id, bad in self._bad_of(number).items()}

    @cached_property
    def null_text(self) -> TextFeatures:
        """The features of the empty caption, B = 1, on the CPU, tokens float32; computed if no file has them."""
        path = self.folder / "null_text.safetensors"
        if not path.is_file():
            self._write(path, vars(encode_half(self._text, [""])), {})
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

    def _read_bad(self, shard: int) -> dict[int, BadSample]:
        source, first = self.index.shards[shard], int(self.index.starts[shard])
        entries = json.loads(_open_tensors(self.path(shard)).metadata()["bad"])
        return {first + n: BadSample(source.name, source.keys[n], reason) for n, reason in entries}


class _CachedShard:
    """One shard's file (cache_build.py lists its tensors): small ones in memory, of large ones single rows."""

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
        # A copy: a view would keep the whole map alive, and what writes into it would change the cached values.
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
