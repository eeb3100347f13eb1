"""Rules against steps that would harm the weights: losses that are not finite, and spikes.

Every rank judges the same number, the loss summed over all ranks, in float64, and so comes to the same verdict. The state is
part of a checkpoint: a run that resumes judges as one that never stopped.
"""

import math
import statistics
from typing import Any, Literal

from raphael_dist.config import Train

Verdict = Literal["good", "not finite", "spike"]
MIN_LOSSES = 10  # before that, a spread means nothing


class Guard:
    """Judges the loss of each step and counts: skipped, the steps in all that changed nothing; spikes, losses too large."""

    def __init__(self, train: Train) -> None:
        self._train = train
        self.window: list[float] = []
        self.skipped = self.in_a_row = self.spikes = self.rollbacks = 0
        self._returned_to: int | None = None  # the step of the checkpoint that this process went back to last

    def judge(self, loss: float) -> Verdict:
        """Return what a step's loss is: a spike lies `spike_sigma` standard deviations above the mean of the last losses."""
        if not math.isfinite(loss):
            return "not finite"
        if not self._train.spike_sigma or len(self.window) < MIN_LOSSES:
            return "good"
        limit = statistics.fmean(self.window) + self._train.spike_sigma * statistics.pstdev(self.window)
        return "spike" if loss > limit else "good"

    def took(self, loss: float) -> None:
        """Note a step that changed the weights."""
        self.window = [*self.window, loss][-self._train.spike_window :]
        self.in_a_row = 0

    def skip(self) -> bool:
        """Note a step that changed nothing; return whether these are too many in a row."""
        self.skipped += 1
        self.in_a_row += 1
        return self.in_a_row >= self._train.max_skipped

    def roll_back(self, state: dict[str, Any], step: int) -> bool:
        """Note a return to the checkpoint of `step` with this state; return whether these are too many without a new one.

        Saves that failed in between are none: the returns are counted until there is another checkpoint to return to.
        """
        before = self.rollbacks if step == self._returned_to else 0
        spikes, rollbacks = self.spikes, max(before, int(state.get("rollbacks", 0))) + 1
        self.restore(state)
        self.spikes, self.rollbacks, self._returned_to = spikes, rollbacks, step
        return rollbacks >= self._train.max_skipped

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, for JSON, which keeps floats exactly."""
        counts = {"skipped": self.skipped, "in_a_row": self.in_a_row, "spikes": self.spikes, "rollbacks": self.rollbacks}
        return {"window": self.window, **counts}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state; {} is that of a new run."""
        self.window = [float(loss) for loss in state.get("window", [])]
        self.skipped, self.in_a_row, self.spikes, self.rollbacks = (
            int(state.get(name, 0)) for name in ("skipped", "in_a_row", "spikes", "rollbacks")
        )
