"""The training loop: build(), train_step(), train()."""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from itertools import count
from pathlib import Path
from typing import Any

import torch

from raphael_dist.checkpoint.store import CheckpointStore
from raphael_dist.config import Config
from raphael_dist.config_adapters import beside
from raphael_dist.convert.initial import adapted_base, load_initial
from raphael_dist.data.build_ahead import BatchesAhead
from raphael_dist.data.source import DataSource, open_source
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.engine import Engine
from raphael_dist.engine.learning_rate import learning_rate
from raphael_dist.errors import NonFiniteError, NotSavedError, UserError
from raphael_dist.model.batch import Batch
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.objective import compute_losses
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.parallel.host_memory import without_long_collections
from raphael_dist.parallel.long_work import from_main, together
from raphael_dist.parallel.ranks import Ranks, all_or_none, all_reduce_sum, rank_table
from raphael_dist.sampling.grid import caption_grid, save_image
from raphael_dist.stages import stage_at
from raphael_dist.training import measure, recovery, rundir
from raphael_dist.training.guard import Guard
from raphael_dist.training.run import Run
from raphael_dist.training.stopping import StopRequest
from raphael_dist.training.telemetry import Telemetry
from raphael_dist.training.validation import Validator, draw_samples, figures_of, ready_to_sample
from raphael_dist.training.watchdog import SLOW, Watchdog


def build(
    config: Config,
    json_tree: dict[str, Any],
    ranks: Ranks,
    device: torch.device,
    stop: StopRequest | None = None,
    open_data: Callable[[Config, Ranks, torch.device], DataSource] = open_source,
) -> Run:
    """Check everything, open the data, build the engine, resume if there is a checkpoint. Collective.

    Raises UserError on all ranks for what the user can fix, before anything is trained.
    """
    lock = together("taking the run directory", lambda tell: rundir.claim(config, tell) if ranks.is_main else None)
    plan = BatchPlan.of(config, ranks.world_size, from_main("looking for checkpoints", lambda _: rundir.beginnings(config)))
    all_or_none(lambda: rundir.start_logging(config, ranks.rank))
    with ExitStack() as on_error:
        watchdog = Watchdog(ranks, config.run.dir, config.run.hang_timeout_s)
        all_or_none(watchdog.start)
        on_error.callback(watchdog.stop)
        table = rank_table(ranks, device)
        telemetry = all_or_none(lambda: Telemetry(config, ranks, device, table))
        for line in plan.advice():
            telemetry.warn(line)
        watchdog.beat("opening the data", SLOW)
        data = open_data(config, ranks, device)
        on_error.callback(data.close)
        watchdog.beat("building the engine", SLOW)
        base, belongs_to = _base(config, ranks)
        engine = Engine(config, json_tree, plan, device, base)
        requests = together("reading the encoders", lambda _: ready_to_sample(config, ranks, engine, data.text, data.image))
        ema = Ema(engine.fragments, config.ema) if config.ema.enabled else None
        schedule = NoiseSchedule.create(config.diffusion, device)
        run = Run(
            config=config,
            ranks=ranks,
            device=device,
            plan=plan,
            data=data,
            builder=data.builder(config, engine.module.num_blocks, device),
            validator=Validator(config, ranks, data, engine, schedule) if data.held_out else None,
            engine=engine,
            ema=ema,
            schedule=schedule,
            store=CheckpointStore(config, ranks, engine.fragments, ema, data.fingerprints() | belongs_to),
            guard=Guard(config.train),
            telemetry=telemetry,
            watchdog=watchdog,
            stop=StopRequest() if stop is None else stop,
            lock=lock,
            requests=requests,
        )
        watchdog.beat("looking for a checkpoint", SLOW)
        saved = run.store.resume()
        recovery.restore(run, saved)
        if saved is None and config.run.init_from is not None and base is None:
            _start_from(run, config.run.init_from)
        run.first_step, run.builder.phase = run.step, run.samples_seen % config.train.global_batch
        watchdog.beat("the rehearsal", SLOW)
        slots = plan.slots(run.samples_seen, ranks.rank, 0)
        first = together("reading the first samples", lambda _: run.builder.build(slots))
        telemetry.begin(run.step, measure.rehearse(engine, first, schedule))
        on_error.pop_all()
        return run


def _base(config: Config, ranks: Ranks) -> tuple[RaphaelUNet | None, dict[str, str]]:
    """Return the frozen model that adapters or a control are trained beside, and what a checkpoint notes of it, if any.

    It is read at every start, since checkpoints hold what is trained alone. Collective.
    """
    if not beside(config):
        return None, {}
    model, digest = together("reading run.init_from", lambda tell: adapted_base(config, verify=ranks.is_main, tell=tell))
    if ranks.is_main:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{trained:,} parameters are trained beside {config.run.init_from}, which stays as it is", flush=True)
    return model, {"run.init_from": digest}


