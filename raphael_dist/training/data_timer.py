"""Measures how long a rank waits for its data, and names the setting that would shorten the wait."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

KINDS = ("reading", "decoding", "encoding", "copying")
WORTH_LOGGING = 0.03  # share of the time
REMEDIES = {
    "reading": "raise data.workers or data.prefetch, or keep the shards (data.shard_cache) on a faster disk",
    "decoding": "raise data.workers, or set data.features=cached or stored, which decode nothing",
    "encoding": "set data.features=cached or stored, or image.dtype=bfloat16 on a GPU",
    "copying": "raise data.prefetch",
}


class DataTimer:
    """Adds up the seconds that this rank waits for data, separately for reading, decoding, encoding and copying.

    The wait for a batch is divided among reading, decoding and encoding, in proportion to the time that each needed for this
    batch. The time to copy the batch to the device is counted as "copying".

    Attributes:
        last_wait: seconds that this rank waited for the last batch, including the copy to the device.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._began = self._fetched = 0.0
        self._named: str | None = None  # the kind that the last line named
        self._is_first = True
        self.last_wait = 0.0  # seconds, of the last batch and its copy

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Return a context manager that measures its body.

        The body must fetch a batch, call `fetched`, and then copy the batch to the device.
        """
        self._began = time.monotonic()
        yield
        now = time.monotonic()
        self._seconds["copying"] += now - self._fetched
        self.last_wait = now - self._began

    def fetched(self, seconds: Mapping[str, float]) -> None:
        """Record that the batch has arrived. Call it inside the body of `waiting`, before the batch is copied to the device.

        `seconds`: the seconds that building the batch needed, by kind of work ("reading", "decoding", "encoding").
        """
        self._fetched = time.monotonic()
        waited, total = self._fetched - self._began, sum(seconds.get(kind, 0.0) for kind in KINDS)
        for kind in KINDS:
            self._seconds[kind] += waited * seconds.get(kind, 0.0) / max(total, 1e-9)

    def take(self, elapsed: float) -> tuple[dict[str, float], str | None]:
        """Return the waiting times since the last call as metrics, and a line for the log or None.

        The metrics are shares (0..1) of `elapsed`, by tag (`time/data_wait_*`). The line names the kind of work with the
        longest wait, and the setting that would shorten this wait. No line is returned if at most 3% of `elapsed` was spent
        waiting, or if the previous line named the same kind of work. The first call returns no line either, because every
        start has to wait for data.

        `elapsed`: seconds since the last call, or since the start.
        """
        shares = {kind: self._seconds[kind] / max(elapsed, 1e-9) for kind in KINDS}
        total, longest = sum(shares.values()), max(KINDS, key=lambda kind: shares[kind])
        metrics = {"time/data_wait_frac": total, **{f"time/data_wait_{kind}": share for kind, share in shares.items()}}
        self._seconds = dict.fromkeys(KINDS, 0.0)
        is_first, self._is_first = self._is_first, False
        if is_first or total <= WORTH_LOGGING or longest == self._named:
            return metrics, None
        self._named = longest
        return metrics, f"{total:.0%} of the time went into waiting for data, most of it for {longest}: {REMEDIES[longest]}"
