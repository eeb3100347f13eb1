"""Super-resolution: small pictures are the same from any source, runs as exact as any other; nothing else changes."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raphael_dist import sample
from raphael_dist.checkpoint.reader import CheckpointReader, check_architecture
from raphael_dist.config import Config, load_config
from raphael_dist.config_upscale import check_small_pictures
from raphael_dist.convert.initial import check_initial, load_initial
from raphael_dist.convert.layouts import open_checkpoint
from raphael_dist.convert.plan import Options
from raphael_dist.convert.run import convert
from raphael_dist.data.batches import BatchBuilder
from raphael_dist.data.cache import FeatureCache
from raphael_dist.data.dataset import DecodedSample
from raphael_dist.data.encoders import ImageEncoder
from raphael_dist.data.encoding import AheadEncoder
from raphael_dist.data.open import source_of
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.shards import build_index
from raphael_dist.data.stream import TrainStream
from raphael_dist.errors import UserError
from raphael_dist.evaluation.enlarged import enlarge, errors, figure
from raphael_dist.identity import check_same_run
from raphael_dist.model.diffusion import make_scheduler
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.model.upscale import back_project, beside_latents, shrink
from raphael_dist.pipeline import RaphaelPipeline
from raphael_dist.prepare.build import Preparer
from raphael_dist.prepare.source import parts_of
from raphael_dist.sampling.sampling import Sampler
from tests.beside import canonical, hashes, losses_of
from tests.forks import Forks
from tests.synthetic import SIZE, TEXT_WIDTH, TREE, plain_fragments, tiny_config
from tests.test_control import inputs
from tests.test_stream import BUCKETS, Text, World, encoders
from tests.workers.light import Letters

UPSCALE = {"factor": 2, "patch": 2}  # beside an image encoder of factor 4


# ---- the small picture ----------------------------------------------------------------------------------------------


def test_a_small_picture_holds_averages_and_loses_no_pixel_beside_the_latents() -> None:
    pictures = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).remainder(251).to(torch.uint8)
    small = shrink(pictures, 2)
    for b, c, y, x in ((0, 0, 0, 0), (1, 2, 3, 1)):
        four = pictures[b, c, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].double()
        assert small[b, c, y, x] == round(four.mean().item())
    latents = torch.zeros(2, 4, 2, 2)
    both = beside_latents(latents, small.float(), patch=2)
    assert both.shape == (2, 4 + 12, 2, 2)
    assert both[1, 4 + 4 * 2 + 2 * 1 + 0, 1, 0] == small[1, 2, 2 * 1 + 1, 2 * 0 + 0]  # colour 2, second row, first column
    assert sorted(both[:, 4:].flatten().tolist()) == sorted(small.flatten().tolist())
    repeated = beside_latents(torch.zeros(2, 4, 8, 8), small.float(), patch=1)
    assert repeated.shape == (2, 4 + 3, 8, 8)
    assert repeated[0, 5, 7, 2] == small[0, 1, 3, 1]


def test_a_drawn_picture_comes_to_agree_with_the_small_one() -> None:
    draw = torch.Generator().manual_seed(2)
    true, other = (0.5 * torch.rand(2, 3, 16, 16, generator=draw) for _ in range(2))
    small = torch.nn.functional.avg_pool2d(true, 4)
    off = [(torch.nn.functional.avg_pool2d(back_project(other, small, n), 4) - small).abs().max() for n in (0, 1, 3)]
    assert off[2] < 0.3 * off[1] < 0.3 * off[0]
    assert torch.allclose(back_project(true, small, 3), true, atol=1e-6)


def test_a_cache_of_before_is_found_again(tmp_path: Path) -> None:
    world, other = World(tmp_path), replace(encoders(Text()), upscale=2)
    assert "upscale.factor" not in encoders(Text()).made_of(world.dataset)
    assert FeatureCache(tmp_path, world.dataset, other, True).fingerprint != world.cache.fingerprint


def batch_of(features: str, world: World, folder: Path, noise: float = 0.0) -> tuple[Any, TrainStream]:
    """Return a batch of six mirrored and plain samples of one bucket."""
    data = {"features": features, "cache_dir": str(folder / "cache"), "flip": True, "bucket_run": 6}
    config = tiny_config(
        data=data, image={"encoder": "none", "buckets": BUCKETS}, upscale={**UPSCALE, "noise": noise}, edge={"channels": 4}
    )
    made = replace(encoders(Text()), upscale=2)
    names = [str(path) for path in sorted(folder.glob("s*.tar"))]
    if features == "stored":
        (folder / "stored").mkdir()
        preparer = Preparer(folder / "stored", "stored", None, config, made)
        assert sum(preparer.make(part).written for part in parts_of(names, 10, 0.0, None)) == 30
        names = [str(path) for path in sorted((folder / "stored").glob("*.tar"))]
    index = build_index(names)
    source = source_of(config, index, made, True)
    if isinstance(source, FeatureCache):
        source.build(source.missing())
    stream = TrainStream(SampleOrder(index, BUCKETS, 0, 2, 6), source, seed=0, caption_drop=0.3, flip=True)
    builder = BatchBuilder(config, stream, AheadEncoder(made, wants_edges=True), 2)
    assert builder.stand_in([(0, 1.0)] * 6).small.shape == builder.build([(p, 1.0) for p in range(6)]).small.shape  # type: ignore[union-attr]
    return builder.build([(p, 1.0) for p in range(6)]), stream


def test_online_cached_and_stored_features_give_the_same_small_pictures(tmp_path: Path) -> None:
    world = World(tmp_path)
    online, stream = batch_of("online", world, tmp_path)
    samples = [stream.sample(p) for p in range(6)]
    assert {s.flipped for s in samples} == {True, False}
    for i, one in enumerate(samples):
        pixels = world.dataset.load(one.sample_id, one.bucket, one.flipped).image.astype(np.float64)
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


def test_a_model_without_is_what_it_was() -> None:
    """The numbers are those of the version before there was super-resolution."""
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
    found = model(beside_latents(x, small, 2), *rest).prediction
    torch.testing.assert_close(found, plain(x, *rest).prediction, rtol=1e-5, atol=1e-6)
    losses_of(model, config).sum().backward()
    assert model.conv_in.weight.grad is not None
    assert (model.conv_in.weight.grad[:, 4:].flatten(1).abs().amax(dim=1) > 0).all(), "it learns to see"
    assert hashes(base) == before
    frozen = tiny_config(upscale=UPSCALE, run={"init_from": str(base)}, lora={"rank": 2})
    with pytest.raises(UserError, match=r"conv_in.weight: \(16, 4, 3, 3\) there, \(16, 16, 3, 3\) here"):
        check_initial(frozen, open_checkpoint("auto", base))


def spec(base: Path, steps: int = 4) -> dict[str, Any]:
    sections = {
        "upscale": UPSCALE,
        "run": {"init_from": str(base)},
        "train": {"global_batch": 8, "micro_batch": 2, "max_steps": steps, "log_every": 1},
        "checkpoint": {"every": 2, "keep": 9},
        "optim": {"kind": "adamw", "lr": 1e-3},
    }
    return {"sections": sections, "stage": 2}


def test_a_run_goes_on_bit_for_bit_on_any_ranks_and_leaves_its_base(forks: Forks, tmp_path: Path) -> None:
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


def pixel_config(*more: str, **sizes: Any) -> Config:
    """Return a tiny model that enlarges 4 x 4 to 8 x 8 pixels, without an image encoder."""
    given = {**TREE["model"], "text_width": 384, "latent_channels": 3, **sizes}
    overrides = [f"model.{key}={json.dumps(value)}" for key, value in given.items()]
    settings = ["image.encoder=none", "image.buckets=[[8,8]]", "sample.steps=3", "text.max_tokens=16", "sample.prompts=[]"]
    return load_config("emoji-tiny", [*overrides, *settings, "upscale.factor=2", *more])


def picture(folder: Path, seed: int = 0, side: int = 4) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    path = folder / f"small-{seed}-{side}.png"
    Image.fromarray(pixels).save(path)
    return path


def drawn(checkpoint: Path, folder: Path, *more: str) -> np.ndarray:
    command = ["--checkpoint", str(checkpoint), "--prompt", "a", "--out", str(folder / "x.png"), "--images", str(folder)]
    assert sample.main([*command, *more]) == 0
    return np.asarray(Image.open(folder / "000000.png"))


@pytest.mark.parametrize("kind", ["experts", "dense"])
def test_a_checkpoint_and_its_export_draw_the_same_from_a_small_picture(kind: str, tmp_path: Path) -> None:
    dense: dict[str, Any] = {
        "space_experts": 0, "time_experts": 0, "time_activation": "geglu", "expert_width": [64, 96]
    }  # fmt: skip
    config = pixel_config() if kind == "experts" else pixel_config("edge.weight=0", **dense)
    found = canonical(tmp_path / "model", config)
    convert("canonical", found, "diffusers", tmp_path / "exported", Options(weights="ema"))
    unet = json.loads((tmp_path / "exported" / "unet" / "config.json").read_text())
    if kind == "dense":
        assert (unet["_class_name"], unet["in_channels"], unet["out_channels"]) == ("UNet2DConditionModel", 6, 3)
    else:
        assert unet["tree"]["upscale"] == {"factor": 2, "patch": 1, "noise": 0.0, "back_projections": 3}
    small, other = picture(tmp_path), picture(tmp_path, seed=1)
    ours = drawn(found, tmp_path, "--upscale", str(small))
    assert ours.shape == (8, 8, 3)
    assert (drawn(tmp_path / "exported", tmp_path, "--upscale", str(small)) == ours).all()
    assert (drawn(found, tmp_path, "--upscale", str(other)) != ours).any()
    pipeline = RaphaelPipeline.from_pretrained(tmp_path / "exported")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a", image=[Image.open(small)], num_images_per_prompt=2, seed=0).images
    assert np.abs(np.asarray(images[0]).astype(int) - ours.astype(int)).max() <= 1
    assert (np.asarray(images[1]) != np.asarray(images[0])).any()
    for wrong in (None, Image.open(picture(tmp_path, side=5))):
        with pytest.raises(UserError, match=r"image: .* 4 x 4"):
            pipeline("a", image=wrong, seed=0)
    convert("diffusers", tmp_path / "exported", "canonical", tmp_path / "again", Options())
    a, b = (open_checkpoint("canonical", path) for path in (found, tmp_path / "again"))
    assert all(torch.equal(a.read("ema", n, 0, 9), b.read("master", n, 0, 9)) for n in ("conv_in.weight", "conv_out.weight"))


def test_what_one_model_draws_another_enlarges(tmp_path: Path) -> None:
    tree = pixel_config().model_dump()
    first = canonical(tmp_path / "first", Config(**{**tree, "upscale": {}, "image": {**tree["image"], "buckets": [(4, 4)]}}))
    second = canonical(tmp_path / "second", pixel_config())
    assert drawn(first, tmp_path / "drawn").shape == (4, 4, 3)
    from_first = ("--upscale", str(tmp_path / "drawn" / "000000.png"))
    assert drawn(second, tmp_path / "larger", *from_first).shape == (8, 8, 3)


def test_a_model_is_measured_beside_bicubic_and_the_autoencoder() -> None:
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
    table = errors(found)
    assert table["autoencoder"] == pytest.approx((0.0, 10 * np.log10(255**2 / 1e-9)))
    assert 0 < table["bicubic, corrected"][0] < table["bicubic"][0] < table["this model"][0], "it was never trained"
    assert table["this model"][0] < table["this model, as drawn"][0]
    assert figure(found, scale=2).height == 4 * (2 * 8 + 4)


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_mistakes_of_sampling_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    upscaler, tree = canonical(tmp_path / "upscaler", pixel_config()), pixel_config().model_dump()
    plain = canonical(tmp_path / "plain", Config(**{**tree, "upscale": {}}))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    cases = [
        (upscaler, [], r"--upscale: none given, but this model enlarges small pictures"),
        (plain, ["--upscale", str(picture(tmp_path))], "this model draws from captions alone"),
        (
            upscaler,
            ["--upscale", str(picture(tmp_path, side=6))],
            "given 6 x 6 pixels, must be 4 x 4 for a picture of 8 x 8",
        ),
        (upscaler, ["--upscale", str(tmp_path / "broken.png")], "broken.png: cannot be read"),
        (upscaler, ["--upscale", str(tmp_path / "nothing.png")], "nothing.png: cannot be read"),
    ]
    for checkpoint, more, message in cases:
        assert sample.main(["--checkpoint", str(checkpoint), "--prompt", "a", "--out", str(tmp_path / "x.png"), *more]) == 2
        told = capsys.readouterr().err
        assert message in told
        assert len(told.strip().splitlines()) == 1, told


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"upscale": {"factor": 3}}, "upscale.factor = 3; allowed: 0"),
        ({"upscale": {"factor": 1}}, "upscale.factor = 1; allowed: 0"),
        (
            {"upscale": {"factor": 2}, "sample": {"prompts": ["a"]}},
            "sample.pictures has 0 entries, but sample.prompts has 1",
        ),
        ({"sample": {"prompts": ["a"], "pictures": ["a.png"]}}, r"give sample.pictures=\[\], or set upscale.factor"),
        ({"upscale": {"factor": 2}, "control": {"enabled": True}, "run": {"init_from": "x"}}, "needs control.enabled=false"),
    ],
)
def test_mistakes_of_the_configuration_are_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(**given)


def test_what_does_not_fit_is_named_before_the_first_step() -> None:
    off, two, four = tiny_config(), tiny_config(upscale=UPSCALE), tiny_config(upscale={"factor": 4})
    check_small_pictures(two.upscale, 4, ((16, 32),))
    check_small_pictures(four.upscale, 2, ((16, 32),))  # fewer pixels than latents
    check_small_pictures(off.upscale, 8, ((24, 24),))
    with pytest.raises(UserError, match=r"upscale.patch is 2, .* set upscale.patch=4"):
        check_small_pictures(two.upscale, 8, ((64, 64),))
    with pytest.raises(UserError, match=r"image.buckets: \[18, 16\] is not a multiple of 4, upscale.factor"):
        check_small_pictures(four.upscale, 2, ((18, 16),))
    with pytest.raises(UserError, match=r"upscale.factor: .* has 0, this configuration gives 2"):
        check_architecture(off, two, "there")
    allowed = tiny_config(upscale={**UPSCALE, "noise": 0.1}, run={"allow_change": ["upscale.noise", "upscale.factor"]})
    assert check_same_run(two, allowed, "there") == ["upscale.noise was 0.0 there and is 0.1 here (run.allow_change)"]
    with pytest.raises(UserError, match=r"holds another run: upscale\.factor was 0 there"):
        check_same_run(off, allowed, "there")
