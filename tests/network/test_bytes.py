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

STAGES = [*(Case(2, 1, stage=stage) for stage in range(4)), Case(2, 1, overlap=True)]
REPEATED = [Case(2, 1, stage=stage, accumulation=3) for stage in (1, 2)]
SHARDED = [Case(2, 1, space_ep=2, time_ep=2)]
# Megabytes, so that gloo's own messages do not count: 64 bytes for each part that is sent.
MODEL = {"channels": [96, 128], "expert_width": [96, 128], "checkpoint_activations": "none"}


def measure(forks: Forks, folder: Path, cases: list[Case]) -> dict[Case, Row]:
    """Take measurements on two nodes, all with the same number of ranks per node."""
    config, out, per_node = str(folder / "tiny.yaml"), str(folder / "out"), cases[0].per_node
    tree = {**TREE, "model": {**TREE["model"], **MODEL}, "data": {"shards": ["synthetic"]}}
    Path(config).write_text(yaml.safe_dump(tree))
    with Network([Link(), Link()]) as network:
        nodes = [network.space(node) for node in range(2) for _ in range(per_node)]
        spec = {"nodes": nodes, "master": network.addresses[0], "config": config, "out": out}
        forks.must(folder, len(nodes), worker="network_bytes", timeout=600, cases=[asdict(case) for case in cases], **spec)
    return dict(zip(cases, read_rows(cases, config, out), strict=True))


@pytest.fixture(scope="module")
def rows(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Row]:
    return measure(forks, tmp_path_factory.mktemp("bytes"), [*STAGES, *REPEATED, *SHARDED])


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


def test_ranks_of_a_node_send_their_sums_once(forks: Forks, tmp_path: Path) -> None:
    """With n bytes, the network carries n / 2 from each of two nodes for gradients, and as much for weights."""
    for case, row in measure(forks, tmp_path, [Case(2, 2, stage=2), Case(2, 2, stage=3)]).items():
        assert row.payload == pytest.approx(row.planned, rel=0.02), case
        # Counters include what the ranks of a node send to each other: each of the two sends 3/4 n instead of 1/4 n.
        assert row.counted == pytest.approx(3 * row.planned, rel=0.02), case
