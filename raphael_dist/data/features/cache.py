"""The feature cache: files with the encoded samples (features) of each shard.

Each file is computed once and memory-mapped. The checksum of a sample is verified whenever the sample is read.
"""

import hashlib
import io
import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load

from raphael_dist.data.features.batch_encoder import Encoders
from raphael_dist.data.features.cache_build import TABLES, ShardBuilder, encode_half
from raphael_dist.data.features.cached_shard import CachedShard, layout_sum
from raphael_dist.data.features.feature_source import FeatureSource
from raphael_dist.data.features.packing import Pick, SampleFeatures, checksum
from raphael_dist.data.features.run_encoders import TextFeatures
from raphael_dist.data.shards.dataset_index import BadSample, BadSampleError, cannot_write
from raphael_dist.data.shards.decode_sample import ImageDataset
from raphael_dist.errors import UserError
from raphael_dist.runtime.progress_bar import Reporter, no_report
from raphael_dist.storage.checksummed import read_sealed, write_sealed
from raphael_dist.storage.files import atomic_path
from raphael_dist.storage.tensorfile import DTYPE_NAMES, save_tensors
from raphael_dist.text import counted

_log = logging.getLogger(__name__)
_OPEN_FILES = 64
_UNREADABLE = (OSError, SafetensorError, KeyError, ValueError, IndexError)


class FeatureCache(FeatureSource):
    """Encoded samples (features), in a safetensors file for each shard (tar file), in the folder `root`/`fingerprint`.

    - The fingerprint is a hash of everything that features depend on: encoders, image sizes, flip, captions, edge maps.
    - A file's name depends on the content of the shard. So shards can be added or moved, and only new shards are encoded.
    - Several processes may write and read at once: a file appears complete or not at all.
    - If the file of a sample is missing or damaged, the sample is returned raw (image and caption), to be encoded in the
      step as with data.features=online. The next `build` computes the file again.
    """

    decodes_images = False

    def __init__(self, root: Path, dataset: ImageDataset, encoders: Encoders, flip: bool, with_text: bool = True) -> None:
        """Open the cache. Its files are opened later, when samples are read.

        Args:
            root: Folder that contains the feature caches, each in a subfolder.
            dataset: Loads the samples to encode.
            encoders: The encoders; their weights are loaded when a sample is encoded.
            flip: Also store the latents of mirrored images.
            with_text: Store the captions as encoded tokens; False: as strings.

        Raises:
            UserError: An image size is not a multiple of the image encoder's factor, which is image height divided by latent
                height (and width by width), such as 8.
        """
        super().__init__(dataset, encoders.image)
        self.encoders, self.flip, self._with_text = encoders, flip, with_text
        self._builder = ShardBuilder(dataset, encoders, flip, with_text)
        parts = [encoders.provenance(dataset), flip, with_text]
        self.fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = Path(root) / self.fingerprint
        self._open_shard = lru_cache(maxsize=_OPEN_FILES)(lambda shard: CachedShard(self.path(shard)))
        self._fill_thread: _FillThread | None = None

    def path(self, shard: int) -> Path:
        """Return the path of the cache file of a shard, which may not exist. `shard`: number of the shard in the index."""
        source = self.index.shard(shard)
        return self.folder / f"{Path(source.name).stem[:100]}-{source.content[:16]}.safetensors"

    def missing(self) -> list[int]:
        """Return the numbers of the shards that have usable samples but no file in the cache yet."""
        return [n for n in range(self.index.num_shards) if self.index.shard(n).num_samples and not self.path(n).is_file()]

    def build(self, shards: Sequence[int], report: Reporter = no_report) -> None:
        """Encode the samples of the shards with these numbers, and write their cache files.

        A file also lists the samples that cannot be encoded. `report`: called with lines of progress. Raises UserError if a
        file cannot be written, or encoded captions exceed the range of float16.
        """
        for number, shard in enumerate(shards, start=1):
            self._build_shard(shard, number, len(shards), report)

    def _build_shard(self, shard: int, number: int, total: int, report: Reporter) -> None:
        tensors, bad = self._builder.build(shard, lambda text: report(f"shard {number} of {total}, {text}", number, total))
        tables_sum = checksum(tensors[name] for name in TABLES)
        layout = {name: (DTYPE_NAMES[tensor.dtype], list(tensor.shape)) for name, tensor in tensors.items()}
        about = {"bad": bad, "tables_sum": tables_sum, "layout_sum": layout_sum(layout, bad)}
        path = self.path(shard)
        try:
            with atomic_path(path) as temporary, open(temporary, "xb") as file:
                save_tensors(file, tensors, {"shard": json.dumps(about)})
        except OSError as error:
            raise cannot_write(path, error) from error

    def fill_in_background(self, shards: Sequence[int]) -> None:
        """Start a thread that computes the cache files of the shards with these numbers. `close` stops it.

        Until a shard has its file, `get` returns the shard's samples raw (image and caption).
        """
        self._fill_thread = _FillThread(self, shards)
        self._fill_thread.start()

    @property
    def filling(self) -> bool:
        """Whether `fill_in_background` was called."""
        return self._fill_thread is not None

    def close(self) -> None:
        """Stop the thread of `fill_in_background`, if it was started. Raises UserError if the thread has failed.

        If the thread is stopped in the middle of a shard, no cache file is written for this shard.
        """
        if self._fill_thread is not None:
            self._fill_thread.stop()

    def get(self, sample_id: int, bucket: int, pick: Pick, flip: bool) -> SampleFeatures:
        """Return the features of a sample, with one of its captions. If the cache lacks the sample, return it raw.

        Args:
            sample_id: Number of the sample, counted over all shards.
            bucket: Index in `buckets` of the image size of the sample.
            pick: Function that draws the index of a caption, given the weights of the sample's captions.
            flip: Return the features of the mirrored image.

        Raises:
            BadSampleError: The sample cannot be used.
            ValueError: `flip` is true, but the cache was created without mirrored images.
            UserError: The thread of `fill_in_background` has failed, or the sample's file exists but cannot be opened.
        """
        if flip and not self.flip:
            raise ValueError("this cache was created without mirrored images. Create it with flip=True")
        if self._fill_thread is not None:
            self._fill_thread.check()
        number, row = self.index.locate(sample_id)
        began = time.monotonic()
        with self._quarantine_if_damaged(number):
            features = self._open_shard(number).get(row, pick, flip)
            if features is None:
                reason = "the sample could not be used when the cache was written"
                raise BadSampleError(self.index.bad_sample(sample_id, reason))
            features.seconds = {"reading": time.monotonic() - began}
            return features
        return super().get(sample_id, bucket, pick, flip)

    @contextmanager
    def _quarantine_if_damaged(self, shard: int) -> Iterator[None]:
        """Return a context manager that suppresses exceptions of its block if a cache file is missing or damaged.

        `shard`: number of the shard whose file the block reads. A damaged file is renamed to damaged-NAME, and a warning is
        logged unless another process has renamed the file already.
        """
        try:
            yield
        except UserError:
            raise
        except FileNotFoundError:
            pass
        except _UNREADABLE as error:
            self._quarantine(shard, error)

    def _quarantine(self, shard: int, error: Exception) -> None:
        path = self.path(shard)
        try:
            path.replace(path.with_name(f"damaged-{path.name}"))
        except OSError:
            return
        self._open_shard.cache_clear()
        _log.warning(
            "data.cache_dir: %s is damaged (%s) and was renamed to damaged-*. The next start of the run writes this file "
            "again. Until then each step encodes the samples of this file, without rounding to float16",
            path,
            " ".join(str(error).split())[:200],
        )

    def verify(self, shards: Sequence[int], report: Reporter = no_report) -> None:
        """Check the cache files of the shards with these numbers: headers and small tables, but not the features in them.

        A damaged file is renamed to damaged-NAME, so that it is missing. `report`: called with a line of text per shard.
        Raises UserError if a file exists but cannot be opened.
        """
        for number in shards:
            report(f"the cached shard {number}")
            with self._quarantine_if_damaged(number):
                self._open_shard(number)

    @cached_property
    def known_bad(self) -> dict[int, BadSample]:
        """The samples that could not be encoded, with the reason, by sample id.

        Samples that were rejected when the shards were indexed have no id, and are left out.
        """
        bad: dict[int, BadSample] = {}
        for number, first in enumerate(self.index.starts[:-1].tolist()):
            with self._quarantine_if_damaged(number):
                entries = self._open_shard(number).bad
                bad |= {first + n: self.index.bad_sample(first + n, reason) for n, reason in entries}
        return bad

    @cached_property
    def null_text(self) -> TextFeatures | None:
        """The encoded empty caption (batch of one, float32, CPU). None if the cache stores captions as strings.

        It is read from its own file in the cache. If this file is missing or damaged, the caption is encoded, and the file
        is written. Raises UserError if it cannot be written.
        """
        if not self._with_text:
            return None
        path = self.folder / "null_text.safetensors"
        try:
            tensors = load(read_sealed(path))
        except (OSError, ValueError, SafetensorError):
            tensors = encode_half(self.encoders.text, [""]).tensors()
            buffer = io.BytesIO()
            save_tensors(buffer, tensors)
            try:
                write_sealed(path, buffer.getvalue())
            except OSError as error:
                raise cannot_write(path, error) from error
        return TextFeatures(tensors["tokens"].float(), tensors["mask"], tensors["end"])


