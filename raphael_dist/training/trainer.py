"""The training loop: build(), train_step(), train()."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import IO, Any

import torch

from raphael_dist.checkpoint.store import CheckpointStore
from raphael_dist.config import Config
from raphael_dist.data.batches import BatchBuilder
from raphael_dist.data.encoders import ImageEncoder, TextEncoder
from raphael_dist.data.open import check_encoders, open_stream
from raphael_dist.data.prefetch import Prefetcher
from raphael_dist.data.stream import TrainStream
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.engine import Engine, learning_rate
from raphael_dist.errors import NotSavedError, UserError
from raphael_dist.evaluate import Validator, sample_prompts
from raphael_dist.model.batch import Batch
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.objective import compute_losses
from raphael_dist.parallel import ranks as parallel
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.sampling.sampling import caption_grid, save_image
from raphael_dist.training import measure, recovery, rundir
from raphael_dist.training.console import Reporter
from raphael_dist.training.guard import Guard
from raphael_dist.training.metrics import LoadWatch, Metrics, MetricsWriter, load_metrics
from raphael_dist.training.stopping import StopWish
from raphael_dist.training.straggler import Stopwatch, Stragglers
from raphael_dist.training.watchdog import SLOW, Watchdog

_log = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything a training run holds on this rank. `step` and `samples_seen` are its whole progress."""

    config: Config
    ranks: parallel.Ranks
    device: torch.device
    plan: BatchPlan
    text: TextEncoder
    image: ImageEncoder
    stream: TrainStream
    builder: BatchBuilder
    validator: Validator | None
    engine: Engine
    ema: Ema | None
    store: CheckpointStore
    guard: Guard
    schedule: NoiseSchedule
    metrics: Metrics
    watch: LoadWatch
    writer: MetricsWriter | None
    lock: IO[str] | None
    stop_wish: StopWish  # of this rank, at any moment
    watchdog: Watchdog
    stopwatch: Stopwatch
    stragglers: Stragglers
    flops: float = 0.0
    samples_seen: int = 0
    step: int = 0
    stop_requested: bool = False  # agreed by all ranks, at a step's end
    first_step: int = 0  # of this process
    logged_step: int = 0
    timers: dict[str, float] = field(default_factory=lambda: {"wait": 0.0, "logged": time.monotonic()})

    def warn(self, text: str) -> None:
        """Write a warning, once for all ranks."""
        if self.ranks.is_main:
            _log.warning("%s", text)

    def patience(self, micro_step: int) -> float:
        """Return how many times longer than usual a micro-step may take: the first of all compiles and allocates."""
        return SLOW if self.step == self.first_step and micro_step == 0 else 1.0


def build(
    config: Config, json_tree: dict[str, Any], ranks: parallel.Ranks, device: torch.device, stop_wish: StopWish | None = None
) -> Run:
    """Check everything, open the data, build the engine, resume if there is a checkpoint. Collective.

    Raises UserError on all ranks for what the user can fix, before anything is trained.
    """
    plan = BatchPlan.of(config, ranks.world_size)
    lock = parallel.all_or_none(lambda: rundir.claim(config) if ranks.is_main else None)
    parallel.all_or_none(lambda: rundir.start_logging(config, ranks.rank))
    hosts = parallel.rank_table(ranks, device)
    dtype = getattr(torch, config.train.dtype)
    text = parallel.all_or_none(lambda: TextEncoder.load(config.text.encoder, config.text.max_tokens, device, dtype))
    image = parallel.all_or_none(lambda: ImageEncoder.load(config.image.encoder, device, torch.float32))
    parallel.all_or_none(lambda: check_encoders(config, text, image))
    stream = open_stream(config, config.data.shards, ranks, text, image, training=True)
    val_stream = None
    if config.data.val_shards:
        val_stream = open_stream(config, config.data.val_shards, ranks, text, image, training=False)
    engine = Engine(config, json_tree, plan, device)
    ema = Ema(engine.fragments, config.ema) if config.ema.enabled else None
    store = CheckpointStore(config, ranks, engine.fragments, ema, stream.order.index.fingerprint)
    schedule = NoiseSchedule.create(config.diffusion, device)
    run = Run(
        config=config,
        ranks=ranks,
        device=device,
        plan=plan,
        text=text,
        image=image,
        stream=stream,
        builder=BatchBuilder(config, stream, engine.module.num_blocks),
        validator=Validator(config, ranks, val_stream, engine, schedule) if val_stream else None,
        engine=engine,
        ema=ema,
        store=store,
        guard=Guard(config.train),
        schedule=schedule,
        metrics=Metrics(device),
        watch=LoadWatch(),
        writer=MetricsWriter(config.run.dir) if ranks.is_main else None,
        lock=lock,
        stop_wish=StopWish() if stop_wish is None else stop_wish,
        watchdog=Watchdog(ranks, config.run.dir, config.run.hang_timeout_s),
        stopwatch=Stopwatch(device),
        stragglers=Stragglers(hosts),
    )
    recovery.restore(run, store.resume())
    run.first_step = run.logged_step = run.step
    run.flops = measure.dry_run(engine, run.builder.build(plan.slots(run.samples_seen, ranks.rank, 0)), schedule)
    return run


