"""The stream of samples: what lies at a global position, with everything random about it drawn from that position."""

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from raphael_dist.data.captions import pick
from raphael_dist.data.dataset import BadSampleError
from raphael_dist.data.features import FeatureSource
from raphael_dist.data.order import SampleOrder, SamplePosition
from raphael_dist.data.packing import SampleFeatures, Text
from raphael_dist.data.shards import BadSample
from raphael_dist.errors import UserError
from raphael_dist.rng import Purpose, generator

_log = logging.getLogger(__name__)
_PIECE = 1 << 16
_ENOUGH = 1000  # samples, from which on a share says something


@dataclass(frozen=True, eq=False)
class StreamSample:
    """One sample as training sees it, encoded as far as it is stored so (`encoding.AheadEncoder` does the rest).

    latents float32 [C, h, w], or image uint8 [3, H, W] and noise float32 [C, h, w], the draw from the latents' distribution;
    text, or caption; edge float32 [h, w] in 0..1 or None; flipped: mirrored left to right; dropped: its caption was replaced
    by the empty one; seconds: what it took, by kind of work.
    """

    position: int
    sample_id: int
    key: str
    bucket: int
    latents: Tensor | None
    image: Tensor | None
    noise: Tensor
    caption: str
    text: Text | None
    edge: Tensor | None
    flipped: bool
    dropped: bool
    seconds: dict[str, float]


class TrainStream:
    """Samples by position: a pure function of (order, source, seed), so any rank may read any position at any time.

    A bad sample is replaced by the next good one of its bucket (by sample id, the first after the last); `replaced` counts
    these, `found_bad` holds those that were met.
    """

    def __init__(
        self,
        order: SampleOrder,
        source: FeatureSource,
        *,
        seed: int,
        caption_drop: float,
        flip: bool,
        max_bad_fraction: float = 0.05,
    ) -> None:
        """`caption_drop`: share of captions replaced by the empty one; `flip`: mirror half of the images.

        UserError: features of other data or buckets, more than `max_bad_fraction` of the samples known to be bad, or all of
        a bucket.
        """
        if source.index.fingerprint != order.index.fingerprint or source.buckets != order.buckets:
            raise UserError("data: the order and the features are of different shards or buckets; build both from one")
        self.order, self.source, self.seed = order, source, seed
        self.caption_drop, self.flip = caption_drop, flip
        self.replaced = self._read = 0
        self.found_bad = dict(source.known_bad)
        self._max_bad_fraction = max_bad_fraction
        index_bad, total = order.index.bad, order.index.num_samples + len(order.index.bad)
        _check_bad([*index_bad, *self.found_bad.values()], total, max_bad_fraction)
        self._stand_in: dict[int, int] = {}
        for sample_id in self.found_bad:
            self._replacement(sample_id, int(order.bucket_of[sample_id]))
        self._null = source.null_text
        self._warned: set[int] = set()
        self._lock = threading.Lock()

    def sample(self, position: int) -> StreamSample:
        """Return the sample at a global position. Safe to call from several threads."""
        place = self.order.lookup(position)
        flipped = self.flip and self._draw(Purpose.FLIP, position).random() < 0.5
        dropped = self._draw(Purpose.DROP, position).random() < self.caption_drop
        sample_id, features = self._get(place, position, flipped)
        factor, (height, width) = self.source.latent_factor, self.source.buckets[place.bucket]
        shape = (self.source.latent_channels, height // factor, width // factor)
        noise = torch.from_numpy(self._draw(Purpose.POSTERIOR, position).standard_normal(shape, dtype=np.float32))
        text = features.text
        if dropped:
            null = self._null
            text = None if null is None else (null.tokens[0], null.mask[0], int(null.end[0]))
        return StreamSample(
            position=position,
            sample_id=sample_id,
            key=self.order.index.key(sample_id),
            bucket=place.bucket,
            latents=None if features.mean is None or features.std is None else features.mean + features.std * noise,
            image=features.image,
            noise=noise,
            caption="" if dropped else features.caption,
            text=text,
            edge=features.edge,
            flipped=flipped,
            dropped=dropped,
            seconds=features.seconds,
        )

    def close(self) -> None:
        """End what the source of the features does beside training."""
        self.source.close()

    def _draw(self, purpose: Purpose, position: int) -> np.random.Generator:
        return generator(self.seed, purpose, position)

    def _get(self, place: SamplePosition, position: int, flip: bool) -> tuple[int, SampleFeatures]:
        """Return a place's sample, or its stand-in where it is bad, which is counted, and warned of the first time."""
        sample_id = place.sample_id
        while True:
            if sample_id not in self.found_bad:
                try:
                    draw = partial(pick, draw=self._draw(Purpose.CAPTION, position))
                    features = self.source.get(sample_id, place.bucket, draw, flip)
                    break
                except BadSampleError as error:
                    with self._lock:
                        self.found_bad[sample_id] = BadSample(error.shard, error.key, error.reason)
            sample_id = self._replacement(sample_id, place.bucket)
        self._count(place.sample_id, replaced=sample_id != place.sample_id)
        return sample_id, features

    def _count(self, sample_id: int, replaced: bool) -> None:
        with self._lock:
            self._read += 1
            self.replaced += replaced
            is_new = replaced and sample_id not in self._warned
            if is_new:
                self._warned.add(sample_id)
        if is_new:
            _log.warning("bad sample %s; another of its bucket takes its place", self.found_bad[sample_id])
            if self.replaced > self._max_bad_fraction * max(self._read, _ENOUGH):
                _check_bad([self.found_bad[n] for n in self._warned], self._read, self._max_bad_fraction)

    def _replacement(self, sample_id: int, bucket: int) -> int:
        """Return the next sample of a bucket that is not known to be bad, from the start again after the last."""
        found = self._stand_in.get(sample_id)
        if found is None or found in self.found_bad:
            found = next((n for n in self._after(sample_id, bucket) if n not in self.found_bad), None)
            if found is None:
                size, bad = list(self.order.buckets[bucket]), self.found_bad[sample_id]
                raise UserError(f"data: all samples of the bucket {size} are bad, one of them {bad}; remove it")
            self._stand_in[sample_id] = found
        return found

    def _after(self, sample_id: int, bucket: int) -> Iterator[int]:
        """Yield the sample ids of a bucket after `sample_id`, then those before it."""
        bucket_of = self.order.bucket_of
        for first, last in ((sample_id + 1, len(bucket_of)), (0, sample_id)):
            for start in range(first, last, _PIECE):
                piece = np.asarray(bucket_of[start : min(start + _PIECE, last)])
                yield from (start + np.flatnonzero(piece == bucket)).tolist()


def _check_bad(bad: list[BadSample], total: int, max_fraction: float) -> None:
    if len(bad) > max_fraction * total:
        first = "; ".join(str(one) for one in bad[:3])
        raise UserError(
            f"data.max_bad_fraction: {len(bad)} of {total} samples are bad, more than {max_fraction:.1%} of them; "
            f"repair the shards or raise the limit. The first: {first}"
        )
