"""The training loop: build(), train_step(), train()."""

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from itertools import count

import torch

from raphael_dist.analysis.route_report import trace_values
from raphael_dist.config.schema import Config
from raphael_dist.config.training_stages import stage_at
from raphael_dist.data.batch_workers import BatchPrefetcher
from raphael_dist.data.run_data import DataSource, open_source
from raphael_dist.engine.ds_keys import Tree
from raphael_dist.errors import NonFiniteError, NotSavedError, UserError
from raphael_dist.model.batch import Batch
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.losses import compute_losses
from raphael_dist.runtime.host_memory import without_long_collections
from raphael_dist.runtime.long_work import long_work, run_on_rank0
from raphael_dist.runtime.ranks import Ranks, all_reduce_sum, raise_on_all_ranks
from raphael_dist.runtime.stop_request import StopRequest
from raphael_dist.runtime.watchdog import SLOW, Watchdog
from raphael_dist.sampling.grid import caption_grid, save_image
from raphael_dist.storage.files import replace_bytes
from raphael_dist.training import console_summary, recovery, run_dir, startup
from raphael_dist.training.deferred_update import finish_deferred, read_step_stats, reduce_step_stats
from raphael_dist.training.lr_schedule import gate_noise_deviation, learning_rate
from raphael_dist.training.run_state import Run, RunProgress, StepLosses, StopState
from raphael_dist.training.step_guard import Guard
from raphael_dist.training.validation import Validator, draw_samples, figures_of, ready_to_sample


def build(
    config: Config,
    json_tree: Tree,
    ranks: Ranks,
    device: torch.device,
    stop: StopRequest,
    open_data: Callable[[Config, Ranks, torch.device], DataSource] = open_source,
    watchdog: Watchdog | None = None,
) -> Run:
    """Open the run directory and the data, build the engine, and resume from the newest checkpoint. Collective.

    `json_tree`: the user's DeepSpeed JSON. `device`: this rank's device. `stop`: requests to stop early. `open_data`: opens
    the training data. `watchdog`: one that is already running; None: start one. Raises UserError on all ranks if the run
    cannot start, e.g. because of its settings or missing data.
    """
    with ExitStack() as on_error:
        watchdog = watchdog or Watchdog(ranks, config.run.dir, config.run.hang_timeout_s, stop.launchers).start()
        on_error.callback(watchdog.stop)
        lock, plan, telemetry = startup.open_run_dir(config, ranks, device, watchdog)
        watchdog.heartbeat("opening the data", SLOW)
        data = open_data(config, ranks, device)
        on_error.callback(data.close)
        watchdog.heartbeat("building the engine", SLOW)
        engine, ema, store = startup.build_engine(config, json_tree, ranks, device, plan, data)
        schedule = NoiseSchedule.create(config.diffusion, device)
        with long_work("reading the encoders"):
            requests = ready_to_sample(config, ranks, engine, data.text, data.image)
        run = Run(
            config=config,
            ranks=ranks,
            plan=plan,
            data=data,
            builder=data.builder(config, engine.module.num_blocks, device),
            validator=Validator(config, ranks, data, engine, schedule) if data.held_out else None,
            engine=engine,
            ema=ema,
            schedule=schedule,
            store=store,
            guard=Guard(config.train),
            telemetry=telemetry,
            watchdog=watchdog,
            lock=lock,
            requests=requests,
            progress=RunProgress(config.train.max_steps),
            stop=StopState(stop),
        )
        startup.resume(run)
        startup.warm_up(run)
        on_error.pop_all()
        return run


def train_step(run: Run, batches: Iterator[Batch]) -> bool:
    """Take one optimizer step on exactly the global batch. Collective.

    It accumulates gradients, agrees with all ranks whether loss and gradients are good, clips, updates the weights, and
    updates their moving average. If loss or gradients are bad, the step is skipped or the run returns to a checkpoint.

    Args:
        run: the run, whose progress is changed.
        batches: endless iterator over this rank's micro-batches.

    Returns:
        False if the run returned to a checkpoint instead of completing the step.
    """
    loss_sum, losses = accumulate(run, batches)
    if run.engine.defers_update:
        return finish_deferred(run, loss_sum, losses)
    loss, norm = read_step_stats(run, reduce_step_stats(run, loss_sum).cpu())  # the only wait for the device in a step
    skip_reason = recovery.judge_step(run, loss, norm, run.progress.step + 1)
    run.telemetry.end_step(run.progress.step + 1, updated=skip_reason is None)
    if skip_reason is not None and skip_reason.rollback and recovery.rollback(run):
        return False
    run.progress.step += 1
    run.progress.samples_seen += run.config.train.global_batch_size
    if skip_reason is not None:
        run.engine.discard_gradients()
        return recovery.skip(run, skip_reason.why, losses)
    run.engine.update(learning_rate(run.config, run.progress.step), norm, run.ema, run.progress.step)
    run.telemetry.record_traffic(run.engine.traffic.take())
    run.guard.record_good_step(loss)
    run.progress.updated = True
    return True


