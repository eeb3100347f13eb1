"""The environment variables with which launchers number the ranks.

DeepSpeed and torchrun set RANK, mpirun sets OMPI_COMM_WORLD_RANK, srun sets SLURM_PROCID. Without them there is one rank.
This module does not import torch, because the command line uses it before anything else.
"""

import os
from collections.abc import Mapping
from typing import NamedTuple


class Launcher(NamedTuple):
    """A launcher, and the names of the environment variables that it sets for each rank.

    Attributes:
        name: name of the launcher for messages, e.g. "mpirun".
        rank, world_size: variables with the global rank and with the number of ranks.
        local_rank, local_world_size: variables with the rank on its host and with the number of ranks on this host.
    """

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


LAUNCHERS = (
    Launcher("deepspeed or torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    Launcher(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)


def launcher_of(env: Mapping[str, str] = os.environ) -> Launcher | None:
    """Return the launcher that started this process; None if its environment has no launcher's variables."""
    for launcher in LAUNCHERS:
        # An interactive Slurm shell has SLURM_PROCID without being one of several ranks.
        if launcher.rank in env and (launcher.name != "srun" or "SLURM_STEP_ID" in env):
            return launcher
    return None


def rank_of(env: Mapping[str, str] = os.environ) -> str:
    """Return the rank of this process, as the string in the launcher's environment variable; "0" without a launcher.

    The string may not be a number, because it is not checked here.

    Args:
        env: the environment variables (default: those of this process).
    """
    launcher = launcher_of(env)
    return env[launcher.rank] if launcher else "0"


def world_size_of(env: Mapping[str, str] = os.environ) -> int:
    """Return the number of ranks from the launcher's variable; 1 without a launcher, or if the variable is not a number."""
    launcher = launcher_of(env)
    text = env.get(launcher.world_size, "") if launcher else ""
    return int(text) if text.isdigit() else 1
