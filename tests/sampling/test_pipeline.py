"""Exports to diffusers: the folder loads as a pipeline and draws the same image as the sampler at the same seed."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from raphael_dist.config.schema import Config, load_config
from raphael_dist.convert.conversion import convert
from raphael_dist.convert.write_plan import Options
from raphael_dist.data.features.encoders import ImageEncoder, TextEncoder
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import make_scheduler
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.pipeline import RaphaelImg2ImgPipeline, RaphaelPipeline
from raphael_dist.sampling.load_model import load_trained
from raphael_dist.sampling.sampler import Request, Sampler, denoiser, initial_noise, sample_latents, to_pixels
from tests.lib.checkpoints import State, assert_same, handmade_canonical, read_state
from tests.lib.synthetic import TREE

VAE = "data/vae-emoji"
PROMPTS = ["a red heart, noto style", "a lemon"]


def emoji(**model) -> Config:
    """Return the tiny model with the demo's encoders."""
    sizes = {**TREE["model"], "text_width": 384, **model}
    overrides = [f"model.{key}={json.dumps(value)}" for key, value in sizes.items()]
    return load_config("emoji-tiny", [*overrides, "edge.channels=4", "sample.steps=3", "text.max_tokens=16"])


def trained(config: Config, folder: Path) -> tuple[RaphaelUNet, State]:
    """Return a model with random weights, and write it as a canonical checkpoint with other averaged weights."""
    torch.manual_seed(5)
    model = RaphaelUNet(config).eval()
    state = {("ema", name): p.detach() for name, p in model.named_parameters()}
    state |= {("master", name): p.detach() + 1 for name, p in model.named_parameters()}
    handmade_canonical(folder, config, state)
    return model, state


def dense_emoji(**model) -> Config:
    """Return one that diffusers has a class for."""
    config = emoji(space_experts=0, time_experts=0, time_activation="geglu", expert_width=[64, 96], **model)
    return config.model_copy(update={"edge": config.edge.model_copy(update={"weight": 0.0})})


def clip(folder: Path, width: int) -> Path:
    """Write a CLIP text encoder with random weights and a tokenizer of single letters."""
    letters = [chr(i) for i in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=77).save_pretrained(folder / "tokenizer")
    torch.manual_seed(6)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    CLIPTextModel(CLIPTextConfig(vocab_size=len(words), **sizes, **ids)).save_pretrained(folder / "text_encoder")
    return folder


def sampled(model, config: Config, scheduler: str = "ddim", negative: str = "", **how) -> np.ndarray:
    text = TextEncoder.load(config.text.encoder, config.text.max_tokens, "cpu", torch.float32)
    image = ImageEncoder.load(VAE, "cpu", torch.float32)
    requests = [Request(prompt, (64, 64), 11, i, negative=negative) for i, prompt in enumerate(PROMPTS)]
    made = make_scheduler(config.diffusion, scheduler)
    return Sampler.of(model, text, image).draw(requests, made, **{"steps": 3, "guidance": 4.0, **how})


def stacked(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_exported_flow_model_samples_the_same_image_as_the_sampler(tmp_path):
    config, flow = emoji(), {"prediction": "flow", "min_snr_gamma": 0.0}
    config = config.model_copy(update={"diffusion": config.diffusion.model_copy(update=flow)})
    model, _ = trained(config, tmp_path / "canonical")
    convert("canonical", tmp_path / "canonical", "diffusers", tmp_path / "exported", Options())
    pipeline = RaphaelPipeline.from_pretrained(tmp_path / "exported")
    images = pipeline(PROMPTS, seed=11, guidance_scale=4.0).images
    assert np.array_equal(stacked(images), sampled(model, config))
    # Image-to-image with all steps differs from pure noise by the image alone, which a flow's first timestep leaves out.
    start = [Image.new("RGB", (64, 64), "white")] * len(PROMPTS)
    again = RaphaelImg2ImgPipeline.from_pipe(pipeline)(PROMPTS, start, 1.0, seed=11, guidance_scale=4.0).images
    assert np.array_equal(stacked(again), stacked(images))


def test_exported_pipeline_samples_the_same_image_as_the_sampler(tmp_path):
    config = emoji()
    model, state = trained(config, tmp_path / "canonical")
    report = convert("canonical", tmp_path / "canonical", "diffusers", tmp_path / "exported", Options())
    assert [row.kind for row in report.rows] == ["ema"]
    assert "master: not written" in report.notes[0]
    card = (tmp_path / "exported" / "README.md").read_text()
    assert card.startswith("---\nlicense: unknown\nlibrary_name: diffusers\n")
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,}; " in card
    shutil.rmtree(tmp_path / "canonical")
    folders = {p.name for p in (tmp_path / "exported").iterdir() if p.is_dir()}
    assert folders == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    pipeline = RaphaelPipeline.from_pretrained(tmp_path / "exported")
    images = pipeline(PROMPTS, seed=11, guidance_scale=4.0).images
    assert np.array_equal(stacked(images), sampled(model, config))
    generic = DiffusionPipeline.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    assert type(generic).__module__ == "diffusers_modules.local.pipeline"  # the folder's own code
    assert np.array_equal(stacked(generic(PROMPTS, seed=11, guidance_scale=4.0).images), stacked(images))
    # What diffusers saves again comes back too, without a manifest.
    pipeline.save_pretrained(tmp_path / "again")
    for again in (RaphaelPipeline, DiffusionPipeline):
        loaded = again.from_pretrained(
            tmp_path / "again", **({} if again is RaphaelPipeline else {"trust_remote_code": True})
        )
        assert np.array_equal(stacked(loaded(PROMPTS, seed=11, guidance_scale=4.0).images), stacked(images))
    convert("auto", tmp_path / "again", "canonical", tmp_path / "back", Options())
    assert_same(read_state("auto", tmp_path / "back"), {("master", n): v for (k, n), v in state.items() if k == "ema"})


