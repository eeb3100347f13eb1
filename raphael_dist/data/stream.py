"""Reads samples by their position: the number of a sample in the endless order of training.

Random choices (caption, flip, dropout) depend only on the seed and the position.
"""

import itertools
import logging
import math
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from raphael_dist.data.captions import pick
from raphael_dist.data.features.feature_source import FeatureSource
from raphael_dist.data.features.packing import SampleFeatures
from raphael_dist.data.fetch.shard_cache import ShardError
from raphael_dist.data.mixture import MixedOrder
from raphael_dist.data.order import SampleOrder, SamplePosition
from raphael_dist.data.shards.dataset_index import BadSample, BadSampleError
from raphael_dist.data.shards.decode_sample import RETRY_AFTER_S, Request
from raphael_dist.data.shards.sample_reader import SampleReader
from raphael_dist.data.shards.skipped import most_common_reasons
from raphael_dist.data.shards.tar_scan import EDGE_EXT
from raphael_dist.errors import UserError
from raphael_dist.rng import Purpose, generator

_log = logging.getLogger(__name__)
_MAX_REASONS = 100_000  # bad samples whose reasons are counted for a message
_PIECE = 1 << 16
_MIN_SAMPLES = 1000  # below which the share of bad samples is not significant


@dataclass(eq=False, kw_only=True)
class StreamSample(SampleFeatures):
    """One sample for training or validation.

    The image and the caption are encoded if the shards or the cache store them in encoded form. Otherwise they are raw, and
    `BatchEncoder` encodes them later. A shard is a tar file of samples. See `SampleFeatures` for further attributes.

    Attributes:
        position: Number of the sample in the endless order of training.
        sample_id: Number of the sample, counted over all shards.
        key: Name of the sample in its shard.
        bucket: Number of the sample's image size in the list image.buckets.
        noise: Standard normal noise, float32 [C, h, w], for drawing latents from the VAE's distribution: mean + std * noise.
        flipped: Whether the image was mirrored left to right.
        dropped: Whether the caption was replaced by the empty one (caption dropout).
    """

    position: int
    sample_id: int
    key: str
    bucket: int
    noise: Tensor
    flipped: bool
    dropped: bool

    @property
    def latents(self) -> Tensor | None:
        """The encoded image, float32 [C, h, w]. None: it is not encoded yet, and `image` is set."""
        return None if self.mean is None or self.std is None else self.mean + self.std * self.noise


