"""The preflight on nodes with a broken link: it names the node that is cut off or slow, and only this one."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.lib import netns
from tests.lib.launch import ROOT
from tests.lib.netns import Link, Network

pytestmark = [
    pytest.mark.network,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(netns.missing()), reason=f"no nodes: {netns.missing()}"),
]


@pytest.mark.parametrize(
    ("fault", "victim", "reason"),
    [
        ("down", 2, "has not answered within"),
        ("receives", 1, "has not answered within"),
        ("down between checks", 2, "all_reduce"),
        ("down between checks", 0, "all_reduce"),
        ("slow", 2, "slow to most other nodes"),
    ],
)
def test_node_with_a_broken_link_is_named(fault: str, victim: int, reason: str, tmp_path: Path) -> None:
    with Network([Link()] * 3) as network:
        if fault == "down":
            network.set_link(victim, "down")
        elif fault == "slow":
            network.set_rate(victim, 1)
        elif fault in ("sends", "receives"):
            network.cut(victim, fault)  # type: ignore[arg-type]
        command = ["-m", "tests.workers.preflight_pause"] if fault == "down between checks" else ["tools/check_cluster.py"]
        arguments = ["--out", str(tmp_path / "out"), "--config", "emoji-tiny", f"run.dir={tmp_path}/run"]
        ranks = network.start_ranks([*command, *arguments])
        if fault == "down between checks":
            deadline = time.monotonic() + 120
            while len(list(tmp_path.glob("out/paused-*"))) < 3 and time.monotonic() < deadline:
                time.sleep(0.05)
            network.set_link(victim, "down")
            (tmp_path / "out" / "go").touch()
        codes, outputs = netns.finish(ranks, 150)
        names = network.names
    assert codes == [1] * 3, outputs
    judge = ["tools/check_cluster.py", "--judge", str(tmp_path / "out"), "--ranks", "3", "--need", "2", "--nodes", *names]
    done = subprocess.run([sys.executable, *judge], cwd=ROOT, capture_output=True, text=True, timeout=120)
    faults = [line for line in done.stdout.splitlines() if line.startswith("fault: ")]
    assert {line.split(": ")[1] for line in faults} == {f"node{victim}"}, done.stdout
    assert any(reason in line for line in faults), done.stdout
    assert done.returncode == 4, "the others suffice"
    good = (tmp_path / "out" / "good-nodes").read_text().split()
    assert good == [name for name in names if name != f"node{victim}"]
