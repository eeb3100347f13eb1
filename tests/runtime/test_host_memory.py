"""On a CPU the process keeps freed memory, unless the environment sets an allocator; old objects are not collected."""

import gc
import os
import subprocess
import sys
import weakref

import pytest

from raphael_dist.runtime.host_memory import without_long_collections

# Prints whether memory is kept, then how many pages a tensor of 64 MB costs once some of its size were freed.
PROGRAM = """
import ctypes, resource
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages would be few
import torch
from raphael_dist.runtime.host_memory import keep_freed_memory
print(keep_freed_memory())
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):  # seven more may be asked for first: what is cut off an aligned tensor waits in a cache of seven
    torch.ones(16 << 20)
before = faults()
torch.ones(16 << 20)
print(faults() - before)
"""


@pytest.mark.parametrize(
    ("env", "expected"), [({}, True), ({"MALLOC_ARENA_MAX": "4"}, False)], ids=["default", "set by the user"]
)
def test_new_tensor_reuses_freed_pages(env: dict[str, str], expected: bool) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM]
    output = subprocess.run(command, env=plain | env, capture_output=True, text=True, check=True).stdout.split()
    assert output[0] == str(expected)
    assert (int(output[1]) < 100) == expected


class Node:
    def __init__(self) -> None:
        self.itself = self


def test_garbage_collections_in_training_visit_new_objects_only() -> None:
    old, known = Node(), len(gc.get_objects())
    with without_long_collections():
        assert len(gc.get_objects()) < known / 10
        new = Node()
        new_ref, old_ref = weakref.ref(new), weakref.ref(old)
        del new, old
        gc.collect()
        assert new_ref() is None
        assert old_ref() is not None
    gc.collect()
    assert old_ref() is None, "the engine's circles go before the next stage is built"