def test_dense_export_is_a_diffusers_unet_with_the_same_images(tmp_path):
    config = dense_emoji()
    model, state = trained(config, tmp_path / "canonical")
    convert("auto", tmp_path / "canonical", "diffusers", tmp_path / "exported", Options(weights="ema"))
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "exported" / "unet", low_cpu_mem_usage=False)
    assert all(torch.equal(unet.state_dict()[n], v) for (k, n), v in state.items() if k == "ema")
    pipeline = RaphaelPipeline.from_pretrained(tmp_path / "exported")
    images = stacked(pipeline(PROMPTS, seed=11, guidance_scale=4.0).images)
    # diffusers' attention rounds in another order than ours.
    assert np.abs(images.astype(int) - sampled(model, config).astype(int)).max() <= 1
    convert("diffusers", tmp_path / "exported", "dense", tmp_path / "dense", Options())
    assert_same(read_state("dense", tmp_path / "dense"), {("master", n): v for (k, n), v in state.items() if k == "ema"})


def test_dense_export_with_clip_is_a_stable_diffusion_pipeline(tmp_path):
    config = dense_emoji(text_width=32)
    text = config.text.model_copy(update={"encoder": str(clip(tmp_path / "clip", 32)), "max_tokens": 77})
    config = config.model_copy(update={"text": text})
    model, _ = trained(config, tmp_path / "canonical")
    convert("auto", tmp_path / "canonical", "diffusers", tmp_path / "exported", Options())
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "exported")
    assert type(pipeline) is StableDiffusionPipeline
    noise = torch.stack([initial_noise(11, i, (4, 16, 16)) for i in range(2)])
    for scheduler in ("ddim", "dpm++", "euler"):
        pipeline.scheduler = make_scheduler(config.diffusion, scheduler)
        arguments = {"negative_prompt": ["a sun"] * 2, "num_inference_steps": 3, "guidance_scale": 4.0}
        # Its own noise is scaled by the scheduler's first sigma; ours is handed over unscaled.
        images = stacked(pipeline(PROMPTS, latents=noise.clone(), **arguments).images)
        ours = sampled(model, config, scheduler, "a sun")
        assert np.abs(images.astype(int) - ours.astype(int)).max() <= 1, scheduler


