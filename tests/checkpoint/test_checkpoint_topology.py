"""A checkpoint resumes on any number of ranks, with any expert parallelism and any ZeRO stage, bit for bit."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from raphael_dist.checkpoint.reader import CheckpointReader
from raphael_dist.training.metrics_files import read_metrics
from tests.lib.checkpoints import open_step
from tests.lib.forks import Forks, output_of


class Topology(NamedTuple):
    ranks: int
    space_ep: int
    time_ep: int
    stage: int

    def spec(self, **sections: dict[str, Any]) -> dict[str, Any]:
        base: dict[str, dict[str, Any]] = {
            # 12 in micro-batches of 2 on 4 ranks: 2 micro-steps, the last of them half empty.
            "train": {"global_batch_size": 12, "micro_batch_size": 2, "max_steps": 6, "log_every": 1},
            "optim": {"lr": 1e-3, "max_grad_norm": 0.5, "eps": 1e-3},
            "checkpoint": {"every": 3, "keep": 9},
            "parallel": {"space_ep": self.space_ep, "time_ep": self.time_ep},
        }
        return {"stage": self.stage, "sections": {n: {**base.get(n, {}), **sections.get(n, {})} for n in base | sections}}


FIRST = Topology(4, 2, 2, 2)


@pytest.fixture(scope="module")
def whole(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six uninterrupted steps on 4 ranks, with checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("oracle") / "run"
    forks.must(folder, FIRST.ranks, **FIRST.spec())
    return folder


def copy_with(whole: Path, folder: Path, *steps: int) -> Path:
    shutil.copytree(whole, folder)
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.name[5:]) not in steps:
            shutil.rmtree(path)
    return folder


def assert_same(checkpoint: CheckpointReader, expected: CheckpointReader) -> None:
    """Compare weights, moments, average and progress, by name."""
    assert checkpoint.kinds() == expected.kinds() == {"master", "exp_avg", "exp_avg_sq", "ema"}
    assert checkpoint.shapes == expected.shapes
    for name in expected.shapes:
        for kind in expected.kinds():
            a, b = checkpoint.whole(kind, name), expected.whole(kind, name)
            assert torch.equal(a.view(torch.int32), b.view(torch.int32)), f"{kind} of {name}"
    for key in ("samples_seen", "updates", "guard"):
        assert checkpoint.manifest[key] == expected.manifest[key]


OTHERS = [Topology(2, 1, 2, 1), Topology(1, 1, 1, 1), Topology(6, 3, 2, 2), FIRST]


@pytest.mark.parametrize("topology", [*OTHERS[:1], *(pytest.param(t, marks=pytest.mark.slow) for t in OTHERS[1:])])
def test_resume_on_other_ranks_gives_the_same_losses(forks: Forks, whole: Path, tmp_path: Path, topology: Topology) -> None:
    run = copy_with(whole, tmp_path / "run", 3)
    (run / "metrics.jsonl").unlink()
    forks.must(run, topology.ranks, **topology.spec())
    metrics, expected = (read_metrics(folder / "metrics.jsonl") for folder in (run, whole))
    for tag in ("train/loss", "train/loss_edge", "optim/grad_norm"):
        assert [step for step, _ in metrics[tag]] == [4, 5, 6]
        assert [v for _, v in metrics[tag]] == pytest.approx([v for _, v in expected[tag]][3:], rel=1e-5), tag
    if topology == FIRST:
        assert_same(open_step(run, 6), open_step(whole, 6))


FEW = [Topology(2, 1, 1, 3), FIRST]
MANY = [
    Topology(1, 1, 1, 0), Topology(2, 2, 1, 1), Topology(1, 1, 1, 1), Topology(2, 1, 1, 0), Topology(6, 6, 2, 2),
    Topology(1, 1, 1, 3), Topology(4, 2, 4, 1), Topology(2, 1, 1, 3), Topology(2, 2, 2, 2), Topology(3, 1, 1, 3),
    Topology(4, 1, 2, 2), Topology(3, 3, 1, 1), Topology(4, 1, 1, 0), Topology(2, 1, 1, 2), Topology(1, 1, 1, 2), FIRST,
]  # fmt: skip


@pytest.mark.parametrize("chain", [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_state_survives_a_chain_of_topologies_bit_for_bit(
    forks: Forks, whole: Path, tmp_path: Path, chain: list[Topology]
) -> None:
    """Each topology loads the checkpoint of the one before it; the last is the first again."""
    run, expected = copy_with(whole, tmp_path / "run", 6), open_step(whole, 6)
    for topology in chain:
        forks.must(run, topology.ranks, **topology.spec(), save_again=True)
        assert_same(open_step(run, 99), expected)
        reports = [json.loads((run / f"read-{rank}.json").read_text()) for rank in range(topology.ranks)]
        assert_each_rank_read_its_part(reports, expected, topology)
        shutil.rmtree(run / "checkpoints" / "step-00000006", ignore_errors=True)  # from now on only what the chain wrote


CURRICULUM: dict[str, dict[str, Any]] = {
    "optim": {"lr": 1e-2},
    "train": {"global_batch_size": 9},
    "image": {"buckets": [[8, 8], [8, 16]]},
    "data": {"bucket_run": 5},
}
CHANGED = {"optim.lr", "train.global_batch_size", "image.buckets", "data.bucket_run"}


def test_changed_settings_must_be_allowed_and_keep_moments(forks: Forks, whole: Path, tmp_path: Path) -> None:
    run, expected = copy_with(whole, tmp_path / "run", 6), open_step(whole, 6)
    assert forks.run(run, 4, **FIRST.spec(**CURRICULUM)) == [2] * 4
    assert all(f"{name} was " in output_of(run, 4) for name in CHANGED)
    assert forks.run(run, 4, **FIRST.spec(optim={"kind": "sgd"})) == [2] * 4
    assert "optim.kind was adamw and is now sgd" in output_of(run, 4)
    allowed = FIRST.spec(**CURRICULUM, run={"allow_change": sorted(CHANGED)})
    forks.must(run, 4, **allowed, save_again=True)
    log = (run / "train.log").read_text()
    for line in ("optim.lr was 0.001 and is now 0.01", "train.global_batch_size was 12 and is now 9"):
        assert line in log
    assert_same(open_step(run, 99), expected)


def assert_each_rank_read_its_part(reports: list[dict], expected: CheckpointReader, topology: Topology) -> None:
    total = 4 * sum(torch.Size(shape).numel() for shape in expected.shapes.values())
    read = [report["elements"] for report in reports]
    if topology.stage == 0:  # every rank keeps everything
        assert read == [total] * topology.ranks
    else:
        assert sum(read) == total
    hashed = [name for report in reports for name in report["hashed"]]
    assert len(hashed) == len(set(hashed)), "a file was summed up twice"


@pytest.mark.slow
def test_rank_opens_only_files_with_its_part(forks: Forks, whole: Path, tmp_path: Path) -> None:
    run = copy_with(whole, tmp_path / "run", 6)
    forks.must(run, FIRST.ranks, **FIRST.spec(), save_again=True)
    for rank in range(FIRST.ranks):
        assert json.loads((run / f"read-{rank}.json").read_text())["opened"] == [f"rank-{rank:05d}.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_bfloat16_with_sharded_experts_resumes_bit_for_bit(forks: Forks, tmp_path: Path, stage: int) -> None:
    topology, bf16 = Topology(4, 2, 4, stage), {"train": {"dtype": "bfloat16", "max_steps": 6}}
    spec = topology.spec()
    spec["sections"]["train"].update(bf16["train"])
    forks.must(tmp_path / "whole", 4, **spec)
    run = copy_with(tmp_path / "whole", tmp_path / "run", 3)
    forks.must(run, 4, **spec)
    assert_same(open_step(run, 6), open_step(tmp_path / "whole", 6))
    losses = [read_metrics(folder / "metrics.jsonl")["train/loss"] for folder in (run, tmp_path / "whole")]
    assert losses[0] == losses[1]
