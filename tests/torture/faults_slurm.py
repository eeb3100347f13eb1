"""Faults of jobs on a real Slurm of four nodes on this host: `sbatch slurm/train_raphael.sh` on two of them."""

import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.cluster.test_slurm import EVERY, LONG_RUN, Job, files_of, losses
from tests.lib.launch import run_ranks
from tests.lib.slurm_cluster import Cluster, wait_for
from tests.torture.faults_disk import disk, leave_room, remount
from tests.torture.faults_process import send
from tests.torture.kinds import fault
from tests.torture.trial import Outcome, Trial, refused, survived
from tests.training.test_training import SMALL

LAST = 120  # of LONG_RUN
TIMEOUT_S = 600.0


class SlurmTrial:
    """A job, the cluster that is shared by all trials, and the same training without Slurm."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.draw, shared = trial, trial.draw, trial.shared
        self.cache = f"data.cache_dir={trial.oracle}/slurm-cache"
        if "cluster" not in shared:
            shared["cluster"] = Cluster(4).__enter__()
            shared.setdefault("close", []).append(shared["cluster"].__exit__)
        self.cluster: Cluster = shared["cluster"]
        if "alone" not in shared:
            folder = trial.oracle / "alone"
            more = ["--deepspeed_config=ds_configs/zero1.json", f"run.dir={folder}", self.cache, *LONG_RUN]
            run_ranks(["raphael_dist/train.py", *SMALL, *more], 2, timeout=TIMEOUT_S)
            shared["alone"] = folder
        self.alone: Path = shared["alone"]
        self.job: Job | None = None

    def submit(self, *more: str, nodes: int = 2, **env: str) -> Job:
        """Submit the job, always with the same run directory."""
        fields = {override.partition("=")[0] for override in more}
        arguments = [self.cache, *(o for o in LONG_RUN if o.partition("=")[0] not in fields), *more]
        self.job = Job(self.cluster, self.trial.folder, [f"--nodes={nodes}"], arguments, **env)
        return self.job

    def any_moment(self) -> str:
        """Wait for a random moment between the job's start and its middle; return a description of it."""
        assert self.job is not None
        wait_for(lambda: self.cluster.job(self.job.id).get("JobState") == "RUNNING", 120, "the job to run")
        if self.draw.random() < 0.3:
            time.sleep(self.draw.uniform(0, 20))
            return f"at step {self.job.steps[-1]}" if self.job.steps else "while it was starting"
        self.job.wait_step(self.draw.randrange(1, LAST // 2))
        time.sleep(self.draw.uniform(0, 0.5))
        return f"at step {self.job.steps[-1]}"

    def pids(self) -> dict[int, tuple[str, int]]:
        """Wait until the ranks have logged their nodes and process ids; return them."""
        assert self.job is not None
        log = self.job.dir / "train.log"
        wait_for(lambda: log.is_file() and "local rank" in log.read_text(), 180, "ranks")
        return self.job.pids()

    def finish(self, sudden: int) -> None:
        """Wait for the job's end and compare it with the oracle. sudden: number of ends without warning."""
        assert self.job is not None
        self.job.finish(seconds=TIMEOUT_S)
        assert files_of(self.job.dir, LAST) == files_of(self.alone, LAST), "other weights or moments at the end"
        assert losses(self.job.dir) == losses(self.alone), "other losses"
        repeated = len(self.job.steps) - LAST
        assert repeated <= sudden * EVERY, f"{repeated} steps were taken again after {sudden} ends"

    def cleanup(self) -> None:
        """Cancel all jobs and start all nodes."""
        wait_for(lambda: not self.cluster.cancel_all(), 120, "the end of all jobs")
        for node in self.cluster.nodes:
            if node not in self.cluster._daemons:
                self.cluster.start_node(node)
        wait_for(lambda: self.cluster.states().count("idle") == len(self.cluster.nodes), 120, "idle nodes")


def on_slurm(act: Callable[[SlurmTrial], Outcome]) -> Callable[[Trial], Outcome]:
    """Return a fault that gets the cluster and cleans it up afterwards."""

    def inject(trial: Trial) -> Outcome:
        case = SlurmTrial(trial)
        try:
            return act(case)
        except AssertionError as error:
            log = case.job.log[-3000:] if case.job is not None else ""
            raise AssertionError(f"{error}\n{log}") from None
        finally:
            case.cleanup()

    return inject


def slurm(name: str) -> Callable[[Callable[[SlurmTrial], Outcome]], Callable[[Trial], Outcome]]:
    """Register a fault of a job."""
    return lambda act: fault(name, "slurm", "slurm")(on_slurm(act))


def processes_of(job: str, name: str) -> list[psutil.Process]:
    """Return the processes of a job with this program name."""
    processes = []
    for process in psutil.process_iter(["name"]):
        try:
            if process.info["name"] == name and process.environ().get("SLURM_JOB_ID") == job:
                processes.append(process)
        except psutil.Error:
            continue
    return processes


@slurm("kill -9 of a task")
def task(case: SlurmTrial) -> Outcome:
    case.submit()
    when = case.any_moment()
    rank, (node, pid) = case.draw.choice(sorted(case.pids().items()))
    there = send(pid, signal.SIGKILL)
    case.finish(sudden=1)
    return survived(f"rank {rank} on {node}, {when}{'' if there else ', which was over'}")


@slurm("kill -9 of the launcher")
def launcher(case: SlurmTrial) -> Outcome:
    job = case.submit()
    when = case.any_moment()
    for process in processes_of(job.id, "srun"):
        send(process.pid, signal.SIGKILL)
    case.finish(sudden=1)
    return survived(f"srun, {when}")


@slurm("kill -9 of the batch shell, and the job sent again")
def batch_shell(case: SlurmTrial) -> Outcome:
    job = case.submit()
    when = case.any_moment()
    shells = [
        p for p in processes_of(job.id, "bash") + processes_of(job.id, "slurm_script") if "slurm_script" in str(p.cmdline())
    ]
    assert shells, "no batch shell"
    send(min(shells, key=lambda p: p.create_time()).pid, signal.SIGKILL)
    case.cluster.wait_job(job.id, "FAILED", "CANCELLED", "COMPLETED", "NODE_FAIL")
    case.submit("run.lock_wait_s=120")
    case.finish(sudden=1)
    return survived(when)


@slurm("scontrol requeue")
def requeue(case: SlurmTrial) -> Outcome:
    job, times = case.submit(), case.draw.choice([1, 1, 2])
    moments = []
    for i in range(times):
        moments.append(case.any_moment())
        case.cluster.run("scontrol", "requeue", job.id, check=False)
        if case.cluster.job(job.id)["JobState"] == "COMPLETED":
            break
        job.wait_restart(i + 1)
    case.finish(sudden=times)
    return survived(", ".join(moments))


@slurm("USR1, as before a time limit or a preemption")
def usr1(case: SlurmTrial) -> Outcome:
    job = case.submit()
    when = case.any_moment()
    case.cluster.run("scancel", "--signal=USR1", job.id, check=False)
    if case.draw.random() < 0.3:
        case.cluster.run("scancel", "--signal=USR1", job.id, check=False)
    case.finish(sudden=0)
    return survived(when)


@slurm("scancel, and the job sent again")
def cancelled(case: SlurmTrial) -> Outcome:
    job = case.submit()
    when = case.any_moment()
    case.cluster.run("scancel", job.id)
    case.cluster.wait_job(job.id)
    case.submit("run.lock_wait_s=120")
    case.finish(sudden=1)
    return survived(when)


@slurm("a node that is lost")
def node_lost(case: SlurmTrial) -> Outcome:
    job = case.submit()
    when = case.any_moment()
    node, pid = case.draw.choice(sorted(case.pids().values()))
    case.cluster.stop(node, signal.SIGKILL)
    for process in processes_of(job.id, "slurmstepd"):
        with_node = process.environ().get("SLURMD_NODENAME") == node
        send(process.pid, signal.SIGKILL) if with_node else None
    send(pid, signal.SIGKILL)
    case.finish(sudden=2)
    return survived(f"{node}, {when}")


@slurm("kill -9 of a node's slurmd, which comes back")
def slurmd(case: SlurmTrial) -> Outcome:
    case.submit()
    when, node = case.any_moment(), case.draw.choice(sorted({node for node, _ in case.pids().values()}))
    case.cluster.stop(node, signal.SIGKILL)
    time.sleep(case.draw.uniform(0, 4))
    case.cluster.start_node(node)
    case.finish(sudden=1)
    return survived(f"{node}, {when}")


@slurm("kill -9 of slurmctld, which comes back")
def slurmctld(case: SlurmTrial) -> Outcome:
    case.submit()
    when = case.any_moment()
    case.cluster.stop("slurmctld", signal.SIGKILL)
    time.sleep(case.draw.uniform(0, 5))
    case.cluster._launch("slurmctld", "-D")
    wait_for(case.cluster.states, 60, "slurmctld")
    case.finish(sudden=1)
    return survived(when)


@slurm("scontrol suspend for longer than the time-out")
def suspended(case: SlurmTrial) -> Outcome:
    job = case.submit("run.hang_timeout_s=10")
    when = case.any_moment()
    case.cluster.run("scontrol", "suspend", job.id, check=False)
    time.sleep(25)
    case.cluster.run("scontrol", "resume", job.id, check=False)
    case.finish(sudden=0)
    assert "restart 1:" not in job.log, "a healthy job was ended"
    return survived(when)


@slurm("SIGSTOP of a task")
def hung(case: SlurmTrial) -> Outcome:
    job = case.submit("run.hang_timeout_s=10")
    when = case.any_moment()
    rank, (_, pid) = case.draw.choice(sorted(case.pids().items()))
    there = send(pid, signal.SIGSTOP)
    case.finish(sudden=1)
    if there and "restart 1:" in job.log:
        assert f"rank {rank}" in job.log, "the hanging rank was not named"
    return survived(f"rank {rank}, {when}")


@slurm("a second job in the same run directory")
def rival(case: SlurmTrial) -> Outcome:
    first = case.submit()
    first.wait_step(1)
    arguments = [case.cache, *LONG_RUN, f"run.dir={first.dir}"]
    second = Job(case.cluster, case.trial.folder / "rival", ["--nodes=1"], arguments)
    state = case.cluster.wait_job(second.id, seconds=TIMEOUT_S)["JobState"]
    log = second.log
    case.finish(sudden=0)
    if state == "COMPLETED":
        return survived("it came when the first was complete, and had nothing to do")
    assert "in use by another process" in log, log[-2000:]
    assert "Traceback" not in log
    return refused("run.dir is in use by another process")


@slurm("a full disk under a job")
def full_disk(case: SlurmTrial) -> Outcome:
    run = case.trial.folder / "run"
    run.mkdir()
    with disk(run, "size=200m,mode=700"):
        job = case.submit()
        when = case.any_moment()
        leave_room(run, 8192)
        state = case.cluster.wait_job(job.id, seconds=TIMEOUT_S)["JobState"]
        log = job.log
        assert "Traceback" not in log, log[-3000:]
        assert "restart 5:" not in log
        remount(run, "size=200m")
        if state != "COMPLETED":
            assert case.cluster.job(job.id)["ExitCode"] == "4:0", case.cluster.job(job.id)["ExitCode"]
            case.submit()
        case.finish(sudden=20)  # every save failed: what is repeated is bounded by the disk, not by the interval
    line = next((line for line in log.splitlines() if line.startswith("error")), "")
    return refused(f"{when}: {line.replace(str(run), '')[:140]}") if line else survived(when)


@slurm("a broken or hanging node in the preflight")
def preflight(case: SlurmTrial) -> Outcome:
    how, node = case.draw.choice(["exit 9", "sleep 1000", "kill -9 $$"]), case.draw.choice(["n1", "n2", "n3"])
    python = case.trial.folder / "python"
    # Only ranks: the batch shell, on the first node, is to judge the others.
    broken = f'[ "$SLURMD_NODENAME" = {node} ] && [ -n "$SLURM_STEP_ID" ] && {{ {how}; exit 1; }}'
    python.write_text(f'#!/bin/bash\n{broken}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    settings = {"PYTHON": str(python), "PREFLIGHT": "1", "SPARE_NODES": "1", "PREFLIGHT_MINUTES": "1"}
    job = case.submit(nodes=3, **settings)
    case.finish(sudden=0)
    assert f"{node}: no report" in job.log, "the node was not named"
    assert node not in {where for where, _ in job.pids().values()}
    return survived(f"{how} on {node}")


@slurm("hostile names, arguments and variables")
def hostile(case: SlurmTrial) -> Outcome:
    canary = case.trial.folder / "canary"
    attack = case.draw.choice(
        [f"$(touch {canary})", f"`touch {canary}`", f"; touch {canary}", f"\ntouch {canary}", f"|touch {canary}"]
    )
    where = case.draw.choice(["argument", "RUN_DIR", "job name", "LAUNCHER", "MASTER_PORT", "OVERRIDES", "CONFIG"])
    env = {where: attack} if where.isupper() else {}
    if where == "MASTER_PORT":
        env = {where: f"PATH[$(touch {canary})]"}
    options = [f"--job-name={attack}"] if where == "job name" else []
    if where == "job name":
        env = {"RUN_DIR": ""}
    arguments = [attack] if where == "argument" else [case.cache, *LONG_RUN[1:], "train.max_steps=1"]
    job = Job(case.cluster, case.trial.folder, ["--nodes=1", *options], arguments, **env)
    state = case.cluster.wait_job(job.id, seconds=TIMEOUT_S)["JobState"]
    log = job.log
    assert not canary.exists(), f"{where} ran"
    assert "Traceback" not in log, log[-2000:]
    if state == "COMPLETED":
        return survived(f"{where}: taken as it is")
    lines = [line for line in log.splitlines() if re.match("error|.*train.py: error", line)]
    assert len(lines) == 1, log[-2000:]
    return refused(f"{where}: {lines[0].replace(str(case.trial.folder), '')[:120]}")
