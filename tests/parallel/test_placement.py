"""Placement of experts per level: arithmetic by hand, and the output of --plan."""

import json
import subprocess
import sys

import pytest

from raphael_dist.config.schema import load_config
from raphael_dist.errors import UserError
from raphael_dist.model.latents import latent_factor
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.parallel.placement import blocks_per_level, choose_placement, describe, mean_tokens
from tests.lib.launch import ROOT
from tests.lib.synthetic import tiny_config


def choices(world_size: int, **parallel) -> dict[tuple[str, int], bool]:
    overrides = [f"parallel.{key}={json.dumps(value)}" for key, value in parallel.items()]
    config = load_config("raphael-3b", overrides)
    return {(c.kind, c.level): c.shard for c in choose_placement(config, BatchPlan.of(config, world_size))}


def test_outer_levels_replicate_their_experts_and_inner_levels_shard_them():
    chosen = choices(984, space_ep=6, time_ep=4)
    assert [chosen["space", level] for level in range(4)] == [False, False, True, True]
    assert [chosen["time", level] for level in range(4)] == [False, True, True, True]
    assert choices(984, space_ep=6) == {key: shard for key, shard in chosen.items() if key[0] == "space"}


def test_placement_of_a_level_can_be_set():
    assert set(choices(984, space_ep=6, time_ep=4, placement="shard").values()) == {True}
    by_hand = choices(984, space_ep=6, placement=["shard", "replicate", "auto", "replicate"])
    assert by_hand == {("space", 0): True, ("space", 1): False, ("space", 2): True, ("space", 3): False}


def test_the_bytes_of_one_level_by_hand():
    """Level 0: 16 channels, 20 hidden units, 64 tokens of an 8 x 8 image; 2 ranks, micro-batch 3, 13 images."""
    config = tiny_config(
        image={"buckets": [[8, 8]]},
        train={"global_batch_size": 13},
        parallel={"space_ep": 2, "time_ep": 2},
        model={"checkpoint_activations": "none"},
    )
    assert blocks_per_level(config) == [3, 1]
    space, time = (c for c in choose_placement(config, BatchPlan.of(config, 2)) if c.level == 0)
    rows = 3 * 3 * 3 * 64  # blocks, micro-steps, samples, tokens
    weights = 3 * 6 * (20 * 16 + 20 + 16 * 20 + 16)
    assert (space.rows, space.parameters) == (rows, weights)
    assert space.sharded_bytes == 4 * 2 * (
        rows * (2 * 16 + 3) + 3 * 3 * 3 * 16
    )  # float32, forward and backward; experts' e_k(0)
    assert space.replicated_bytes == 4 * 2 * weights // 2  # reduced and gathered, half of it each
    assert (time.rows, time.sharded_bytes) == (rows, 4 * 2 * rows * 2 * 16 // 2)


def test_levels_and_tokens_are_those_of_the_model():
    config = tiny_config()
    model = RaphaelUNet(config)
    assert [model.block_levels.count(level) for level in range(2)] == blocks_per_level(config)
    small = load_config("emoji-tiny")
    assert latent_factor(small.image.vae) == 4
    assert [mean_tokens(small, level) for level in range(4)] == [256, 64, 16, 4]
    assert latent_factor(load_config("raphael-3b").image.vae) == 8  # its encoder is not here


def test_without_expert_parallelism_there_is_nothing_to_place():
    config = load_config("raphael-3b")
    assert describe(choose_placement(config, BatchPlan.of(config, 1000))) == []


def test_dry_run_shows_rows_parameters_bytes_and_the_choice():
    command = ["raphael_dist/train.py", "--config", "raphael-3b", "--plan", "--world-size", "984", "parallel.space_ep=6"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("# space  ")]
    assert len(lines) == 4
    assert "118040" in lines[0]
    assert "replicate" in lines[0]
    assert "755.3 M" in lines[2]
    assert "shard, 629.4 M fewer parameters per rank" in lines[2]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("parallel.placement=mve", "mve must be 'auto', 'shard' or 'replicate'"),
        (
            "parallel.placement=[shard, replicate]",
            "must have one entry, or one per U-Net level, but it has 2 and model.channels has 4",
        ),
    ],
)
def test_wrong_placement_is_refused_in_one_line(override, expected):
    with pytest.raises(UserError) as caught:
        load_config("raphael-3b", [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
