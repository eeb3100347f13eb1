"""How far a run is: what a checkpoint says beside weights and moments."""

from typing import Any, NamedTuple


class Progress(NamedTuple):
    """step: optimizer steps, skipped ones included. samples_seen: the next sample position. updates: steps that changed the
    weights, which is what Adam counts. guard: the state of the rules against bad steps (guard.py).
    """

    step: int
    samples_seen: int
    updates: int
    guard: dict[str, Any]

    def as_manifest(self) -> dict[str, Any]:
        """Return the manifest's part."""
        return self._asdict()


def progress_of(manifest: dict[str, Any]) -> Progress:
    """Read it back."""
    step = int(manifest["step"])
    return Progress(
        step, int(manifest["samples_seen"]), int(manifest.get("updates", step)), dict(manifest.get("guard") or {})
    )
