"""Bytes that nodes send in a step, on the wire, as ranks count them (`comm/*`), and as planned."""

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from benchmarks.network import Case, Row, read_rows
from tests.lib import netns
from tests.lib.forks import Forks
from tests.lib.netns import Link, Network
from tests.lib.synthetic import TREE

pytestmark = [
    pytest.mark.network,
    pytest.mark.timeout(700),
    pytest.mark.skipif(bool(netns.missing()), reason=f"no nodes: {netns.missing()}"),
]

STAGES = [Case(2, 1, stage=stage) for stage in range(4)]
REPEATED = [Case(2, 1, stage=stage, accumulation=3) for stage in (1, 2)]
SHARDED = [Case(2, 1, space_ep=2, time_ep=2)]
# Megabytes, so that gloo's own messages do not count: 64 bytes for each part that is sent.
MODEL = {"channels": [96, 128], "expert_width": [96, 128], "checkpoint_activations": "none"}


@pytest.fixture(scope="module")
def rows(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Row]:
    folder = tmp_path_factory.mktemp("bytes")
    config, out = str(folder / "tiny.yaml"), str(folder / "out")
    tree = {**TREE, "model": {**TREE["model"], **MODEL}, "data": {"shards": ["synthetic"]}}
    Path(config).write_text(yaml.safe_dump(tree))
    cases = [*STAGES, *REPEATED, *SHARDED]
    with Network([Link(), Link()]) as network:
        spec = {"nodes": [network.space(0), network.space(1)], "master": network.addresses[0], "config": config, "out": out}
        forks.must(folder, 2, worker="network_bytes", timeout=600, cases=[asdict(case) for case in cases], **spec)
    return dict(zip(cases, read_rows(cases, config, out), strict=True))


def test_counted_bytes_are_on_the_wire(rows: dict[Case, Row]) -> None:
    for case, row in rows.items():
        assert row.payload == pytest.approx(row.counted, rel=0.02), case
        # Full frames, acknowledgements, and what a busy TCP repeats.
        assert 1 + netns.HEADERS / 1448 < row.wire / row.payload < 1.2, case


def test_planned_bytes_are_on_the_wire(rows: dict[Case, Row]) -> None:
    for case in (*STAGES, *REPEATED):
        assert rows[case].planned == pytest.approx(rows[case].payload, rel=0.02), case


def test_reduce_scatter_sends_half_of_an_all_reduce(rows: dict[Case, Row]) -> None:
    """With ZeRO-2, gradients and weights cross the link once each: as much as the all-reduce of ZeRO-0."""
    assert rows[STAGES[2]].payload == pytest.approx(rows[STAGES[0]].payload, rel=0.02)
