"""The commands of docs/launching.md on two nodes of network namespaces, compared with ranks that no launcher started."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.test_slurm import files_of, losses
from tests.lib import netns
from tests.lib.documents import blocks_of, is_command
from tests.lib.forks import NO_GPU
from tests.lib.launch import ROOT, run_ranks
from tests.lib.netns import Link, Network
from tests.training.test_training import SMALL

pytestmark = [
    pytest.mark.network,
    pytest.mark.slow,
    pytest.mark.timeout(700),
    pytest.mark.skipif(bool(netns.missing()), reason=f"no nodes: {netns.missing()}"),
]
PROGRAM = "raphael_dist/train.py"
LINES = [line for block in blocks_of("docs/launching.md") for line in block.lines if is_command(line)]
COMMANDS = [line.partition(PROGRAM)[0] for line in LINES]
ON_EVERY_NODE = ("torchrun", "deepspeed")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.cache_dir={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, cache: str) -> Path:
    """The same training by two ranks on this host."""
    folder = tmp_path_factory.mktemp("alone")
    run_ranks([PROGRAM, *SMALL, f"run.dir={folder}", cache, "train.max_steps=3"], 2)
    return folder


def words_for(network: Network, node: int, command: str, hosts: Path) -> list[str]:
    """Return a command of the page with this network's address, one rank per node, and the number of the node."""
    changes = {"10.0.0.1": network.addresses[0], "--hostfile hosts": f"--hostfile {hosts}"}
    changes |= {"--node_rank 0": f"--node_rank {node}", "--nproc_per_node 8": "--nproc_per_node 1"}
    changes |= {"-np 16": "-np 2", "ppr:8:": "ppr:1:"}
    for before, after in changes.items():
        command = command.replace(before, after)
    return shlex.split(command)


def write_remote_shell(network: Network, path: Path) -> None:
    """Write a program that replaces ssh: called with the name of the second node and a command, which it runs there."""
    enter = shlex.join(network.command(1, ["sh", "-c"]))
    path.write_text(f'#!/bin/sh\nshift\nexec {enter} "$*"\n')
    path.chmod(0o755)


@pytest.mark.parametrize("command", COMMANDS, ids=["torchrun", "torchrun-rendezvous", "deepspeed", "mpirun"])
def test_launcher_on_two_nodes_trains_as_plain_ranks(tmp_path: Path, cache: str, alone: Path, command: str) -> None:
    if command.startswith("mpirun") and shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed (Debian: openmpi-bin)")
    run, hosts, shell = tmp_path / "run", tmp_path / "hosts", tmp_path / "shell"
    arguments = [PROGRAM, *SMALL, f"run.dir={run}", cache, "train.max_steps=3"]
    env = {**os.environ, **NO_GPU, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_plm_rsh_agent": str(shell)}
    with Network([Link(whole=True)] * 2) as network, (tmp_path / "log").open("w+") as log:
        hosts.write_text("".join(f"{name} slots=1\n" for name in network.names))
        write_remote_shell(network, shell)
        launchers = [
            subprocess.Popen(
                network.command(node, [*words_for(network, node, command, hosts), *arguments]),
                env=env,
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )
            for node in range(2 if command.startswith(ON_EVERY_NODE) else 1)
        ]
        deadline = time.monotonic() + 240
        while any(launcher.poll() is None for launcher in launchers) and time.monotonic() < deadline:
            time.sleep(0.2)
        log.seek(0)
        assert [launcher.returncode for launcher in launchers] == [0] * len(launchers), log.read()[-5000:]
        assert min(network.counters(node).sent for node in range(2)) > 1e5
    table = (run / "train.log").read_text()
    assert all(f"rank {node}: node{node}, cpu, local rank 0" in table for node in range(2)), table
    assert losses(run) == losses(alone)
    assert files_of(run, 3) == files_of(alone, 3)
