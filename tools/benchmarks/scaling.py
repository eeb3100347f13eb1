"""`tools/bench.py scaling`: speed of a whole run on 1, 2, 4 and 8 ranks of this machine, compared with the planner.

strong: the same global batch on any number of ranks; weak: the same number of images per rank. The time includes data,
metrics, EMA and engine, but no saves, validation and samples. In each of several rounds, all numbers of ranks are
measured one after another. For each number, the fastest step of all rounds counts. If there are more ranks than cores, the
planner's computation time is multiplied by ranks / cores.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from raphael_dist.config.schema import load_config
from raphael_dist.planning.cluster_spec import ClusterSpec, load_cluster
from raphael_dist.planning.search import Choice, Search
from raphael_dist.training.metrics_files import read_metrics

ROOT = Path(__file__).resolve().parent.parent.parent
IMAGES, EACH, MOST = 32, 8, 8  # images per step (strong), per rank (weak), per micro-batch at most
QUIET = (
    "checkpoint.every=0",
    "train.val_every=0",
    "sample.prompts=[]",
    "data.val_shards=[]",
    "train.log_every=1",
    "run.ignore_damaged=true",
)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to its parser `command`."""
    command.add_argument("--config", default="emoji-tiny", help="preset or YAML file of the run (default emoji-tiny)")
    command.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of ranks (default 1 2 4 8)")
    command.add_argument("--steps", type=int, default=10, help="steps of a run (default 10)")
    command.add_argument("--rounds", type=int, default=2, help="runs with each number of ranks (default 2)")
    command.add_argument("--cluster", default="cpu", help="this machine: cpu, or a YAML file from plan_run.py --calibrate")


def overrides(kind: str, ranks: int) -> list[str]:
    """Return the key=value overrides that set the global batch size and the micro-batch size of a run on `ranks` ranks.

    `kind` of scaling decides the global batch size. "strong": IMAGES images, for any number of ranks. "weak": EACH images
    per rank, so it grows with the number of ranks. The micro-batch size is the share of a rank, but at most MOST images.
    """
    batch = IMAGES if kind == "strong" else EACH * ranks
    return [f"train.global_batch_size={batch}", f"train.micro_batch_size={min(MOST, -(-batch // ranks))}"]


def measured(args: argparse.Namespace, kind: str, ranks: int, folder: Path) -> float:
    """Run a training on `ranks` ranks and return the images per second of its fastest step, on all ranks.

    `args`: options of the benchmark. `kind`: "strong" or "weak" scaling. `folder`: where the run directory is created.
    """
    run = folder / f"{kind}-{ranks}"
    settings = [
        *overrides(kind, ranks),
        *QUIET,
        f"train.max_steps={args.steps}",
        f"run.dir={run}",
        f"data.cache_dir={folder}/cache",
    ]
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "raphael_dist/train.py"]
    done = subprocess.run(
        [sys.executable, *command, "--config", args.config, *settings],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    rates = dict(read_metrics(run / "metrics.jsonl")["throughput/samples_per_s"])
    return max(rate for step, rate in rates.items() if step > 2)


def planned(args: argparse.Namespace, cluster: ClusterSpec, kind: str, ranks: int) -> float:
    """Return the images per second that the planner predicts for the run that `measured` starts.

    `cluster`: description of this machine.
    """
    config = load_config(args.config, overrides(kind, ranks))
    choice = Choice(1, 1, 1, False, config.train.micro_batch_size, "none", "auto")
    outcome = Search(config, cluster.with_value("per_node", ranks), ranks).evaluate(choice)
    assert outcome is not None
    step = outcome.step
    return step.images / (step.compute * max(1, ranks / (os.cpu_count() or 1)) + step.exposed)


def run(args: argparse.Namespace) -> None:
    """Print images per second by number of ranks, for strong and weak scaling, next to the planner's prediction."""
    cluster, rates = load_cluster(args.cluster), defaultdict(list)
    ways = [(kind, ranks) for kind in ("strong", "weak") for ranks in args.ranks]
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for way in ways:
                rates[way].append(measured(args, *way, Path(folder)))
    print(f"{'':<8}{'ranks':>6}{'images/s':>10}{'speed-up':>12}{'plan':>8}{'speed-up':>12}")
    best, plan = {way: max(rates[way]) for way in ways}, {way: planned(args, cluster, *way) for way in ways}
    for kind, ranks in ways:
        rate, planned_rate, base = best[kind, ranks], plan[kind, ranks], (kind, args.ranks[0])
        shown = f"{rate:>10.1f}{rate / best[base]:>12.2f}{planned_rate:>8.1f}{planned_rate / plan[base]:>12.2f}"
        print(f"{kind:<8}{ranks:>6}{shown}")
