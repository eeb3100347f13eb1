"""One thread per process: ranks and workers share the machine's cores."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before whatever reads it: threads that wait for each other spin

import torch

from tests.forks import Forks, server

torch.set_num_threads(1)


# Minutes each: begun last, one of them would keep a single core at work when all others are done.
LONGEST = ("test_precision.py", "test_watchdog.py", "test_checkpoint_faults.py", "test_ablations.py", "test_prepare.py",
           "test_shipped_model.py", "test_examples.py")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; `make test-slow` keeps that order."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def forks() -> Forks:
    """A process that has imported everything and forks ranks from itself."""
    return server()


@pytest.fixture(scope="session", autouse=True)
def _no_server_is_left() -> Iterator[None]:
    yield
    if server.cache_info().currsize:
        server().close()


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Return the random state of a model with experts and of a dense one, and their canonical folders, not to be changed."""
    from tests.checkpoints import DENSE, MOE, handmade_canonical, random_state

    folder = tmp_path_factory.mktemp("sources")
    found = {}
    for name, config in (("moe", MOE), ("dense", DENSE)):
        state = random_state(config)
        found[name] = (state, handmade_canonical(folder / name, config, state))
    return found
