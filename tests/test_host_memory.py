"""On a CPU freed memory stays with the process, unless the environment says how it is to be; old objects are let alone."""

import gc
import os
import subprocess
import sys
import weakref

import pytest

from raphael_dist.parallel.host_memory import without_long_collections

# Says whether memory is kept, then how many pages a tensor of 64 MB costs once some of its size were freed.
PROGRAM = """
import resource, torch
from raphael_dist.parallel.host_memory import keep_freed_memory
print(keep_freed_memory())
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):  # seven more may be asked for first: what is cut off an aligned tensor waits in a cache of seven
    torch.ones(16 << 20)
before = faults()
torch.ones(16 << 20)
print(faults() - before)
"""


@pytest.mark.parametrize(("env", "kept"), [({}, True), ({"MALLOC_ARENA_MAX": "4"}, False)], ids=["as it is", "by the user"])
def test_a_tensor_takes_the_pages_of_the_one_before(env: dict[str, str], kept: bool) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM]
    told = subprocess.run(command, env=plain | env, capture_output=True, text=True, check=True).stdout.split()
    assert told[0] == str(kept)
    assert (int(told[1]) < 100) == kept


class Node:
    def __init__(self) -> None:
        self.itself = self


def test_collections_while_training_see_only_what_is_new() -> None:
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
