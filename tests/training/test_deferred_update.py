"""`train.kernels=[adamw,deferred_update]` leaves the checkpoints, metrics and log of a run whose host waits in every step.

The device is a CPU, and the kernel runs in Triton's interpreter (tests/conftest.py). `test_logged_steps.py` shows when a
result is read.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs the package triton")

from raphael_dist.checkpoint.manifest import MANIFEST
from raphael_dist.errors import EXIT_NON_FINITE
from tests.lib.forks import Forks, output_of
from tests.training.test_step_guard import INF, G, at, differing, log, poison, spec

KERNELS = (["adamw"], ["adamw", "deferred_update"])
COMPARED = ("train/", "optim/", "comm/", "moe/", "data/replaced", "val/", "checkpoint/failed")
SMALL = {"channels": [16], "attention": [True], "expert_width": [20]}  # the interpreter is slow
NAN = G + 4  # a position of the second step, on the second rank


def deferred_spec(kernels: list[str], faults: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    base = {"max_steps": 7, "log_every": 3, "kernels": kernels}
    optim = {"weight_decay": 0.1, "max_grad_norm": 0.05}
    sections = {"optim": optim, "checkpoint": {"every": 5}, "ema": {"decay": 0.9}, "model": SMALL}
    return spec(faults=faults, train={**base, **train}, **sections)


def metrics(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Without rows of saves, which are written whenever a save is complete.
    return [{k: v for k, v in row.items() if k.startswith(("step", *COMPARED))} for row in rows if "optim/lr" in row]


def progress(run: Path, step: int) -> list[Any]:
    manifest = at(run, step).manifest
    return [manifest[key] for key in ("step", "samples_seen", "updates", "guard")]


def assert_equal_runs(run: Path, other: Path) -> None:
    steps = sorted(path.name for path in (run / "checkpoints").iterdir() if (path / MANIFEST).exists())
    assert steps == sorted(path.name for path in (other / "checkpoints").iterdir() if (path / MANIFEST).exists())
    for step in (int(re.sub(r".*-", "", name)) for name in steps if name.startswith("step-")):
        assert differing(at(run, step), at(other, step)) == set()
        assert progress(run, step) == progress(other, step)
    assert metrics(run) == metrics(other)
    skipped = [re.findall(r"step \d+ was skipped.*|.*back at step.*", log(folder)) for folder in (run, other)]
    assert [re.sub(r"^[^a-z]*", "", line) for line in skipped[0]] == [re.sub(r"^[^a-z]*", "", line) for line in skipped[1]]
    assert skipped[0]


@pytest.mark.parametrize(
    ("dtype", "micro_batch"), [("float32", 3), pytest.param("bfloat16", 6, marks=pytest.mark.slow)]
)  # two micro-steps, and one
def test_deferred_run_equals_a_run_that_waits(forks: Forks, tmp_path: Path, dtype: str, micro_batch: int) -> None:
    """With steps that are skipped in between, and in the step in which a checkpoint is due. Resumed, too."""
    runs = [tmp_path / "waits", tmp_path / "deferred", tmp_path / "resumed"]
    faults = {"nan": [NAN], "inf_grad": {**INF, "steps": [5]}}
    for run, kernels in zip(runs, KERNELS, strict=False):
        forks.must(run, 2, **deferred_spec(kernels, faults, dtype=dtype, micro_batch_size=micro_batch))
    assert_equal_runs(runs[0], runs[1])
    assert progress(runs[1], 6)[:3] == [6, 6 * G, 4]
    if dtype == "bfloat16":  # the interpreter cuts off what resuming rounds
        return
    shutil.copytree(runs[1], runs[2])
    shutil.rmtree(runs[2] / "checkpoints" / "step-00000007")
    forks.must(runs[2], 2, **deferred_spec(KERNELS[1], faults, dtype=dtype, micro_batch_size=micro_batch))
    assert_equal_runs(runs[0], runs[2])


def test_deferred_run_ends_at_the_limit_of_skipped_steps(forks: Forks, tmp_path: Path) -> None:
    faults = {"nan": [2 * G, 3 * G + 5, 4 * G + 11]}
    run_spec = deferred_spec(KERNELS[1], faults, log_every=99)
    assert forks.run(tmp_path / "run", 2, **run_spec) == [EXIT_NON_FINITE] * 2
    assert "step 5 was skipped, because the loss is not finite" in output_of(tmp_path / "run", 2)
    assert "train.max_skipped=3 of consecutive skipped steps" in output_of(tmp_path / "run", 2)


@pytest.mark.slow
def test_deferred_run_returns_to_an_earlier_checkpoint(forks: Forks, tmp_path: Path) -> None:
    runs = [tmp_path / "waits", tmp_path / "deferred"]
    for run, kernels in zip(runs, KERNELS, strict=True):
        train = {"max_steps": 9, "log_every": 4, "kernels": kernels}
        forks.must(run, 2, **spec(train={**train, "max_steps": 2}, model=SMALL))
        poison(run, 2)
        forks.must(run, 2, **spec(train=train, checkpoint={"every": 6}, model=SMALL))
        assert "No step after step 2 was good" in log(run)
        assert f"back at step 1 and continues with sample {5 * G}" in log(run)
    assert_equal_runs(*runs)
