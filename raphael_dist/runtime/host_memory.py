"""Keeps the cost of freed memory out of steps: that of the C library, for tensors on a CPU, and that of Python."""

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

# Of malloc.h; -1 means never.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_USER_SETTINGS = ("MALLOC_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next tensor; return whether it does.

    Each step allocates the memory that the previous step freed. By default glibc returns tensors above 32 MB to the system
    and requests them again, and the system clears every page. That takes a quarter of a step with weights of this size. From
    now on the process keeps the memory of its highest use. Nothing changes if the environment sets an allocator or glibc's
    own variables.
    """
    if any(name.startswith(_USER_SETTINGS) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_TRIM_THRESHOLD, -1)) and bool(mallopt(_MMAP_MAX, 0))


@contextmanager
def without_long_collections() -> Iterator[None]:
    """Return a context in which Python's garbage collector ignores all objects that exist at its beginning.

    Modules and the model are a million objects. A full collection visits them in 0.4 s: every eight steps with activation
    checkpointing, on each rank at another time, while all others wait.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
