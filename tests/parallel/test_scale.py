"""Work of a rank among many: only its own groups, only the requested images, no unused weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raphael_dist.cluster import preflight
from raphael_dist.config.schema import load_config
from raphael_dist.data.features.encoders import ImageEncoder
from raphael_dist.model.diffusion import make_scheduler
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.runtime.ranks import Ranks
from raphael_dist.sampling.sampler import Request, Sampler
from raphael_dist.training.validation import active_ranks, prompt_share
from tests.data.features.test_encoders import save_clip
from tests.lib.launch import ROOT
from tests.workers.light import Letters, config_of_prompts, tiny_unet


def seen(forks: Any, folder: Path, world_size: int, **spec: Any) -> list[dict]:
    forks.must(folder, world_size, worker="light", **spec)
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(world_size)]


def test_every_rank_has_both_groups_of_each_size_in_deepspeed(forks, tmp_path):
    """Sums of rank numbers: of consecutive ranks, and of ranks at a distance of the size."""
    actual = seen(forks, tmp_path, 6, case="groups", sizes=[2, 3, 6])
    for rank, of in enumerate(actual):
        for size in (2, 3, 6):
            first = rank // size * size
            expected = [sum(range(first, first + size)), sum(range(rank % size, 6, size))]
            assert of[str(size)] == {"sums": expected, "index": rank - first, "same": True}


def test_with_a_full_cache_only_ranks_that_sample_load_an_encoder(forks, tmp_path):
    overrides = [
        f"text.encoder={save_clip(tmp_path / 'clip', '[pad]')}", "text.max_tokens=6", "model.text_width=32",
        "image.vae=none", "image.buckets=[[8,8]]", "model.latent_channels=3", "data.val_shards=[]",
        f"data.cache_dir={tmp_path / 'cache'}", "edge.weight=0", 'sample.prompts=["a", "b"]',
    ]  # fmt: skip
    actual = seen(forks, tmp_path, 4, case="encoders", overrides=overrides)
    # One shard, which rank 0 computes; each opening makes a new encoder, that nobody needs the second time.
    assert [of["loads"] for of in actual] == [[1, 1, 2], [0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert {(of["width"], of["fingerprint"]) for of in actual} == {(32, actual[0]["fingerprint"])}
    everyone = seen(forks, tmp_path, 2, case="encoders", overrides=overrides, stage=3)
    assert [of["loads"] for of in everyone] == [[0, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    ("count", "space_ep", "stage", "drawn"),
    [
        (3, 1, 1, [[0], [1], [2], []]),
        (1, 1, 1, [[0], [], [], []]),
        (1, 2, 1, [[0], [0], [], []]),
        (5, 1, 1, [[0, 1], [2, 3], [4, 4], []]),
        (1, 1, 3, [[0], [0], [0], [0]]),
    ],
)
def test_prompts_are_sampled_on_few_ranks_and_sent_to_rank_0(
    forks, tmp_path, count: int, space_ep: int, stage: int, drawn: list[list[int]]
):
    prompts = [f"prompt {letter}" for letter in "abcde"[:count]]
    actual = seen(forks, tmp_path, 4, case="prompts", prompts=prompts, space_ep=space_ep, stage=stage)
    assert [of["drawn"] for of in actual] == drawn
    assert [of["images"] for of in actual[1:]] == [None] * 3
    assert [of["checked"] for of in actual] == [[["prompts", prompts]], [], [], []], "rank 0 reports truncated prompts"
    config = config_of_prompts(prompts, 1)
    s, text, none = config.sample, Letters(), ImageEncoder.of(None)
    requests = [Request(prompt, config.image.buckets[0], s.seed, i) for i, prompt in enumerate(prompts)]
    scheduler = make_scheduler(config.diffusion, s.scheduler)
    alone = Sampler.of(tiny_unet(config), text, none).draw(requests, scheduler, steps=s.steps, guidance=s.guidance)
    np.testing.assert_allclose(np.array(actual[0]["images"]), alone, atol=1)
    assert len({image.tobytes() for image in alone}) == count


@pytest.mark.parametrize("group", [1, 2, 6, 984])
@pytest.mark.parametrize("num_prompts", [1, 5, 6, 2000])
def test_every_prompt_is_sampled_once_and_groups_sample_equally(num_prompts, group):
    shares = [prompt_share(num_prompts, rank, 984, group) for rank in range(984)]
    owned = [i for rank, local in enumerate(shares) for i in dict.fromkeys(local) if i // len(local) == rank]
    assert sorted(owned) == list(range(num_prompts))
    for first in range(0, 984, group):
        assert len({len(local) for local in shares[first : first + group]}) == 1
    assert sum(map(bool, shares)) < num_prompts + group


@pytest.mark.parametrize("count", [32, 48, 1000])
@pytest.mark.parametrize(("world", "group"), [(1, 1), (7, 1), (1000, 1), (984, 6), (12, 12)])
@pytest.mark.parametrize("micro", [1, 2, 16])
def test_validation_samples_are_processed_once(count, world, group, micro):
    drawing = active_ranks(count, world, group, group * micro)
    plan = BatchPlan(count, drawing, micro, group)
    taken = [
        position
        for rank in range(drawing)
        for micro_step in range(plan.accumulation)
        for position, weight in plan.slots(0, rank, micro_step)
        if weight
    ]
    assert sorted(taken) == list(range(count))
    assert drawing % group == 0
    assert drawing <= world
    idle_units = drawing // group - -(-count // (group * micro))
    assert idle_units <= 0, "a group has no sample"


def test_the_preflights_limits_grow_with_the_ranks(tmp_path):
    def limits(world: int) -> tuple[float, float]:
        probe = preflight.Probe(load_config("emoji-tiny"), Ranks(world_size=world), tmp_path)
        return probe._limit(preflight.LIMIT_S), probe._limit(preflight.JOIN_S)

    assert limits(10) == pytest.approx((56.0, 30.5))
    assert limits(1000) == pytest.approx((155.0, 80.0))
    assert limits(10_000) == pytest.approx((1055.0, 530.0))


def test_a_start_is_timed_with_forked_ranks():
    output = subprocess.run(
        [sys.executable, "tools/bench.py", "start", "--ranks", "4", "8", "--ep", "2", "--repeats", "1"],
        capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    ).stdout  # fmt: skip
    table = output[output.index("\nranks ") + 1 :].splitlines()
    rows = {line[:42].strip(): [float(ms) for ms in line[42:].split()] for line in table}
    assert rows.pop("ranks") == [4, 8]
    assert {
        "join the process group",
        "raise_on_all_ranks",
        "expert groups, members only",
        "save: agree on room",
    } <= rows.keys()
    assert all(len(times) == 2 and min(times) > 0 for times in rows.values())
