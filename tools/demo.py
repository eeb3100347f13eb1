"""`make demo`: train emoji-tiny on two ranks, sample images from it, and check that the loss fell."""

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import checkout  # noqa: F401 (before the package)
from raphael_dist.cli.common import Parser
from raphael_dist.errors import UserError
from raphael_dist.runtime.ranks import free_port
from raphael_dist.training.metrics_files import read_metrics

PROMPTS = (
    "a red heart, noto style",
    "a yellow heart, twemoji style",
    "a blue heart, fluent 3d style",
    "a green circle, noto style",
    "a red square, twemoji style",
    "a lemon, fluent 3d style",
    "a red apple, noto style",
    "a purple circle, twemoji style",
    "an orange square, fluent 3d style",
    "a full moon, noto style",
    "a blue heart, noto style",
    "a sun, twemoji style",
)


def main() -> int:
    parser = Parser(
        example="python tools/demo.py --run-dir runs/demo",
        description="Train emoji-tiny on two ranks, sample images from it, and check that the loss fell. `make demo` runs "
        "this.",
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="run directory, which is deleted first")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings for raphael_dist/train.py")
    args = parser.parse_args()
    began = time.monotonic()
    shutil.rmtree(args.run_dir, ignore_errors=True)
    launcher = ["deepspeed", "--log_level", "warning", "--num_gpus", "2", "--master_port", str(free_port())]
    config = ["--config", "emoji-tiny", "--deepspeed_config", "ds_configs/zero2.json", f"run.dir={args.run_dir}"]
    subprocess.run([*launcher, "raphael_dist/train.py", *config, *args.overrides], check=True)
    grid = args.run_dir / "samples" / "demo.png"
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    sample = [sys.executable, "-m", "raphael_dist.sample", "--checkpoint", str(args.run_dir), "--out", str(grid)]
    subprocess.run([*sample, *prompts], check=True)
    first, last = check(args.run_dir, grid)
    run_dir = shlex.quote(str(args.run_dir))
    print(f"""
The loss fell from {first:.3f} to {last:.3f} in {time.monotonic() - began:.0f} s.
  images       {shlex.quote(str(grid))}   (training had no images of the last two emoji in these drawing styles)
  checkpoint   {run_dir}/checkpoints
  curves       tensorboard --logdir {run_dir}/tensorboard
Next:
  python -m raphael_dist.sample --checkpoint {run_dir} --prompt "a purple heart, noto style" --out heart.png
  deepspeed --num_gpus 2 raphael_dist/train.py --config emoji run.dir=runs/all
""")
    return 0


def check(run_dir: Path, grid: Path) -> tuple[float, float]:
    """Return the first and the last training loss of a run.

    Raises UserError if the last loss is above half of the first one, or the image file `grid` is missing.
    """
    losses = [loss for _, loss in read_metrics(run_dir / "metrics.jsonl")["train/loss"]]
    if losses[-1] > 0.5 * losses[0]:
        raise UserError(
            f"the loss must fall to half of its first value {losses[0]:.3f}, but it ended at {losses[-1]:.3f}. Read the "
            "log of the run."
        )
    if not grid.is_file() or grid.stat().st_size < 10_000:
        raise UserError(f"{grid} must be an image of at least 10 kB, but it is missing or smaller. Read the log of the run.")
    return losses[0], losses[-1]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
