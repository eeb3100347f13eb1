"""Ranks whose launcher is killed stop by themselves; no other ancestor counts as a launcher."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from raphael_dist.runtime.launchers import Process, launcher_in, launchers
from raphael_dist.runtime.stop_request import StopRequest
from tests.lib.forks import NO_GPU
from tests.lib.launch import ROOT
from tests.training.test_training import SMALL, wait_for

COMMANDS = {
    "/usr/bin/python3 -u -m deepspeed.launcher.launch --world_info=e30= train.py": "deepspeed.launcher.launch",
    "/venv/bin/python /venv/bin/deepspeed --num_gpus 2 train.py": "deepspeed",
    "/venv/bin/python3.11 /venv/bin/torchrun --nproc_per_node 2 train.py": "torchrun",
    "python -m torch.distributed.run train.py": "torch.distributed.run",
    "mpirun -np 2 python train.py": "mpirun",
    "/usr/bin/orted --hnp": "orted",
    "slurmstepd: [123.0]": "slurmstepd",
    "bash -c deepspeed\ttrain.py": "",
    "python raphael_dist/train.py": "",
    "python -m pytest torchrun": "",
    "vim deepspeed": "",
    "python": "",
    "": "",
}


def test_launchers_are_recognised_by_their_command_lines() -> None:
    assert {line: launcher_in(line.split(" ")) for line in COMMANDS} == COMMANDS


RANK = """
import sys, time
from raphael_dist.runtime.stop_request import StopRequest
stop = StopRequest()
print(len(stop.launchers), flush=True)
while not stop.requested:
    time.sleep(0.05)
"""
SCRIPTS = {  # of a launcher, as it starts the rank
    "torchrun": "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', sys.argv[1]]))",
    "deepspeed": (
        "import subprocess, sys\n"
        "sys.exit(subprocess.call([sys.executable, sys.argv[0].replace('deepspeed', 'torchrun'), sys.argv[1]]))"
    ),
    "starter.py": "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', sys.argv[1]]))",
}


@pytest.mark.parametrize(("name", "number", "known"), [("torchrun", 9, 1), ("deepspeed", 15, 2), ("starter.py", 9, 0)])
def test_rank_stops_when_its_launcher_ends_but_no_other_parent(tmp_path: Path, name: str, number: int, known: int) -> None:
    for script, text in SCRIPTS.items():
        (tmp_path / script).write_text(text)
    command = [sys.executable, str(tmp_path / name), RANK]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        above = len(launchers())  # of these tests
        assert int(launcher.stdout.readline()) == known + above
        rank = psutil.Process(launcher.pid).children(recursive=True)[-1]
        launcher.send_signal(number)
        launcher.wait(10)
        if known:
            assert not psutil.wait_procs([rank], timeout=10)[1]
            assert launcher.stderr is not None
            assert f"the launcher {name} (process {launcher.pid}) has ended" in launcher.stderr.read()
        else:
            assert psutil.wait_procs([rank], timeout=1)[1]
            rank.kill()


def test_process_with_a_reused_id_is_not_the_launcher() -> None:
    assert not Process(os.getpid(), 1, "torchrun").alive
    stop = StopRequest()
    assert not stop.requested


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed.launcher.runner", "torch.distributed.run"])
def test_killed_launcher_leaves_no_ranks(tmp_path: Path, launcher: str) -> None:
    ranks = ["--num_gpus=2"] if "deepspeed" in launcher else ["--nproc_per_node=2"]
    arguments = [*SMALL, f"run.dir={tmp_path}/run", f"data.cache_dir={tmp_path}/cache", "train.max_steps=100000"]
    command = [
        sys.executable,
        "-m",
        launcher,
        *ranks,
        "raphael_dist/train.py",
        *arguments,
        "sample.prompts=[]",
        "data.val_shards=[]",
    ]
    environment = {**os.environ, **NO_GPU, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    family = []
    try:
        wait_for((tmp_path / "run" / "metrics.jsonl").exists, 240)
        family = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        assert not psutil.wait_procs(family, timeout=60)[1], "ranks continue without their launcher"
        assert list((tmp_path / "run" / "checkpoints").glob("step-*")), "they saved before they left"
    finally:
        process.kill()
        for rank in family:
            if rank.is_running():
                rank.kill()