class _FillThread(threading.Thread):
    """A thread that computes the cache files of `shards` during training. It can be stopped after any batch of images.

    If a file cannot be written, the thread logs a warning and ends; training continues, but more slowly. After any other
    failure `check` raises an error, which ends training: otherwise the cache would stay empty without notice.
    """

    def __init__(self, cache: FeatureCache, shards: Sequence[int]) -> None:
        super().__init__(name="cache", daemon=True)
        self._cache, self._shards, self._stop_requested = cache, shards, threading.Event()
        self._failure: UserError | None = None

    def _report(self, text: str, done: int | None = None, total: int | None = None) -> None:
        if self._stop_requested.is_set():
            raise InterruptedError

    def run(self) -> None:
        try:
            with self._cache.encoders.side_stream():
                self._cache.build(self._shards, self._report)
            _log.info("data.cache_dir: no shard of this rank is missing (%s)", counted(len(self._shards), "shard"))
        except InterruptedError:
            pass
        except UserError as error:
            _log.warning(
                "data.cache_fill=during: caching stopped, and each step encodes its samples instead. Reason: %s", error
            )
        except Exception as error:  # `check` raises it in the training thread
            _log.exception("data.cache_fill=during: the cache cannot be filled")
            self._failure = UserError(
                f"data.cache_fill=during: the cache cannot be filled ({type(error).__name__}: {error}); the log of the run "
                "has the traceback. Set data.features=online to train without the cache."
            )

    def check(self) -> None:
        """Raise UserError if the thread has failed."""
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Stop the thread, and log for how many shards it has not written a file. UserError: the thread has failed."""
        self._stop_requested.set()
        self.join()
        self.check()
        if missing := [number for number in self._shards if not self._cache.path(number).is_file()]:
            _log.warning(
                "data.cache_fill=during: %d of %d shards of this rank were not cached when the run ended; the next start of "
                "the run continues to cache them",
                len(missing),
                len(self._shards),
            )