def test_image_to_image_is_the_same_as_in_diffusers(tmp_path):
    config = dense_emoji(text_width=32)
    text = config.text.model_copy(update={"encoder": str(clip(tmp_path / "clip", 32)), "max_tokens": 77})
    config = config.model_copy(update={"text": text})
    model, _ = trained(config, tmp_path / "canonical")
    convert("auto", tmp_path / "canonical", "diffusers", tmp_path / "exported", Options())
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(tmp_path / "exported")
    encoder = TextEncoder.load(config.text.encoder, 77, "cpu", torch.float32)
    start = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    for scheduler in ("ddim", "dpm++", "euler"):
        pipeline.scheduler = make_scheduler(config.diffusion, scheduler)
        arguments = {"num_inference_steps": 6, "strength": 0.55, "guidance_scale": 4.0, "output_type": "latent"}
        expected = pipeline(PROMPTS, image=start, generator=torch.Generator().manual_seed(2), **arguments).images
        latents = sample_latents(
            denoiser(model), make_scheduler(config.diffusion, scheduler), noise, encoder.encode(PROMPTS),
            encoder.encode([""]), steps=6, guidance=4.0, start_BChw=start, strength=0.55,
        )  # fmt: skip
        torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> RaphaelPipeline:
    folder = tmp_path_factory.mktemp("exported")
    trained(emoji(), folder / "canonical")
    convert("canonical", folder / "canonical", "diffusers", folder / "exported", Options())
    pipeline = RaphaelPipeline.from_pretrained(folder / "exported")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_pipeline_is_called_like_diffusers(exported):
    def drawn(**arguments):
        return exported("a sun", num_inference_steps=2, output_type="np", **arguments).images

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    first = drawn(generator=seeded(), num_images_per_prompt=2)
    assert first.shape == (2, 64, 64, 3)
    assert (first == drawn(generator=seeded(), num_images_per_prompt=2)).all()
    assert (first[0] != first[1]).any()
    assert (drawn(seed=4) != drawn(seed=5)).any()
    assert (drawn(seed=4) != drawn(seed=4, negative_prompt="a red heart")).any()
    assert (drawn(seed=4, guidance_scale=1.0) == drawn(seed=4, guidance_scale=1.0, negative_prompt="a red heart")).all()
    assert drawn(seed=4, height=32, width=96).shape == (1, 32, 96, 3)
    tensors = exported("a sun", num_inference_steps=2, output_type="pt", seed=4).images
    np.testing.assert_array_equal(tensors.permute(0, 2, 3, 1).numpy(), drawn(seed=4))
    as_tuple = exported("a sun", num_inference_steps=2, output_type="np", seed=4, return_dict=False)
    assert (as_tuple[0] == drawn(seed=4)).all()


def test_pipeline_reports_truncated_prompts(exported, caplog):
    long = "a red heart " * 10
    with caplog.at_level(logging.WARNING, logger="raphael_dist"):
        exported(["a sun", long], num_inference_steps=1, output_type="latent", seed=1, negative_prompt="a moon")
        exported("a sun", num_inference_steps=1, output_type="latent", seed=1, negative_prompt=long)
        exported("a sun", num_inference_steps=1, output_type="latent", seed=1, negative_prompt=long, guidance_scale=1.0)
    truncated = [message for message in caplog.messages if "truncated" in message]
    assert truncated == [
        "text.max_tokens=16: longer prompts are truncated (1 of 2)",
        "text.max_tokens=16: longer negative prompts are truncated (1 of 1)",
    ]


def test_callback_is_called_every_step_and_may_change_latents(exported):
    seen = []

    def callback(pipeline, step, timestep, values):
        seen.append((step, int(timestep)))
        return {"latents": torch.zeros_like(values["latents"])} if step == 2 else {}

    latents = exported("a sun", num_inference_steps=3, output_type="latent", callback_on_step_end=callback, seed=1).images
    assert [step for step, _ in seen] == [0, 1, 2]
    assert [t for _, t in seen] == exported.scheduler.timesteps.tolist()
    assert not latents.any()


def test_image_with_strength_0_is_only_encoded_and_decoded(exported):
    image = Image.fromarray(np.full((64, 64, 3), 200, np.uint8))
    changing = RaphaelImg2ImgPipeline.from_pipe(exported)
    same = np.asarray(changing("a sun", image=image, strength=0.0, num_inference_steps=4, seed=1).images[0])
    vae = ImageEncoder.load(VAE, "cpu", torch.float32)
    mean, _ = vae.encode(torch.full((1, 3, 64, 64), 200 / 127.5 - 1))
    # A level apart at most: how many threads compute it decides how a value between two levels is rounded.
    np.testing.assert_allclose(same, to_pixels(vae.decode(mean))[0].astype(int), atol=1)
    changed = np.asarray(changing("a sun", image=image, strength=0.5, num_inference_steps=4, seed=1).images[0])
    assert (changed != same).any()


def test_unet_is_called_like_diffusers(exported):
    unet, draw = exported.unet, torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 5, 384, generator=draw)
    with torch.no_grad():
        prediction = unet(sample, 500, encoder_hidden_states=text).sample
        as_tuple = unet(sample, torch.tensor([500, 500]), text, return_dict=False)
        whole = unet._predict(sample, torch.tensor([500, 500]), text, torch.ones(2, 5).bool(), torch.tensor([4, 4]))
    assert torch.equal(prediction, as_tuple[0])
    assert torch.equal(prediction, whole.prediction)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be .* 1 to 999"),
        ({"height": 30}, r"height=30 must be a multiple of 4"),
        ({"output_type": "jpeg"}, "output_type='jpeg' must be one of 'pil', 'np'"),
        ({"negative_prompt": ["a", "b"]}, r"negative_prompt must be one value, .* prompt \(1\), but the list has 2"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents must have the shape .* but it is \[1, 4, 8, 8\]"),
    ],
)
def test_pipeline_reports_an_argument_that_does_not_fit(exported, arguments, message):
    with pytest.raises(UserError, match=message):
        exported("a sun", **arguments)


