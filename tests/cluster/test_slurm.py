"""Runs on a real Slurm of four nodes on this host (tests/lib/slurm_cluster.py): `sbatch slurm/train_raphael.sh` and mishaps.

The reference is always the same training without Slurm. Four ranks on few cores start slowly: a case takes up to minutes.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raphael_dist.training.metrics_files import read_metrics
from tests.lib import slurm_cluster
from tests.lib.launch import ROOT, run_ranks
from tests.lib.slurm_cluster import Cluster, wait_for
from tests.training.test_training import SMALL

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(slurm_cluster.missing() is not None, reason=str(slurm_cluster.missing())),
    pytest.mark.timeout(900),
]
EVERY = 5
# Long enough to be met in the middle.
LONG_RUN = (
    "train.max_steps=120",
    f"checkpoint.every={EVERY}",
    "checkpoint.background=false",  # or the steps that a kill costs depend on how busy the disk is
    "sample.prompts=[]",
    "data.val_shards=[]",
    "run.hang_timeout_s=60",
)
SPREAD = ("parallel.space_ep=2", "parallel.time_ep=2", "parallel.placement=shard")


@pytest.fixture(scope="module")
def four_nodes() -> Iterator[Cluster]:
    with Cluster(4) as running:
        yield running


@pytest.fixture
def cluster(four_nodes: Cluster) -> Iterator[Cluster]:
    """The nodes without a job. A job of a failed test would occupy nodes."""
    yield four_nodes
    wait_for(lambda: not four_nodes.cancel_all(), 60, "the end of all jobs")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.cache_dir={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, cache: str) -> Path:
    """The long run by two ranks without Slurm and without an interruption."""
    folder = tmp_path_factory.mktemp("alone")
    extra = ["--deepspeed_config=ds_configs/zero1.json", f"run.dir={folder}", cache, *LONG_RUN]
    run_ranks(["raphael_dist/train.py", *SMALL, *extra], 2, timeout=600)
    return folder


class Job:
    """A submitted training job, its log and its run directory."""

    def __init__(self, cluster: Cluster, folder: Path, options: list[str], arguments: list[str], **env: str) -> None:
        self.cluster, self.dir = cluster, folder / "run"
        folder.mkdir(exist_ok=True)
        self._log = folder / "slurm.log"
        settings = {"RUN_DIR": str(self.dir), "PYTHON": sys.executable, "PREFLIGHT": "0", "OMP_NUM_THREADS": "1"}
        settings |= {"CONFIG": "tests/fixtures/small.yaml"} | env
        command = ["sbatch", "--parsable", f"--output={self._log}", *options, "slurm/train_raphael.sh", *arguments]
        self.id = cluster.run(*command, env=settings, cwd=ROOT).strip()

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.is_file() else ""

    @property
    def steps(self) -> list[int]:
        """The steps taken by metrics.jsonl, repeated ones too."""
        path = self.dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return [row["step"] for row in rows if "train/loss" in row]  # a checkpoint has a row of its own

    def wait_step(self, step: int) -> None:
        wait_for(lambda: self.steps and self.steps[-1] >= step, 180, f"step {step}", self.details)

    def wait_restart(self, count: int) -> None:
        wait_for(lambda: f"restart {count}:" in self.log, 180, f"restart {count}", self.details)

    def details(self) -> str:
        """What Slurm says of the job and of the nodes, and the ends of the logs of the job and of the controller."""
        controller = (self.cluster.folder / "slurmctld.log").read_text()
        return f"{self.cluster.job(self.id)}\n{self.cluster.states()}\n{controller[-3000:]}\n{self.log[-3000:]}"

    def pids(self) -> dict[int, tuple[str, int]]:
        """The (node, process id) of each rank of the last start."""
        actual = re.findall(r"rank (\d+): (\S+), \S+, local rank \d+, pid (\d+)", (self.dir / "train.log").read_text())
        return {int(rank): (node, int(pid)) for rank, node, pid in actual}

    def finish(self, state: str = "COMPLETED", seconds: float = 400) -> str:
        actual = self.cluster.wait_job(self.id, seconds=seconds)["JobState"]
        assert actual == state, f"{actual}:\n{self.log[-5000:]}"
        return self.log


def losses(folder: Path) -> list[tuple[int, float]]:
    return read_metrics(folder / "metrics.jsonl")["train/loss"]


def files_of(folder: Path, step: int) -> dict:
    return json.loads((folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())["files"]


def test_nodes_with_sharded_experts_train_like_one_process(cluster: Cluster, tmp_path: Path, cache: str) -> None:
    steps = [cache, "train.max_steps=6"]
    jobs = [Job(cluster, tmp_path / f"{n}", [f"--nodes={n}"], [*steps, *SPREAD], PREFLIGHT="1") for n in (2, 4)]
    run_ranks(["raphael_dist/train.py", *SMALL, f"run.dir={tmp_path}/one", *steps], 1)
    expected = read_metrics(tmp_path / "one" / "metrics.jsonl")
    for job, nodes in zip(jobs, (2, 4), strict=True):
        assert "preflight passed" in job.finish()
        assert [node for node, _ in job.pids().values()] == [f"n{i + 1}" for i in range(nodes)]
        actual = read_metrics(job.dir / "metrics.jsonl")
        for tag in ("train/loss", "optim/grad_norm", "val/loss"):
            assert [v for _, v in actual[tag]] == pytest.approx([v for _, v in expected[tag]], rel=1e-4), tag
        assert (job.dir / "versions.json").is_file()
        assert all((job.dir / "logs" / f"rank-{rank:05d}.log").is_file() for rank in range(1, nodes))
        assert job.dir.stat().st_mode & 0o077 == 0


def test_a_run_survives_signals_kills_requeues_and_a_lost_node(
    cluster: Cluster, tmp_path: Path, cache: str, alone: Path
) -> None:
    job = Job(cluster, tmp_path, ["--nodes=2"], [cache, *LONG_RUN])
    job.wait_step(8)
    cluster.run("scancel", "--signal=USR1", job.id)
    job.wait_restart(1)
    assert "stopped after saving" in job.log
    saved = job.steps[-1]

    job.wait_step(saved + 8)
    assert f"resumed at step {saved}" in job.log
    os.kill(job.pids()[1][1], signal.SIGKILL)
    job.wait_restart(2)

    job.wait_step(job.steps[-1] + 8)
    cluster.run("scontrol", "requeue", job.id)
    job.wait_restart(3)
    cluster.run("scontrol", "requeue", job.id)  # while the ranks are starting
    job.wait_restart(4)

    job.wait_step(job.steps[-1] + 8)
    node, pid = job.pids()[1]
    cluster.stop(node, signal.SIGKILL)  # the whole node, as far as this job can tell
    os.kill(pid, signal.SIGKILL)
    job.wait_restart(5)
    assert node not in cluster.job(job.id)["NodeList"]

    job.finish()
    cluster.start_node(node)
    whole, actual = losses(alone), losses(job.dir)
    assert actual == whole
    assert files_of(job.dir, 120) == files_of(alone, 120)
    # Three ends without warning (the requeue of a starting run loses nothing) and at most an interval for each.
    assert len(job.steps) - 120 <= 3 * EVERY


def test_run_continues_on_fewer_nodes_with_the_same_global_batch(
    cluster: Cluster, tmp_path: Path, cache: str, alone: Path
) -> None:
    wait_for(lambda: cluster.states().count("idle") == 4, 60, "four idle nodes")
    job = Job(cluster, tmp_path, ["--nodes=3-4"], [cache, *LONG_RUN, *SPREAD, "parallel.elastic=true"])
    job.wait_step(8)
    assert len(job.pids()) == 4
    cluster.run("scontrol", "update", "nodename=n4", "state=down", "reason=test")
    cluster.stop("n4")  # or it would report for duty again
    try:
        log = job.finish(seconds=500)
    finally:
        cluster.start_node("n4")
    assert "nodes: 3, ranks per node: 1" in log
    assert "resumed at step" in log
    whole, actual = losses(alone), losses(job.dir)
    assert [step for step, _ in actual] == [step for step, _ in whole]
    assert [loss for _, loss in actual] == pytest.approx([loss for _, loss in whole], rel=2e-2)
    assert [loss for _, loss in actual[:12]] == pytest.approx([loss for _, loss in whole[:12]], rel=1e-4)


def test_time_limit_restarts_the_job_and_cancel_ends_it(cluster: Cluster, tmp_path: Path, cache: str) -> None:
    deaf = tmp_path / "python"  # replaces a run that neither saves nor ends in time
    deaf.write_text("#!/bin/bash\ntrap '' USR1 TERM\nwhile :; do sleep 1; done\n")
    deaf.chmod(0o755)
    # USR1 a second before the end: at once, which @300 of a minute would be, it could come before the trap is set.
    late = Job(cluster, tmp_path / "late", ["--nodes=1", "--time=1", "--signal=USR1@1"], [], PYTHON=str(deaf))
    job = Job(
        cluster,
        tmp_path / "job",
        ["--nodes=1", "--time=1", "--signal=USR1@1"],
        [cache, *LONG_RUN[1:], "train.max_steps=100000"],
    )
    late.wait_restart(1)
    assert "the time limit came before the run could save" in late.log
    cluster.run("scancel", late.id)
    job.wait_restart(1)
    # On a slow machine the second minute would end before the run has resumed.
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=30")
    wait_for(lambda: "resumed at step" in job.log, 180, "the resumed run")
    cluster.run("scancel", job.id)
    log = job.finish("CANCELLED")
    assert "restart 2" not in log
    time.sleep(8)
    assert cluster.job(job.id)["JobState"] == "CANCELLED"


def test_crash_loop_ends_and_user_error_is_not_retried(cluster: Cluster, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 9\n")
    broken.chmod(0o755)
    loop = Job(cluster, tmp_path / "loop", ["--nodes=1"], [], PYTHON=str(broken), MAX_RESTARTS="2")
    mistake = Job(cluster, tmp_path / "mistake", ["--nodes=2"], ["train.max_step=1"])
    log = mistake.finish("FAILED")
    assert "did you mean 'train.max_steps'?" in log
    assert "A restart would not help" in log
    assert cluster.job(mistake.id)["ExitCode"] == "2:0"
    log = loop.finish("FAILED")
    assert log.count("job " + loop.id) == 3
    assert "giving up" in log


def test_two_jobs_never_train_in_one_directory(cluster: Cluster, tmp_path: Path, cache: str) -> None:
    first = Job(cluster, tmp_path / "a", ["--nodes=1"], [cache, *LONG_RUN[1:], "train.max_steps=100000"])
    first.wait_step(1)
    second = Job(cluster, tmp_path / "b", ["--nodes=1"], [cache, *LONG_RUN, f"run.dir={first.dir}"])
    assert "in use by another process" in second.finish("FAILED")
    cluster.run("scancel", first.id)
    first.finish("CANCELLED")


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "deepspeed", "mpirun"])
def test_every_launcher_starts_two_ranks(cluster: Cluster, tmp_path: Path, cache: str, launcher: str) -> None:
    if launcher == "mpirun" and shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed (Debian: openmpi-bin)")
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    job = Job(cluster, tmp_path, ["--nodes=2"], [cache, "train.max_steps=2", *SPREAD], LAUNCHER=launcher, **root)
    job.finish()
    table = re.findall(r"rank (\d+): (\S+), cpu, local rank (\d+), .* by (.*)", (job.dir / "train.log").read_text())
    name = "deepspeed or torchrun" if launcher in ("torchrun", "deepspeed") else launcher
    assert table == [("0", "n1", "0", name), ("1", "n2", "0", name)]
    assert len(losses(job.dir)) == 2


def test_prove_names_a_node_with_another_torch(cluster: Cluster, tmp_path: Path) -> None:
    """The checks of numbers, which take minutes, are left out: tests/cluster/test_prove.py has them, and the exit codes."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, importlib.metadata as m\n"
        "original = m.version\n"
        "if os.environ.get('SLURMD_NODENAME') == 'n2':\n"
        "    m.version = lambda name: '2.11.0' if name == 'torch' else original(name)\n"
    )
    log, path = tmp_path / "slurm.log", tmp_path / "proof" / "report.json"
    command = ["sbatch", "--parsable", "--nodes=2", f"--output={log}", "slurm/prove.sh"]
    settings = {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path), "PROOF_DIR": str(path.parent), "OMP_NUM_THREADS": "1"}
    job = cluster.run(*command, env=settings, cwd=ROOT).strip()
    wait_for(lambda: log.is_file() and "Latency and bandwidth" in log.read_text(), 600, "result of the second check")
    cluster.run("scancel", job)
    report = json.loads(path.read_text())
    assert [rank["host"] for rank in report["environment"]["ranks"]] == ["n1", "n2"]
    problems = {check["name"]: check["problems"] for check in report["checks"] if check["status"] == "red"}
    assert list(problems) == ["environment"]
    assert problems["environment"][0].startswith("n2: torch is 2.11.0")
    assert "between nodes: all-to-all" in log.read_text()


