"""The training stream: the sample of a global position, with everything random about it drawn from that position."""

import logging
import threading
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raphael_dist.data.cache import FeatureCache
from raphael_dist.data.order import SampleOrder, Slot
from raphael_dist.data.shards import BadSample
from raphael_dist.errors import UserError
from raphael_dist.rng import Purpose, generator

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class StreamSample:
    """One training sample.

    latents float32 [C, h, w]; tokens float32 [Y, D]; mask bool [Y]; end, the end-of-text token;
    edge float32 [H, W] in 0..1 or None; `dropped`: the caption is the empty one.
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

    A bad sample is replaced by the next good sample id of its bucket, cyclically; `replaced` counts how often.
    """

    def __init__(
        self,
        order: SampleOrder,
        cache: FeatureCache,
        *,
        seed: int,
        caption_drop: float,
        flip: bool,
        max_bad_fraction: float = 0.05,
    ) -> None:
        """UserError: an incomplete cache, a cache for other data or buckets, too many bad samples, a bucket of bad
        samples only."""
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
        self._null = cache.null_text()
        self._bad = dict(zip(cache.bad_ids, cache.bad, strict=True))
        _check_bad([*order.index.bad, *self._bad.values()], order.index.num_samples + len(order.index.bad), max_bad_fraction)
        self._stand_in = self._stand_ins()
        self._warned: set[int] = set()
        self._lock = threading.Lock()

    def sample(self, position: int) -> StreamSample:
        """Return the sample at a global position. Safe to call from several threads."""
        slot = self.order.lookup(position)
        sample_id = self._good(slot)
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
            bucket=slot.bucket,
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

    def _good(self, slot: Slot) -> int:
        """Return the slot's sample id, or its stand-in's if it is bad: counted, and warned of once."""
        if slot.sample_id not in self._bad:
            return slot.sample_id
        with self._lock:
            self.replaced += 1
            is_new = slot.sample_id not in self._warned
            self._warned.add(slot.sample_id)
        if is_new:
            _log.warning("bad sample %s; another of its bucket takes its place", self._bad[slot.sample_id])
        return self._stand_in[slot.sample_id]

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


def _check_bad(bad: list[BadSample], total: int, max_fraction: float) -> None:
    if len(bad) > max_fraction * total:
        first = "; ".join(str(one) for one in bad[:3])
        raise UserError(
            f"data.max_bad_fraction: {len(bad)} of {total} samples are bad, more than {max_fraction:.1%} of them; "
            f"repair the shards or raise the limit. The first: {first}"
        )
