"""Rank: trains as the command line does, with faults of its environment (see tests/torture/).

The argument `spec` is that of forked_train.py, or {"arguments": command line of train.py} to train on a real data set. In
both cases spec["around"] has the faults by rank: {"0": {...}, "1": {...}}, with the keys
    calls: [log, how, n]: the call number n (from 0) that changes the file system kills the rank (how = "kill") or fails with
        the errno `how`. With "kill", earlier calls are written to the file `log`.
    clock: seconds: time.time() is wrong by this from its 31st call on
    memory: bytes: limit of memory (RLIMIT_AS), in addition to what the process has when it starts
    never: true: the rank stops itself before it contacts other ranks
    shm: bytes: size of /dev/shm
    node: [namespace, host name]: the simulated node on which the rank runs (tests/lib/netns.py)
    umask, uid, env, chdir: umask, user, environment variables and folder of the process
    ema: step: the average of the weights has a NaN when this step is saved
"""

import ctypes
import os
import resource
import signal
import socket
import threading
import time
from typing import Any

import psutil
import torch

from raphael_dist import train
from tests.lib.relay import enter
from tests.workers import forked_train

_NEW_HOST_NAME = 0x4000000  # CLONE_NEWUTS
_KEEP_CAPABILITIES, _AMBIENT, _AMBIENT_RAISE = 8, 47, 2  # of prctl(2)
_READ_SEARCH = 2  # CAP_DAC_READ_SEARCH


def become_user(uid: int) -> None:
    """Make this process run as the user `uid`, who may read all files but not write them.

    The right to read is needed, because Python may be installed in a folder that only root can read.
    """
    libc, word = ctypes.CDLL(None, use_errno=True), ctypes.c_uint32
    _checked(libc.prctl(_KEEP_CAPABILITIES, 1, 0, 0, 0))
    os.setuid(uid)
    header = (word * 2)(0x20080522, 0)  # version 3 of capset(2), this thread
    one = 1 << _READ_SEARCH
    _checked(libc.capset(header, (word * 6)(one, one, one, 0, 0, 0)))  # effective, permitted, inheritable; the high ones
    _checked(libc.prctl(_AMBIENT, _AMBIENT_RAISE, _READ_SEARCH, 0, 0))  # for the programs that it starts


def fail_call(log: str, how: str | int, at: int) -> None:
    """Make the call number `at` (from 0) that changes the file system kill this process, or fail.

    `how`: "kill", or the errno of the error. `log`: file to which calls are written; only for "kill".
    """
    lock, calls = threading.Lock(), [0]
    if how == "kill":
        forked_train.count_calls(log, at)
        return

    def failing(real: Any, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)
            with lock:
                calls[0] += 1
                mine = calls[0] - 1 == at
            if mine:
                raise OSError(int(how), os.strerror(int(how)), str(args[0]))
            return real(*args, **kwargs)

        return call

    for name in forked_train.COUNTED:
        setattr(os, name, failing(getattr(os, name), name))


def jump(seconds: float) -> None:
    """Make time.time() return a value that is wrong by `seconds` from its 31st call on."""
    real, looks = time.time, [0]

    def jumping() -> float:
        looks[0] += 1
        return real() + (seconds if looks[0] > 30 else 0.0)

    time.time = jumping


def poison_average(step: int) -> None:
    """Put a NaN into the moving average of the weights just before `step` is saved."""
    real = forked_train.build

    def build(*args: Any, **more: Any) -> Any:
        run = real(*args, **more)
        begin = run.store.begin

        def poisoned(progress: Any) -> None:
            if progress.step == step:
                run.ema.values[0].flatten()[0] = float("nan")
            begin(progress)

        run.store.begin = poisoned  # type: ignore[method-assign]
        return run

    forked_train.build = build  # type: ignore[assignment]


def shrink_shared_memory(size: int) -> None:
    """Mount a file system of `size` bytes as /dev/shm. Only this process and its children see it."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = {"namespace": 0x20000, "private": 0x44000}  # CLONE_NEWNS; MS_PRIVATE | MS_REC
    calls = (
        libc.unshare(flags["namespace"]),
        libc.mount(b"none", b"/", None, flags["private"], None),
        libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, f"size={size}".encode()),
    )
    _checked(*calls)


def _checked(*calls: int) -> None:
    assert not any(calls), os.strerror(ctypes.get_errno())


def surround(around: dict[str, Any]) -> None:
    """Cause the faults `around` of this rank in this process, except \"ema\". The text of the module lists them."""
    os.environ.update(around.get("env", {}))
    if "node" in around:
        space, name = around["node"]
        enter(space)
        _checked(ctypes.CDLL(None, use_errno=True).unshare(_NEW_HOST_NAME))
        socket.sethostname(name)
    if around.get("never"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if "shm" in around:
        shrink_shared_memory(around["shm"])
    if "umask" in around:
        os.umask(around["umask"])
    if "chdir" in around:
        os.chdir(around["chdir"])
    if "uid" in around:
        become_user(around["uid"])
    if "clock" in around:
        jump(around["clock"])
    if "calls" in around:
        fail_call(*around["calls"])
    if "memory" in around:
        limit = psutil.Process().memory_info().vms + around["memory"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def main(spec: dict[str, Any]) -> int:
    """Train with the faults of `spec` for this rank; return the exit code."""
    around = spec.get("around", {}).get(os.environ["RANK"], {})
    surround(around)
    if "arguments" in spec:
        torch.set_num_threads(1)
        return train.main(spec["arguments"])
    if "ema" in around:
        poison_average(around["ema"])
    return forked_train.main(spec)