def accumulate(run: Run, batches: Iterator[Batch]) -> tuple[torch.Tensor, StepLosses]:
    """Add up the gradients of this rank's micro-batches of one step. The last backward pass also reduces them over ranks.

    Returns:
        The sum of this rank's sample losses, float32 [] on the device, and for each micro-batch the positions (numbers in
        the training order) and losses of its samples.
    """
    loss_sum, step_losses = torch.zeros((), device=run.engine.device), []
    step = run.progress.step + 1
    run.engine.traffic.take()  # discards what validation and sampling sent
    for micro_step in range(run.plan.accumulation):
        timeout_factor = run.progress.timeout_factor(micro_step)
        run.watchdog.heartbeat(f"the data of step {step}", timeout_factor)
        batch = next_batch(run, batches, micro_step)
        batch.scale_gate_noise(gate_noise_deviation(run.config, step))
        run.watchdog.heartbeat(f"step {step}", timeout_factor)
        with run.telemetry.computing():
            losses = compute_losses(run.engine, batch, run.schedule, run.config, run.engine.dtype)
        run.engine.backward(losses.total.sum() * run.plan.loss_scale)
        loss_sum += losses.total.detach().sum()
        step_losses.append((batch.position, losses.total.detach()))
        run.telemetry.record(batch, losses)
    return loss_sum, step_losses


def next_batch(run: Run, batches: Iterator[Batch], micro_step: int) -> Batch:
    """Return the next micro-batch on the device. `micro_step`: its number in the optimizer step, from 0.

    If this rank's data fails (UserError), this function returns dummy batches from then on, so that no other rank waits.
    `read_step_stats` then ends the run on all ranks, before the weights change.
    """
    if run.stop.data_failure is None:
        try:
            with run.telemetry.waiting_for_data() as timer:
                batch = next(batches)
                timer.fetched(batch.seconds)
                return batch.to(run.engine.device)
        except UserError as error:
            run.stop.data_failure = error
    slots = run.plan.slots(run.progress.samples_seen, run.ranks.rank, micro_step)
    return run.builder.dummy_batch(slots).to(run.engine.device)


def train_stages(
    config: Config, json_tree: Tree, ranks: Ranks, device: torch.device, stop: StopRequest, watchdog: Watchdog | None
) -> bool:
    """Build and train a run, one stage of train.stages after another; return whether the run is complete.

    `json_tree`: the user's DeepSpeed JSON. `ranks`, `device`: this rank and its device. `stop`: requests to stop early.
    `watchdog`: the watchdog that is already running. Without stages, the run is built once.
    """
    step = run_on_rank0("looking for checkpoints", lambda _: run_dir.newest_step(config))
    while True:
        stage, stage_start, stage_end = stage_at(config, step)
        run = build(stage, json_tree, ranks, device, stop, watchdog=watchdog)
        progress = run.progress
        progress.stage_start, progress.stage_end = stage_start, stage_end
        # A stage is over at once if the newest checkpoint is damaged and that of an earlier stage was restored.
        if not progress.stage_over or progress.complete:
            if train(run) or run.stop.agreed:
                return progress.complete
            reason = "the stage is over" if progress.step >= stage_end else "the rollback returned to an earlier stage"
            run.telemetry.warn(f"step {progress.step}: {reason} (train.stages)")
        run.watchdog.stop()
        step, watchdog = progress.step, None
        if run.lock is not None:
            run.lock.close()
        del run
        gc.collect()  # the engine's reference cycles, before the next engine is built


def train(run: Run) -> bool:
    """Train until the run or the stage ends, or all ranks agree to stop early. Closes the objects of `run` at the end.

    Returns whether the whole run is complete.
    """
    run.stop.request.listen()
    # A request that came while the run was being built.
    run.stop.agreed = float(all_reduce_sum([float(run.stop.request.requested)], run.engine.device)) > 0
    depth, workers = max(1, run.config.data.prefetch), run.config.data.workers
    with (
        without_long_collections(),
        run.watchdog,
        run.store,
        run.telemetry,
        closing(run.data),
        BatchPrefetcher(run.builder, _slots(run), depth, workers, run.ranks.local_world_size) as batches,
    ):
        run.telemetry.line(console_summary.start_line(run))
        while not run.progress.stage_over and not run.stop.agreed:
            if train_step(run, batches):
                after_step(run)
        if run.stop.agreed and not run.progress.stage_over:
            run.telemetry.line(console_summary.stop_line(run))
        elif run.progress.complete and run.ranks.is_main:
            run.telemetry.flush()
            for line in console_summary.end_lines(
                run.config, run.progress.step, run.progress.samples_seen, run.telemetry.seconds
            ):
                run.telemetry.line(line)
        run.stop.request.ignore()
    return run.progress.complete