def _start_from(run: Run, path: Path) -> None:
    """Give a new run the weights of a checkpoint. Collective."""
    fragments, verify = run.engine.fragments, run.ranks.is_main
    initial = together(
        "reading run.init_from", lambda tell: load_initial(fragments, path, run.config, verify=verify, tell=tell)
    )
    if run.ranks.is_main:
        print(f"run.init_from: {initial.describe(path)}", flush=True)
    fragments.sync_model()
    if run.ema is not None:
        run.ema.restart()


def train_step(run: Run, batches: Iterator[Batch]) -> bool:
    """One optimizer step on exactly the global batch: accumulate, agree, clip and update, average.

    Returns False when the run went back to a checkpoint.
    """
    loss_sum, seen = accumulate(run, batches)
    loss, norm = agree(run, loss_sum)
    objection = recovery.objection(run, loss, norm)
    if objection is not None and objection.goes_back and recovery.roll_back(run):
        return False
    run.step += 1
    run.samples_seen += run.config.train.global_batch
    if objection is not None:
        run.engine.discard()
        return recovery.skip(run, objection.why, seen)
    run.engine.update(learning_rate(run.config, run.step), norm)
    run.guard.took(loss)
    run.trained = True
    if run.ema is not None:
        run.ema.update(run.step)
    return True


def accumulate(run: Run, batches: Iterator[Batch]) -> tuple[torch.Tensor, recovery.Seen]:
    """Add up the gradients of this rank's micro-batches; the last one's backward also reduces them over the ranks.

    Returns the sum of the losses, float32 [] on the device, and which samples had which loss.
    """
    loss_sum, seen = torch.zeros((), device=run.device), []
    run.engine.traffic.take()  # what validation and sampling sent is no part of a step
    for micro in range(run.plan.accumulation):
        run.watchdog.beat(f"the data of step {run.step + 1}", run.patience(micro))
        batch = next_batch(run, batches, micro)
        run.watchdog.beat(f"step {run.step + 1}", run.patience(micro))
        with run.telemetry.computing():
            losses = compute_losses(run.engine, batch, run.schedule, run.config, run.engine.dtype)
        run.engine.backward(losses.total.sum() * run.plan.loss_scale, step=run.step + 1)
        loss_sum += losses.total.detach().sum()
        seen.append((batch.position, losses.total.detach()))
        run.telemetry.record(batch, losses, run.engine.traffic.take())
    return loss_sum, seen


def next_batch(run: Run, batches: Iterator[Batch], micro_step: int) -> Batch:
    """Return the next micro-batch; a stand-in once this rank's data cannot go on, so that no other waits for it in vain.

    `agree` ends the run on all ranks, before anything has changed.
    """
    if run.failure is None:
        try:
            return run.telemetry.next_batch(batches)
        except UserError as error:
            run.failure = error
    return run.builder.stand_in(run.plan.slots(run.samples_seen, run.ranks.rank, micro_step)).to(run.device)


def agree(run: Run, loss_sum: torch.Tensor) -> tuple[float, float]:
    """Return the mean loss and the gradient norm of the step, the same on all ranks. The step's one wait for the device.

    The same exchange tells whether any rank wants to stop, and lets a checkpoint go on that all ranks have written.
    UserError on all ranks: the data of one cannot go on.
    """
    mine = [float(run.stop.wanted), float(run.store.written), float(run.failure is not None)]
    # new_full, not a copy from the host, which would wait.
    values = [loss_sum.double(), run.engine.grad_square(), *(loss_sum.new_full((), x, dtype=torch.float64) for x in mine)]
    total, square, stop, written, failed = all_reduce_sum(torch.stack(values), run.device).tolist()
    if failed:
        all_or_none(run.check_data)
    run.stop_requested = stop > 0
    if written == run.ranks.world_size:
        run.store.settle()
    return total / run.config.train.global_batch, math.sqrt(square) if square >= 0 else math.nan


def save(run: Run, last: bool) -> None:
    """Start a checkpoint, and wait for the last one. NotSavedError when that fails; an earlier one is tried again when the
    next is due. Collective.
    """
    all_or_none(lambda: rundir.check_owner(run.lock))
    run.watchdog.beat(f"saving step {run.step}", SLOW)
    run.save_due = False
    run.store.begin(recovery.progress(run, rollbacks=0))
    if last or not run.config.checkpoint.background:
        failure = run.store.finish()
        if failure and last:
            raise NotSavedError(failure)


def train_stages(
    config: Config, json_tree: dict[str, Any], ranks: Ranks, device: torch.device, stop: StopRequest | None = None
) -> bool:
    """Build and train a run, one stage after another; return whether it is complete. Arguments are those of `build`."""
    step = from_main("looking for checkpoints", lambda _: rundir.newest_step(config))
    while True:
        stage, since, until = stage_at(config, step)
        run = build(stage, json_tree, ranks, device, stop)
        run.since, run.until = since, until
        if not run.over or run.complete:  # or a damaged checkpoint was passed over for one of an earlier stage
            if train(run) or run.stop_requested:
                return run.complete
            ended = "the stage is over" if run.step >= until else "back in an earlier stage"
            run.telemetry.warn(f"step {run.step}: {ended} (recipe.stages)")
        step = run.step
        if run.lock is not None:
            run.lock.close()
        del run
        gc.collect()  # the engine's circles, before the next one is built


