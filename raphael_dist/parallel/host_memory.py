"""What the C library does with freed memory, which is where tensors lie on a CPU."""

import ctypes
import os

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
