"""A checkpoint that an older version wrote (tests/data/README.md) still verifies, converts, resumes and trains on."""

import shutil
from pathlib import Path

import pytest
import torch

from raphael_dist.checkpoint.reader import open_newest
from raphael_dist.convert.layouts import open_checkpoint
from raphael_dist.convert.plan import Options
from raphael_dist.convert.run import convert
from raphael_dist.training.metrics import read_metrics
from tests.checkpoints import KINDS, assert_same, read_state, state_of
from tests.launch import ROOT, run_ranks

OLD = ROOT / "tests/data/run-6865f08"


@pytest.mark.parametrize("layout", ["canonical", "deepspeed"])
def test_an_older_versions_checkpoint_verifies_and_converts(tmp_path: Path, layout: str) -> None:
    reader, found = open_newest(OLD), open_checkpoint("auto", OLD)
    assert (reader.incomplete(), found.layout, found.progress[:3]) == (None, "raphael", (3, 30, 3))
    state = state_of(found)
    assert all(torch.equal(reader.whole(kind, name), value) for (kind, name), value in state.items())
    assert {kind for kind, _ in state} == set(KINDS)
    convert("auto", OLD, layout, tmp_path / layout, Options())
    assert_same(read_state("auto", tmp_path / layout), state)


def test_an_older_versions_run_goes_on_on_another_number_of_ranks(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(OLD, run)
    output = run_ranks(
        ["tests/workers/train_run.py", f"--config={run / 'config.yaml'}", "--deepspeed_config=ds_configs/zero2.json",
         f"run.dir={run}", f"data.cache_dir={tmp_path / 'cache'}", "data.val_shards=[]", "train.max_steps=4",
         "parallel.space_ep=1", "parallel.time_ep=1"],
        1,
    )[0]  # fmt: skip
    assert "step 4/4" in output
    [(step, loss)] = read_metrics(run / "metrics.jsonl")["train/loss"]
    assert (step, open_newest(run).step) == (4, 4)
    assert 0.5 < loss < 1.0, "from scratch it is above 1"