def train_step(run: Run, batches: Iterator[Batch]) -> bool:
    """One optimizer step on exactly the global batch: accumulate, agree that the loss is sound, clip, update, average.

    Returns False when the run went back to a checkpoint instead.
    """
    loss_sum, bad_positions = torch.zeros((), device=run.device), []
    run.engine.traffic.take()  # what validation and sampling sent is no part of a step
    for micro in range(run.plan.accumulation):
        run.watchdog.beat(f"the data of step {run.step + 1}", run.patience(micro))
        waited = time.monotonic()
        batch = next(batches).to(run.device)
        waited = time.monotonic() - waited
        run.timers["wait"] += waited
        run.stopwatch.add(waited)
        run.watchdog.beat(f"step {run.step + 1}", run.patience(micro))
        began = run.stopwatch.start()
        losses = compute_losses(run.engine, batch, run.schedule, run.config, run.engine.dtype)
        run.stopwatch.stop(began)
        run.engine.backward(losses.total.sum() * run.plan.loss_scale)
        loss_sum += losses.total.detach().sum()
        bad_positions.append((batch.position, losses.total.detach()))
        measure.record(run.metrics, batch, losses, run.engine.traffic.take())
    agreed = parallel.total([float(loss_sum), float(run.stop_wish.wanted), float(run.store.written)], run.device)
    total, stop, written = agreed.tolist()
    run.stop_requested = stop > 0
    if written == run.ranks.world_size:
        run.store.settle()
    return recovery.apply(run, total / run.config.train.global_batch, bad_positions)


def save(run: Run, last: bool) -> None:
    """Start a checkpoint, and wait for the last one. NotSavedError when that fails; an earlier one is tried again when the
    next is due. Collective.
    """
    parallel.all_or_none(lambda: rundir.check_owner(run.lock))
    run.watchdog.beat(f"saving step {run.step}", SLOW)
    run.guard.rollbacks = 0
    run.store.begin(recovery.progress(run))
    if last or not run.config.checkpoint.background:
        failure = run.store.finish()
        if failure and last:
            raise NotSavedError(failure)


def train(run: Run) -> bool:
    """Train to `train.max_steps`, or until a signal or the time asks to stop; return whether the run is complete."""
    config = run.config
    run.stop_wish.listen()
    run.stop_requested = float(parallel.total([float(run.stop_wish.wanted)], run.device)) > 0  # while it was being built
    with (
        run.watchdog,
        run.store,
        Reporter(run.ranks.is_main, run.step, config.train.max_steps) as report,
        Prefetcher(run.builder.build, _slots(run), depth=max(1, config.data.prefetch)) as batches,
    ):
        report.line(_greeting(run))
        while run.step < config.train.max_steps and not run.stop_requested:
            if not train_step(run, batches):
                continue
            run.watchdog.beat(f"the end of step {run.step}", SLOW)
            last = run.step == config.train.max_steps
            report.advance(run.step)
            if run.step % config.train.log_every == 0 or last:
                report.scalars(run.step, log_scalars(run))
            if run.validator and (_due(run.step, config.train.val_every) or last):
                report.line(log_validation(run))
            if config.sample.prompts and (_due(run.step, config.train.sample_every) or last):
                report.line(log_samples(run))
            if _due(run.step, config.checkpoint.every) or last or run.stop_requested:
                save(run, last or run.stop_requested)
            log_saves(run, report)
        if run.stop_requested and run.step < config.train.max_steps:
            saved = "" if run.step > run.first_step else ", with nothing new to save"
            report.line(f"stopped by a signal or the time limit at step {run.step}{saved}; the same command continues")
        run.stop_wish.ignore()
    if run.writer is not None:
        run.writer.close()
    return run.step >= config.train.max_steps


