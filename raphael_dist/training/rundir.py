"""The run directory: who owns it, what runs in it, and where its log goes."""

import contextlib
import fcntl
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import IO

from raphael_dist.checkpoint.folders import step_of
from raphael_dist.checkpoint.progress import progress_of
from raphael_dist.checkpoint.reader import CheckpointReader, newest
from raphael_dist.config import Config, to_yaml
from raphael_dist.errors import UserError, cannot_write
from raphael_dist.identity import check_same_run
from raphael_dist.parallel.long_work import Tell, quiet
from raphael_dist.parallel.ranks import host_name
from raphael_dist.storage import files
from raphael_dist.storage.versions import versions


def claim(config: Config, tell: Tell = quiet) -> IO[str]:
    """Make the run directory this process's own and record configuration and versions in it. For rank 0.

    `tell` gets a word while another run is waited for.

    Returns the lock file: the directory is locked while it is open. Raises UserError when another run is in there, in use
    or of another identity, or when the directory cannot be written; NotSavedError when it is full.
    """
    folder = config.run.dir
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")
        if not _lock(lock, config.run.lock_wait_s, tell):
            raise UserError(f"run.dir: another process is training in {folder}; wait for it or choose another run.dir")
        check_unowned(config)
        files.replace_bytes(folder / "config.yaml", to_yaml(config).encode())
        files.replace_bytes(folder / "versions.json", json.dumps(versions(), indent=1).encode())
    except OSError as error:
        raise cannot_write(folder, error) from None
    return lock


def _lock(file: IO[str], patience: float, tell: Tell) -> bool:
    # After a lost node, what is left of the run before may take a while to notice that it has lost the others.
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            tell("waiting for another run to leave it")
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


def check_unowned(config: Config) -> None:
    """Raise UserError when the run directory holds another run: by its newest checkpoint, since nothing was trained before
    the first; a start that failed owns nothing."""
    for checkpoint in newest(config.run.dir / "checkpoints"):
        try:
            before = CheckpointReader(checkpoint).config()
        except UserError:
            continue
        check_same_run(before, config, str(config.run.dir))
        return


def newest_step(config: Config) -> int:
    """Return the step of the newest checkpoint, whole or not; 0 without one."""
    found = newest(config.run.dir / "checkpoints")
    return step_of(found[0]) or 0 if found else 0


def beginnings(config: Config) -> list[int]:
    """Return from how many samples seen on the run may go on: those of each of its checkpoints that says so."""
    found = []
    for checkpoint in newest(config.run.dir / "checkpoints"):
        with contextlib.suppress(UserError):
            found.append(progress_of(CheckpointReader(checkpoint).manifest).samples_seen)
    return found


class _LogFile(logging.FileHandler):
    """A log that ends no run when it cannot be written, and says so once."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Say what is wrong, where logging would print a traceback at every line."""
        if not self._told:
            print(f"warning: cannot write {self.baseFilename}: {sys.exc_info()[1]}; training goes on", file=sys.stderr)
        self._told = True


def start_logging(config: Config, rank: int) -> None:
    """Send log lines to `train.log` (rank 0) or `logs/rank-NNNNN.log`, and rank 0's from run.log_level on to stderr too."""
    name = "train.log" if rank == 0 else f"logs/rank-{rank:05d}.log"
    path = config.run.dir / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        to_file = _LogFile(path)
    except OSError as error:
        raise cannot_write(config.run.dir, error) from None
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("raphael_dist")
    root.handlers = [to_file]
    level = getattr(logging, config.run.log_level.upper())
    root.setLevel(min(logging.INFO, level))
    root.propagate = False
    if rank == 0:
        to_terminal = logging.StreamHandler(sys.stderr)
        to_terminal.setLevel(level)
        to_terminal.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        root.addHandler(to_terminal)
