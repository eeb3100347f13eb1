"""Super-resolution: small images are equal from any source, and runs are exact."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from enlarge import draw_rows, enlarge, measure_errors
from raphael_dist import sample
from raphael_dist.checkpoint.reader import CheckpointReader, check_architecture
from raphael_dist.config.resume_check import check_same_run
from raphael_dist.config.schema import Config, load_config
from raphael_dist.config.upscale import check_small_images
from raphael_dist.convert.conversion import convert
from raphael_dist.convert.init_weights import check_initial, load_initial
from raphael_dist.convert.layouts import open_checkpoint
from raphael_dist.convert.write_plan import Options
from raphael_dist.data.batches import BatchBuilder
from raphael_dist.data.features.batch_encoder import BatchEncoder
from raphael_dist.data.features.cache import FeatureCache
from raphael_dist.data.features.encoders import ImageEncoder
from raphael_dist.data.open_streams import source_of
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.shards.decode_sample import DecodedSample
from raphael_dist.data.stream import TrainStream
from raphael_dist.data_prep.build_shards import Preparer
from raphael_dist.data_prep.inputs import parts_of
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import make_scheduler
from raphael_dist.model.super_resolution import append_small_image, back_project, downscale
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.pipeline import RaphaelUpscalePipeline
from raphael_dist.sampling.sampler import Sampler
from tests.data.test_stream import BUCKETS, Text, World, encoders
from tests.lib.adapters import canonical, hashes, losses_of
from tests.lib.forks import Forks
from tests.lib.synthetic import SIZE, TEXT_WIDTH, TREE, plain_fragments, tiny_config
from tests.model.test_controlnet import inputs
from tests.workers.light import Letters

UPSCALE = {"factor": 2, "patch": 2}  # with an image encoder of factor 4


# ---- the small image ----------------------------------------------------------------------------------------------


def test_small_image_has_averages_and_all_pixels_become_channels() -> None:
    images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).remainder(251).to(torch.uint8)
    small = downscale(images, 2)
    for b, c, y, x in ((0, 0, 0, 0), (1, 2, 3, 1)):
        four = images[b, c, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].double()
        assert small[b, c, y, x] == round(four.mean().item())
    latents = torch.zeros(2, 4, 2, 2)
    both = append_small_image(latents, small.float(), patch=2)
    assert both.shape == (2, 4 + 12, 2, 2)
    assert both[1, 4 + 4 * 2 + 2 * 1 + 0, 1, 0] == small[1, 2, 2 * 1 + 1, 2 * 0 + 0]  # colour 2, second row, first column
    assert sorted(both[:, 4:].flatten().tolist()) == sorted(small.flatten().tolist())
    repeated = append_small_image(torch.zeros(2, 4, 8, 8), small.float(), patch=1)
    assert repeated.shape == (2, 4 + 3, 8, 8)
    assert repeated[0, 5, 7, 2] == small[0, 1, 3, 1]


def test_back_projection_approaches_the_small_image() -> None:
    draw = torch.Generator().manual_seed(2)
    true, other = (0.5 * torch.rand(2, 3, 16, 16, generator=draw) for _ in range(2))
    small = torch.nn.functional.avg_pool2d(true, 4)
    off = [(torch.nn.functional.avg_pool2d(back_project(other, small, n), 4) - small).abs().max() for n in (0, 1, 3)]
    assert off[2] < 0.3 * off[1] < 0.3 * off[0]
    assert torch.allclose(back_project(true, small, 3), true, atol=1e-6)


def test_cache_depends_on_upscale_factor(tmp_path: Path) -> None:
    world, other = World(tmp_path), replace(encoders(Text()), upscale=2)
    assert FeatureCache(tmp_path, world.dataset, other, True).fingerprint != world.cache.fingerprint


def batch_of(features: str, world: World, folder: Path, noise: float = 0.0) -> tuple[Any, TrainStream]:
    """Return a batch of six mirrored and plain samples of one bucket."""
    data = {"features": features, "cache_dir": str(folder / "cache"), "flip": True, "bucket_run": 6}
    config = tiny_config(
        data=data, image={"vae": "none", "buckets": BUCKETS}, upscale={**UPSCALE, "noise": noise}, edge={"channels": 4}
    )
    made = replace(encoders(Text()), upscale=2)
    names = [str(path) for path in sorted(folder.glob("s*.tar"))]
    if features == "stored":
        (folder / "stored").mkdir()
        preparer = Preparer(folder / "stored", "stored", None, config, made)
        assert sum(preparer.make(part).written for part in parts_of(names, 10, 0.0, None)) == 30
        names = [str(path) for path in sorted((folder / "stored").glob("*.tar"))]
    index = build_index(names, folder / "index")
    source = source_of(config, index, made, True)
    if isinstance(source, FeatureCache):
        source.build(source.missing())
    stream = TrainStream(SampleOrder(index, BUCKETS, 0, 2, 6), source, seed=0, caption_dropout=0.3, flip=True)
    builder = BatchBuilder(config, stream, BatchEncoder(made, with_edges=True), 2)
    assert builder.dummy_batch([(0, 1.0)] * 6).small.shape == builder.build([(p, 1.0) for p in range(6)]).small.shape  # type: ignore[union-attr]
    return builder.build([(p, 1.0) for p in range(6)]), stream


def test_online_cached_and_stored_features_give_equal_small_images(tmp_path: Path) -> None:
    world = World(tmp_path)
    online, stream = batch_of("online", world, tmp_path)
    samples = [stream.sample(p) for p in range(6)]
    assert {s.flipped for s in samples} == {True, False}
    for i, item in enumerate(samples):
        pixels = world.dataset.load(item.sample_id, item.bucket, item.flipped).image.astype(np.float64)
        height, width = pixels.shape[1:]
        means = pixels.reshape(3, height // 2, 2, width // 2, 2).mean(axis=(2, 4)).round()
        torch.testing.assert_close(online.small[i], torch.from_numpy(means / 127.5 - 1).float())
    for features in ("cached", "stored"):
        assert torch.equal(batch_of(features, world, tmp_path)[0].small, online.small), features
    noisy, _ = batch_of("online", world, tmp_path, noise=0.3)
    off = (noisy.small - online.small).flatten(1).std(dim=1)
    assert 0 < off.min() < off.max() < 0.33
    assert torch.equal(noisy.small, batch_of("cached", world, tmp_path, noise=0.3)[0].small), "drawn by the position"


# ---- nothing else changes -------------------------------------------------------------------------------------------


def test_a_model_without_upscale_is_unchanged() -> None:
    """The numbers equal those of the version before super-resolution."""
    config = tiny_config()
    torch.manual_seed(0)
    model = RaphaelUNet(config)
    about = "".join(f"{name} {tuple(p.shape)}" for name, p in model.named_parameters())
    assert hashlib.sha256(about.encode()).hexdigest()[:16] == "70dca8cec3f053cc"
    assert losses_of(model, config).sum().item() == pytest.approx(4.520462989807129, rel=1e-5)


def test_an_upscaler_starts_as_the_base_that_it_is_given(tmp_path: Path) -> None:
    base = canonical(tmp_path / "base", tiny_config())
    before, config = hashes(base), tiny_config(upscale=UPSCALE, run={"init_from": str(base)})
    torch.manual_seed(9)
    model, plain = RaphaelUNet(config), RaphaelUNet(tiny_config())
    load_initial(plain_fragments(plain), base, tiny_config())
    load_initial(plain_fragments(model), base, config)
    x, *rest = inputs()
    small = torch.rand(2, 3, 2 * SIZE, 2 * SIZE)
    actual = model(append_small_image(x, small, 2), *rest).prediction
    torch.testing.assert_close(actual, plain(x, *rest).prediction, rtol=1e-5, atol=1e-6)
    losses_of(model, config).sum().backward()
    assert model.conv_in.weight.grad is not None
    assert (model.conv_in.weight.grad[:, 4:].flatten(1).abs().amax(dim=1) > 0).all(), "it learns to see"
    assert hashes(base) == before
    frozen = tiny_config(upscale=UPSCALE, run={"init_from": str(base)}, lora={"rank": 2})
    with pytest.raises(UserError, match=r"conv_in.weight is \(16, 4, 3, 3\) in .* and \(16, 16, 3, 3\) in"):
        check_initial(frozen, open_checkpoint("auto", base))


def spec(base: Path, steps: int = 4) -> dict[str, Any]:
    sections = {
        "upscale": UPSCALE,
        "run": {"init_from": str(base)},
        "train": {"global_batch_size": 8, "micro_batch_size": 2, "max_steps": steps, "log_every": 1},
        "checkpoint": {"every": 2, "keep": 9},
        "optim": {"kind": "adamw", "lr": 1e-3},
    }
    return {"sections": sections, "stage": 2}


def test_upscale_run_resumes_bit_for_bit_and_keeps_its_base(forks: Forks, tmp_path: Path) -> None:
    base = canonical(tmp_path / "base", tiny_config())
    before = hashes(base)
    forks.must(tmp_path / "whole", 1, **spec(base))
    forks.must(tmp_path / "two", 2, **spec(base))
    forks.must(tmp_path / "run", 1, **spec(base, steps=2))
    forks.must(tmp_path / "run", 1, **spec(base))
    assert hashes(base) == before
    whole, two, run = (CheckpointReader(tmp_path / n / "checkpoints" / "step-00000004") for n in ("whole", "two", "run"))
    assert whole.shapes["conv_in.weight"] == (16, 16, 3, 3)
    for kind in ("master", "exp_avg", "exp_avg_sq", "ema"):
        for name in whole.shapes:
            assert torch.equal(run.whole(kind, name), whole.whole(kind, name)), f"{kind} of {name}"
    seen = whole.whole("master", "conv_in.weight")[:, 4:]
    assert seen.abs().max() > 1e-4, "these channels began at zero"
    torch.testing.assert_close(two.whole("master", "conv_in.weight")[:, 4:], seen, rtol=1e-2, atol=1e-5)


# ---- drawing --------------------------------------------------------------------------------------------------------


def pixel_config(*extra: str, **sizes: Any) -> Config:
    """Return the configuration of a tiny model that enlarges 4 x 4 to 8 x 8 pixels, without an image encoder."""
    arguments = {**TREE["model"], "text_width": 384, "latent_channels": 3, **sizes}
    overrides = [f"model.{key}={json.dumps(value)}" for key, value in arguments.items()]
    settings = ["image.vae=none", "image.buckets=[[8,8]]", "sample.steps=3", "text.max_tokens=16", "sample.prompts=[]"]
    return load_config("emoji-tiny", [*overrides, *settings, "upscale.factor=2", *extra])


def image_file(folder: Path, seed: int = 0, side: int = 4) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    path = folder / f"small-{seed}-{side}.png"
    Image.fromarray(pixels).save(path)
    return path


def drawn(checkpoint: Path, folder: Path, *extra: str) -> np.ndarray:
    command = ["--checkpoint", str(checkpoint), "--prompt", "a", "--out", str(folder / "x.png"), "--images", str(folder)]
    assert sample.main([*command, *extra]) == 0
    return np.asarray(Image.open(folder / "000000.png"))


@pytest.mark.parametrize("kind", ["experts", "dense"])
def test_checkpoint_and_export_sample_equal_images_from_a_small_one(kind: str, tmp_path: Path) -> None:
    dense: dict[str, Any] = {
        "space_experts": 0, "time_experts": 0, "time_activation": "geglu", "expert_width": [64, 96]
    }  # fmt: skip
    config = pixel_config() if kind == "experts" else pixel_config("edge.weight=0", **dense)
    actual = canonical(tmp_path / "model", config)
    convert("canonical", actual, "diffusers", tmp_path / "exported", Options(weights="ema"))
    unet = json.loads((tmp_path / "exported" / "unet" / "config.json").read_text())
    if kind == "dense":
        assert (unet["_class_name"], unet["in_channels"], unet["out_channels"]) == ("UNet2DConditionModel", 6, 3)
    else:
        assert (unet["_class_name"], unet["in_channels"], unet["out_channels"]) == ("RaphaelUNet2D", 6, 3)
    small, other = image_file(tmp_path), image_file(tmp_path, seed=1)
    ours = drawn(actual, tmp_path, "--upscale", str(small))
    assert ours.shape == (8, 8, 3)
    assert (drawn(tmp_path / "exported", tmp_path, "--upscale", str(small)) == ours).all()
    assert (drawn(actual, tmp_path, "--upscale", str(other)) != ours).any()
    pipeline = RaphaelUpscalePipeline.from_pretrained(tmp_path / "exported")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a", image=[Image.open(small)], num_images_per_prompt=2, seed=0).images
    assert np.abs(np.asarray(images[0]).astype(int) - ours.astype(int)).max() <= 1
    assert (np.asarray(images[1]) != np.asarray(images[0])).any()
    for wrong in (None, Image.open(image_file(tmp_path, side=5))):
        with pytest.raises(UserError, match=r"image.* 4 x 4"):
            pipeline("a", image=wrong, seed=0)
    convert("diffusers", tmp_path / "exported", "canonical", tmp_path / "again", Options())
    a, b = (open_checkpoint("canonical", path) for path in (actual, tmp_path / "again"))
    assert all(torch.equal(a.read("ema", n, 0, 9), b.read("master", n, 0, 9)) for n in ("conv_in.weight", "conv_out.weight"))


def test_a_second_model_enlarges_samples_of_the_first(tmp_path: Path) -> None:
    tree = pixel_config().model_dump()
    first = canonical(tmp_path / "first", Config(**{**tree, "upscale": {}, "image": {**tree["image"], "buckets": [(4, 4)]}}))
    second = canonical(tmp_path / "second", pixel_config())
    assert drawn(first, tmp_path / "drawn").shape == (4, 4, 3)
    from_first = ("--upscale", str(tmp_path / "drawn" / "000000.png"))
    assert drawn(second, tmp_path / "larger", *from_first).shape == (8, 8, 3)


def test_a_model_is_compared_with_bicubic_and_the_autoencoder() -> None:
    config = pixel_config(text_width=TEXT_WIDTH)
    torch.manual_seed(5)
    sampler = Sampler.of(RaphaelUNet(config).eval(), Letters(), ImageEncoder.of(None))  # type: ignore[arg-type]
    edge = np.zeros((3, 8, 8), np.uint8)
    edge[:, :, 3:] = 255
    flat = np.full((3, 8, 8), 90, np.uint8)
    samples = [DecodedSample(image, ["a"], None, "", [1.0], {}) for image in (flat, edge, flat)]
    found = list(enlarge(sampler, samples, lambda: make_scheduler(config.diffusion, "ddim"), steps=2, guidance=1.0, batch=2))
    assert (found[1].small[0, :, 0] == [0, 128, 255, 255]).all()
    assert (found[0].large["bicubic"] == 90).all()
    table = measure_errors(found)
    assert table["autoencoder"] == pytest.approx((0.0, 10 * np.log10(255**2 / 1e-9)))
    assert 0 < table["bicubic, corrected"][0] < table["bicubic"][0] < table["this model"][0], "it was never trained"
    assert table["this model"][0] < table["this model, as drawn"][0]
    assert draw_rows(found, scale=2).height == 4 * (2 * 8 + 4)


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_mistakes_of_sampling_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    upscaler, tree = canonical(tmp_path / "upscaler", pixel_config()), pixel_config().model_dump()
    plain = canonical(tmp_path / "plain", Config(**{**tree, "upscale": {}}))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    cases = [
        (upscaler, [], "--upscale is required, because the model enlarges images (upscale.factor="),
        (plain, ["--upscale", str(image_file(tmp_path))], "requires a super-resolution model"),
        (
            upscaler,
            ["--upscale", str(image_file(tmp_path, side=6))],
            "must have 4 x 4 pixels (height x width), since it is enlarged 2 times to 8 x 8, but it has 6 x 6",
        ),
        (upscaler, ["--upscale", str(tmp_path / "broken.png")], "broken.png cannot be read"),
        (upscaler, ["--upscale", str(tmp_path / "nothing.png")], "nothing.png cannot be read"),
    ]
    for checkpoint, extra, message in cases:
        assert sample.main(["--checkpoint", str(checkpoint), "--prompt", "a", "--out", str(tmp_path / "x.png"), *extra]) == 2
        reported = capsys.readouterr().err
        assert message in reported
        assert len(reported.strip().splitlines()) == 1, reported


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"upscale": {"factor": 3}}, "upscale.factor=3 must be a power of two. Set 0"),
        ({"upscale": {"factor": 1}}, "upscale.factor=1 must be a power of two. Set 0"),
        (
            {"upscale": {"factor": 2}, "sample": {"prompts": ["a"]}},
            "one image for each caption in sample.prompts, but the number of images is 0 and that of captions is 1",
        ),
        (
            {"sample": {"prompts": ["a"], "images": ["a.png"]}},
            r"requires upscale.factor above 0 or control.enabled=true, .* sample.images=\[\]",
        ),
        (
            {"upscale": {"factor": 2}, "control": {"enabled": True}, "run": {"init_from": "x"}},
            "requires control.enabled=false",
        ),
    ],
)
def test_mistakes_of_the_configuration_are_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(**arguments)


def test_incompatible_data_is_reported_before_the_first_step() -> None:
    off, two, four = tiny_config(), tiny_config(upscale=UPSCALE), tiny_config(upscale={"factor": 4})
    check_small_images(two.upscale, 4, ((16, 32),))
    check_small_images(four.upscale, 2, ((16, 32),))  # fewer pixels than latents
    check_small_images(off.upscale, 8, ((24, 24),))
    with pytest.raises(UserError, match=r"upscale.patch=2 must be .* Set upscale.patch=4"):
        check_small_images(two.upscale, 8, ((64, 64),))
    with pytest.raises(UserError, match=r"image.buckets must have .* multiples of upscale.factor=4, but \[18, 16\]"):
        check_small_images(four.upscale, 2, ((18, 16),))
    with pytest.raises(UserError, match=r"upscale.factor=2 must be 0, the value in the configuration of the checkpoint"):
        check_architecture(off, two, "there")
    allowed = tiny_config(upscale={**UPSCALE, "noise": 0.1}, run={"allow_change": ["upscale.noise", "upscale.factor"]})
    assert check_same_run(two, allowed, "there") == ["upscale.noise was 0.0 and is now 0.1 (run.allow_change)"]
    with pytest.raises(UserError, match=r"different settings: upscale\.factor was 0"):
        check_same_run(off, allowed, "there")
