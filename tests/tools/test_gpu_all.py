"""`tools/bench.py gpu --all` measures in rounds, continues where it ended, and keeps to its time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_all import ROUNDS, TIME_IS_UP, Case, Results, cases, measure_all, table
from raphael_dist.config.schema import load_config
from raphael_dist.errors import UserError
from tests.lib.launch import ROOT

CASES = [Case("emoji", n) for n in (1, 2, 3)]
MACHINE = {"device": "a GPU", "commit": "abc"}


class Clock:
    """A clock that a measurement advances by 10 seconds."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def measure(self, case: Case, left: float) -> dict:
        self.now += 10
        if case.images == 2:
            return {"error": "out of memory | device"}
        return {"seconds": self.now / 1e3, "mfu": 0.2, "useful_mfu": 0.1, "peak_gib": 3.0}


def test_every_case_is_measured_once_before_any_is_repeated(tmp_path: Path) -> None:
    clock, results = Clock(), Results(tmp_path / "gpu.json", MACHINE)
    assert measure_all(CASES, results, clock.measure, 1000, clock) == 0
    names = [record["case"] for record in results.records]
    assert names == [CASES[0].name, CASES[1].name, CASES[2].name, CASES[0].name, CASES[2].name]
    # The medians of 10 and 40, and of 30 and 50 ms.
    rows = [line.split(" | ") for line in table(CASES, results).splitlines()[2:]]
    assert [row[4] for row in rows] == ["25.0", "out of memory / device", "40.0"]
    assert [row[-1] for row in rows] == ["2 |", "1 |", "2 |"]


def test_a_second_call_continues_where_time_was_up(tmp_path: Path) -> None:
    path, clock = tmp_path / "gpu.json", Clock()
    assert measure_all(CASES, Results(path, MACHINE), clock.measure, 25, clock) == 3
    assert clock.now == 20  # a third would have taken more than was left
    results = Results(path, MACHINE)
    assert len(results.records) == 2
    assert measure_all(CASES, results, clock.measure, 1000, clock) == 0
    assert len(json.loads(path.read_text())["records"]) == 3 + 2


def test_what_is_cut_off_is_tried_again_with_the_whole_time(tmp_path: Path) -> None:
    clock, results = Clock(), Results(tmp_path / "gpu.json", MACHINE)

    def slow(case: Case, left: float) -> dict:
        clock.now += min(left, 10 if case.images == 1 else 100)
        return {"error": TIME_IS_UP} if case.images == 2 else {"seconds": 1.0}

    assert measure_all(CASES, results, slow, 60, clock) > 0
    assert [record["case"] for record in results.records] == [CASES[0].name]
    clock.now = 0.0
    measure_all(CASES[1:], results, slow, 60, clock)
    assert results.records[-1] == {"case": CASES[1].name, "error": TIME_IS_UP}  # it does not fit into a call


def test_results_of_another_machine_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    Results(path, MACHINE).add({"case": CASES[0].name})
    with pytest.raises(UserError, match=r"--out=.*has results of .*abc.*but the present .*def.*Give another --out"):
        Results(path, {**MACHINE, "commit": "def"})


def test_every_case_is_a_configuration_and_a_command() -> None:
    chosen = cases()
    assert len(set(chosen)) == len(chosen)
    for case in chosen:
        sizes = [f"train.{key}={case.images}" for key in ("micro_batch_size", "global_batch_size")]
        load_config(case.config, [*case.overrides, *sizes, f"data.bucket_run={case.images}"])
    assert {case.step_of for case in chosen} == {"ours", "diffusers", "diffusers-compiled"}
    assert ROUNDS > 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_ends_with_one_line() -> None:
    command = [sys.executable, "tools/bench.py", "gpu", "--all"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "tools/bench.py gpu --all requires a GPU, but torch finds none. Run it on a machine with one."
    ]
