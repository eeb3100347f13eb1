"""The stream of samples: what lies at a global position, with everything random about it drawn from that position."""

import itertools
import logging
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from raphael_dist.data.captions import pick
from raphael_dist.data.dataset import BadSampleError
from raphael_dist.data.features import FeatureSource, OnlineFeatures
from raphael_dist.data.index import BadSample
from raphael_dist.data.mixture import MixedOrder
from raphael_dist.data.order import SampleOrder, SamplePosition
from raphael_dist.data.packing import SampleFeatures, Text
from raphael_dist.data.reading import Reading
from raphael_dist.data.shard_store import ShardError
from raphael_dist.data.tar_scan import EDGE_EXT
from raphael_dist.errors import UserError
from raphael_dist.rng import Purpose, generator

_log = logging.getLogger(__name__)
_LOOKED_AT = 100_000
_PIECE = 1 << 16
_ENOUGH = 1000  # samples, from which on a share says something


@dataclass(frozen=True, eq=False)
class StreamSample:
    """One sample as training sees it, encoded as far as it is stored so (`encoding.AheadEncoder` does the rest).

    latents float32 [C, h, w], or image uint8 [3, H, W] and noise float32 [C, h, w], the draw from the latents' distribution;
    text, or caption; edge float32 [h, w] in 0..1 or None; flipped: mirrored left to right; dropped: its caption was replaced
    by the empty one; seconds: what it took, by kind of work; small uint8 [3, Hs, Ws], the small picture where it is stored.
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
    small: Tensor | None = None


class TrainStream:
    """Samples by position: a pure function of (order, source, seed), so any rank may read any position at any time.

    A bad sample is replaced by the next good one of its bucket (by sample id, the first after the last); `replaced` counts
    these, `found_bad` holds those that were met.
    """

    def __init__(
        self,
        order: SampleOrder | MixedOrder,
        source: FeatureSource,
        *,
        seed: int,
        caption_drop: float,
        flip: bool,
        max_bad_fraction: float = 0.05,
        on_error: str = "skip",
        reading: Reading | None = None,
    ) -> None:
        """`caption_drop`: share of captions replaced by the empty one; `flip`: mirror half of the images.

        `on_error`: stop at a bad sample, or skip it. `reading`: workers that decode, and shards brought ahead.

        UserError: features of other data or buckets, more than `max_bad_fraction` of the samples known to be bad, or all of
        a bucket, or any of them where a bad sample is to stop the run.
        """
        if source.index.fingerprint != order.index.fingerprint or source.buckets != order.buckets:
            raise UserError("data: the order and the features are of different shards or buckets; build both from one")
        self.order, self.source, self.seed = order, source, seed
        self.caption_drop, self.flip = caption_drop, flip
        self.replaced = self._read = 0
        self.found_bad = dict(source.known_bad)
        self._max_bad_fraction, self._on_error, self._reading = max_bad_fraction, on_error, reading
        if on_error == "stop" and self.found_bad:
            raise _stopped_by(next(iter(self.found_bad.values())))
        num_bad = order.index.num_bad + len(self.found_bad)
        first = itertools.chain(order.index.iter_bad(), self.found_bad.values())
        _check_bad(num_bad, first, order.index.num_samples + order.index.num_bad, max_bad_fraction)
        self._stand_in: dict[int, int] = {}
        for sample_id in self.found_bad:
            if order.bucket_of[sample_id] >= 0:  # else a filter has dropped it
                self._replacement(sample_id, int(order.bucket_of[sample_id]))
        self._null = source.null_text
        self._warned: set[int] = set()
        self._lock = threading.Lock()

    def samples(self, positions: Sequence[int]) -> list[StreamSample]:
        """Return the samples at these positions, which workers read and decode at once where there are some."""
        if self._reading is not None and len(positions):
            decodes = type(self.source) is OnlineFeatures
            self._reading.ahead(positions[0], [self._request(position) for position in positions] if decodes else [])
        return [self.sample(position) for position in positions]

    def _request(self, position: int) -> tuple[int, int, bool]:
        """Return what `sample` will have decoded first."""
        place = self.order.lookup(position)
        is_bad = place.sample_id in self.found_bad
        sample_id = self._replacement(place.sample_id, place.bucket) if is_bad else place.sample_id
        return sample_id, place.bucket, self._flips(position)

    def _flips(self, position: int) -> bool:
        return self.flip and bool(self._draw(Purpose.FLIP, position).random() < 0.5)

    def sample(self, position: int) -> StreamSample:
        """Return the sample at a global position. Safe to call from several threads."""
        place = self.order.lookup(position)
        flipped = self._flips(position)
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
            small=features.small,
        )

    def close(self) -> None:
        """End what the source of the features does beside training."""
        self.source.close()
        if self._reading is not None:
            self._reading.close()

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
                except (BadSampleError, ShardError) as error:
                    self._note(sample_id, error)
            sample_id = self._replacement(sample_id, place.bucket)
        self._count(place.sample_id, replaced=sample_id != place.sample_id)
        return sample_id, features

    def _note(self, sample_id: int, error: BadSampleError | ShardError) -> None:
        """Take a sample for a bad one from here on. UserError: data.on_error says to stop."""
        shard, row = self.order.index.locate(sample_id)
        source = self.order.index.shards[shard]
        bad = BadSample(source.name, source.keys[row], getattr(error, "reason", str(error)))
        if self._on_error == "stop":
            raise _stopped_by(bad) from error
        with self._lock:
            self.found_bad[sample_id] = bad

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
                found = [self.found_bad[n] for n in self._warned]
                _check_bad(self.replaced, found, self._read, self._max_bad_fraction)

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


def _stopped_by(bad: BadSample) -> UserError:
    return UserError(f"data.on_error=stop: the bad sample {bad}; repair it, or set data.on_error=skip")


def _check_bad(num_bad: int, bad: Iterable[BadSample], total: int, max_fraction: float) -> None:
    """Raise UserError where `num_bad` are too many; `bad` are the first of them, enough to tell what is wrong with most."""
    if num_bad > max_fraction * total:
        looked_at = list(itertools.islice(bad, _LOOKED_AT))
        first = "; ".join(str(one) for one in looked_at[:3])
        (reason, times), *others = Counter(one.reason for one in looked_at).most_common()
        why = f"{times} of them: {reason}" if others else reason
        if reason == f"no {EDGE_EXT}":
            remedy = f"add edge maps ({EDGE_EXT} in each sample), or train without by edge.weight=0"
        else:
            remedy = "repair the shards or raise the limit"
        raise UserError(
            f"data.max_bad_fraction: {num_bad} of {total} samples are bad ({why}), more than {max_fraction:.1%}; "
            f"{remedy}. The first: {first}"
        )
