"""Faults of links between nodes, each once; tools/torture.py draws their places and moments at random."""

from pathlib import Path

import pytest

from tests.lib import netns
from tests.torture.campaign import KINDS, Campaign

pytestmark = [
    pytest.mark.network,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(netns.missing()), reason=f"no nodes: {netns.missing()}"),
]


def test_no_fault_of_a_link_loses_anything(tmp_path: Path) -> None:
    with Campaign(0, tmp_path, [], lambda _: None) as trials:
        kinds = [kind for kind in KINDS.values() if kind.group == "links"]
        lost = [result for kind in kinds if (result := trials.run_trial(kind, "0.0")).outcome == "lost"]
    assert not lost
