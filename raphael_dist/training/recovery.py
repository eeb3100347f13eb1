"""What becomes of a step once its loss is known: the weights are updated, the step is skipped, or the run goes back.

All ranks know the same loss and the same gradient norm, so that all of them take the same way.
"""

from typing import Protocol

import torch

from raphael_dist.checkpoint.progress import Progress
from raphael_dist.checkpoint.store import CheckpointStore
from raphael_dist.config import Config
from raphael_dist.data.stream import TrainStream
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.engine import Engine, learning_rate
from raphael_dist.errors import NonFiniteError
from raphael_dist.parallel import ranks as parallel
from raphael_dist.training.guard import Guard

Seen = list[tuple[torch.Tensor, torch.Tensor]]  # (sample positions, losses) of each micro-batch of a step, on this rank


class Running(Protocol):
    """What is needed of trainer.Run."""

    config: Config
    stream: TrainStream
    engine: Engine
    ema: Ema | None
    store: CheckpointStore
    guard: Guard
    samples_seen: int
    step: int

    def warn(self, text: str) -> None:
        """Write a warning, once for all ranks."""


def apply(run: Running, loss: float, seen: Seen) -> bool:
    """Update the weights, skip the step or go back, as the guard judges the loss, which all ranks know alike."""
    verdict, action = run.guard.judge(loss), run.config.train.spike_action
    why = "the loss is not finite"
    if verdict == "spike":
        run.guard.spikes += 1
        why = (
            f"the loss {loss:.4g} is a spike, more than train.spike_sigma = {run.config.train.spike_sigma:g} above the last"
        )
        run.warn(f"step {run.step + 1}: {why}; {action}")
        if action == "rollback" and _roll_back(run):
            return False
    drop = verdict == "not finite" or (verdict == "spike" and action != "warn")
    run.step += 1
    run.samples_seen += run.config.train.global_batch
    if drop:
        run.engine.discard()
    elif not run.engine.step(learning_rate(run.config, run.step)):
        drop, why = True, "the gradient norm is not finite"
    if drop:
        _skip(run, why, seen)
        return True
    run.guard.took(loss)
    if run.ema is not None:
        run.ema.update(run.step)
    return True


def _skip(run: Running, why: str, seen: Seen) -> None:
    """Note a step that left everything as it was, its samples used up. NonFiniteError at too many in a row. Collective."""
    line = f"step {run.step}: skipped, {why}; {_name_bad_samples(run, seen)}"
    if run.guard.skip():
        raise NonFiniteError(
            f"{line}; that is train.max_skipped = {run.guard.in_a_row} in a row: lower optim.lr or look at the samples; the "
            "last checkpoint is untouched"
        )
    run.warn(line)


def _roll_back(run: Running) -> bool:
    """Return to the newest checkpoint and go on with the samples after this batch; False when there is none. Collective."""
    found, seen = run.store.rewind(), run.samples_seen + run.config.train.global_batch
    if found is None:
        run.warn("no checkpoint to go back to; the step is skipped")
        return False
    run.engine.discard()
    if run.guard.roll_back(found.guard):
        raise NonFiniteError(
            f"{run.guard.rollbacks} returns to step {found.step} without reaching a new checkpoint (train.max_skipped); "
            "lower optim.lr, or look at the samples"
        )
    run.step, run.samples_seen = found.step, seen
    # In the checkpoint, too: a run that stops now must not meet the same samples again.
    run.store.amend(progress(run))
    run.warn(f"back at step {run.step}, going on with sample {seen}")
    return True


def restore(run: Running, found: Progress | None) -> None:
    """Go on from what a checkpoint says; None is the beginning."""
    if found is not None:
        run.step, run.samples_seen = found.step, found.samples_seen
        run.guard.restore(found.guard)


def progress(run: Running) -> Progress:
    """Return what a checkpoint notes, to be restored."""
    return Progress(run.step, run.samples_seen, run.step - run.guard.skipped, run.guard.state())


def _name_bad_samples(run: Running, seen: Seen) -> str:
    bad = [int(p) for positions, losses in seen for p, x in zip(positions, losses, strict=True) if not x.isfinite()]
    found = sorted(p for part in parallel.gather(bad) for p in part)
    keys = ", ".join(run.stream.sample(p).key for p in found[:5])
    if not found:
        last = run.samples_seen - 1
        return (
            f"the loss of each sample is finite, at positions {run.samples_seen - run.config.train.global_batch} to {last}"
        )
    return f"the loss of {len(found)} samples is not finite: positions {found[:5]} ({keys})"
