"""Shared fixtures. Each process uses one thread, because ranks and workers share the cores."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before it is read

import torch

from tests.lib.forks import Forks, server

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels run on CPU tensors


# Minutes each: started last, one of them would run alone on a single core at the end.
LONGEST = ("test_precision.py", "test_watchdog.py", "test_checkpoint_faults.py", "test_ablations.py", "test_data_prep.py",
           "test_shipped_model.py", "test_examples.py")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; `make test-slow` keeps that order."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def forks() -> Forks:
    """The server that forks ranks, shared by the session."""
    return server()


@pytest.fixture(scope="session", autouse=True)
def _close_server() -> Iterator[None]:
    yield
    if server.cache_info().currsize:
        server().close()


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Return (random state, canonical folder) of a model with experts and of a dense one. Tests must not change them."""
    from tests.lib.checkpoints import DENSE, MOE, handmade_canonical, random_state

    folder = tmp_path_factory.mktemp("sources")
    sources = {}
    for name, config in (("moe", MOE), ("dense", DENSE)):
        state = random_state(config)
        sources[name] = (state, handmade_canonical(folder / name, config, state))
    return sources
