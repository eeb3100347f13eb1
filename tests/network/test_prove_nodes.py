"""`sbatch slurm/prove.sh` on nodes of network namespaces, each with an address and a link of its own."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lib.launch import ROOT
from tests.lib.netns import Link, Network
from tests.lib.slurm_cluster import Cluster, wait_for
from tests.network import SLURM_MARKS

pytestmark = SLURM_MARKS


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three nodes, and one for the controller, which notices no lost node before `prove` does."""
    with Network([Link(whole=True)] * 4) as network, Cluster(network=network, slurmd_timeout=300) as running:
        yield running


class Proof:
    """A submitted `prove.sh` with the `checks`, their time limit in seconds, its log and its reports."""

    def __init__(self, cluster: Cluster, folder: Path, nodes: int, checks: str, limit_s: int = 180) -> None:
        self._cluster, self.folder, self._log = cluster, folder / "proof", folder / "slurm.log"
        python = folder / "python"  # the script calls it with -m raphael_dist prove --out DIR
        python.write_text(f'#!/bin/sh\nshift 3\nexec {sys.executable} -m tests.workers.prove_quickly "$@"\n')
        python.chmod(0o755)
        settings = {"PYTHON": str(python), "PROOF_DIR": str(self.folder), "CHECKS": checks, "LIMIT_S": str(limit_s)}
        command = ["sbatch", "--parsable", f"--nodes={nodes}", f"--output={self._log}", "slurm/prove.sh"]
        self.id = cluster.run(*command, env={**settings, "OMP_NUM_THREADS": "1"}, cwd=ROOT).strip()

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.is_file() else ""

    def finish(self, code: int) -> dict:
        """Wait for the end of the job, and check its exit code; return the report."""
        job = self._cluster.wait_job(self.id, seconds=500)
        assert job["ExitCode"] == f"{code}:0", self.log
        report: dict = json.loads((self.folder / "report.json").read_text())
        assert report["exit_code"] == code
        assert f"exit code {code}: read {self.folder}/report.html" in self.log
        return report


def test_two_nodes_pass_and_have_a_report(cluster: Cluster, tmp_path: Path) -> None:
    assert cluster.network is not None
    before = [cluster.network.counters(i) for i in range(3)]
    report = Proof(cluster, tmp_path, 2, "environment links seeds gradients save resume").finish(0)
    sent = [(cluster.network.counters(i) - before[i]).sent for i in range(3)]
    assert [(rank["host"], rank["local_rank"]) for rank in report["environment"]["ranks"]] == [("node0", 0), ("node1", 0)]
    assert {check["status"] for check in report["checks"]} <= {"green", "amber"}
    assert "All checks that could run here passed" in (tmp_path / "proof" / "report.html").read_text()
    assert min(sent[:2]) > 1e8 > sent[2]


def test_node_with_a_slow_link_is_named(cluster: Cluster, tmp_path: Path) -> None:
    """At 1 Mbit/s collectives do not finish, so that no further check can run."""
    assert cluster.network is not None
    cluster.network.set_rate(1, 1)
    try:
        report = Proof(cluster, tmp_path, 3, "environment links").finish(2)
    finally:
        cluster.network.set_rate(1, 0)
    environment, links = report["checks"]
    assert {problem.split(": ")[0] for problem in environment["problems"]} == {"node1"}
    assert any("slow to most other nodes" in problem for problem in environment["problems"])
    assert links["status"] == "not run"


def test_node_whose_routes_break_between_checks_is_named(cluster: Cluster, tmp_path: Path) -> None:
    """Slurm reaches the node, so that only `prove` can notice, and srun must not wait for its rank for ever."""
    assert cluster.network is not None
    job = Proof(cluster, tmp_path, 2, "environment links", limit_s=30)
    wait_for(lambda: "Environment: " in job.log, 180, "result of the first check")
    cluster.network.drop_routes(1, [0, 2])
    try:
        report = job.finish(2)
    finally:
        cluster.network.keep_routes(1)
    assert "rank 1 on node1 does not answer: its node hangs or is gone" in report["checks"][1]["problems"]
