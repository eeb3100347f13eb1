"""`prove` with real ranks: it passes where nothing is wrong, and names each planted fault and its rank.

Faults are planted by tests/workers/prove_faults.py; ranks are nodes n1, n2, ... A loaded machine is slow: time limits of
checks are long where no limit is tested.
"""

import json
import re
from pathlib import Path

import pytest

from raphael_dist.cluster.prove_report import html, judge_check, judge_environment
from raphael_dist.cluster.prove_results import Outcome
from tests.lib.forks import Forks, output_of, server
from tests.lib.small_disk import small_disk

pytestmark = pytest.mark.timeout(900)
ZERO0, ZERO2, SHARDED = ("float32", 0, 1), ("float32", 2, 1), ("float32", 2, 2)
SAVING = ("save", "resume")
# fault, checks, cases, ranks, exit code, what a problem says. The first word of a check's name is that of its result.
FAULTS = [
    ("scaled expert", ["gradients"], [ZERO2], 2, 3, r"rank 1 on n2: float32 ZeRO-2 .* expert \d is 2\.00 times"),
    ("scaled expert", ["gradients"], [SHARDED], 2, 3, r"rank 1 on n2: float32 ZeRO-2 ep 2: .* expert [4-7] is 2\.00 times"),
    ("norm without experts", ["gradients"], [ZERO0], 2, 3, r"gradient norm of step 1 is .*: .* experts are left out"),
    ("dropped micro-step", ["gradients"], [ZERO2], 2, 3, r"rank 1 on n2: .*gradient of micro-step 2 of 2 is missing"),
    ("other seed", ["seeds"], [], 3, 3, r"rank 2 on n3: .*another seed"),
    ("bf16 sums", ["sums"], [], 1, 3, r"bfloat16 ZeRO-2 ep 1: the sum of gradients over 24 micro-steps is .* away"),
    ("wrong expert", SAVING, [], 2, 3, r"rank 0 on n1: after resuming, .*, expert 0 holds the weights of expert 1"),
    ("stale weights", ["gradients"], [ZERO2], 2, 3, r"rank 1 on n2: .* computes step 2 with stale weights"),
    ("other torch", ["environment"], [], 3, 2, r"n2: torch is 2\.11\.0, on other nodes 2"),
    ("slow link", ["environment"], [], 4, 0, r"n4 is slow to most other nodes"),
    ("late clock", ["environment"], [], 3, 2, r"n2: its clock differs by \+3600"),
    ("shared GPU", ["environment"], [], 2, 2, r"n2: 31\.0 GiB of the GPU GPU-1234 are in use by another process"),
    ("wrong bytes", ["environment"], [], 2, 2, r"n2: all-to-all: rows of other ranks are wrong"),
]

QUICK = {"norm without experts", "other seed", "other torch", "slow link", "late clock", "shared GPU"}


def marks_of(fault: str) -> list[pytest.MarkDecorator]:
    """Return the marks of a planted fault's test: most take half a minute."""
    return [] if fault in QUICK else [pytest.mark.slow]


def prove(folder: Path, world: int, **spec: object) -> tuple[list[int], dict]:
    """Run `prove`; return the exit codes and the report."""
    codes = server().run(folder, world, timeout=880, worker="prove_faults", **spec)
    path = folder / "proof" / "report.json"
    assert path.is_file(), output_of(folder, world)
    return codes, json.loads(path.read_text())


def problems(report: dict) -> list[str]:
    return [problem for check in report["checks"] for problem in check["problems"]]


@pytest.mark.parametrize(
    ("fault", "checks", "cases", "world", "code", "expected"),
    [
        pytest.param(
            *row, id=f"{row[0]} ep {row[2][0][2]}" if row[2] else row[0], marks=[] if row[0] in QUICK else pytest.mark.slow
        )
        for row in FAULTS
    ],
)
def test_planted_fault_is_named(forks: Forks, tmp_path, fault, checks, cases, world, code, expected) -> None:
    codes, report = prove(tmp_path, world, fault=fault, checks=checks, cases=cases)
    assert any(re.search(expected, problem) for problem in problems(report)), (problems(report), output_of(tmp_path, world))
    assert codes == [code] * world
    assert report["exit_code"] == code


