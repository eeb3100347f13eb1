"""How far a run is: what a checkpoint says beside weights and moments."""

from typing import Any, NamedTuple


class Progress(NamedTuple):
    """How far a run is.

    Attributes:
        step: optimizer steps, skipped ones included.
        samples_seen: the position of the next sample.
        updates: steps that changed the weights, which is what Adam counts.
        guard: the state of the rules against bad steps (training/guard.py).
    """

    step: int
    samples_seen: int
    updates: int
    guard: dict[str, Any]

    def as_manifest(self) -> dict[str, Any]:
        """Return it as keys of a manifest."""
        return self._asdict()


def progress_of(manifest: dict[str, Any]) -> Progress:
    """Return the progress that a manifest tells of."""
    step = int(manifest["step"])
    return Progress(
        step, int(manifest["samples_seen"]), int(manifest.get("updates", step)), dict(manifest.get("guard") or {})
    )


START = Progress(0, 0, 0, {})  # of a run that has not begun
