"""The run directory: its lock, the check that no other run uses it, and its log files."""

import contextlib
import fcntl
import json
import logging
import os
import sys
import time
from io import TextIOWrapper
from pathlib import Path
from typing import IO

from raphael_dist.checkpoint.folders import newest, step_of
from raphael_dist.checkpoint.progress import progress_of
from raphael_dist.checkpoint.reader import CheckpointReader
from raphael_dist.config.resume_check import check_same_run
from raphael_dist.config.schema import Config, to_yaml
from raphael_dist.errors import UserError, write_error
from raphael_dist.runtime.progress_bar import Reporter, no_report
from raphael_dist.runtime.ranks import host_name
from raphael_dist.storage import files
from raphael_dist.storage.versions import versions
from raphael_dist.text import LineFormat


def acquire(config: Config, report: Reporter = no_report) -> IO[str]:
    """Lock the run directory, and write configuration and software versions into it. Called on rank 0.

    Args:
        config: the run's configuration.
        report: called repeatedly while another process holds the lock, so that other ranks see progress.

    Returns:
        The open lock file. The directory stays locked until this file is closed.

    Raises:
        UserError: another process trains in the directory, the directory is not writable, or it contains checkpoints of a
            run with other settings.
        NotSavedError: the disk is full.
    """
    folder = config.run.dir
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a", opener=files.no_links)
        if not _lock(lock, config.run.lock_wait_s, report):
            raise UserError(
                f"run.dir={folder} is in use by another process, which trains in it. Wait until it ends, or choose another "
                "run.dir."
            )
        check_unowned(config)
        files.replace_bytes(folder / "config.yaml", to_yaml(config).encode())
        files.replace_bytes(folder / "versions.json", json.dumps(versions(), indent=1).encode())
    except OSError as error:
        raise write_error(folder, error) from None
    return lock


def _lock(file: IO[str], wait_s: float, report: Reporter) -> bool:
    # After a node is lost, the other ranks of the previous run may take a while to end.
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            report("waiting until the run that uses this directory ends")
            time.sleep(0.5)
        except OSError as error:  # some parallel file systems are mounted without locks
            print(
                f"warning: {file.name} cannot be locked ({error.strerror}), so another run could use this directory at the "
                "same time",
                file=sys.stderr,
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
    """Raise RuntimeError if another run has locked the run directory after this run had locked it.

    This can happen because some file systems drop a lock when its node fails. `lock`: the open lock file that `acquire`
    returned; None on ranks other than 0, where nothing is checked.
    """
    if lock is not None and Path(lock.name).read_text() != _owner():
        raise RuntimeError(f"another process has locked {Path(lock.name).parent}, so this process writes nothing more to it")


def check_unowned(config: Config) -> None:
    """Check that the newest readable checkpoint in run.dir is from a run with these settings.

    A run directory without a readable checkpoint may be used, even if it has other files of an earlier run.

    Args:
        config: the run's configuration.

    Raises:
        UserError: the checkpoint is from a run with other settings.
    """
    for checkpoint in newest(config.run.dir / "checkpoints"):
        try:
            stored_config = CheckpointReader(checkpoint).config()
        except UserError:
            continue
        check_same_run(stored_config, config, str(config.run.dir))
        return


def newest_step(config: Config) -> int:
    """Return the step of the newest checkpoint in run.dir, even if it is damaged; 0 if there is none."""
    checkpoints = newest(config.run.dir / "checkpoints")
    return step_of(checkpoints[0]) or 0 if checkpoints else 0


def resume_points(config: Config, report: Reporter = no_report) -> list[int]:
    """Return `samples_seen` (number of used training samples) of each readable checkpoint in run.dir.

    The run may resume from any of them. `report` is called with the name of each checkpoint, to show progress.
    """
    samples_seen = []
    for checkpoint in newest(config.run.dir / "checkpoints"):
        report(checkpoint.name)
        with contextlib.suppress(UserError):
            samples_seen.append(progress_of(CheckpointReader(checkpoint).manifest).samples_seen)
    return samples_seen


class _LogFile(logging.FileHandler):
    """A log file. If it cannot be written, one warning is printed and the run continues."""

    _warned = False

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding=self.encoding, errors=self.errors, opener=files.no_links)

    def handleError(self, record: logging.LogRecord) -> None:
        """Print a warning the first time that a line cannot be written. Python's logging prints a traceback each time."""
        if not self._warned:
            print(
                f"warning: {self.baseFilename} cannot be written ({sys.exc_info()[1]}); training continues", file=sys.stderr
            )
        self._warned = True


def start_logging(config: Config, rank: int) -> None:
    """Write log messages of the package to `train.log` (rank 0) or `logs/rank-NNNNN.log` (other ranks) in run.dir.

    Rank 0 also writes messages of level run.log_level and above to stderr. Raises NotSavedError if the disk is full, and
    UserError if the folder cannot be written.
    """
    name = "train.log" if rank == 0 else f"logs/rank-{rank:05d}.log"
    path = config.run.dir / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        to_file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise write_error(config.run.dir, error) from None
    to_file.setFormatter(LineFormat("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("raphael_dist")
    root.handlers = [to_file]
    level = getattr(logging, config.run.log_level.upper())
    root.setLevel(min(logging.INFO, level))
    root.propagate = False
    if rank == 0:
        to_terminal = logging.StreamHandler(sys.stderr)
        to_terminal.setLevel(level)
        to_terminal.setFormatter(LineFormat("%(levelname)s: %(message)s"))
        root.addHandler(to_terminal)