def test_full_disk_is_named(forks: Forks, tmp_path: Path) -> None:
    with small_disk(tmp_path / "full", 4 << 20) as disk:
        arguments = ["--config", "emoji-tiny", "data.shards=[]", f"run.dir={disk}"]
        codes, report = prove(tmp_path, 2, checks=["environment"], arguments=arguments)
    assert codes == [2, 2]
    assert any(re.search(r"n1: run\.dir: .*No space left", problem) for problem in problems(report)), problems(report)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "expected"),
    {
        "hang": "rank 1 on n2 hangs at 'a group of all ranks'; others are at 'all_reduce, all ranks'",
        "hanging agent": "rank 1 on n2 does not answer: its node hangs or is gone",
    }.items(),
)
def test_hanging_node_is_named_within_the_limit(forks: Forks, tmp_path, monkeypatch, fault, expected) -> None:
    codes = server().run(
        tmp_path, 2, timeout=300, worker="prove_faults", fault=fault, checks=["links", "seeds"], limit_s=30.0
    )
    report = json.loads((tmp_path / "proof" / "report.json").read_text())
    assert any(expected in problem for problem in problems(report)), (problems(report), output_of(tmp_path, 2))
    assert codes[0] == 2
    if fault == "hang":  # new workers ran the next check
        assert [check["status"] for check in report["checks"]] == ["red", "green"]


@pytest.mark.slow
def test_two_ranks_without_a_fault_pass_and_results_are_read_again(forks: Forks, tmp_path: Path) -> None:
    spec = {"checks": ["seeds", "gradients", *SAVING], "cases": [ZERO2, SHARDED, ("bfloat16", 2, 2), ("bfloat16", 3, 1)]}
    codes, first = prove(tmp_path, 2, **spec)
    assert codes == [0, 0], (problems(first), output_of(tmp_path, 2))
    assert [check["status"] for check in first["checks"]] == ["green"] * 4
    page = (tmp_path / "proof" / "report.html").read_text()
    assert page.index("All checks that could run here passed") < page.index("What was not proven here")
    assert not re.search(r"https?://", page)
    logs = sorted((tmp_path / "proof" / "logs").iterdir())
    codes, again = prove(tmp_path, 2, **spec)
    assert codes == [0, 0]
    assert again["checks"] == first["checks"]
    assert sorted((tmp_path / "proof" / "logs").iterdir()) == logs


def test_page_escapes_foreign_text() -> None:
    check = {"name": '"><script>', "title": "<b>", "status": "<script>", "problems": ["<script>"], "lines": ["&"]}
    tree = {
        "exit_code": 3,
        "checks": [{**check, "not_proven": [], "seconds": 1.0}],
        "never_proven": [],
        "written": "now",
        "environment": {"ranks": [{"host": "<x>"}], "commit": ""},
    }
    page = html(tree)
    assert "<script>" not in page
    assert "<x>" not in page
    assert "do not train here" in page


@pytest.mark.slow
def test_speed_checks_measure_and_say_what_a_cpu_cannot_prove(forks: Forks, tmp_path: Path) -> None:
    arguments = ["--config", "tests/fixtures/small.yaml", "train.micro_batch_size=2", f"run.dir={tmp_path / 'run'}"]
    codes, report = prove(tmp_path, 2, checks=["links", "graphs", "waits", "plan", "micro_batch"], arguments=arguments)
    assert codes == [0, 0], problems(report)
    status = {check["name"]: check["status"] for check in report["checks"]}
    assert status["links"] == "green"
    assert status["graphs"] == status["waits"] == status["micro_batch"] == "not proven"
    lines = "\n".join(line for check in report["checks"] for line in check["lines"])
    assert re.search(r"between nodes: reduce-scatter \d+ us, \d+\.\d+ GB/s per rank", lines)
    assert re.search(r"a step of 4 images: .* ms, planned .* ms", lines)
    sent, planned = re.search(r"bytes to other ranks' experts in a micro-step: ([\d,]+), planned ([\d,]+)", lines).groups()
    assert sent == planned != "0"
    reasons = [text for check in report["checks"] for text in check["not_proven"]]
    assert "train.cuda_graphs on and off requires a GPU" in reasons


def test_lost_connection_to_a_killed_rank_does_not_hide_who_was_late() -> None:
    late = Outcome(1, "n2", marks=2, last="a group of all ranks", why="not finished after 15 s")
    lost = Outcome(0, "n1", marks=3, last="all_reduce", why="RuntimeError: Connection closed by peer")
    report = judge_check([lost, late], ["n1", "n2"], environment=True, expects_kill=False)
    assert report.problems == ["rank 1 on n2 hangs at 'a group of all ranks'; others are at 'all_reduce'"]


def test_rank_that_never_answers_is_named_in_the_first_check() -> None:
    report = judge_environment([Outcome(0, "n1"), None], ["n1", "n2"])
    assert report.problems == ["rank 1 on n2 does not answer: its node hangs or is gone"]
    assert not report.joined