class TrainStream:
    """Returns the sample at any global position (number of a sample in the endless order of training).

    Samples depend only on the data, the seed and the position. So any rank may read any position at any time. A sample that
    cannot be used is replaced by the usable sample of the same image size that has the next higher id. After the highest
    id, the search continues at the lowest.

    Attributes:
        replaced: Number of samples that were replaced so far.
        bad_samples: By sample id, the samples that are known to be unusable, with the reason.
    """

    def __init__(
        self,
        order: SampleOrder | MixedOrder,
        source: FeatureSource,
        *,
        seed: int,
        caption_dropout: float,
        flip: bool,
        max_bad_fraction: float = 0.05,
        on_error: str = "skip",
        reader: SampleReader | None = None,
    ) -> None:
        """Create the stream.

        Args:
            order: Maps a position to a sample id.
            source: Returns a sample's image and caption, encoded or not.
            seed: Seed of the random choices (caption, mirroring, caption dropout).
            caption_dropout: Fraction of the captions that are replaced by the empty one.
            flip: Mirror half of the images left to right.
            max_bad_fraction: Largest allowed fraction of unusable samples.
            on_error: What happens at an unusable sample: "stop" raises UserError, "skip" replaces it.
            reader: Decodes in worker processes and prefetches shards; None: decode in this process.

        Raises:
            UserError: More than `max_bad_fraction` of all samples, or all samples of an image size, are known to be
                unusable; or any sample is known to be unusable and `on_error` is "stop".
        """
        assert source.index.fingerprint == order.index.fingerprint, "order and features are of different shards"
        assert source.buckets == order.buckets, "order and features are of different buckets"
        self.order, self.source, self.seed = order, source, seed
        self.caption_dropout, self.flip = caption_dropout, flip
        self.replaced = self._num_read = 0
        self.bad_samples = dict(source.known_bad)
        self._max_bad_fraction, self._on_error, self._reader = max_bad_fraction, on_error, reader
        if on_error == "stop" and self.bad_samples:
            raise _stop_error(next(iter(self.bad_samples.values())))
        num_bad = order.index.num_bad + len(self.bad_samples)
        bad = itertools.chain(order.index.iter_bad(), self.bad_samples.values())
        _check_bad_fraction(num_bad, bad, order.index.num_samples + order.index.num_bad, max_bad_fraction)
        self._replacements: dict[int, int] = {}
        for sample_id in self.bad_samples:
            if order.bucket_of[sample_id] >= 0:  # otherwise a filter drops it
                self._replacement(sample_id, int(order.bucket_of[sample_id]))
        self._null = source.null_text
        self._warned: set[int] = set()
        self._bad_until: dict[int, float] = {}  # monotonic seconds, for samples of shards that could not be reached
        self._lock = threading.Lock()

    def samples(self, positions: Sequence[int]) -> list[StreamSample]:
        """Return the samples at these positions: numbers of samples in the endless order of training.

        If the stream has worker processes, they decode the images. Raises UserError if too many samples cannot be used.
        """
        if self._reader is not None and len(positions):
            decodes = self.source.decodes_images
            self._reader.prefetch(positions[0], [self._request(position) for position in positions] if decodes else [])
        return [self.sample(position) for position in positions]

    def _request(self, position: int) -> Request:
        """Return the request for the sample at a position: (sample id, number of the image size, whether to mirror).

        For a sample that is known to be unusable, this is the request for its replacement.
        """
        place = self.order.lookup(position)
        is_bad = self._is_bad(place.sample_id)
        sample_id = self._replacement(place.sample_id, place.bucket) if is_bad else place.sample_id
        return sample_id, place.bucket, self._flips(position)

    def _flips(self, position: int) -> bool:
        return self.flip and bool(self._generator(Purpose.FLIP, position).random() < 0.5)

    def sample(self, position: int) -> StreamSample:
        """Return the sample at a global position (its number in the endless order of training). Thread-safe.

        A sample that cannot be used is replaced by another one of the same image size.

        Raises:
            UserError: More than the fraction data.max_bad_fraction of the samples cannot be used; no sample of this image
                size can be used; or a sample cannot be used and data.on_error=stop.
        """
        place = self.order.lookup(position)
        flipped = self._flips(position)
        dropped = self._generator(Purpose.DROP, position).random() < self.caption_dropout
        sample_id, features = self._read(place, position, flipped)
        factor, (height, width) = self.source.latent_factor, self.source.buckets[place.bucket]
        shape = (self.source.latent_channels, height // factor, width // factor)
        noise = torch.from_numpy(self._generator(Purpose.POSTERIOR, position).standard_normal(shape, dtype=np.float32))
        if dropped:
            null = self._null
            features.caption = ""
            features.text = None if null is None else (null.tokens[0], null.mask[0], int(null.end[0]))
        return StreamSample(
            **vars(features),
            position=position,
            sample_id=sample_id,
            key=self.order.index.key(sample_id),
            bucket=place.bucket,
            noise=noise,
            flipped=flipped,
            dropped=dropped,
        )

    def close(self) -> None:
        """Stop the threads and processes that read or encode samples."""
        self.source.close()
        if self._reader is not None:
            self._reader.close()

    def _generator(self, purpose: Purpose, position: int) -> np.random.Generator:
        return generator(self.seed, purpose, position)

    def _read(self, place: SamplePosition, position: int, flip: bool) -> tuple[int, SampleFeatures]:
        """Return (sample id, features) of the sample that `place` names, or of its replacement if it cannot be used.

        `place`: sample id and bucket (image size). `position`: number of the sample in the endless order of training, which
        determines the random choice of a caption. `flip`: mirror the image.
        """
        sample_id = place.sample_id
        while True:
            if not self._is_bad(sample_id):
                try:
                    pick_caption = partial(pick, draw=self._generator(Purpose.CAPTION, position))
                    features = self.source.get(sample_id, place.bucket, pick_caption, flip)
                    break
                except (BadSampleError, ShardError) as error:
                    self._record_bad(sample_id, error)
            sample_id = self._replacement(sample_id, place.bucket)
        self._count(place.sample_id, replaced=sample_id != place.sample_id)
        return sample_id, features

    def _is_bad(self, sample_id: int) -> bool:
        """Return whether a sample is known to be unusable.

        A sample that is unusable since its shard could not be read counts as usable again after 600 s (RETRY_AFTER_S).
        """
        if time.monotonic() >= self._bad_until.get(sample_id, math.inf):
            with self._lock:
                self._bad_until.pop(sample_id, None)
                self.bad_samples.pop(sample_id, None)
        return sample_id in self.bad_samples

    def _record_bad(self, sample_id: int, error: BadSampleError | ShardError) -> None:
        """Record that a sample cannot be used; `error` states the reason. Raises UserError if data.on_error=stop.

        After a ShardError, the sample counts as usable again in 600 s (RETRY_AFTER_S).
        """
        bad = error.sample if isinstance(error, BadSampleError) else self.order.index.bad_sample(sample_id, error.reason)
        if self._on_error == "stop":
            raise _stop_error(bad) from error
        with self._lock:
            self.bad_samples[sample_id] = bad
            if isinstance(error, ShardError):
                self._bad_until[sample_id] = time.monotonic() + RETRY_AFTER_S

    def _count(self, sample_id: int, replaced: bool) -> None:
        with self._lock:
            self._num_read += 1
            self.replaced += replaced
            is_new = replaced and sample_id not in self._warned
            if is_new:
                self._warned.add(sample_id)
        if is_new:
            _log.warning(
                "sample %s cannot be used, so another sample of the same image size replaces it",
                self.bad_samples.get(sample_id),
            )
            if self.replaced > self._max_bad_fraction * max(self._num_read, _MIN_SAMPLES):
                bad = [self.bad_samples[n] for n in self._warned if n in self.bad_samples]
                _check_bad_fraction(self.replaced, bad, self._num_read, self._max_bad_fraction)

    def _replacement(self, sample_id: int, bucket: int) -> int:
        """Return the id of the sample that replaces an unusable one: the next usable id of this bucket, cyclically.

        `bucket`: number of the image size of both samples.
        """
        replacement = self._replacements.get(sample_id)
        if replacement is None or replacement in self.bad_samples:
            replacement = next((n for n in self._next_ids(sample_id, bucket) if n not in self.bad_samples), None)
            if replacement is None:
                size, bad = list(self.order.buckets[bucket]), self.bad_samples[sample_id]
                raise UserError(
                    f"The size {size} in image.buckets requires at least one sample that can be used, but all of its "
                    f"samples are unusable. One of them: {bad}. Replace these samples, or remove the size."
                )
            self._replacements[sample_id] = replacement
        return replacement

    def _next_ids(self, sample_id: int, bucket: int) -> Iterator[int]:
        """Yield the ids of the samples of a bucket (image size): first those after `sample_id`, then those before it."""
        bucket_of = self.order.bucket_of
        for first, last in ((sample_id + 1, len(bucket_of)), (0, sample_id)):
            for start in range(first, last, _PIECE):
                piece = np.asarray(bucket_of[start : min(start + _PIECE, last)])
                yield from (start + np.flatnonzero(piece == bucket)).tolist()


def _stop_error(bad: BadSample) -> UserError:
    return UserError(
        f"data.on_error=stop ends the run, since this sample cannot be used: {bad}. Replace it, or set data.on_error=skip."
    )


def _check_bad_fraction(num_bad: int, bad: Iterable[BadSample], total: int, max_fraction: float) -> None:
    """Check that at most the fraction `max_fraction` of `total` samples is unusable.

    Args:
        num_bad: Number of unusable samples.
        bad: Unusable samples, perhaps not all of them, as examples in the message.
        total: Number of all samples, with the unusable ones.
        max_fraction: The limit.

    Raises:
        UserError: A larger fraction is unusable.
    """
    if num_bad <= max_fraction * total:
        return
    examples = list(itertools.islice(bad, _MAX_REASONS))
    (reason, count, _), *others = most_common_reasons((sample.key, sample.reason) for sample in examples)
    most_common = f"the reason of {count} of them is: {reason}" if others else reason
    if reason == f"no {EDGE_EXT}":
        remedy = f"Add edge maps ({EDGE_EXT} in each sample), or set edge.weight=0 to train without them"
    else:
        remedy = "Replace these samples, or raise data.max_bad_fraction"
    raise UserError(
        f"data.max_bad_fraction={max_fraction} is exceeded: {num_bad} of {total} samples cannot be used ({most_common}). "
        f"{remedy}. The first ones are {'; '.join(str(sample) for sample in examples[:3])}"
    )
