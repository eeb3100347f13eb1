"""The cache of features: computed once per shard, read a sample at a time by memory map, and checked as it is read."""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from raphael_dist.data.buckets import nearest_buckets
from raphael_dist.data.cache_build import IMAGE_TENSORS, TABLES, TEXT_TENSORS, ShardBuilder, checksum, encode_half
from raphael_dist.data.dataset import BadSampleError, ImageDataset
from raphael_dist.data.encoders import TextFeatures
from raphael_dist.data.encoding import Encoders
from raphael_dist.data.features import OnlineFeatures
from raphael_dist.data.index import BadSample
from raphael_dist.data.packing import Pick, SampleFeatures, unpack
from raphael_dist.errors import UserError
from raphael_dist.parallel.long_work import Tell, quiet
from raphael_dist.storage.files import atomic_path

_log = logging.getLogger(__name__)
_OPEN_FILES = 64
_FORMER_VERSION = 1


class FeatureCache:
    """One safetensors file per shard under `root`/`fingerprint`, named by the shard and its content.

    The fingerprint follows from the encoders, the buckets, flip, captions and the kind of edges; a file's name from the
    shard's content. So shards may be added or moved without computing the others again, and no file is read for data that
    has changed. Several processes may build and read at once: a file appears whole or not at all. A sample whose file is
    missing or damaged is left raw, as online, and the file is computed again by the next `build`.
    """

    def __init__(self, root: Path, dataset: ImageDataset, encoders: Encoders, flip: bool, with_text: bool = True) -> None:
        """With `flip` it holds the latents of mirrored images too, `with_text` the captions' tokens.

        UserError: a bucket that the image encoder's factor does not divide.
        """
        self._raw = OnlineFeatures(dataset, encoders.image)
        self.dataset, self.index, self.buckets, self.flip = dataset, dataset.index, dataset.buckets, flip
        self.latent_factor, self.latent_channels = self._raw.latent_factor, self._raw.latent_channels
        self._encoders, self._with_text = encoders, with_text
        self._builder = ShardBuilder(dataset, encoders, flip, with_text)
        parts = [encoders.made_of(dataset), flip, with_text]
        self.fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = Path(root) / self.fingerprint
        self._shard = lru_cache(maxsize=_OPEN_FILES)(lambda shard: _CachedShard(self.path(shard)))
        self._filling: _Filling | None = None

    def former_folder(self) -> Path:
        """Return where the version before this one kept what it computed of the same data."""
        d, e = self.dataset, self._encoders
        parts = [_FORMER_VERSION, e.text.fingerprint, e.image.fingerprint, self.buckets, self.flip, d.edge, d.max_pixels]
        return self.folder.parent / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def path(self, shard: int) -> Path:
        """Return the file of that shard number."""
        source = self.index.shards[shard]
        return self.folder / f"{Path(source.name).stem[:100]}-{source.content[:16]}.safetensors"

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
        tables_sum = checksum(tensors[name] for name in TABLES)
        self._write(self.path(shard), tensors, {"shard": json.dumps({"bad": bad, "tables_sum": tables_sum})})

    def aside(self) -> AbstractContextManager[None]:
        """Let what is encoded in the block run on a stream of its own on a GPU."""
        return self._encoders.aside()

    def fill_aside(self, shards: Sequence[int]) -> None:
        """Compute the files of these shards in a thread of its own, until `close`; samples are read as online until then."""
        self._filling = _Filling(self, shards)
        self._filling.start()

    @property
    def filling(self) -> bool:
        """Whether `fill_aside` is at work."""
        return self._filling is not None

    def close(self) -> None:
        """End `fill_aside`; what it has not finished is left out."""
        if self._filling is not None:
            self._filling.stop()

    def get(self, sample_id: int, bucket: int, pick: Pick, flip: bool) -> SampleFeatures:
        """Return a sample's features with one of its captions, mirrored if `flip`; raw where the cache lacks them.

        BadSampleError: it cannot be used; ValueError: `flip` of a cache without.
        """
        if flip and not self.flip:
            raise ValueError("this cache was made without mirrored latents; make it with flip")
        number, local = self.index.locate(sample_id)
        began = time.monotonic()
        try:
            found = self._shard(number).get(local, pick, flip)
        except FileNotFoundError:
            return self._raw.get(sample_id, bucket, pick, flip)
        except (OSError, SafetensorError, KeyError, ValueError, IndexError) as error:
            self._set_aside(number, error)
            return self._raw.get(sample_id, bucket, pick, flip)
        if found is None:
            source = self.index.shards[number]
            raise BadSampleError(source.name, source.keys[local], "it was bad when it was cached")
        found.seconds = {"reading": time.monotonic() - began}
        return found

    def _set_aside(self, shard: int, error: Exception) -> None:
        """Take a damaged file out of the way, and say so once: another process may have done it before."""
        path = self.path(shard)
        try:
            path.replace(path.with_name(f"damaged-{path.name}"))
        except OSError:
            return
        self._shard.cache_clear()
        _log.warning(
            "data.cache_dir: %s is damaged (%s) and was set aside; its samples are encoded as they are needed, "
            "and it is computed again at the next start", path, " ".join(str(error).split())[:200],
        )  # fmt: skip

    def verify(self, shards: Sequence[int], tell: Tell = quiet) -> None:
        """Open the files of these shards, and set aside those that are damaged, so that they are missing."""
        for number in shards:
            tell(f"the cached shard {number}")
            try:
                self._shard(number)
            except FileNotFoundError:
                pass
            except (OSError, SafetensorError, KeyError, ValueError) as error:
                self._set_aside(number, error)

    @cached_property
    def known_bad(self) -> dict[int, BadSample]:
        """Sample id -> what is wrong, of the samples that could not be encoded; what the index refused is in `index.bad`."""
        missing = set(self.missing())
        present = [n for n, shard in enumerate(self.index.shards) if shard.num_samples and n not in missing]
        return {sample_id: bad for number in present for sample_id, bad in self._read_bad(number).items()}

    @cached_property
    def null_text(self) -> TextFeatures | None:
        """The features of the empty caption, B = 1, on the CPU, tokens float32; None where tokens are not cached.

        They are computed if no file has them. UserError: the file cannot be read or written.
        """
        if not self._with_text:
            return None
        path = self.folder / "null_text.safetensors"
        if not path.is_file():
            self._write(path, vars(encode_half(self._encoders.text, [""])), {})
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"data.cache_dir: {path} cannot be read; delete it, it is computed again") from error
        return TextFeatures(tensors["tokens"].float(), tensors["mask"], tensors["end"])

    def _write(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        try:
            with atomic_path(path) as temporary:
                save_file(tensors, temporary, metadata)
        except (OSError, SafetensorError) as error:
            raise UserError(f"data.cache_dir: cannot write {path}: {error}; check space and rights") from error

    def _read_bad(self, shard: int) -> dict[int, BadSample]:
        source, first = self.index.shards[shard], int(self.index.starts[shard])
        try:
            entries = self._shard(shard).bad
        except (OSError, SafetensorError, KeyError, ValueError):
            return {}  # `get` says what is wrong with it
        return {first + n: BadSample(source.name, source.keys[n], reason) for n, reason in entries}


class _Filling(threading.Thread):
    """Builds shards beside training. What stops it is told at the next batch of images."""

    def __init__(self, cache: FeatureCache, shards: Sequence[int]) -> None:
        super().__init__(name="cache", daemon=True)
        self._cache, self._shards, self._stop_it = cache, shards, threading.Event()

    def run(self) -> None:
        def tell(_: str) -> None:
            if self._stop_it.is_set():
                raise InterruptedError

        try:
            with self._cache.aside():
                self._cache.build(self._shards, tell)
            _log.info("data.cache_dir: all %d shards of this rank are cached", len(self._shards))
        except InterruptedError:
            pass
        except UserError as error:  # training does not depend on it
            _log.warning("%s; features are computed as they are needed", error)

    def stop(self) -> None:
        """Wait until it has stopped."""
        self._stop_it.set()
        self.join()


class _CachedShard:
    """One shard's file (cache_build.py lists its tensors): small ones in memory, of large ones single rows."""

    def __init__(self, path: Path) -> None:
        """FileNotFoundError; others of OSError, SafetensorError, KeyError, ValueError: it is damaged."""
        self._file = safe_open(path, framework="pt")
        # One entry: safetensors writes several in no fixed order.
        about = json.loads(self._file.metadata()["shard"])
        self.bad: list[tuple[int, str]] = about["bad"]
        self._names = set(self._file.keys())
        self._bucket, self._row, self._offsets, self._caption_rows, self._weights = (
            self._file.get_tensor(name).numpy() for name in TABLES
        )
        if checksum(self._file.get_tensor(name) for name in TABLES) != about["tables_sum"]:
            raise ValueError("the tables do not match their checksum")

    def get(self, number: int, pick: Pick, flip: bool) -> SampleFeatures | None:
        """Return a sample's features, or None where it is a bad one. ValueError: they do not match their checksum."""
        bucket, row = int(self._bucket[number]), int(self._row[number])
        if bucket < 0:
            return None
        mine = slice(self._offsets[number], self._offsets[number + 1])
        text_row = int(self._caption_rows[mine][pick(self._weights[mine].tolist())])
        tensors = self._checked([n for n in IMAGE_TENSORS if f"{n}.{bucket}" in self._names], f".{bucket}", row, "sum")
        tensors["weights"] = torch.ones(1)
        return unpack({**tensors, **self._text(text_row)}, lambda _: 0, flip)

    def _text(self, row: int) -> dict[str, Tensor]:
        if "tokens" in self._names:
            return {name: one[None] for name, one in self._checked(TEXT_TENSORS, "", row, "text_sum").items()}
        ends = self._file.get_tensor("caption_ends")
        first, last = int(ends[row - 1]) if row else 0, int(ends[row])
        text = self._file.get_slice("captions")[first:last].clone()
        if checksum([text]) != int(self._file.get_slice("text_sum")[row : row + 1][0]):
            raise ValueError(f"caption {row} does not match its checksum")
        return {"captions": text, "caption_ends": ends[row : row + 1] - first}

    def _checked(self, names: Sequence[str], suffix: str, row: int, sum_name: str) -> dict[str, Tensor]:
        # Copies: a view would keep the whole map alive, and what writes into it would change the cached values.
        def cut(name: str) -> Tensor:
            return self._file.get_slice(f"{name}{suffix}")[row : row + 1][0].clone()

        tensors = {name: cut(name) for name in names}
        if checksum(tensors.values()) != int(cut(sum_name)):
            raise ValueError(f"row {row} does not match its checksum")
        return tensors
