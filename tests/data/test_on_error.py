"""A bad sample on one of two ranks: both stop with one line, or it is skipped and counted."""

from pathlib import Path

import numpy as np
import pytest

from raphael_dist.data.order import SampleOrder
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.training.metrics_files import read_metrics
from tests.data.shards.test_decode_sample import encode
from tests.data.shards.test_shards import write_shard
from tests.lib.launch import run_ranks
from tests.training.test_training import SMALL, SPREAD

BATCH, STEPS = 10, 4  # a position's rank is its place in the batch of 10 and micro-batches of 3
SIZED = b'{"caption": "an image", "width": 8, "height": 8}'


def shard_with(path: Path, bad: int | None) -> Path:
    """Write 60 images; the one at the position `bad` cannot be decoded."""
    rng = np.random.default_rng(0)
    images = [encode(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(60)]
    rows = [(f"{n:03d}", {"png": image, "json": SIZED}) for n, image in enumerate(images)]
    index = build_index([write_shard(path, rows)], path.parent / "index")
    if bad is not None:
        place = SampleOrder(index, [(8, 8)], seed=0).lookup(bad)
        rows[place.sample_id][1]["png"] = images[place.sample_id][:-30]
        write_shard(path, rows)
    return path


def train(
    folder: Path, on_error: str, exit_code: int, *more: str, bad: int | None = None, held_out: bool = False
) -> list[str]:
    shards = [f"data.shards={shard_with(folder / 'a.tar', bad)}", "data.val_shards=[]"]
    if held_out:
        shards[1] = f"data.val_shards={shard_with(folder / 'val.tar', 0)}"
    overrides = [f"run.dir={folder}/run", f"data.cache_dir={folder}/cache", f"train.max_steps={STEPS}", "sample.prompts=[]"]
    options = ["data.features=online", "edge.weight=0", f"data.on_error={on_error}", "data.max_bad_fraction=0.1"]
    return run_ranks(["tests/workers/train_run.py", *SMALL, *shards, *overrides, *options, *more], 2, exit_code=exit_code)


LATER = 2 * BATCH + 8
CASES = {
    "in a later step": ((), LATER),
    "in the first step": ((), 0),
    "with zero3": (("--deepspeed_config=ds_configs/zero3.json",), LATER),
    "with spread experts": (SPREAD, LATER),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if n else []) for n, c in enumerate(CASES)])
def test_bad_sample_stops_all_ranks_with_exit_code_2(tmp_path: Path, case: str) -> None:
    more, bad = CASES[case]
    outputs = train(tmp_path, "stop", 2, *more, bad=bad)
    assert (
        sum("data.on_error=stop ends the run, since this sample cannot be used: a.tar:'" in one for one in outputs) == 1
    ), outputs
    assert outputs[0].count("error: ") == 1
    assert not any("Traceback" in one for one in outputs)
    losses = read_metrics(tmp_path / "run" / "metrics.jsonl")["train/loss"] if bad else []
    assert [step for step, _ in losses] == list(range(1, bad // BATCH + 1)), "the step with the sample changed nothing"


@pytest.mark.slow
def test_bad_validation_sample_stops_all_ranks(tmp_path: Path) -> None:
    outputs = train(tmp_path, "stop", 2, "train.val_every=2", held_out=True)
    assert (
        sum("data.on_error=stop ends the run, since this sample cannot be used: val.tar:'" in one for one in outputs) == 1
    ), outputs


@pytest.mark.slow
def test_skipped_samples_are_counted_and_run_continues(tmp_path: Path) -> None:
    train(tmp_path, "skip", 0, bad=LATER)
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [value for _, value in metrics["data/replaced"]][:: STEPS - 1] == [0, 1]
    assert len(metrics["train/loss"]) == STEPS
