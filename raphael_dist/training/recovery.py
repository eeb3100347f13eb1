"""What becomes of a step whose loss or gradient is bad: it is skipped, or the run goes back to a checkpoint.

All ranks know the same loss and the same gradient norm, so that all of them take the same way.
"""

import math
from typing import NamedTuple

import torch

from raphael_dist.checkpoint.progress import Progress
from raphael_dist.errors import NonFiniteError
from raphael_dist.parallel.ranks import gather_objects
from raphael_dist.training.run import Run

Seen = list[tuple[torch.Tensor, torch.Tensor]]  # (sample positions, losses) of each micro-batch of a step, on this rank


class Objection(NamedTuple):
    """Why a step must not change the weights; goes_back: it is a spike, and train.spike_action is rollback."""

    why: str
    goes_back: bool = False


def objection(run: Run, loss: float, norm: float) -> Objection | None:
    """Judge a step by its loss and gradient norm, which all ranks know alike; None: it may change the weights."""
    verdict, action = run.guard.judge(loss), run.config.train.spike_action
    if verdict == "not finite":
        return Objection("the loss is not finite")
    if verdict == "spike":
        run.guard.spikes += 1
        sigma = run.config.train.spike_sigma
        why = f"the loss {loss:.4g} is a spike, more than train.spike_sigma = {sigma:g} above the last"
        run.telemetry.warn(f"step {run.step + 1}: {why}; {action}")
        if action != "warn":
            return Objection(why, action == "rollback")
    return None if math.isfinite(norm) else Objection("the gradient norm is not finite")


def skip(run: Run, why: str, seen: Seen) -> bool:
    """Note a step that left everything as it was, its samples used up. Collective.

    Returns False when the run went back to a checkpoint, because there were too many in a row, and no good step since it
    was resumed. Otherwise too many are a NonFiniteError.
    """
    bad = _bad_positions(seen)
    run.suspect = len(set(bad)) == run.config.train.global_batch
    line = f"step {run.step}: skipped, {why}; {_name_bad_samples(run, bad)}"
    if run.guard.skip():
        if not run.trained and fall_back(run, line):
            return False
        raise NonFiniteError(
            f"{line}; that is train.max_skipped = {run.guard.in_a_row} in a row: lower optim.lr or look at the samples; the "
            "last checkpoint is untouched"
        )
    run.telemetry.warn(line)
    return True


def fall_back(run: Run, line: str) -> bool:
    """Leave the checkpoint that the run began from for the one before it; False, and no change, without one. Collective."""
    bad, seen = run.first_step, run.samples_seen
    found = run.store.rewind(before=bad)
    if found is None:
        return False
    run.telemetry.warn(f"{line}; no step since the return to step {bad} was any good: its checkpoint is set aside")
    _go_back(run, found, seen)
    run.first_step = found.step
    return True


def roll_back(run: Run) -> bool:
    """Return to the newest checkpoint and go on with the samples after this batch; False when there is none. Collective."""
    found, seen = run.store.rewind(), run.samples_seen + run.config.train.global_batch
    if found is None:
        run.telemetry.warn("no checkpoint to go back to; the step is skipped")
        return False
    run.engine.discard()
    _go_back(run, found, seen)
    return True


def _go_back(run: Run, found: Progress, seen: int) -> None:
    if run.guard.roll_back(found.guard, found.step):
        raise NonFiniteError(
            f"{run.guard.rollbacks} returns to step {found.step} without reaching a new checkpoint (train.max_skipped); "
            "lower optim.lr, or look at the samples"
        )
    run.step, run.samples_seen = found.step, seen
    # In the checkpoint, too: a run that stops now must not meet the same samples again.
    run.store.amend(progress(run))
    run.telemetry.warn(f"back at step {run.step}, going on with sample {seen}")


def restore(run: Run, found: Progress | None) -> None:
    """Go on from what a checkpoint says; None is the beginning."""
    if found is not None:
        run.step, run.samples_seen = found.step, found.samples_seen
        run.guard.restore(found.guard)


def progress(run: Run, *, rollbacks: int | None = None) -> Progress:
    """Return what a checkpoint notes, to be restored. rollbacks: to it; None: the guard's."""
    state = run.guard.state()
    state["rollbacks"] = state["rollbacks"] if rollbacks is None else rollbacks
    return Progress(run.step, run.samples_seen, run.step - run.guard.skipped, state)


def _bad_positions(seen: Seen) -> list[int]:
    """Return the positions of all ranks' samples without a finite loss. Collective."""
    bad = [int(p) for positions, losses in seen for p, x in zip(positions, losses, strict=True) if not x.isfinite()]
    return sorted(p for part in gather_objects(bad) for p in part)


def _name_bad_samples(run: Run, bad: list[int]) -> str:
    if not bad:
        first = run.samples_seen - run.config.train.global_batch
        return f"the loss of each sample is finite, at positions {first} to {run.samples_seen - 1}"
    keys = ", ".join(run.data.key(p) for p in bad[:5])
    return f"the loss of {len(bad)} samples is not finite: positions {bad[:5]} ({keys})"
