"""Disks that are full, slow, read-only, or fail once."""

import errno
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raphael_dist.errors import EXIT_NOT_SAVED
from tests.torture.kinds import fault
from tests.torture.trial import EVERY, STEPS, WORLD, Outcome, Trial, refused, survived


@contextmanager
def disk(folder: Path, options: str) -> Iterator[Path]:
    """Put a folder on a file system of its own, in memory."""
    held = folder.with_name("moved")
    if folder.exists():
        folder.rename(held)
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True, capture_output=True)
    try:
        if held.exists():
            subprocess.run(["cp", "-a", f"{held}/.", str(folder)], check=True, capture_output=True)
        yield folder
        subprocess.run(["cp", "-a", f"{folder}/.", str(held)], check=True, capture_output=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()
        if held.exists():
            held.rename(folder)


def remount(folder: Path, options: str) -> None:
    """Change a file system while it is in use."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True, capture_output=True)


def used(folder: Path) -> int:
    """Return the bytes that are taken on a file system."""
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def leave_room(folder: Path, room: int) -> None:
    """Make a file system so small that `room` bytes are left, while others write to it."""
    for _ in range(20):
        with suppress(subprocess.CalledProcessError):  # more was written since it was asked how much there is
            remount(folder, f"size={used(folder) + room}")
            return
        time.sleep(0.02)
    raise AssertionError(f"{folder} never came to rest")


def train_without_room(trial: Trial, at: int) -> list[int]:
    """Train where something is full; return the exit codes. Nothing saved up to step `at` may be lost."""
    codes = trial.train()
    ended = trial.output
    assert set(codes) <= {0, 2, EXIT_NOT_SAVED}, f"exit codes {codes}:\n{ended}"
    assert "Traceback" not in ended, ended[-3000:]
    assert trial.newest() >= at
    return codes


@fault("a full disk, from the start or after some steps", "disks")
def full(trial: Trial) -> Outcome:
    at = trial.begin()
    room = trial.draw.choice([0, 4096, 100_000, 500_000, 2_000_000, 4_000_000])
    (trial.run / "checkpoints").mkdir(exist_ok=True)
    with disk(trial.run, "size=64m"):
        leave_room(trial.run, room)
        codes = train_without_room(trial, at)
        error = "" if not any(codes) else next(line for line in trial.output.splitlines() if line.startswith("error"))
        remount(trial.run, "size=64m")
        trial.finish()
    return refused(error.replace(str(trial.run), "")[:200]) if error else survived(f"{room} bytes were enough")


@fault("a disk that is full for a while", "disks")
def full_for_a_while(trial: Trial) -> Outcome:
    trial.begin()
    wait, seconds = trial.draw.uniform(1.0, 3.5), trial.draw.uniform(0.2, 1.5)

    def squeeze(pids: list[int]) -> None:
        time.sleep(wait)
        leave_room(trial.run, 4096)
        time.sleep(seconds)
        remount(trial.run, "size=64m")

    (trial.run / "checkpoints").mkdir(exist_ok=True)
    with disk(trial.run, "size=64m"):
        codes = trial.train(squeeze)
        assert set(codes) <= {0, EXIT_NOT_SAVED}, f"exit codes {codes}:\n{trial.output}"
        assert "Traceback" not in trial.output, trial.output[-3000:]
        trial.newest()
        trial.finish()
    return survived(f"for {seconds:.1f} s, exit codes {codes}")


@fault("no more inodes", "disks")
def inodes(trial: Trial) -> Outcome:
    at, more = trial.begin(), trial.draw.choice([0, 1, 2, 3, 5, 8, 13, 21])
    (trial.run / "checkpoints").mkdir(exist_ok=True)
    with disk(trial.run, "size=64m"):
        files = 1 + sum(1 for _ in trial.run.rglob("*"))
        remount(trial.run, f"size=64m,nr_inodes={files + more}")
        codes = train_without_room(trial, at)
        remount(trial.run, "size=64m,nr_inodes=100000")
        trial.finish()
    return survived(f"{more} were left, exit codes {codes}")


@fault("a file that may not grow beyond a size, on one rank", "disks")
def file_size(trial: Trial) -> Outcome:
    trial.begin(at=trial.draw.choice([0, 2]))
    step, rank = trial.draw.choice(range(4, STEPS, EVERY)), trial.draw.randrange(WORLD)
    size = int(10 ** trial.draw.uniform(2, 5.5))
    saving = [{"ranks": [rank], "step": step, "file_size": size, "for_one_save": True}]
    codes = trial.train(faults={"chunk": 1 << 16, "saving": saving})
    assert codes == [0] * WORLD, f"exit codes {codes}:\n{trial.output}"
    trial.check_equals_oracle()
    assert trial.newest() == STEPS
    if not (trial.run / "checkpoints" / f"step-{step:08d}").exists():
        assert f"checkpoint of step {step} was not written, and the previous one remains: rank {rank}: no space" in trial.log
    return survived(f"{size} bytes on rank {rank} in step {step}")


@fault("a call to the file system that fails once", "disks")
def fails_once(trial: Trial) -> Outcome:
    at, rank, call = trial.begin(), trial.draw.randrange(WORLD), int(trial.draw.triangular(4, 200, 30))
    number = trial.draw.choice(
        [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ESTALE, errno.EDQUOT, errno.EMFILE]
    )
    around = {rank: {"calls": ["", number, call]}}
    codes = trial.train(around=around, sections={"run": {"hang_timeout_s": 20}})
    newest = trial.newest()
    assert newest >= at, f"the checkpoint of step {at} is gone"
    assert all(codes) or not any(codes), f"one rank continued alone: {codes}\n{trial.output}"
    ended = trial.output
    trial.finish(damaged=True)
    what = f"{errno.errorcode[number]} at call {call} of rank {rank}"
    if not any(codes):
        return survived(what)
    assert "Traceback" not in ended, f"{what}, exit codes {codes}:\n{ended[-3000:]}"
    errors = [line for line in ended.splitlines() if line.startswith("error")]
    assert errors, f"{what}: ended with {codes} and no error line"
    return refused(f"{what}: {errors[0].replace(str(trial.run), '')[:140]}; continued from step {newest}")


@fault("a rank whose user may not write to the run directory", "disks")
def permissions(trial: Trial) -> Outcome:
    at, rank = trial.begin(), trial.draw.randrange(WORLD)
    trial.outputs.mkdir()
    for folder in (trial.folder.parent, trial.folder, trial.outputs):
        folder.chmod(0o777)
    before = trial.snapshot()
    codes = trial.train(around={rank: {"uid": 65534}})
    line = trial.check_refused(codes)
    assert "Permission denied" in line, line
    assert trial.snapshot() == before
    shutil.rmtree(trial.outputs)  # some of it is the other user's
    trial.finish()
    return refused(f"rank {rank}: {line.replace(str(trial.run), '')}; continued from step {at}")


@fault("a read-only file system in the middle of training", "disks")
def read_only(trial: Trial) -> Outcome:
    at, wait = trial.begin(), trial.draw.uniform(0.0, 3.5)

    def freeze(pids: list[int]) -> None:
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline:
            time.sleep(0.01)
        busy(lambda: remount(trial.run, "ro"))

    (trial.run / "checkpoints").mkdir(exist_ok=True)
    with disk(trial.run, "size=64m"):
        codes = trial.train(freeze)
        ended = trial.output
        assert "Traceback" not in ended, ended[-3000:]
        assert trial.newest() >= at
        remount(trial.run, "rw")
        trial.finish()
    return survived(f"after {wait:.1f} s, exit codes {codes}")


def busy(act: object) -> None:
    """Retry while files are open for writing, which keeps a file system from becoming read-only."""
    for _ in range(50):
        try:
            act()  # type: ignore[operator]
        except subprocess.CalledProcessError:
            time.sleep(0.05)
        else:
            return


@fault("a slow disk under one rank", "disks")
def slow(trial: Trial) -> Outcome:
    trial.begin()
    rank, seconds = trial.draw.randrange(WORLD), trial.draw.uniform(0.1, 1.0)
    step, seen, over = trial.draw.choice(range(2, STEPS, EVERY)), [], threading.Event()
    latest = trial.run / "checkpoints" / "latest"

    def watch() -> None:
        while not over.wait(0.01):
            try:
                name = latest.read_text()
            except OSError:
                continue
            if not (latest.parent / name).is_dir():
                seen.append(name)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        saving = [{"ranks": [rank], "step": step, "sleep_in_fsync": seconds}]
        trial.finish(faults={"saving": saving})
    finally:
        over.set()
        watcher.join()
    assert not seen, f"latest names {seen}, which is not there"
    return survived(f"{seconds:.1f} s for each sync of rank {rank} from step {step} on")
