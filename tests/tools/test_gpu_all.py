"""`tools/bench.py gpu --all` measures in rounds, continues where it ended, and keeps to its time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_all import ROUNDS, TIME_IS_UP, Case, Results, cases, goals, measure_all, table
from raphael_dist.config.schema import load_config
from raphael_dist.engine.ds_config import merge, read_deepspeed_json
from raphael_dist.errors import UserError
from tests.lib.launch import ROOT

CASES = [Case("emoji", n, rounds=ROUNDS) for n in (1, 2, 3)]
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
        return step_record(seconds=self.now / 1e3, mfu=0.2)


def step_record(seconds: float, mfu: float) -> dict:
    """Return the record of a step, half of whose FLOPs are useful, on a device of 100 TFLOP/s."""
    flops = {"flops": 2e12, "useful_flops": 1e12, "tflops": 100 * mfu}
    return {"seconds": seconds, "mfu": mfu, "useful_mfu": mfu / 2, "peak_gib": 3.0, **flops}


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
        return {"error": TIME_IS_UP} if case.images == 2 else step_record(1.0, 0.2)

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


def test_cases_of_goals_are_repeated_before_the_others_are_measured(tmp_path: Path) -> None:
    once, clock, results = Case("emoji", 9), Clock(), Results(tmp_path / "gpu.json", MACHINE)
    measure_all([once, CASES[0]], results, clock.measure, 1000, clock)
    assert [record["case"] for record in results.records] == [CASES[0].name, CASES[0].name, once.name]


def test_goals_are_compared_with_the_fastest_measurement(tmp_path: Path) -> None:
    chosen, results = cases(), Results(tmp_path / "gpu.json", MACHINE)
    lines = goals(chosen, results).splitlines()
    assert len(lines) == 7
    assert all("not measured" in line for line in lines)
    for case in chosen:
        if (case.config, case.images) in {("sd2-dense", 64), ("raphael-3b", 8)}:
            kernels = "layer_norm" in case.name
            results.add(
                {"case": case.name, **step_record(0.4, (0.4 if kernels else 0.3) if case.step_of == "ours" else 0.2)}
            )
    lines = goals(chosen, results).splitlines()
    # 40 TFLOP/s and 2 TFLOP per image are 20 images/s.
    assert lines[0] == "- sd2-dense, 64 images: images/s: 20, goal 150: missed by 86.7%"
    assert lines[1] == "- sd2-dense, 64 images: times diffusers compiled: 2, goal 1.6: reached"
    assert lines[3] == "- raphael-3b, 8 images: useful MFU: 0.2, goal 0.25: missed by 20.0%"
    assert lines[5] == "- raphael-3b, 8 images: FLOP/s of sd2-dense's: 1, goal 0.86957: reached"


def test_every_case_is_a_configuration_that_the_engine_accepts() -> None:
    chosen = cases()
    assert len({case.name for case in chosen}) == len(chosen)
    for case in chosen:
        sizes = [f"train.{key}={case.images}" for key in ("micro_batch_size", "global_batch_size")]
        config = load_config(case.config, [*case.overrides, *sizes, f"data.bucket_run={case.images}"])
        if case.step_of == "ours":
            merge(config, read_deepspeed_json(None, config.train.dtype), 1, 1)
    assert {case.step_of for case in chosen} == {"ours", "diffusers", "diffusers-compiled"}
    assert {case.rounds for case in chosen} == {1, ROUNDS}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_ends_with_one_line() -> None:
    command = [sys.executable, "tools/bench.py", "gpu", "--all"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "tools/bench.py gpu --all requires a GPU, but torch finds none. Run it on a machine with one."
    ]
