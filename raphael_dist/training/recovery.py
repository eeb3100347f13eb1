"""Handles a step with a bad loss or gradient: the step is skipped, or the run returns to a checkpoint.

The loss and the gradient norm are equal on all ranks, so all ranks decide in the same way.
"""

import math
from typing import NamedTuple

from raphael_dist.checkpoint.progress import Progress
from raphael_dist.errors import NonFiniteError
from raphael_dist.runtime.ranks import gather_objects
from raphael_dist.training.run_state import Run, StepLosses


class SkipReason(NamedTuple):
    """Why a step must not change the weights.

    Attributes:
        why: the reason, as a string for the log.
        rollback: whether the run must return to a checkpoint: true if the loss is a spike and train.spike_action is
            "rollback".
    """

    why: str
    rollback: bool = False


def judge_step(run: Run, loss: float, norm: float, step: int) -> SkipReason | None:
    """Return why a step must be skipped, or None if it may change the weights.

    A step is skipped if the loss or the gradient norm is not finite, or if the loss is a spike (far above the last losses)
    and train.spike_action is not "warn". Spikes are counted and logged.

    Args:
        run: the run.
        loss: mean loss of the step over all ranks.
        norm: global gradient norm of the step.
        step: number of the step, for the log.
    """
    verdict, action = run.guard.judge(loss), run.config.train.spike_action
    if verdict == "not finite":
        return SkipReason("the loss is not finite")
    if verdict == "spike":
        run.guard.spikes += 1
        sigma = run.config.train.spike_sigma
        why = (
            f"the loss {loss:.4g} is a spike: it exceeds the mean of the last losses by more than {sigma:g} standard "
            "deviations (train.spike_sigma)"
        )
        run.telemetry.warn(f"step {step}: {why}. This is handled by train.spike_action={action}")
        if action != "warn":
            return SkipReason(why, action == "rollback")
    return None if math.isfinite(norm) else SkipReason("the gradient norm is not finite")


def skip(run: Run, why: str, losses: StepLosses) -> bool:
    """Record and log a step that did not change the weights. The run does not use the step's samples again. Collective.

    Args:
        run: the run. Its progress already counts this step.
        why: the reason, for the log.
        losses: for each micro-batch, the positions (numbers in the training order) and losses of this rank's samples.

    Returns:
        True: the run continues with the next step. False: the run returned to an earlier checkpoint. It does so if
        train.max_skipped steps in a row were skipped and no step of this process has changed the weights.

    Raises:
        NonFiniteError: train.max_skipped steps in a row were skipped, and either a step of this process has changed the
            weights or there is no earlier checkpoint.
    """
    bad = _bad_positions(losses)
    run.progress.all_non_finite = len(set(bad)) == run.config.train.global_batch_size
    line = f"step {run.progress.step} was skipped, because {why}. {_name_bad_samples(run, bad)}"
    if run.guard.skip():
        if not run.progress.updated and return_to_earlier_checkpoint(run, line):
            return False
        raise NonFiniteError(
            f"{line}. The limit train.max_skipped={run.guard.in_a_row} of consecutive skipped steps is reached. The last "
            "checkpoint is unchanged. Lower optim.lr, or remove the samples at these positions if they are faulty."
        )
    run.telemetry.warn(line)
    return True


def return_to_earlier_checkpoint(run: Run, line: str) -> bool:
    """Restore the checkpoint before the one that this process started from. Collective.

    The checkpoint that this process started from is renamed to damaged-step-*, because all steps after it were skipped.

    Args:
        run: the run.
        line: the reason, for the log.

    Returns:
        True; or False without changing anything if there is no earlier checkpoint.
    """
    first_step, samples_seen = run.progress.first_step, run.progress.samples_seen
    saved = run.store.rewind(before=first_step)
    if saved is None:
        return False
    run.telemetry.warn(
        f"{line}. No step after step {first_step} was good, so the checkpoint of step {first_step} was renamed to "
        "damaged-step-*"
    )
    _return_to(run, saved, samples_seen)
    run.progress.first_step = saved.step
    return True


def rollback(run: Run) -> bool:
    """Restore the newest checkpoint, and continue with the samples that follow the current global batch. Collective.

    It is called if a step has a loss spike.

    Args:
        run: the state of the run.

    Returns:
        True; False without changing anything if there is no checkpoint.
    """
    saved = run.store.rewind()
    if saved is None:
        run.telemetry.warn("there is no checkpoint to return to, so the step is skipped")
        return False
    run.engine.discard_gradients()
    _return_to(run, saved, run.progress.samples_seen + run.config.train.global_batch_size)
    return True


def _return_to(run: Run, saved: Progress, samples_seen: int) -> None:
    if run.guard.record_rollback(saved.guard, saved.step):
        raise NonFiniteError(
            f"The run returned to step {saved.step} too often without reaching a new checkpoint: {run.guard.rollbacks} "
            f"times, and train.max_skipped={run.config.train.max_skipped} is the limit. Lower optim.lr, or remove the "
            "faulty samples, which the log names."
        )
    run.progress.step, run.progress.samples_seen = saved.step, samples_seen
    # In the checkpoint, too: a run that is stopped now must not use the same samples again.
    run.store.amend(progress_record(run))
    run.telemetry.return_to(saved.step)
    run.telemetry.warn(f"the run is back at step {saved.step} and continues with sample {samples_seen}")


def progress_record(run: Run, *, rollbacks: int | None = None) -> Progress:
    """Return the progress of the run in the form that is stored in a checkpoint.

    `rollbacks`: number of rollbacks to this checkpoint, which the result states; 0 for a new checkpoint. None: the number
    that `run.guard` has counted.
    """
    assert run.started is None, "the result of the last step is not known"
    state = run.guard.state()
    if rollbacks is not None:
        state["rollbacks"] = rollbacks
    step = run.progress.step
    return Progress(step, run.progress.samples_seen, step - run.guard.skipped, state)


def _bad_positions(losses: StepLosses) -> list[int]:
    """Return the positions (numbers in the training order) of all ranks' samples without a finite loss. Collective."""
    bad = [
        int(position)
        for positions_B, losses_B in losses
        for position, loss in zip(positions_B, losses_B, strict=True)
        if not loss.isfinite()
    ]
    return sorted(position for positions in gather_objects(bad) for position in positions)


def _name_bad_samples(run: Run, bad: list[int]) -> str:
    if not bad:
        samples_seen = run.progress.samples_seen
        first = samples_seen - run.config.train.global_batch_size
        return f"The loss of every sample (positions {first} to {samples_seen - 1}) is finite"
    keys = ", ".join(run.data.key(position) for position in bad[:5])
    return f"Samples whose loss is not finite: {len(bad)}, at positions {bad[:5]} ({keys})"
