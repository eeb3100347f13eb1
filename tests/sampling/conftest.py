"""Fixtures that several files here use."""

from typing import Any

import pytest

from tests.sampling.small_pipeline import build, make_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_parts(tmp_path_factory.mktemp("text"))


@pytest.fixture
def pipeline(parts: dict[str, Any]) -> Any:
    return build(parts)
