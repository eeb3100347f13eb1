"""Loads of experts: relative to an even share, and said once when one is dead or overloaded."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from raphael_dist.insight.figures import heat_map
from raphael_dist.training.metrics import LAYOUT, ExpertLoadMonitor, Metrics, MetricsWriter, load_metrics


def test_loads_are_relative_to_an_even_share_and_density_to_all_pairs():
    values = load_metrics("moe/space", torch.tensor([[3.0, 1.0], [2.0, 2.0]]), total_samples=4.0)
    assert values["moe/space/L00/load_max"] == 1.5
    assert values["moe/space/L00/load_min"] == 0.5
    assert values["moe/space/L00/density"] == 0.5
    assert values["moe/space/L01/load_max"] == values["moe/space/L01/load_min"] == 1.0


def test_a_dead_and_an_overloaded_expert_are_named_once_with_what_to_do():
    watch, load_LK = ExpertLoadMonitor(), torch.tensor([[100.0, 100.0, 100.0, 100.0], [0.0, 390.0, 5.0, 5.0]])
    lines = watch.new("space", load_LK, samples=400)
    assert len(lines) == 2
    assert "space expert 0 of block 1 has almost nothing to do" in lines[0]
    assert "space expert 1 of block 1 has 97.5% of the load" in lines[1]
    assert all("model.gate_noise" in line and "model.balance_weight=0.01" in line for line in lines)
    assert watch.new("space", load_LK, samples=400) == []
    assert "balance" not in watch.new("time", load_LK, samples=400)[0]  # there is no such loss for the time gate


@pytest.mark.parametrize(("load", "samples"), [([[0.0, 8.0]], 8), ([[40.0]], 400), ([[30.0, 70.0]], 100)])
def test_few_samples_one_expert_or_a_tolerable_load_say_nothing(load, samples):
    assert ExpertLoadMonitor().new("time", torch.tensor(load), samples) == []


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


@pytest.mark.parametrize("every_scalar", [False, True])
def test_tensorboard_opens_on_the_curves_that_matter_and_has_blocks_on_request(tmp_path: Path, every_scalar: bool):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, every_scalar)
    writer.write(10, 320, {"train/loss": 0.5, **load_metrics("moe/space", torch.tensor([[3.0, 1.0], [2.0, 2.0]]), 4.0)})
    writer.image("loads/space", 10, heat_map(np.array([[1.5, 0.5]]), "loads"))
    writer.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert tags["tensors"] == ["custom_scalars__config__"]
    assert tags["images"] == ["loads/space"]
    few = {"train/loss", "moe/space/load_max", "moe/space/load_min", "moe/space/density"}
    assert set(tags["scalars"]) >= few
    assert (set(tags["scalars"]) == few) != every_scalar
    assert ("moe/space/L01/load_max" in tags["scalars"]) == every_scalar
    patterns = [p for chart in LAYOUT["first"].values() for p in chart[1]]
    assert len(LAYOUT["first"]) == 5
    assert all(any(re.search(p, tag) for p in patterns) for tag in ("train/loss", "moe/space/load_max", "val/loss_t0"))
    # metrics.jsonl has everything in any case.
    assert "moe/space/L00/density" in json.loads((tmp_path / "metrics.jsonl").read_text())