def test_hostile_arguments_and_variables_are_data(cluster: Cluster, tmp_path: Path, cache: str) -> None:
    canary = tmp_path / "canary"
    attack = f"$(touch {canary}) `touch {canary}`; touch {canary}"
    secret = "s3cr3t-value"
    # Taken as they are: a run directory with spaces and more in its name, and a secret that nothing may write down.
    name = f"a b;$(touch canary) & '\"* {attack.replace('/', '_')}"[:200]  # a file's name has 255 bytes at most
    steps = [cache, "train.max_steps=1", "data.val_shards=[]", "sample.prompts=[]"]
    job = Job(cluster, tmp_path / "ok", ["--nodes=1"], steps, RUN_DIR=str(tmp_path / name), WANDB_API_KEY=secret)
    argument = Job(cluster, tmp_path / "argument", ["--nodes=1"], [attack])
    newline = Job(cluster, tmp_path / "newline", ["--nodes=1"], [], RUN_DIR=f"{tmp_path}/a\nb")
    job_name = Job(cluster, tmp_path / "job-name", ["--nodes=1", f"--job-name={attack}"], [], RUN_DIR="")
    launcher = Job(cluster, tmp_path / "launcher", ["--nodes=1"], [], LAUNCHER=f"srun;touch {canary}")
    assert "must have the form section.key=value" in argument.finish("FAILED")
    assert "control character" in newline.finish("FAILED")
    assert "cannot be the name of a folder" in job_name.finish("FAILED")
    assert "one of srun, torchrun, deepspeed, mpirun" in launcher.finish("FAILED")
    job.finish()
    assert (tmp_path / name / "checkpoints" / "latest").is_file()
    assert not canary.exists()
    assert not list(ROOT.glob("canary"))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if secret.encode() in path.read_bytes()]
    assert secret not in json.dumps(cluster.job(job.id))


