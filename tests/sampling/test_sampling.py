"""Sampling: an image depends only on its request, not on batch or rank; prompt files; mistakes in one line."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raphael_dist import sample
from raphael_dist.config.schema import load_config
from raphael_dist.convert.conversion import convert
from raphael_dist.convert.write_plan import Options
from raphael_dist.data.features.encoders import ImageEncoder
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import make_scheduler
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.runtime.ranks import Ranks
from raphael_dist.sampling.distributed import SamplingSettings, draw_share
from raphael_dist.sampling.prompts import batches, read_requests
from raphael_dist.sampling.sampler import Request, Sampler
from tests.lib.checkpoints import handmade_canonical
from tests.lib.launch import run_ranks
from tests.lib.synthetic import TEXT_WIDTH, TREE
from tests.workers.light import Letters

PROMPTS = [f"prompt {letter}" for letter in "abcdefgh"]


def config_of(text_width: int = 384):
    sizes = {**TREE["model"], "text_width": text_width, "latent_channels": 3}
    overrides = [f"model.{key}={json.dumps(value)}" for key, value in sizes.items()]
    others = ["image.vae=none", "image.buckets=[[8,8]]", "edge.channels=4", "sample.steps=3", "text.max_tokens=16"]
    return load_config("emoji-tiny", [*overrides, *others])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of a tiny model with random weights in pixel space."""
    path = tmp_path_factory.mktemp("sampling") / "canonical"
    config = config_of()
    torch.manual_seed(5)
    model = RaphaelUNet(config)
    handmade_canonical(
        path, config, {(kind, n): p.detach() for n, p in model.named_parameters() for kind in ("ema", "master")}
    )
    return path


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "euler"])
@pytest.mark.parametrize("size_hw", [(8, 8), (12, 20)])
def test_image_is_the_same_in_a_batch_of_one_and_of_eight(scheduler, size_hw):
    config = config_of(text_width=TEXT_WIDTH)
    torch.manual_seed(5)
    model = RaphaelUNet(config)
    sampler = Sampler.of(model.eval(), Letters(), ImageEncoder.of(None))
    requests = [Request(p, size_hw, seed=3, index=i, negative="x" * (i % 3)) for i, p in enumerate(PROMPTS)]

    def drawn(batch: int, rank: int, world: int) -> dict[int, np.ndarray]:
        share = draw_share(
            sampler,
            requests,
            lambda: make_scheduler(config.diffusion, scheduler),
            SamplingSettings(4, 3.0, batch),
            Ranks(rank, world),
        )
        return {number: pixels for part in share for number, pixels in part}

    eight, alone = drawn(8, 0, 1), drawn(1, 0, 1)
    divided = drawn(2, 0, 3) | drawn(3, 1, 3) | drawn(8, 2, 3)
    assert sorted(eight) == sorted(alone) == sorted(divided) == list(range(8))
    for number in eight:
        # Sums of another shape may round differently in the last bit.
        assert np.abs(eight[number].astype(int) - alone[number].astype(int)).max() <= 1
        assert np.abs(eight[number].astype(int) - divided[number].astype(int)).max() <= 1
    assert len({pixels.tobytes() for pixels in eight.values()}) == 8


def test_two_ranks_draw_the_same_images_as_one(folder: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": p, "seed": 9} if i == 3 else {"prompt": p, "size": [8, 8 + 4 * (i % 2)]} for i, p in enumerate(PROMPTS)
    ]
    prompts.write_text("\n".join(json.dumps(line) for line in lines))
    common = ["--checkpoint", str(folder), "--prompts", str(prompts), "--batch", "3", "--per-prompt", "2"]
    assert sample.main([*common, "--out", str(tmp_path / "1.png"), "--images", str(tmp_path / "one")]) == 0
    spread = [*common, "--out", str(tmp_path / "2.png"), "--images", str(tmp_path / "two")]
    outputs = run_ranks(["raphael_dist/sample.py", *spread], 2)
    assert "16 of 16 images" in outputs[0]
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "two").iterdir()) == [f"{i:06d}.png" for i in range(16)]
    for name in names:
        first, second = (np.asarray(Image.open(tmp_path / where / name)).astype(int) for where in ("one", "two"))
        assert np.abs(first - second).max() <= 1, name
    assert np.asarray(Image.open(tmp_path / "one" / "000002.png")).shape == (8, 12, 3)
    alone = [*common[:2], "--prompt", PROMPTS[3], "--seed", "9", "--out", str(tmp_path / "3.png"), "--images", str(tmp_path)]
    assert sample.main(alone) == 0
    with_own_seed = np.asarray(Image.open(tmp_path / "one" / "000006.png")).astype(int)
    assert np.abs(with_own_seed - np.asarray(Image.open(tmp_path / "000000.png")).astype(int)).max() <= 1