def log_scalars(run: Run) -> dict[str, float]:
    """Reduce what was recorded since the last call and write it with the step's own numbers. Collective."""
    run.metrics.add("data/replaced", float(run.stream.replaced), "sum")
    reduced, now = run.metrics.reduce(), time.monotonic()
    values = {tag: float(v) for tag, v in reduced.items() if v.ndim == 0 and tag != "samples"}
    samples = float(reduced["samples"])
    for kind, total in (("space", samples), ("time", None)):
        if f"load/{kind}" in reduced:
            values |= load_metrics(f"moe/{kind}", reduced[f"load/{kind}"], total)
            for line in run.watch.new(kind, reduced[f"load/{kind}"], samples):
                run.warn(line)
    elapsed = now - run.timers["logged"]
    values |= measure.throughput(samples, elapsed, run.flops, run.device, run.engine.dtype, run.ranks.world_size)
    values["optim/lr"] = learning_rate(run.config, run.step)
    values["optim/grad_norm"] = run.engine.grad_norm()
    values["train/skipped"], values["train/spikes"] = float(run.guard.skipped), float(run.guard.spikes)
    values["checkpoint/failed"] = float(run.store.failed)
    values["time/data_wait_frac"] = run.timers["wait"] / max(elapsed, 1e-9)
    run.timers.update(wait=0.0, logged=now)
    run.stragglers.observe(max(1, run.step - run.logged_step), run.stopwatch.take(), run.device)
    run.logged_step = run.step
    values["time/slowest_rank_ratio"] = run.stragglers.slowest_ratio()
    if slow := run.stragglers.slow():
        run.warn(f"step {run.step}: {slow}")
    _write(run, values)
    return values


def log_saves(run: Run, report: Reporter) -> None:
    """Tell of the checkpoints that were published since the last call."""
    for saved in run.store.news():
        report.line(saved.line)
        if run.writer is not None:
            run.writer.write(saved.manifest["step"], saved.manifest["samples_seen"], saved.metrics())


def log_validation(run: Run) -> str:
    """Measure the loss on the held-out pairs, write it, and return a line about it. Collective."""
    assert run.validator is not None
    values = run.validator.run()
    _write(run, values)
    return f"step {run.step}: validation loss {values['val/loss']:.4f}"


def log_samples(run: Run) -> str:
    """Sample the configured prompts with the averaged weights, write the grid, and return a line about it. Collective."""
    images = sample_prompts(run.config, run.ranks, run.engine, run.ema, run.text, run.image)
    path = run.config.run.dir / "samples" / f"step-{run.step:08d}.png"
    if run.ranks.is_main and run.writer is not None:
        grid = caption_grid(images, run.config.sample.prompts)
        save_image(grid, path)
        run.writer.image("samples", run.step, measure.as_array(grid))
    return f"step {run.step}: samples in {path}"


def _write(run: Run, values: dict[str, float]) -> None:
    if run.writer is not None:
        run.writer.write(run.step, run.samples_seen, values)


def _slots(run: Run) -> Iterator[list[tuple[int, float]]]:
    # Read ahead of training: the starting point is fixed here, since `samples_seen` moves on meanwhile. Without an end: a
    # run that goes back to a checkpoint takes more samples than it has steps.
    for first in count(run.samples_seen, run.config.train.global_batch):
        for micro in range(run.plan.accumulation):
            yield run.plan.slots(first, run.ranks.rank, micro)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _greeting(run: Run) -> str:
    c, index = run.config, run.stream.order.index
    bad = len(index.bad) + len(run.stream.cache.bad)
    size = f"{index.num_samples} images" + (f" ({bad} bad samples left out)" if bad else "")
    state = f"resumed at step {run.step}" if run.step else "from scratch"
    return (
        f"{state}: {c.run.dir}, {size}, {run.ranks.world_size} ranks on {run.device.type}, ZeRO-{run.engine.stage}, global "
        f"batch {c.train.global_batch} = {run.plan.accumulation} x {run.ranks.world_size} x {c.train.micro_batch} slots"
    )


def check_complete(config: Config) -> None:
    """Raise UserError when the configuration lacks what training needs."""
    if not config.data.shards:
        raise UserError("data.shards: none given; e.g. data.shards='data/emoji/train-*'")
