"""The lines that a run prints at its start and its end: what it trains, its validation loss, the next command."""

import math
import shlex
from pathlib import Path

from raphael_dist.config.schema import Config
from raphael_dist.text import counted
from raphael_dist.training.metrics_files import read_metrics
from raphael_dist.training.run_state import Run


def start_line(run: Run) -> str:
    """Return a line that states what the run trains, on how many ranks, and at which step it starts."""
    c, engine, world_size = run.config, run.engine, run.ranks.world_size
    new = f"new, from the weights of {c.run.init_from}" if c.run.init_from else "from scratch"
    state = f"resumed at step {run.progress.step}" if run.progress.step else new
    shards_experts = c.parallel.uses_expert_parallelism or c.parallel.elastic
    expert_parallelism = f"space_ep={c.parallel.space_ep} time_ep={c.parallel.time_ep}, " if shards_experts else ""
    return (
        f"{state}: {c.run.dir}, {run.data.describe()}, {counted(world_size, 'rank')} on {engine.device.type}, "
        f"ZeRO-{engine.stage}, {expert_parallelism}global batch {c.train.global_batch_size}, "
        f"micro-batch {c.train.micro_batch_size}, micro-steps per step: {run.plan.accumulation}"
    )


def stop_line(run: Run) -> str:
    """Return a line about a run that stopped early: at which step, and the reason if no checkpoint was saved."""
    saved = "" if run.progress.step > run.progress.first_step else ", with nothing new to save"
    if run.guard.in_a_row:
        saved = f", not saved because of {counted(run.guard.in_a_row, 'skipped step')} in a row"
    return f"stopped by a signal or the time limit at step {run.progress.step}{saved}; the same command continues"


def end_lines(config: Config, steps: int, images: int, seconds: float) -> list[str]:
    """Return the lines to print at the end of a complete run.

    Args:
        config: the run's configuration.
        steps: optimizer steps of the whole run.
        images: number of training images that the whole run has used.
        seconds: duration of this process, which is shorter than the run if this process resumed the run.
    """
    run_dir = quoted(config.run.dir)
    minutes, rest = divmod(round(seconds), 60)
    duration = f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} in this process"
    grids = sorted((config.run.dir / "samples").glob("step-*.png"))
    return [
        f"complete: {counted(steps, 'step', ',')}, {counted(images, 'image', ',')}, {duration}{_best(config.run.dir)}",
        *(f"  images      {quoted(path)}" for path in grids[-1:]),
        f"  checkpoint  {run_dir}/checkpoints/step-{steps:08d}",
        f"  curves      tensorboard --logdir {run_dir}/tensorboard",
        f'  next        python -m raphael_dist sample {_model(config)} --prompt "..." --out image.png',
        f"              python -m raphael_dist {_export(config)}",
    ]


def quoted(path: object) -> str:
    """Return a path quoted for a shell."""
    return shlex.quote(str(path))


def _model(config: Config) -> str:
    """Return the options of the command `sample` that name the trained model, with its base model if there is one."""
    run_dir, base = quoted(config.run.dir), f"--checkpoint {quoted(config.run.init_from)}"
    if config.control.enabled:
        return f"{base} --control-from {run_dir} --control drawing.png"
    with_small = " --upscale small.png" if config.upscale.factor else ""
    return (f"{base} --lora {run_dir}" if config.lora.rank else f"--checkpoint {run_dir}") + with_small


def _export(config: Config) -> str:
    run_dir = quoted(config.run.dir)
    layout = "controlnet" if config.control.enabled else "peft" if config.lora.rank else "diffusers"
    return f"convert --from auto {run_dir} --to {layout} {run_dir}/exported"


def _best(run_dir: Path) -> str:
    """Return the text about the best validation loss; "" if there was no validation."""
    try:
        losses = read_metrics(run_dir / "metrics.jsonl").get("val/loss", [])
    except OSError:
        return ""
    finite = [(loss, step) for step, loss in losses if math.isfinite(loss)]
    if not finite:
        return ""
    loss, step = min(finite)
    return f"; best validation loss {loss:.4f} at step {step:,}"
