"""Collectives of our own (parallel/async_collectives.py)."""

from pathlib import Path

import pytest

from tests.lib.forks import Forks


@pytest.mark.parametrize("world_size", [2, 3])
def test_reduce_scatter_is_as_exact_as_an_all_reduce(forks: Forks, tmp_path: Path, world_size: int) -> None:
    forks.must(tmp_path, world_size, worker="sums")
