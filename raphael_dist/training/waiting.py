"""How long a rank waited for its data, by the kind of work that it waited for, and which setting would help."""

import time
from collections.abc import Iterator

import torch

from raphael_dist.model.batch import Batch

KINDS = ("reading", "decoding", "encoding", "copying")
WORTH_SAYING = 0.03  # share of the time
_HELP = {
    "reading": "raise data.workers or data.prefetch, or keep the shards (data.shard_cache) on a faster disk",
    "decoding": "raise data.workers, or set data.features=cached or stored, which decode nothing",
    "encoding": "set data.features=cached or stored, or image.dtype=bfloat16 on a GPU",
    "copying": "raise data.prefetch",
}


class DataWait:
    """Sums up waiting. A wait for a batch is shared out to what making the batch took; its copy to the device is copying."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._told: str | None = None
        self._is_first = True

    def next(self, batches: Iterator[Batch], device: torch.device) -> tuple[Batch, float]:
        """Return the next batch on the device, and the seconds that this took."""
        began = time.monotonic()
        batch = next(batches)
        waited = time.monotonic() - began
        took = {kind: batch.seconds.get(kind, 0.0) for kind in KINDS}
        for kind, seconds in took.items():
            self._seconds[kind] += waited * seconds / max(sum(took.values()), 1e-9)
        batch = batch.to(device)
        copied = time.monotonic() - began - waited
        self._seconds["copying"] += copied
        return batch, waited + copied

    def take(self, elapsed: float) -> tuple[dict[str, float], str | None]:
        """Return the shares of `elapsed` seconds since the last call, by metric, and a line where there is one to say.

        It names the kind that was waited for most, once until that changes; the first time is the start, which always waits.
        """
        shares = {kind: self._seconds[kind] / max(elapsed, 1e-9) for kind in KINDS}
        total, most = sum(shares.values()), max(KINDS, key=lambda kind: shares[kind])
        metrics = {"time/data_wait_frac": total, **{f"time/data_wait_{kind}": share for kind, share in shares.items()}}
        self._seconds = dict.fromkeys(KINDS, 0.0)
        is_first, self._is_first = self._is_first, False
        if is_first or total <= WORTH_SAYING or most == self._told:
            return metrics, None
        self._told = most
        return metrics, f"{total:.0%} of the time went into waiting for data, most of it for {most}: {_HELP[most]}"
