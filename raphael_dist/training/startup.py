"""The steps of `trainer.build`: open the run directory, build the engine, resume, and test one micro-batch before step 1."""

from functools import partial
from typing import IO

import torch

from raphael_dist.checkpoint.save import CheckpointStore
from raphael_dist.config.schema import Config
from raphael_dist.convert.init_weights import adapted_base, load_initial
from raphael_dist.data.run_data import DataSource
from raphael_dist.engine.ds_keys import Tree
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.engine import Engine
from raphael_dist.model.device import is_gpu
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.runtime.long_work import long_work, run_on_rank0
from raphael_dist.runtime.ranks import Ranks, rank_table
from raphael_dist.runtime.watchdog import SLOW, Watchdog
from raphael_dist.text import print_line
from raphael_dist.training import run_dir, throughput
from raphael_dist.training.logged_metrics import Telemetry
from raphael_dist.training.run_state import Run


def open_run_dir(
    config: Config, ranks: Ranks, device: torch.device, watchdog: Watchdog
) -> tuple[IO[str] | None, BatchPlan, Telemetry]:
    """Lock the run directory, and start logs and metrics in it. Collective.

    Once the directory is locked, `watchdog` writes its heartbeats and the stack traces of a hang to it.

    Returns:
        The open lock file (None except on rank 0), the division of batches over ranks, and the collector of the run's
        metrics.
    """
    watchdog.heartbeat("locking the run directory", SLOW)
    lock = None
    with long_work("locking the run directory") as report:
        if ranks.is_main:
            lock = run_dir.acquire(config, report)
    resume_points = run_on_rank0("looking for checkpoints", partial(run_dir.resume_points, config))
    plan = BatchPlan.of(config, ranks.world_size, resume_points)
    with long_work("opening the logs"):
        run_dir.start_logging(config, ranks.rank)
        watchdog.use_folder()
    hosts = rank_table(ranks, device)
    with long_work("opening the metrics"):
        telemetry = Telemetry(config, ranks, device, hosts)
    for line in [*config.find_warnings(), *plan.advice(), *expert_loop_warnings(config, device)]:
        telemetry.warn(line)
    return lock, plan, telemetry


def build_engine(
    config: Config, json_tree: Tree, ranks: Ranks, device: torch.device, plan: BatchPlan, data: DataSource
) -> tuple[Engine, Ema | None, CheckpointStore]:
    """Build the model with its DeepSpeed engine, the moving average of the weights, and the checkpoint store. Collective.

    The moving average is None if `ema.enabled` is false.

    Args:
        config: the run's configuration.
        json_tree: the user's DeepSpeed JSON.
        ranks: this rank and the number of ranks.
        device: this rank's device.
        plan: how batches are divided over ranks.
        data: the opened training data.
    """
    base, digest = _read_base(config, ranks)
    engine = Engine(config, json_tree, plan, device, base)
    ema = engine.create_ema()
    return engine, ema, CheckpointStore(config, ranks, engine.fragments, ema, data.fingerprints() | digest)


def expert_loop_warnings(config: Config, device: torch.device) -> list[str]:
    """Return a warning if the Time-MoE layers run their experts one by one on a GPU, else an empty list."""
    at_once = (
        config.fits_grouped_product or config.model.expert_backend == "megablocks" or "time_moe" in config.train.kernels
    )
    if not config.model.time_experts or not is_gpu(device) or at_once:
        return []
    return [
        "Time experts run one after another, and the host waits for the GPU in each Time-MoE layer. One product for all of "
        "them requires train.dtype=bfloat16, and multiples of 8 in model.channels and model.expert_width."
    ]


def _read_base(config: Config, ranks: Ranks) -> tuple[RaphaelUNet | None, dict[str, str]]:
    """Return the frozen base model for LoRA or ControlNet training, and its digest, which checkpoints store. Collective.

    Returns None and {} if all weights are trained. The base is read at every start, because checkpoints contain only the
    trained weights.
    """
    if not config.trains_adapter_only:
        return None, {}
    with long_work("reading run.init_from") as report:
        model, digest = adapted_base(config, verify=ranks.is_main, report=report)
    if ranks.is_main:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print_line(f"{trained:,} parameters are trained on top of the frozen weights of {config.run.init_from}")
    return model, {"run.init_from": digest}


def resume(run: Run) -> None:
    """Restore the newest checkpoint of the run. If there is none, load the weights of run.init_from, if set. Collective."""
    run.watchdog.heartbeat("looking for a checkpoint", SLOW)
    saved, progress = run.store.resume(), run.progress
    if saved is not None:
        progress.step, progress.samples_seen = saved.step, saved.samples_seen
        run.guard.restore(saved.guard)
    elif run.config.run.init_from is not None and not run.config.trains_adapter_only:
        _load_initial_weights(run)
    progress.first_step = progress.step
    run.builder.phase = progress.samples_seen % run.config.train.global_batch_size


def _load_initial_weights(run: Run) -> None:
    path, fragments = run.config.run.init_from, run.engine.fragments
    assert path is not None
    with long_work("reading run.init_from") as report:
        initial = load_initial(fragments, path, run.config, verify=run.ranks.is_main, report=report)
    if run.ranks.is_main:
        print_line(f"run.init_from: {initial.describe(path)}")
    fragments.sync_model()
    if run.ema is not None:
        run.ema.restart()


def warm_up(run: Run) -> None:
    """Run one micro-batch before the first step, so that a run that does not fit into memory fails at once. Collective."""
    run.watchdog.heartbeat("the test of a micro-batch", SLOW)
    with long_work("reading the first samples"):
        batch = run.builder.build(run.plan.slots(run.progress.samples_seen, run.ranks.rank, 0))
    run.telemetry.begin(run.progress.step, throughput.warmup_step(run.engine, batch, run.schedule))
