"""Facts about this host: its GPUs, and its network interface to another host."""

import os
import socket
from pathlib import Path

import psutil
import torch

from raphael_dist.errors import UserError
from raphael_dist.text import JsonObject

NVIDIA_DEVICE = Path("/dev/nvidia0")


def check_gpus_are_usable() -> None:
    """Raise UserError if this host has a GPU, or Slurm gave this job one, but torch can use none.

    Training would then run on the CPUs. An empty CUDA_VISIBLE_DEVICES turns this check off, to train on the CPUs on purpose.
    """
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        return
    slurm = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if slurm != "0" or NVIDIA_DEVICE.exists():
        reason = f"Slurm gave this job {slurm} on this node" if slurm != "0" else f"{NVIDIA_DEVICE} exists"
        raise UserError(
            f"torch must be able to use the GPUs of this host ({reason}), but torch {torch.__version__} can use none. "
            "Install the packages of constraints-cuda.txt, update the driver, or start the container with its GPUs "
            "(docker: --gpus all, apptainer: --nv). To use the CPUs, set CUDA_VISIBLE_DEVICES=-1."
        )


def gpu_use(device: torch.device) -> JsonObject:
    """Return the GPU's identity and how much of its memory is in use.

    Call it before this process allocates GPU memory, so that the GiB are those of other processes.

    Args:
        device: device of this rank.

    Returns:
        {"id": UUID of the GPU, "used_gib": GiB in use on it}; {} for a CPU.
    """
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {"id": str(torch.cuda.get_device_properties(device).uuid), "used_gib": (total - free) / 2**30}


def network(host: str) -> str:
    """Return this machine's interface and IPv4 address for traffic to `host` ("eth0 10.0.0.5"), or an error message."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.connect((host, 9))  # sends nothing
            address = s.getsockname()[0]
    except OSError as error:
        return f"no route to {host}: {error.strerror}"
    interfaces = psutil.net_if_addrs().items()
    names = [name for name, addresses in interfaces if any(address == a.address for a in addresses)]
    return " ".join([*names[:1], address])
