"""Collectives of our own (parallel/async_collectives.py)."""

from pathlib import Path

import pytest

from tests.lib.forks import Forks

# The node of each rank, and whether sums are made inside each node first.
LAYOUTS = {
    "1 x 2": ([0, 0], False),
    "2 x 1": ([0, 1], False),
    "1 x 3": ([0, 0, 0], False),
    "2 x 2": ([0, 0, 1, 1], True),
    "2 x 3": ([0, 0, 0, 1, 1, 1], True),
    "3 x 2": ([0, 0, 1, 1, 2, 2], True),
    "2 x 2, in any order": ([0, 1, 1, 0], True),
    "nodes of two and one ranks": ([0, 0, 1], False),
}


@pytest.mark.parametrize(("nodes", "two_stages"), LAYOUTS.values(), ids=list(LAYOUTS))
def test_sums_and_gathers_are_those_of_torch(forks: Forks, tmp_path: Path, nodes: list[int], two_stages: bool) -> None:
    forks.must(tmp_path, len(nodes), worker="sums", nodes=nodes, two_stages=two_stages)