def after_step(run: Run) -> None:
    """Log, validate, draw images and save a checkpoint, each if it is due after the current step. Collective.

    Raises NonFiniteError at the end of the run if its last step was skipped and no sample in it had a finite loss, and
    NotSavedError if the last checkpoint cannot be saved.
    """
    train, progress = run.config.train, run.progress
    step, last = progress.step, progress.complete
    run.watchdog.heartbeat(f"the end of step {step}", SLOW)
    run.telemetry.advance(step)
    if step % train.log_every == 0 or last:
        log_step(run)
    if run.validator and (_due(step, train.val_every) or last):
        validate(run, run.validator)
    if run.requests and (_due(step, train.sample_every) or last):
        sample(run)
    progress.save_due |= _due(step, run.config.checkpoint.every) or run.stop.agreed
    if progress.stage_over and run.guard.in_a_row and progress.all_non_finite:
        raise NonFiniteError(
            f"The run is complete at step {step}, but its weights are not saved: the last steps were skipped, and no loss "
            "in them was finite. The last checkpoint is unchanged. Lower optim.lr, and train again."
        )
    # Not while steps are being skipped: the last update may have damaged the weights.
    if progress.stage_over or (progress.save_due and not run.guard.in_a_row):
        save(run, progress.stage_over or run.stop.agreed)
    for saved in run.store.finished_saves():
        run.telemetry.log_save(saved)


def log_step(run: Run) -> None:
    """Log metrics since the last call: losses, learning rate, gradient norm, speed, numbers of skipped steps. Collective."""
    own = {
        "optim/lr": learning_rate(run.config, run.progress.step),
        "optim/grad_norm": run.engine.grad_norm,
        "train/skipped": float(run.guard.skipped),
        "train/spikes": float(run.guard.spikes),
        "checkpoint/failed": float(run.store.failed),
    }
    run.telemetry.log_step(run.progress.step, run.progress.samples_seen, run.data.replaced, own)


def validate(run: Run, validator: Validator) -> None:
    """Measure the loss on the held-out pairs (image and caption) and log it. Collective."""
    values = validator.run()
    run.telemetry.write(run.progress.step, run.progress.samples_seen, values)
    run.telemetry.line(f"step {run.progress.step}: validation loss {values['val/loss']:.4f}")


def sample(run: Run) -> None:
    """Draw the images of `run.requests` (sample.prompts) with the averaged weights; write them as one grid. Collective."""
    drawn = draw_samples(run.config, run.ranks, run.engine, run.ema, run.data.text, run.data.image, run.requests)
    if drawn is None:
        return
    images, trace = drawn
    step, prompts = run.progress.step, [request.prompt for request in run.requests]
    path = run.config.run.dir / "samples" / f"step-{step:08d}.png"
    grid = caption_grid(images, prompts)
    try:
        save_image(grid, path)
        routes = json.dumps(trace_values(prompts[0], trace))
        replace_bytes(path.with_suffix(".routes.json"), routes.encode(), durable=False)
    except OSError as error:
        run.telemetry.warn(f"{path} cannot be written ({error.strerror or error}); training continues")
    run.telemetry.log_images(step, {"samples": grid, **figures_of(trace, prompts[0])})
    run.telemetry.line(f"step {step}: samples in {path}")


def save(run: Run, last: bool) -> None:
    """Start saving a checkpoint of the run. If it is the last one (`last`), wait until it is written. Collective.

    Raises NotSavedError if the last checkpoint cannot be saved. If an earlier one fails, saving is tried again when the next
    one is due.
    """
    raise_on_all_ranks(partial(run_dir.check_owner, run.lock))
    run.watchdog.heartbeat(f"saving step {run.progress.step}", SLOW)
    run.progress.save_due = False
    run.store.begin(recovery.progress_record(run, rollbacks=0))
    if last or not run.config.checkpoint.background:
        failure = run.store.finish()
        if failure and last:
            raise NotSavedError(failure)


def _slots(run: Run) -> Iterator[list[tuple[int, float]]]:
    """Yield for each micro-step, without end, (position in training order, weight) of each of this rank's samples.

    The weight is 1, or 0 for samples that only fill up a micro-batch. The first position is the number of samples trained so
    far (`samples_seen`). This number is read only once, because it lags behind the positions of prefetched batches.
    """
    for first in count(run.progress.samples_seen, run.config.train.global_batch_size):
        for micro_step in range(run.plan.accumulation):
            yield run.plan.slots(first, run.ranks.rank, micro_step)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
