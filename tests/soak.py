"""`make soak`: a run on a local Slurm while a seeded punisher kills random ranks; then the same run in peace must end equal.

SOAK_MINUTES (30), SOAK_SEED (0). Every second job that is sent into the same directory meanwhile must be refused.
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from raphael_dist.training.metrics import read_metrics
from tests.launch import run_ranks
from tests.slurm_cluster import Cluster, missing
from tests.test_slurm import EVERY, LONG, Job, files_of
from tests.test_training import SMALL

STEPS = 10**6  # more than it will get to


def punish(job: Job, cluster: Cluster, draw: random.Random, until: float) -> int:
    """Kill a random rank every 40 seconds or so until `until`; return how many kills there were."""
    kills = 0
    while time.monotonic() < until:
        time.sleep(draw.uniform(30, 50))
        if job.steps and cluster.job(job.id)["JobState"] == "RUNNING":
            rank, (node, pid) = draw.choice(sorted(job.pids().items()))
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # it is on its way back
                continue
            kills += 1
            print(f"step {job.steps[-1]}: killed rank {rank} on {node}", flush=True)
    return kills


def main(minutes: float, seed: int) -> None:
    folder, draw = Path(tempfile.mkdtemp(prefix="soak-")), random.Random(seed)
    arguments = [f"data.cache_dir={folder}/cache", *LONG, f"train.max_steps={STEPS}"]
    with Cluster(4) as cluster:
        job = Job(cluster, folder / "punished", ["--nodes=2"], arguments)
        job.wait_step(1)
        rival = Job(cluster, folder / "rival", ["--nodes=1"], [*arguments, f"run.dir={job.dir}"])
        kills = punish(job, cluster, draw, time.monotonic() + 60 * minutes)
        job.wait_step(job.steps[-1] + 1)
        cluster.run("scancel", job.id)
        job.finish("CANCELLED")
        assert "another process is training in" in rival.finish("FAILED")
    last = max(int(p.name.split("-")[1]) for p in (job.dir / "checkpoints").glob("step-*"))
    repeated = len(job.steps) - len(set(job.steps))
    print(f"{kills} kills, {last} steps, {repeated} of them repeated; now the same in peace", flush=True)
    peace = [f"run.dir={folder}/peace", *arguments, f"train.max_steps={last}"]
    run_ranks(
        ["raphael_dist/train.py", *SMALL, "--deepspeed_config=ds_configs/zero1.json", *peace], 2, timeout=60 * minutes + 300
    )
    assert files_of(job.dir, last) == files_of(folder / "peace", last), f"the checkpoints differ: {folder}"
    losses = [read_metrics(d / "metrics.jsonl")["train/loss"] for d in (job.dir, folder / "peace")]
    assert losses[0][:last] == losses[1], f"the losses differ: {folder}"
    assert repeated <= kills * EVERY, "a kill lost more than an interval"
    print(f"passed: after {kills} kills, weights and moments of step {last} are equal bit for bit")


if __name__ == "__main__":
    if missing():
        sys.exit(f"error: {missing()}")
    main(float(os.environ.get("SOAK_MINUTES", "30")), int(os.environ.get("SOAK_SEED", "0")))
