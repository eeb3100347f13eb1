"""Avoids pauses in training steps that are caused by freeing memory, in the C library and in Python."""

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

# Of malloc.h; -1 means never.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_USER_SETTINGS = ("MALLOC_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for later tensors; return whether it does so.

    Each step allocates the memory that the previous step freed. By default glibc returns tensors above 32 MB to the system
    and requests them again, and the system clears every page. With weights above 32 MB, this takes a quarter of a step.
    After this call the process never gives memory back. Nothing is changed (False) if the environment selects another
    allocator or sets glibc's variables.
    """
    if any(name.startswith(_USER_SETTINGS) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_TRIM_THRESHOLD, -1)) and bool(mallopt(_MMAP_MAX, 0))


@contextmanager
def without_long_collections() -> Iterator[None]:
    """Return a context manager inside which Python's garbage collector ignores all objects that were created before.

    The modules and the model are about a million objects, for which a full collection takes 0.4 s. With activation
    checkpointing, each rank runs a full collection every eight steps. Ranks do so at different times, and all other ranks
    wait meanwhile.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
