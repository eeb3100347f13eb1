"""The progress of a run: the few numbers that training continues from."""

from typing import NamedTuple

from raphael_dist.checkpoint.manifest import Manifest
from raphael_dist.text import JsonObject


class Progress(NamedTuple):
    """The progress of a run.

    Attributes:
        step: number of optimizer steps, including skipped ones.
        samples_seen: number of training samples that were used or skipped. It is also the position (from 0) of the next
            sample in the order of training.
        updates: number of steps that changed the weights. It is the step count in Adam's bias correction.
        guard: state of the check that detects loss spikes and non-finite losses (training/step_guard.py).
    """

    step: int
    samples_seen: int
    updates: int
    guard: JsonObject

    def as_manifest(self) -> Manifest:
        """Return the progress as a dict with the keys step, samples_seen, updates and guard, for a manifest.json."""
        return self._asdict()


def progress_of(manifest: Manifest) -> Progress:
    """Return the progress that is stated in `manifest`, the content of a checkpoint's manifest.json."""
    return Progress(*(manifest[name] for name in Progress._fields))


START = Progress(0, 0, 0, {})  # of a run that has not begun
