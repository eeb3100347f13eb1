"""How long a rank waits for its data, by the kind of work it waits for, and which setting would help."""

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
    """Sums up waiting. The wait for a batch is divided in proportion to the work that made it; its copy is "copying"."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._began = self._fetched = 0.0
        self._named: str | None = None  # the kind that the last line named
        self._is_first = True
        self.last_wait = 0.0  # seconds, of the last batch and its copy

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context around fetching a batch, after which `fetched` is called, and copying it to the device."""
        self._began = time.monotonic()
        yield
        now = time.monotonic()
        self._seconds["copying"] += now - self._fetched
        self.last_wait = now - self._began

    def fetched(self, seconds: Mapping[str, float]) -> None:
        """Record that the batch has arrived. `seconds`: the time for making it, by kind of work."""
        self._fetched = time.monotonic()
        waited, total = self._fetched - self._began, sum(seconds.get(kind, 0.0) for kind in KINDS)
        for kind in KINDS:
            self._seconds[kind] += waited * seconds.get(kind, 0.0) / max(total, 1e-9)

    def take(self, elapsed: float) -> tuple[dict[str, float], str | None]:
        """Return the shares of the `elapsed` seconds since the last call, by metric, and a line to log, if there is one.

        The line names the kind of work with the longest wait, once until that changes. The first call returns no line,
        because a start always waits.
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
