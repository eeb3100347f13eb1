"""A real Slurm on this host: munged, slurmctld and several slurmd with their own ports and folders."""

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raphael_dist.runtime.ranks import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
# A requeued job waits for cred_expire + 1 seconds (120 by default). KillWait is the time between TERM and KILL.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=5,batch_sched_delay=1
ReturnToService=2
SlurmdTimeout=10
KillWait=15
OverTimeLimit=0
InactiveLimit=0
FirstJobId={first_job}
"""


def missing() -> str | None:
    """Return why no Slurm can run here, or None."""
    absent = [name for name in PROGRAMS if program(name) is None]
    return f"{', '.join(absent)} not installed (Debian: slurmctld slurmd munge slurm-client)" if absent else None


def program(name: str) -> str | None:
    """Return the path of a program; daemons are often outside PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Poll until `condition()` is true and return its value. AssertionError, with `what`, when it stays false."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} within {seconds:.0f} s"
        time.sleep(0.25)
    return value


class Cluster:
    """Context manager: a controller and nodes n1, n2, ... with four CPUs each, all ended on exit."""

    def __init__(self, num_nodes: int = 4) -> None:
        self.nodes = [f"n{i + 1}" for i in range(num_nodes)]
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.env = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        for name in [n for n in self.env if n.startswith(("SLURM_", "SBATCH_")) and n != "SLURM_CONF"]:
            del self.env[name]
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self._daemons:
            self.cancel_all("--full", "--signal=KILL")
        for name in reversed(list(self._daemons)):
            self.stop(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        self.folder.chmod(0o755)  # the socket's folder must be open to all
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = [f"--{n}-file={self.folder}/munge.{n}" for n in ("log", "pid", "seed")]
        files = [*files, f"--key-file={key}", f"--socket={self.folder}/munge.socket"]
        self._launch("munged", "--foreground", "--force", *files)
        wait_for((self.folder / "munge.socket").exists, 20, "munged")
        (self.folder / "state").mkdir()
        host, user = socket.gethostname().split(".")[0], pwd.getpwuid(os.getuid()).pw_name
        # Ports of jobs follow from their numbers, and another cluster of this host may run at the same time.
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
        first_job = 1 + 250 * worker
        text = CONFIG.format(host=host, port=free_port(), user=user, folder=self.folder, first_job=first_job)
        for node in self.nodes:
            text += f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=4 RealMemory=1000\n"
        text += "PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP DefMemPerCPU=1\n"
        (self.folder / "slurm.conf").write_text(text)
        self._launch("slurmctld", "-D", "-i")
        for node in self.nodes:
            self.start_node(node)
        wait_for(lambda: self.states().count("idle") == len(self.nodes), 60, "idle nodes")

    def start_node(self, node: str) -> None:
        """Start the node's slurmd."""
        self._launch("slurmd", "-D", "-N", node, name=node)

    def _launch(self, command: str, *arguments: str, name: str | None = None) -> None:
        path = program(command)
        assert path is not None
        log = open(self.folder / f"{name or command}.out", "a")
        self._daemons[name or command] = subprocess.Popen(
            [path, *arguments], env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )

    def stop(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal to a daemon ("slurmctld" or a node's name) and wait for its end."""
        daemon = self._daemons.pop(name)
        daemon.send_signal(number)
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def run(self, *command: str, check: bool = True, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
        """Run a Slurm command and return its output. AssertionError when it fails."""
        done = subprocess.run(command, env={**self.env, **(env or {})}, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def cancel_all(self, *options: str) -> list[str]:
        """Cancel every job, with options of scancel, and return those there were."""
        jobs = self.run("squeue", "-h", "-o", "%A", check=False).split()
        for job in jobs:
            self.run("scancel", *options, job, check=False)
        return jobs

    def states(self) -> list[str]:
        """Return the state of every node."""
        return self.run("sinfo", "-h", "-N", "-o", "%T", check=False).split()

    def job(self, number: str) -> dict[str, str]:
        """Return the fields that scontrol shows of a job."""
        words = self.run("scontrol", "-o", "show", "job", number, check=False).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_job(self, number: str, *states: str, seconds: float = 240) -> dict[str, str]:
        """Wait until a job is in one of `states` (by default: until it has ended) and return what scontrol shows of it."""
        expected = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_for(
            lambda: self.job(number).get("JobState") in expected, seconds, f"job {number} to be {' or '.join(expected)}"
        )
        return self.job(number)
