"""What a run says when it is complete: how long it took, how good it became, where things are, what to run next."""

import math
from pathlib import Path

from raphael_dist.config import Config
from raphael_dist.config_adapters import beside
from raphael_dist.training.metrics import read_metrics


def closing(config: Config, steps: int, images: int, seconds: float) -> list[str]:
    """Return the lines for a complete run; `seconds`: of this process, which may have continued an earlier one."""
    run_dir = config.run.dir
    minutes, rest = divmod(round(seconds), 60)
    took = f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} in this process"
    lines = [f"complete: {steps:,} steps, {images:,} images, {took}{_best(run_dir)}"]
    pictures = sorted((run_dir / "samples").glob("step-*.png"))
    lines += [f"  pictures    {pictures[-1]}"] if pictures else []
    lines += [
        f"  checkpoint  {run_dir}/checkpoints/step-{steps:08d}",
        f"  curves      tensorboard --logdir {run_dir}/tensorboard",
        f'  next        python -m raphael_dist sample {_model(config)} --prompt "..." --out picture.png',
        f"              python -m raphael_dist {_export(config)}",
    ]
    return lines


def _model(config: Config) -> str:
    """Return the options of `sample` that draw with what was trained, beside its base where there is one."""
    run_dir, base = config.run.dir, f"--checkpoint {config.run.init_from}"
    if config.control.enabled:
        return f"{base} --control-from {run_dir} --control drawing.png"
    with_small = " --upscale small.png" if config.upscale.factor else ""
    return (f"{base} --lora {run_dir}" if config.lora.rank else f"--checkpoint {run_dir}") + with_small


def _export(config: Config) -> str:
    run_dir = config.run.dir
    if beside(config):
        return f"{'control' if config.control.enabled else 'lora'} --run {run_dir} --out {run_dir}/exported"
    return f"convert --from auto {run_dir} --to diffusers {run_dir}/exported"


def _best(run_dir: Path) -> str:
    """Return the best validation loss in words, "" where nothing was validated."""
    try:
        found = read_metrics(run_dir / "metrics.jsonl").get("val/loss", [])
    except OSError:
        return ""
    finite = [(loss, step) for step, loss in found if math.isfinite(loss)]
    if not finite:
        return ""
    loss, step = min(finite)
    return f"; best validation loss {loss:.4f} at step {step:,}"
