"""DeepSpeed's files: those of a real engine are read bit for bit, and a real engine continues from converted ones."""

import json
from pathlib import Path

import pytest
import torch

from raphael_dist.convert.conversion import convert
from raphael_dist.convert.layouts import open_checkpoint
from raphael_dist.convert.write_plan import Options
from tests.lib.checkpoints import assert_same, read_state, state_of
from tests.lib.launch import put_together, run_ranks
from tests.lib.synthetic import tiny_config

# (ranks, space_ep, time_ep, ZeRO stage, dtype)
Case = tuple[int, int, int, int, str]


def sections(case: Case, placement: str, **run: str) -> dict:
    _, space, time, _, dtype = case
    train = {"global_batch_size": 12, "micro_batch_size": 2, "dtype": dtype}
    parallel = {"space_ep": space, "time_ep": time, "placement": placement.split()}
    return {"parallel": parallel, "train": train, "optim": {"lr": 0.01, "max_grad_norm": 0.5}, "run": run}


def steps(folder: Path, case: Case, placement: str, **spec) -> dict:
    """Train on real ranks; return losses and whole tensors, before and after, by (kind, name)."""
    folder.mkdir(parents=True)
    world, _, _, stage, _ = case
    json_tree = {"zero_optimization": {"stage": stage}}
    whole = {"sections": sections(case, placement, dir=str(folder / "run")), "deepspeed": json_tree, "first": 0, **spec}
    (folder / "spec.json").write_text(json.dumps(whole))
    run_ranks(["tests/workers/deepspeed_steps.py", str(folder / "out"), str(folder / "spec.json")], world)
    parts = [torch.load(f"{folder}/out.{rank}") for rank in range(world)]
    results = {"losses": parts[0]["losses"]}
    for when in ("resumed", "fragments"):
        if any("exp_avg" not in kinds for part in parts for *_, kinds in part[when]):
            continue  # before the first step there are no moments
        shapes = {name: shape for part in parts for name, shape, *_ in part[when]}
        put = put_together([part[when] for part in parts])
        kinds = {"master": put["weights"], **put["moments"]}
        results[when] = {(k, n): flat.view(shapes[n]) for k, named in kinds.items() for n, flat in named.items()}
    return results


def there_and_back(tmp_path: Path, case: Case, other: Case, placement: str = "shard") -> None:
    """Train 2 steps, save by DeepSpeed, convert over canonical to `other`, load by DeepSpeed, train the third step."""
    reference = steps(tmp_path / "whole", case, placement, steps=3)
    half = steps(tmp_path / "half", case, placement, steps=2, save=str(tmp_path / "ds"), run=True)
    config = tiny_config(**sections(case, placement))
    saved = open_checkpoint("auto", tmp_path / "ds", config)
    assert (saved.layout, saved.progress.step, saved.progress.samples_seen) == ("deepspeed", 2, 24)
    assert_same(state_of(saved), half["fragments"])
    of_run = read_state("auto", tmp_path / "half" / "run")
    assert_same({key: value for key, value in of_run.items() if key[0] != "ema"}, half["fragments"])
    convert("deepspeed", tmp_path / "ds", "canonical", tmp_path / "canonical", Options(), config)
    world, space, time, stage, _ = other
    convert("canonical", tmp_path / "canonical", "deepspeed", tmp_path / "to", Options(space, time, world, stage))
    again = steps(tmp_path / "again", other, placement, first=2, steps=3, load=str(tmp_path / "to"))
    assert_same(again["resumed"], half["fragments"])
    exact = case == other
    assert again["losses"] == pytest.approx(reference["losses"][2:], rel=0 if exact else 1e-5, abs=0)
    if exact:
        assert_same(again["fragments"], reference["fragments"])


@pytest.mark.slow
def test_sharded_experts_survive_conversion_to_deepspeed_and_back(tmp_path):
    case = (2, 2, 1, 2, "float32")
    there_and_back(tmp_path, case, case)


@pytest.mark.slow
def test_zero3_converts_to_zero1_with_sharded_experts(tmp_path):
    there_and_back(tmp_path, (2, 1, 1, 3, "float32"), (2, 1, 2, 1, "float32"))


SLOW = [
    ((4, 2, 4, 2, "float32"), (6, 3, 2, 1, "float32")),
    ((6, 6, 2, 1, "float32"), (4, 2, 2, 2, "float32")),
    ((1, 1, 1, 0, "float32"), (2, 1, 1, 3, "float32")),
    ((2, 1, 1, 0, "float32"), (1, 1, 1, 0, "float32")),
    ((2, 2, 2, 2, "bfloat16"), (2, 2, 2, 2, "bfloat16")),
    ((2, 1, 2, 1, "bfloat16"), (2, 1, 2, 1, "bfloat16")),
    ((3, 1, 1, 3, "float32"), (3, 1, 1, 3, "float32")),
]


@pytest.mark.slow
def test_replicated_level_survives_conversion_to_deepspeed(tmp_path):
    case = (4, 2, 4, 2, "float32")
    there_and_back(tmp_path, case, case, "shard replicate")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "other"), SLOW)
def test_every_stage_and_placement_survives_conversion_to_deepspeed(tmp_path, case, other):
    there_and_back(tmp_path, case, other)
