"""The run does not depend on how many ranks it has: the same global batch in the same order on any number of them."""

from pathlib import Path

import pytest

from raphael_dist import train
from raphael_dist.config.schema import load_config
from raphael_dist.engine import ds_config
from raphael_dist.training.metrics_files import read_metrics
from tests.lib.launch import run_ranks
from tests.training.test_training import SMALL

# Adam divides by the root of the second moment: without an eps, rounding in a gradient of nearly 0 becomes a full step.
FIFTY = (
    "train.global_batch_size=50",
    "train.micro_batch_size=4",
    "optim.eps=1e-4",
    "checkpoint.every=5",
    "sample.prompts=[]",
)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_losses_are_equal_on_any_number_of_ranks_and_after_a_resume(tmp_path: Path) -> None:
    def losses(name: str, world_size: int, steps: int = 10) -> list[float]:
        options = (
            f"run.dir={tmp_path / name}",
            f"data.cache_dir={tmp_path}/cache",
            "data.val_shards=[]",
            f"train.max_steps={steps}",
        )
        run_ranks(["raphael_dist/train.py", *SMALL, *FIFTY, *options], world_size, timeout=600)
        return [loss for _, loss in read_metrics(tmp_path / name / "metrics.jsonl")["train/loss"]]

    expected = losses("1", 1)
    assert len(expected) == 10
    for world_size in (2, 3, 7):  # and 4 below
        assert losses(str(world_size), world_size) == pytest.approx(expected, rel=1e-5), world_size
    losses("resumed", 4, steps=5)
    assert losses("resumed", 3) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("world_size", "micro", "settings"),
    [
        (8, 32, ["train.micro_batch_size=256"]),
        (3, 86, ["train.micro_batch_size=256"]),
        (8, 16, ["train.micro_batch_size=16"]),  # two micro-steps
        (2, 60, ["train.micro_batch_size=60"]),  # three micro-steps
        (4, 64, ["train.micro_batch_size=256", "parallel.space_ep=2"]),
        (4, 256, ["train.micro_batch_size=256", "train.stages=[{until: 9, set: {}}, {set: {}}]"]),
    ],
)
def test_micro_batch_has_no_spare_slots_in_a_single_micro_step(world_size: int, micro: int, settings: list[str]) -> None:
    config = load_config("emoji-tiny", ["train.global_batch_size=256", *settings])
    assert ds_config.fit_to_ranks(config, world_size).train.micro_batch_size == micro


def test_micro_batch_is_as_large_as_image_sizes_require() -> None:
    """With two sizes in runs of 24, a step of 40 is divided into 24 and 16: rank 0 needs 24 slots for one micro-step."""
    sizes = ["image.buckets=[[64, 64], [64, 128]]", "data.bucket_run=24"]
    batch = ["train.global_batch_size=40", "train.micro_batch_size=24"]
    fitted = ds_config.fit_to_ranks(load_config("emoji-tiny", [*sizes, *batch]), 2)
    assert fitted.train.micro_batch_size == 24


def test_elastic_expert_groups_are_as_large_as_the_ranks_allow(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("parallel.space_ep=6", "parallel.time_ep=4")
    elastic = load_config("emoji-tiny", [*sizes, "parallel.elastic=true"])
    for world_size, expected in {12: (6, 4), 8: (2, 4), 6: (6, 2), 4: (2, 4), 3: (3, 1), 5: (1, 1)}.items():
        parallel = ds_config.fit_to_ranks(elastic, world_size).parallel
        assert (parallel.space_ep, parallel.time_ep) == expected, world_size
    assert train.main(["--config", "emoji-tiny", "--plan", "--world-size", "3", *sizes, "parallel.elastic=true"]) == 0
    shown = capsys.readouterr().out
    assert "space_ep: 3" in shown
    assert "time_ep: 1" in shown
    assert train.main(["--config", "emoji-tiny", "--plan", "--world-size", "3", *sizes]) == 2
    assert "or set parallel.elastic=true" in capsys.readouterr().err
