"""One thread per process: ranks and workers share the machine's cores."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forks import Forks, server

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run what shares a fixture of its module in one worker (`--dist loadgroup`), so that it is made once."""
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        if any(each[-1].scope == "module" and each[-1].baseid == item.nodeid.split("::")[0] for each in fixtures):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))


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
