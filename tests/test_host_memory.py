"""On a CPU freed memory stays with the process, unless the environment says how it is to be."""

import os
import subprocess
import sys

import pytest

# Says whether memory is kept, then how many pages a tensor of 64 MB costs once one of its size was freed.
PROGRAM = """
import resource, torch
from raphael_dist.parallel.host_memory import keep_freed_memory
print(keep_freed_memory())
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
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
