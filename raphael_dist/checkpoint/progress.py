"""How far a run is."""

from typing import Any, NamedTuple

from raphael_dist.checkpoint.manifest import Manifest


class Progress(NamedTuple):
    """How far a run is.

    Attributes:
        step: optimizer steps, skipped ones included.
        samples_seen: the position of the next sample in the data order.
        updates: steps that changed the weights; Adam counts these.
        guard: the state of the rules against bad steps (training/step_guard.py).
    """

    step: int
    samples_seen: int
    updates: int
    guard: dict[str, Any]

    def as_manifest(self) -> Manifest:
        """Return it as keys of a manifest."""
        return self._asdict()


def progress_of(manifest: Manifest) -> Progress:
    """Return the progress in a manifest."""
    return Progress(*(manifest[name] for name in Progress._fields))


START = Progress(0, 0, 0, {})  # of a run that has not begun
