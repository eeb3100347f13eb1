"""`train.kernels` with deferred_update: the device decides whether a step updates the weights; the host learns it later.

Usually the host waits in each step for loss and gradient norm, and meanwhile the device runs out of work. Here the host
starts the update, and the next forward and backward pass, without knowing them. It reads the result of a step
(`finish_step`) while the device computes the next step, or at once if it needs the result: to log, validate, draw images,
save, stop, or end after too many skipped steps. So weights, counters, metrics and checkpoints are those of a run that waits.

Requests to stop, a rank without data, and finished checkpoints are also noticed one step later.
"""

import math

import torch
from torch import Tensor

from raphael_dist.model.device import HostCopy
from raphael_dist.runtime.ranks import all_reduce_on_device, raise_if_any_failed
from raphael_dist.training import recovery
from raphael_dist.training.lr_schedule import learning_rate
from raphael_dist.training.run_state import Run, StartedStep, StepLosses


def reduce_step_stats(run: Run, loss_sum: Tensor) -> Tensor:
    """Return the sums over ranks of the values on which all ranks agree in a step, float64 [5] on the device. Collective.

    They are loss, squared gradient norm, requests to stop, written parts of a checkpoint, and failures of data.

    `loss_sum`: the sum of this rank's sample losses, from `trainer.accumulate`.
    """
    flags = [float(run.stop.request.requested), float(run.store.written), float(run.stop.data_failure is not None)]
    # new_full, not a copy from the host, which would wait.
    tensors = [loss_sum.new_full((), flag, dtype=torch.float64) for flag in flags]
    values = torch.stack([loss_sum.double(), run.engine.grad_square(), *tensors])
    return all_reduce_on_device(values, run.engine.device)


def read_step_stats(run: Run, stats: Tensor) -> tuple[float, float]:
    """Return the mean loss and the global gradient norm of a step, equal on all ranks. Collective.

    All ranks also agree on stopping early, and complete a checkpoint once all of them have written it. Raises UserError on
    all ranks if the data of any rank failed.

    `stats`: the result of `reduce_step_stats`, on the host.
    """
    total, square, stop, written, failed = stats.tolist()
    if failed:
        raise_if_any_failed(None, run.stop.data_failure)
    run.stop.agreed = stop > 0
    if written == run.ranks.world_size:
        run.store.commit()
    return total / run.config.train.global_batch_size, math.sqrt(square) if square >= 0 else math.nan


def finish_deferred(run: Run, loss_sum: Tensor, losses: StepLosses) -> bool:
    """Finish the step before, then start the update of the current step. Collective.

    Arguments are those that `trainer.accumulate` returns.

    Returns:
        False if the run returned to a checkpoint instead of completing the current step.
    """
    finish_step(run)
    start_update(run, loss_sum, losses)
    return finish_step(run) if _needs_result(run) else True


def start_update(run: Run, loss_sum: Tensor, losses: StepLosses) -> None:
    """Count the current step, and start its update, which the device skips if loss or gradients are bad. Collective.

    Args:
        run: the state of the run.
        loss_sum: as `trainer.accumulate` returns it.
        losses: as `trainer.accumulate` returns it.
    """
    stats = reduce_step_stats(run, loss_sum)
    # `read_step_stats` and `recovery.judge_step` come to the same result. A sum of infinities or NaN is not below infinity.
    good = (stats[:2].abs().sum() < math.inf) & (stats[4] == 0)
    progress = run.progress
    progress.step += 1
    progress.samples_seen += run.config.train.global_batch_size
    run.engine.update_if(good, learning_rate(run.config, progress.step), stats[1].sqrt(), run.ema, progress.step)
    run.telemetry.end_step(progress.step, updated=True)
    run.started = StartedStep(HostCopy(stats), losses, run.engine.traffic.take())


def finish_step(run: Run) -> bool:
    """Read the result of the last started step, if it has not been read, and record or skip the step. Collective.

    Returns:
        False if the run returned to a checkpoint.
    """
    started, run.started = run.started, None
    if started is None:
        return True
    loss, norm = read_step_stats(run, started.stats.read())
    skip_reason = recovery.judge_step(run, loss, norm, run.progress.step)
    if skip_reason is not None:
        run.engine.grad_norm = math.inf
        run.telemetry.drop_step(run.progress.step)
        return recovery.skip(run, skip_reason.why, started.losses)
    run.engine.grad_norm = norm
    run.telemetry.record_traffic(started.traffic)
    run.guard.record_good_step(loss)
    run.progress.updated = True
    return True


def _needs_result(run: Run) -> bool:
    """Return whether the host must know the result of the current step before the next one."""
    train, progress = run.config.train, run.progress
    every = (train.log_every, train.val_every, train.sample_every, run.config.checkpoint.every)
    return (
        any(n > 0 and progress.step % n == 0 for n in every)
        or progress.stage_over
        or progress.save_due
        or run.stop.agreed
        or run.guard.in_a_row + 1 >= train.max_skipped  # the run ends or returns to a checkpoint if this step is bad
    )
