"""The stream of samples: what lies at a global position, with everything random about it drawn from that position."""

import itertools
import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raphael_dist.data.cache import FeatureCache
from raphael_dist.data.index import BadSample
from raphael_dist.data.mixture import MixedOrder
from raphael_dist.data.order import SampleOrder, SamplePosition
from raphael_dist.data.tar_scan import EDGE_EXT
from raphael_dist.errors import UserError
from raphael_dist.rng import Purpose, generator

_log = logging.getLogger(__name__)
_LOOKED_AT = 100_000


@dataclass(frozen=True, eq=False)
class StreamSample:
    """One sample as training sees it.

    latents float32 [C, h, w]; tokens float32 [Y, D]; mask bool [Y], true at attended tokens; end: index of the end-of-text
    token; edge float32 [H, W] in 0..1 or None; flipped: mirrored left to right; dropped: its caption was replaced by the
    empty one.
    """

    position: int
    sample_id: int
    key: str
    bucket: int
    latents: Tensor
    tokens: Tensor
    mask: Tensor
    end: int
    edge: Tensor | None
    flipped: bool
    dropped: bool


class TrainStream:
    """Samples by position: a pure function of (order, cache, seed), so any rank may read any position at any time.

    A bad sample is replaced by the next good one of its bucket (by sample id, the first after the last); `replaced` counts
    these.
    """

    def __init__(
        self,
        order: SampleOrder | MixedOrder,
        cache: FeatureCache,
        *,
        seed: int,
        caption_drop: float,
        flip: bool,
        max_bad_fraction: float = 0.05,
    ) -> None:
        """`caption_drop`: share of captions replaced by the empty one; `flip`: mirror half of the images.

        UserError: an incomplete cache, a cache of other data or buckets, more than `max_bad_fraction` of the samples bad, or
        all of a bucket.
        """
        if cache.index.fingerprint != order.index.fingerprint or cache.buckets != order.buckets:
            raise UserError("data: the order and the cache are of different shards or buckets; build both from one")
        if flip and not cache.flip:
            raise UserError("data.flip: true, but the cache was made without mirrored images; build it with flip")
        if missing := cache.missing():
            raise UserError(
                f"data: {len(missing)} shards are not cached yet, the first {cache.path(missing[0])}; build them"
            )
        self.order, self.cache, self.seed = order, cache, seed
        self.caption_drop, self.flip = caption_drop, flip
        self.replaced = 0
        self._null = cache.null_text
        self._bad = cache.bad
        num_bad = order.index.num_bad + len(self._bad)
        first = itertools.chain(order.index.iter_bad(), self._bad.values())
        _check_bad(num_bad, first, order.index.num_samples + order.index.num_bad, max_bad_fraction)
        self._stand_in = self._stand_ins()
        self._warned: set[int] = set()
        self._lock = threading.Lock()

    def sample(self, position: int) -> StreamSample:
        """Return the sample at a global position. Safe to call from several threads."""
        place = self.order.lookup(position)
        sample_id = self._good(place)
        flipped = self.flip and self._draw(Purpose.FLIP, position).random() < 0.5
        dropped = self._draw(Purpose.DROP, position).random() < self.caption_drop
        caption = int(self._draw(Purpose.CAPTION, position).integers(self.cache.num_captions(sample_id)))
        cached = self.cache.get(sample_id, caption, flipped)
        noise = self._draw(Purpose.POSTERIOR, position).standard_normal(tuple(cached.mean.shape), dtype=np.float32)
        null = self._null
        return StreamSample(
            position=position,
            sample_id=sample_id,
            key=self.order.index.key(sample_id),
            bucket=place.bucket,
            latents=cached.mean + cached.std * torch.from_numpy(noise),
            tokens=null.tokens[0] if dropped else cached.tokens,
            mask=null.mask[0] if dropped else cached.mask,
            end=int(null.end[0]) if dropped else cached.end,
            edge=None if cached.edge is None else cached.edge.float() / 255,
            flipped=flipped,
            dropped=dropped,
        )

    def _draw(self, purpose: Purpose, position: int) -> np.random.Generator:
        return generator(self.seed, purpose, position)

    def _good(self, place: SamplePosition) -> int:
        """Return the sample id of a place; of a bad one, its stand-in's, which is counted, and warned of the first time."""
        if place.sample_id not in self._bad:
            return place.sample_id
        with self._lock:
            self.replaced += 1
            is_new = place.sample_id not in self._warned
            self._warned.add(place.sample_id)
        if is_new:
            _log.warning("bad sample %s; another of its bucket takes its place", self._bad[place.sample_id])
        return self._stand_in[place.sample_id]

    def _stand_ins(self) -> dict[int, int]:
        """Return, for each bad sample id, the next good one of its bucket, from the start again after the last."""
        bucket_of, stand_in = self.order.bucket_of, dict[int, int]()
        bad_of = defaultdict(list)
        for sample_id in sorted(self._bad):
            bad_of[int(bucket_of[sample_id])].append(sample_id)
        for bucket, bad in bad_of.items():
            good = np.setdiff1d(np.flatnonzero(bucket_of == bucket), bad, assume_unique=True)
            if not len(good):
                size, first = list(self.order.buckets[bucket]), self._bad[bad[0]]
                raise UserError(f"data: all {len(bad)} samples of the bucket {size} are bad, the first {first}; remove it")
            after = np.searchsorted(good, bad) % len(good)
            stand_in.update(zip(bad, good[after].tolist(), strict=True))
        return stand_in


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