@pytest.mark.parametrize("encoder", ["minilm", "characters"])
def test_text_encoder_with_a_name_is_exported_by_name(tmp_path, encoder):
    config = emoji() if encoder == "minilm" else emoji(text_width=256)
    config = config.model_copy(update={"text": config.text.model_copy(update={"encoder": encoder})})
    model, _ = trained(config, tmp_path / "canonical")
    by_name = Options(dtype=torch.float16, text_by_name=True)
    # That of characters has no files, and therefore only a name.
    options = by_name if encoder == "minilm" else Options(dtype=torch.float16)
    convert("auto", tmp_path / "canonical", "diffusers", tmp_path / "exported", options)
    assert {p.name for p in (tmp_path / "exported").iterdir() if p.is_dir()} == {"unet", "vae", "scheduler"}
    expected = sampled(model.half().float(), config)
    for kind, options in ((RaphaelPipeline, {}), (DiffusionPipeline, {"trust_remote_code": True})):
        pipeline = kind.from_pretrained(tmp_path / "exported", torch_dtype=torch.float32, **options)
        assert np.array_equal(stacked(pipeline(PROMPTS, seed=11, guidance_scale=4.0).images), expected)
    trained_by_name = load_trained(tmp_path / "exported", "ema", torch.device("cpu"))
    assert trained_by_name.config.text.encoder == encoder
    pipeline.save_pretrained(tmp_path / "again")
    again = RaphaelPipeline.from_pretrained(tmp_path / "again", torch_dtype=torch.float32)
    assert np.array_equal(stacked(again(PROMPTS, seed=11, guidance_scale=4.0).images), expected)
    requests = [Request(prompt, (64, 64), 11, i) for i, prompt in enumerate(PROMPTS)]
    made = make_scheduler(config.diffusion, "ddim")
    assert np.array_equal(trained_by_name.sampler.draw(requests, made, steps=3, guidance=4.0), expected)


def test_text_encoder_without_a_name_is_not_exported_by_name(tmp_path):
    config = emoji()
    own = config.model_copy(update={"text": config.text.model_copy(update={"encoder": str(clip(tmp_path / "clip", 384))})})
    trained(own, tmp_path / "own")
    with pytest.raises(UserError, match=r"--text-by-name requires .*minilm.* but it is '.*clip'"):
        convert("auto", tmp_path / "own", "diffusers", tmp_path / "refused", Options(text_by_name=True))


def test_encoder_that_does_not_fit_is_reported_before_writing(tmp_path):
    config = emoji(text_width=24)
    trained(config, tmp_path / "canonical")
    with pytest.raises(
        UserError, match=r"text.encoder='minilm' must .*model.text_width=24, but their width is 384.*--unet-only"
    ):
        convert("auto", tmp_path / "canonical", "diffusers", tmp_path / "exported", Options())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["canonical"]
    convert("auto", tmp_path / "canonical", "diffusers", tmp_path / "exported", Options(unet_only=True))
    assert sorted(p.name for p in (tmp_path / "exported").iterdir()) == ["manifest.json", "unet"]


def test_export_has_the_scheduler_of_the_run(tmp_path):
    config = emoji()
    config = config.model_copy(update={"diffusion": config.diffusion.model_copy(update={"prediction": "v_prediction"})})
    trained(config, tmp_path / "canonical")
    convert("auto", tmp_path / "canonical", "diffusers", tmp_path / "exported", Options())
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "exported" / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    assert not scheduler.config.clip_sample


def test_wrong_pipeline_arguments_are_reported_with_their_value(exported: RaphaelPipeline) -> None:
    wrong = {
        "num_images_per_prompt": [0, -1, 1.5, True],
        "seed": [-1, 2**63, 0.5, "1"],
        "negative_prompt": [[None, None], [3, "x"], 7],
        "guidance_scale": [float("nan"), float("inf"), -1.0, "4"],
        "image": ["heart.png", np.zeros((64, 64, 3), np.uint8), [Image.new("RGB", (64, 64)), None], torch.zeros(64, 64, 3)],
        "num_inference_steps": [0, 2.5, "20", True],
        "strength": [float("nan"), "half", -0.1],
        "height": [0, 63, 64.0, "64"],
        "prompt": [[], [None], 3, None],
    }
    for name, values in wrong.items():
        for value in values:
            arguments = {
                "prompt": PROMPTS,
                "num_inference_steps": 2,
                **({"image": Image.new("RGB", (64, 64))} if name == "strength" else {}),
            }
            pipeline = RaphaelImg2ImgPipeline.from_pipe(exported) if name in ("image", "strength") else exported
            with pytest.raises(UserError, match=name) as error:
                pipeline(**arguments | {name: value})
            assert "\n" not in str(error.value)
            assert "must be" in str(error.value), error.value