def train(run: Run) -> bool:
    """Train to the end of run or stage, or until a signal or the time asks to stop; return whether the run is complete."""
    config, telemetry = run.config, run.telemetry
    run.stop.listen()
    run.stop_requested = float(all_reduce_sum([float(run.stop.wanted)], run.device)) > 0  # while it was being built
    with (
        without_long_collections(),
        run.watchdog,
        run.store,
        telemetry,
        closing(run.data),
        BatchesAhead(run.builder, _slots(run), max(1, config.data.prefetch), config.data.workers) as batches,
    ):
        telemetry.line(_greeting(run))
        while not run.over and not run.stop_requested:
            if not train_step(run, batches):
                continue
            run.watchdog.beat(f"the end of step {run.step}", SLOW)
            last = run.complete
            telemetry.advance(run.step)
            if run.step % config.train.log_every == 0 or last:
                log_step(run)
            if run.validator and (_due(run.step, config.train.val_every) or last):
                validate(run, run.validator)
            if run.requests and (_due(run.step, config.train.sample_every) or last):
                sample(run)
            run.save_due |= _due(run.step, config.checkpoint.every) or run.stop_requested
            # Not while steps are being skipped: the update before them may be what is wrong with the weights.
            if run.over and run.guard.in_a_row and run.suspect:
                raise NonFiniteError(_worthless(run))
            if run.over or (run.save_due and not run.guard.in_a_row):
                save(run, run.over or run.stop_requested)
            for saved in run.store.news():
                telemetry.log_save(saved)
        if run.stop_requested and not run.over:
            telemetry.line(
                f"stopped by a signal or the time limit at step {run.step}{_unsaved(run)}; the same command continues"
            )
        elif run.complete:
            telemetry.closing(config, run.step, run.samples_seen)
        run.stop.ignore()
    return run.complete


def log_step(run: Run) -> None:
    """Log what was recorded since the last call, with the step's own numbers. Collective."""
    own = {
        "optim/lr": learning_rate(run.config, run.step),
        "optim/grad_norm": run.engine.grad_norm,
        "train/skipped": float(run.guard.skipped),
        "train/spikes": float(run.guard.spikes),
        "checkpoint/failed": float(run.store.failed),
    }
    run.telemetry.log_step(run.step, run.samples_seen, run.data.replaced, own)


def validate(run: Run, validator: Validator) -> None:
    """Measure the loss on the held-out pairs and log it. Collective."""
    values = validator.run()
    run.telemetry.write(run.step, run.samples_seen, values)
    run.telemetry.line(f"step {run.step}: validation loss {values['val/loss']:.4f}")


def sample(run: Run) -> None:
    """Draw what is to be drawn while training with the averaged weights, and write the grid. Collective."""
    samples = draw_samples(run.config, run.ranks, run.engine, run.ema, run.data.text, run.data.image, run.requests)
    if samples is not None:
        prompts = [request.prompt for request in run.requests]
        path = run.config.run.dir / "samples" / f"step-{run.step:08d}.png"
        grid = caption_grid(samples.images, prompts)
        try:
            save_image(grid, path)
        except OSError as error:
            run.telemetry.warn(f"cannot write {path}: {error.strerror or error}; training goes on")
        run.telemetry.log_images(run.step, {"samples": grid, **figures_of(samples, prompts[0], run.data.text)})
        run.telemetry.line(f"step {run.step}: samples in {path}")


def _slots(run: Run) -> Iterator[list[tuple[int, float]]]:
    # Read ahead of training: the starting point is fixed here, since `samples_seen` moves on meanwhile. Without an end: a
    # run that goes back to a checkpoint takes more samples than it has steps.
    for first in count(run.samples_seen, run.config.train.global_batch):
        for micro in range(run.plan.accumulation):
            yield run.plan.slots(first, run.ranks.rank, micro)


def _worthless(run: Run) -> str:
    return (
        f"step {run.step}: the run is complete, but its last steps were skipped, without one finite loss: the weights "
        "are not saved, the last checkpoint stands; lower optim.lr"
    )


def _unsaved(run: Run) -> str:
    if run.guard.in_a_row:
        return f", unsaved because of the {run.guard.in_a_row} steps that were skipped last"
    return "" if run.step > run.first_step else ", with nothing new to save"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _greeting(run: Run) -> str:
    c, ranks = run.config, run.ranks.world_size
    new = f"new, from the weights of {c.run.init_from}" if c.run.init_from else "from scratch"
    state = f"resumed at step {run.step}" if run.step else new
    spread = (
        f"space_ep={c.parallel.space_ep} time_ep={c.parallel.time_ep}, " if c.parallel.spreads or c.parallel.elastic else ""
    )
    return (
        f"{state}: {c.run.dir}, {run.data.describe()}, {ranks} ranks on {run.device.type}, ZeRO-{run.engine.stage}, {spread}"
        f"global batch {c.train.global_batch} = {run.plan.accumulation} x {ranks} x {c.train.micro_batch} slots"
    )
