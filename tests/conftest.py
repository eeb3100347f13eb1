"""One thread per process: ranks and workers share the machine's cores."""

from collections.abc import Iterator

import pytest
import torch

from tests.forks import Forks

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """A process that has imported everything and forks ranks from itself."""
    with Forks() as server:
        yield server
