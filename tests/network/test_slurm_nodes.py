"""Slurm on nodes of network namespaces, each with an address and a link of its own: `sbatch slurm/train_raphael.sh`."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raphael_dist.training.metrics_files import read_metrics
from tests.cluster.test_slurm import LONG_RUN, Job, files_of, losses
from tests.lib import netns, slurm_cluster
from tests.lib.launch import ROOT, run_ranks
from tests.lib.netns import Link, Network
from tests.lib.slurm_cluster import Cluster, wait_for
from tests.network import SLURM_MARKS
from tests.training.test_training import SMALL

pytestmark = SLURM_MARKS
STEPS = ("train.max_steps=25", *LONG_RUN[1:-1], "run.hang_timeout_s=20")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three nodes, and one for the controller, which notices a lost node after the run has."""
    with Network([Link(whole=True)] * 4) as network, Cluster(network=network, slurmd_timeout=60) as running:
        yield running


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.cache_dir={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, cache: str) -> Path:
    """The same training by two ranks without Slurm and without a fault."""
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(["raphael_dist/train.py", *SMALL, f"run.dir={folder}", cache, *STEPS], 2)
    return folder


def test_two_nodes_train_over_the_bridge(cluster: Cluster, tmp_path: Path, cache: str, alone: Path) -> None:
    assert cluster.network is not None
    before = [cluster.network.counters(i) for i in range(3)]
    job = Job(cluster, tmp_path, ["--nodes=2"], [cache, *STEPS], PREFLIGHT="1")
    assert "preflight passed" in job.finish()
    sent = [cluster.network.counters(i) - before[i] for i in range(3)]
    assert [node for node, _ in job.pids().values()] == ["node0", "node1"]
    assert losses(job.dir) == losses(alone)
    assert files_of(job.dir, 25) == files_of(alone, 25)
    metrics = read_metrics(job.dir / "metrics.jsonl")
    counted = sum(value for tag in metrics if tag.startswith("comm/") for _, value in metrics[tag])
    assert counted > 5e5
    assert min(sent[0].sent, sent[1].sent) > counted > sent[2].sent


def test_node_lost_in_training_is_left_out_by_the_preflight_of_the_restart(
    cluster: Cluster, tmp_path: Path, cache: str, alone: Path
) -> None:
    """Slurm reaches it, so that only the run can notice; and srun, which waits for the node's rank, must not hang."""
    assert cluster.network is not None
    job = Job(cluster, tmp_path, ["--nodes=3"], [cache, *STEPS], PREFLIGHT="1", SPARE_NODES="1")
    wait_for(lambda: "preflight passed" in job.log, 240, "preflight", job.details)
    job.wait_step(8)
    assert [node for node, _ in job.pids().values()] == ["node0", "node1"]
    cluster.network.drop_routes(1, [0, 2])
    try:
        log = job.finish(seconds=800)
    finally:
        cluster.network.keep_routes(1)
    before, _, after = log.partition("restart 1: nodes: 2")
    assert "rank 1 on node1 cannot be reached from node0" in before
    assert "the run hung" in before  # exit code 76
    assert "The job is requeued (restart 1" in before
    assert re.findall("fault: (.*?):", after) == ["node1"], after
    assert "preflight passed" in after
    assert "restart 2" not in after
    assert [node for node, _ in job.pids().values()] == ["node0", "node2"]
    assert losses(job.dir) == losses(alone)
    assert files_of(job.dir, 25) == files_of(alone, 25)


def test_node_whose_link_is_cut_is_named_and_replaced(cluster: Cluster, tmp_path: Path, cache: str, alone: Path) -> None:
    """Slurm notices the lost node, and starts the job again on another one."""
    assert cluster.network is not None
    job = Job(cluster, tmp_path, ["--nodes=2"], [cache, *STEPS])
    job.wait_step(8)
    assert [node for node, _ in job.pids().values()] == ["node0", "node1"]
    cluster.network.set_link(1, "down")
    log = job.finish(seconds=600)
    cluster.network.set_link(1, "up")
    assert "rank 1 on node1 cannot be reached from node0" in log
    assert "exit code 76 after a cancellation, preemption or requeue by Slurm" in log
    assert "restart 1: nodes: 2" in log
    assert [node for node, _ in job.pids().values()] == ["node0", "node2"]
    assert losses(job.dir) == losses(alone)
    assert files_of(job.dir, 25) == files_of(alone, 25)


def test_preflight_leaves_out_a_node_that_srun_cannot_reach(
    cluster: Cluster, tmp_path: Path, cache: str, alone: Path
) -> None:
    """Slurm's controller reaches it and gives it to the job; the job's first node, where srun runs, does not."""
    assert cluster.network is not None
    cluster.network.drop_routes(1, [0, 2])
    job = Job(cluster, tmp_path, ["--nodes=3"], [cache, *STEPS], PREFLIGHT="1", SPARE_NODES="1")
    log = job.finish(seconds=600)
    cluster.network.keep_routes(1)
    assert re.findall("fault: (.*?):", log) == ["node1"], log  # by reports, or by asking the nodes that left none
    assert "preflight passed" in log
    assert [node for node, _ in job.pids().values()] == ["node0", "node2"]
    assert losses(job.dir) == losses(alone)


def test_killed_owner_leaves_nothing_for_long() -> None:
    program = (
        "import time; from tests.lib.netns import *; from tests.lib.slurm_cluster import *\n"
        "cluster = Cluster(network=Network([Link()] * 2).__enter__()).__enter__()\n"
        "cluster.run('sbatch', '--output=/dev/null', '--wrap', 'srun sleep 600', cwd=cluster.folder)\n"
        "print(cluster.folder, flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    folder = Path(owner.stdout.readline().strip())
    wait_for(lambda: "sleep" in [process.name() for process in slurm_cluster.processes_of(folder)], 60, "the job's process")
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    slurm_cluster.sweep()
    netns.sweep()
    wait_for(lambda: not slurm_cluster.processes_of(folder), 10, "end of the processes")
    assert not folder.exists()
    assert not [name for name in netns.spaces() if f"-{owner.pid}-" in name]