@pytest.mark.parametrize("number", ["1;touch x", "1\n2", ""])
def test_invalid_job_number_is_refused(tmp_path: Path, number: str) -> None:
    env = {**os.environ, "SLURM_JOB_ID": number, "RAPHAEL_HOME": str(ROOT)}
    done = subprocess.run(
        ["bash", str(ROOT / "slurm/train_raphael.sh")], env=env, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_broken_node_is_named_and_excluded(cluster: Cluster, tmp_path: Path, cache: str) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$SLURMD_NODENAME" = n2 ] && exit 9\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    settings = {"PYTHON": str(python), "PREFLIGHT": "1", "SPARE_NODES": "1"}
    job = Job(cluster, tmp_path, ["--nodes=3"], [cache, "train.max_steps=2"], **settings)
    assert "n2: no report" in job.finish()
    assert [node for node, _ in job.pids().values()] == ["n1", "n3"]


def test_node_that_hangs_in_preflight_is_named_and_excluded(cluster: Cluster, tmp_path: Path, cache: str) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$SLURMD_NODENAME" = n2 ] && exec sleep 1000\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    settings = {"PYTHON": str(python), "PREFLIGHT": "1", "SPARE_NODES": "1", "PREFLIGHT_MINUTES": "1"}
    job = Job(cluster, tmp_path, ["--nodes=3"], [cache, "train.max_steps=2"], **settings)
    assert "n2: no report" in job.finish()
    assert [node for node, _ in job.pids().values()] == ["n1", "n3"]