def test_truncated_prompts_are_reported(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    long = "a red heart " * 10
    words = ["--checkpoint", str(folder), "--steps", "1", "--out", str(tmp_path / "x.png")]

    def warnings(*more: str) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="raphael_dist"):
            assert sample.main([*words, *more]) == 0
        return [message for message in caplog.messages if "truncated" in message]

    prompts = "text.max_tokens=16: longer prompts are truncated (1 of 2)"
    negative = "text.max_tokens=16: longer negative prompts are truncated (1 of 1)"
    assert warnings("--prompt", "a", "--prompt", long) == [prompts]
    assert warnings("--prompt", "a", "--negative", long) == [negative]
    assert warnings("--prompt", "a", "--negative", long, "--guidance", "1") == [], "it has no effect then"
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a", "negative_prompt": long}))
    assert warnings("--prompts", str(tmp_path / "prompts.jsonl")) == [negative]


def test_exported_pipeline_is_sampled_like_its_checkpoint(folder: Path, tmp_path: Path):
    convert("canonical", folder, "diffusers", tmp_path / "exported", Options(weights="ema"))
    images = []
    for path in (folder, tmp_path / "exported"):
        command = ["--checkpoint", str(path), "--prompt", "a", "--scheduler", "euler", "--out", str(tmp_path / "x.png")]
        assert sample.main(command) == 0
        images.append(np.asarray(Image.open(tmp_path / "x.png")))
    assert (images[0] == images[1]).all()


def test_batches_hold_one_size_and_every_number_once():
    requests = [Request("", (8, 8 + 4 * (i % 3))) for i in range(20)]
    divided = batches(requests, range(20), 4)
    assert sorted(n for batch in divided for n in batch) == list(range(20))
    assert all(len({requests[n].size_hw for n in batch}) == 1 and len(batch) <= 4 for batch in divided)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 must be JSON"),
        ("[1]", "line 2 must be a JSON object"),
        ('{"prompt": 3}', "line 2 must be a JSON object"),
        ('{"prompt": "a", "sed": 3}', r"line 2: the key 'sed' is unknown \(did you mean 'seed'\?\)"),
        ('{"prompt": "a", "seed": -1}', "line 2: seed=-1 must be"),
        ('{"prompt": "a", "size": [8]}', r"line 2: size=\[8\] must be"),
        ('{"prompt": "a", "label": 3}', r"line 2: label=3 must be a string"),
        ('{"prompt": "a", "negative_prompt": 3}', "line 2: negative_prompt=3 must be"),
    ],
)
def test_bad_line_of_a_prompt_file_is_reported(tmp_path: Path, line: str, message: str):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(UserError, match=message):
        read_requests(path, Request("", (8, 8)))


def test_prompt_file_is_read_without_empty_lines(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text("a\n\n  b \n")
    requests = read_requests(path, Request("", (8, 8), seed=4, negative="x"))
    assert [(r.prompt, r.index, r.seed, r.negative) for r in requests] == [("a", 0, 4, "x"), ("b", 1, 4, "x")]
    path.write_text("\n")
    with pytest.raises(UserError, match=r"must contain 1 to .* but it contains 0"):
        read_requests(path, Request("", (8, 8)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch 0 must be"),
        (["--strength", "2"], "--strength 2.0 must be"),
        (["--prompts", "nothing.txt"], "--prompts=nothing.txt cannot be read"),
        (["--prompt", "a", "--image", "nothing.png"], "--image=nothing.png cannot be read"),
        (["--prompt", "a", "--images", "/proc/x"], "--out, --images: /proc/x"),
    ],
)
def test_sample_mistakes_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments, message):
    assert sample.main(["--checkpoint", str(folder), "--out", str(tmp_path / "x.png"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_suffix_of_a_prompt_file_is_read_in_any_case(tmp_path: Path):
    path = tmp_path / "p.JSONL"
    path.write_text('{"prompt": "a"}\n')
    assert [r.prompt for r in read_requests(path, Request("", (8, 8)))] == ["a"]


@pytest.mark.parametrize("name", ["p.json", "p.JSON"])
def test_json_file_as_prompt_file_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).write_text('["a", "b"]')
    with pytest.raises(UserError, match=r"p.json must have one prompt per line, .* Save it as .jsonl|p.JSON must"):
        read_requests(tmp_path / name, Request("", (8, 8)))
