"""The run directory: who owns it, what runs in it, and where its log goes."""

import fcntl
import json
import logging
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import yaml

from raphael_dist import __version__
from raphael_dist.config import ARCHITECTURE_FIELDS, Config, to_yaml
from raphael_dist.errors import UserError
from raphael_dist.parallel.ranks import host_name

# Beside the architecture, what makes a run this run; all else (learning rate, length, ZeRO, ranks) may change on resume.
IDENTITY = (
    "run.seed",
    "diffusion.num_timesteps",
    "diffusion.schedule",
    "diffusion.prediction",
    "text.max_tokens",
    "image.buckets",
    "data.bucket_run",
    "data.window_shards",
    "data.flip",
    "train.global_batch",
)
PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "webdataset", "numpy")


def claim(config: Config) -> IO[str]:
    """Make the run directory this process's own and record configuration and versions in it. For rank 0.

    Returns the lock file: the directory is locked while it is open. Raises UserError when another run is in there, in use
    or of another identity, or when the directory cannot be written.
    """
    folder = config.run.dir
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {folder}: {error.strerror}; choose another run.dir") from None
    if not _lock(lock, config.run.lock_wait_s):
        raise UserError(f"run.dir: another process is training in {folder}; wait for it or choose another run.dir")
    _check_identity(config, folder)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "versions.json").write_text(json.dumps(versions(), indent=1))
    return lock


def _lock(file: IO[str], patience: float) -> bool:
    # After a lost node, what is left of the run before may take a while to notice that it has lost the others.
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.5)
        except OSError as error:  # some parallel file systems are mounted without locks
            print(
                f"warning: {file.name}: {error.strerror}: nothing keeps another run out of this directory", file=sys.stderr
            )
            break
        else:
            break
    file.truncate(0)
    file.write(_owner())
    file.flush()
    return True


def _owner() -> str:
    return f"{host_name()} {os.getpid()} {os.environ.get('SLURM_JOB_ID', '')} {os.environ.get('SLURM_RESTART_COUNT', '')}"


def check_owner(lock: IO[str] | None) -> None:
    """Raise RuntimeError when another run has taken the directory over: on some file systems a lock ends with its node."""
    if lock is not None and Path(lock.name).read_text() != _owner():
        raise RuntimeError(f"another process has taken over {Path(lock.name).parent}; this one writes nothing more there")


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and those it stands on."""
    return {"python": platform.python_version(), "raphael_dist": __version__, **{name: version(name) for name in PACKAGES}}


def _check_identity(config: Config, folder: Path) -> None:
    recorded = folder / "config.yaml"
    if not recorded.is_file():
        return
    try:
        old: Any = yaml.safe_load(recorded.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        old = None
    if not isinstance(old, dict) or not all(isinstance(section, dict) for section in old.values()):
        raise UserError(f"run.dir: {recorded} is not readable; repair it or choose another run.dir") from None
    new = yaml.safe_load(to_yaml(config))
    for dotted in (*(f"model.{f}" for f in ARCHITECTURE_FIELDS), *IDENTITY):
        section, field = dotted.split(".")
        was, wanted = old.get(section, {}).get(field), new[section][field]
        if was != wanted:
            raise UserError(
                f"run.dir: {folder} holds another run, with {dotted} = {was} where this one has {wanted}; "
                f"choose another run.dir, or {dotted}={was} to continue it"
            )


def start_logging(config: Config, rank: int) -> None:
    """Send log lines to `train.log` (rank 0) or `logs/rank-NNNNN.log`, and warnings of rank 0 to stderr too."""
    name = "train.log" if rank == 0 else f"logs/rank-{rank:05d}.log"
    path = config.run.dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    to_file = logging.FileHandler(path)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("raphael_dist")
    root.handlers = [to_file]
    root.setLevel(logging.INFO)
    root.propagate = False
    if rank == 0:
        to_terminal = logging.StreamHandler(sys.stderr)
        to_terminal.setLevel(logging.WARNING)
        to_terminal.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        root.addHandler(to_terminal)
