"""Detects steps that would harm the weights: losses that are not finite, and loss spikes.

All ranks judge the same number, the mean loss over all ranks in float64, so they decide in the same way. Checkpoints contain
the state of the guard, so a resumed run judges as if it had not been interrupted.
"""

import math
import statistics
from typing import Literal

from raphael_dist.config.run_sections import Train
from raphael_dist.text import JsonObject

Verdict = Literal["good", "not finite", "spike"]
MIN_LOSSES = 10  # fewer give no meaningful deviation


class Guard:
    """Decides by the loss whether an optimizer step would harm the weights, and counts the bad steps of the whole run.

    Attributes:
        window: the last train.spike_window good losses, oldest first.
        skipped: number of steps that did not change the weights.
        in_a_row: number of skipped steps since the last good step.
        spikes: number of losses that were far above the losses before.
        rollbacks: how many times the run has returned to the checkpoint of the last rollback.
    """

    def __init__(self, train: Train) -> None:
        self._train = train
        self.window: list[float] = []
        self.skipped = self.in_a_row = self.spikes = self.rollbacks = 0
        self._returned_to: int | None = None  # the step of the checkpoint of the last rollback

    def judge(self, loss: float) -> Verdict:
        """Judge the mean loss of a step: return "good", "not finite" or "spike". Nothing is recorded.

        A loss is a spike if it is more than train.spike_sigma standard deviations above the mean of the last
        train.spike_window good losses. While there are fewer than 10 of them, no loss is a spike.
        """
        if not math.isfinite(loss):
            return "not finite"
        if not self._train.spike_sigma or len(self.window) < MIN_LOSSES:
            return "good"
        limit = statistics.fmean(self.window) + self._train.spike_sigma * statistics.pstdev(self.window)
        return "spike" if loss > limit else "good"

    def record_good_step(self, loss: float) -> None:
        """Record the mean loss of a step that changed the weights. `judge` compares later losses with it."""
        self.window = [*self.window, loss][-self._train.spike_window :]
        self.in_a_row = 0

    def skip(self) -> bool:
        """Count a step that did not change the weights.

        Returns whether the limit is reached: True if at least train.max_skipped steps in a row did not change the weights.
        """
        self.skipped += 1
        self.in_a_row += 1
        return self.in_a_row >= self._train.max_skipped

    def record_rollback(self, state: JsonObject, step: int) -> bool:
        """Record that the run returned to a checkpoint, and take over the guard's state in that checkpoint.

        Args:
            state: the guard's state in that checkpoint, in the form that the method `state` returns.
            step: the step of that checkpoint. The attribute `rollbacks` counts returns to this checkpoint only, including
                the number in `state`.

        Returns:
            Whether the run must end, because it has returned to this checkpoint train.max_skipped times.
        """
        before = self.rollbacks if step == self._returned_to else 0
        spikes, rollbacks = self.spikes, max(before, int(state.get("rollbacks", 0))) + 1
        self.restore(state)
        self.spikes, self.rollbacks, self._returned_to = spikes, rollbacks, step
        return rollbacks >= self._train.max_skipped

    def state(self) -> JsonObject:
        """Return recent losses and counts as JSON values, for a checkpoint and for `restore`. JSON keeps floats exactly."""
        counts = {"skipped": self.skipped, "in_a_row": self.in_a_row, "spikes": self.spikes, "rollbacks": self.rollbacks}
        return {"window": self.window, **counts}

    def restore(self, state: JsonObject) -> None:
        """Restore the state that the method `state` returned; an empty dict resets the guard to the state of a new run."""
        self.window = [float(loss) for loss in state.get("window", [])]
        self.skipped = int(state.get("skipped", 0))
        self.in_a_row = int(state.get("in_a_row", 0))
        self.spikes = int(state.get("spikes", 0))
        self.rollbacks = int(state.get("rollbacks", 0))
