"""What freed memory costs a step: the C library's, where tensors lie on a CPU, and Python's."""

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

# Of malloc.h; -1 means never.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_SET_BY_THE_USER = ("MALLOC_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed for the next tensor instead of giving it back to the system; return whether it does.

    Each step allocates what the one before freed. glibc asks the system for every tensor above 32 MB, which hands out its
    pages cleared, one fault each: a quarter of a step where weights are that large. A process holds its highest use of
    memory from then on, which the next step wants anyway. Nothing is changed where the environment sets an allocator or
    glibc's own variables.
    """
    if any(name.startswith(_SET_BY_THE_USER) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_TRIM_THRESHOLD, -1)) and bool(mallopt(_MMAP_MAX, 0))


@contextmanager
def without_long_collections() -> Iterator[None]:
    """Context in which Python's garbage collector passes over whatever is there when it begins.

    Modules and the model are a million objects, which a full collection walks through in 0.4 s: every eight steps where
    blocks are recomputed, on each rank at another time, and all others wait.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
