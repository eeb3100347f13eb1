"""Exports to diffusers: a folder that loads as a pipeline and samples the same image as our sampler at the same seed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from raphael_dist.config import Config, load_config
from raphael_dist.convert.plan import Options
from raphael_dist.convert.run import convert
from raphael_dist.data.encoders import ImageEncoder, TextEncoder
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import make_scheduler
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.pipeline import RaphaelPipeline
from raphael_dist.sampling.sampling import generate, initial_noise
from tests.checkpoints import State, assert_same, handmade_canonical, read_state
from tests.synthetic import TREE

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


def sampled(model, config: Config) -> np.ndarray:
    text = TextEncoder.load(config.text.encoder, config.text.max_tokens, "cpu", torch.float32)
    image = ImageEncoder.load(VAE, "cpu", torch.float32)
    scheduler = make_scheduler(config.diffusion, "ddim")
    return generate(model, text, image, scheduler, PROMPTS, range(2), size_hw=(64, 64), steps=3, guidance=4.0, seed=11)


def test_the_exported_pipeline_samples_the_same_image_as_our_sampler(tmp_path):
    config = emoji()
    model, state = trained(config, tmp_path / "canonical")
    report = convert("canonical", tmp_path / "canonical", "diffusers", tmp_path / "exported", Options())
    assert [row.kind for row in report.rows] == ["ema"]
    assert "master: left out" in report.notes[0]
    shutil.rmtree(tmp_path / "canonical")
    folders = {p.name for p in (tmp_path / "exported").iterdir() if p.is_dir()}
    assert folders == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    pipeline = RaphaelPipeline.from_pretrained(tmp_path / "exported")
    images = pipeline(PROMPTS, seed=11).images
    assert np.array_equal(np.stack([np.asarray(image) for image in images]), sampled(model, config))
    generic = DiffusionPipeline.from_pretrained(tmp_path / "exported", custom_pipeline="pipeline", trust_remote_code=True)
    assert type(generic) is RaphaelPipeline
    # What diffusers saves again comes back too, without a manifest.
    pipeline.save_pretrained(tmp_path / "again")
    convert("auto", tmp_path / "again", "canonical", tmp_path / "back", Options())
    assert_same(read_state("auto", tmp_path / "back"), {("master", n): v for (k, n), v in state.items() if k == "ema"})


def test_a_dense_export_is_a_unet_of_diffusers_and_samples_the_same_image(tmp_path):
    config = dense_emoji()
    model, state = trained(config, tmp_path / "canonical")
    convert("auto", tmp_path / "canonical", "diffusers", tmp_path / "exported", Options(weights="ema"))
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "exported" / "unet", low_cpu_mem_usage=False)
    assert all(torch.equal(unet.state_dict()[n], v) for (k, n), v in state.items() if k == "ema")
    pipeline = RaphaelPipeline.from_pretrained(tmp_path / "exported")
    images = np.stack([np.asarray(image) for image in pipeline(PROMPTS, seed=11).images])
    # diffusers' attention rounds in another order than ours.
    assert np.abs(images.astype(int) - sampled(model, config).astype(int)).max() <= 1
    convert("diffusers", tmp_path / "exported", "dense", tmp_path / "dense", Options())
    assert_same(read_state("dense", tmp_path / "dense"), {("master", n): v for (k, n), v in state.items() if k == "ema"})


def test_a_dense_export_with_clip_is_a_stable_diffusion_pipeline_and_samples_the_same_image(tmp_path):
    config = dense_emoji(text_width=32)
    text = config.text.model_copy(update={"encoder": str(clip(tmp_path / "clip", 32)), "max_tokens": 77})
    config = config.model_copy(update={"text": text})
    model, _ = trained(config, tmp_path / "canonical")
    convert("auto", tmp_path / "canonical", "diffusers", tmp_path / "exported", Options())
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "exported")
    assert type(pipeline) is StableDiffusionPipeline
    noise = torch.stack([initial_noise(11, i, (4, 16, 16)) for i in range(2)])
    found = pipeline(PROMPTS, negative_prompt=["", ""], latents=noise, num_inference_steps=3, guidance_scale=4.0)
    images = np.stack([np.asarray(image) for image in found.images])
    assert np.abs(images.astype(int) - sampled(model, config).astype(int)).max() <= 1


def test_an_encoder_that_does_not_fit_is_named_before_anything_is_written(tmp_path):
    config = emoji(text_width=24)
    trained(config, tmp_path / "canonical")
    with pytest.raises(
        UserError, match=r"text.encoder: 'minilm' gives 384 numbers a token.*model.text_width = 24.*--unet-only"
    ):
        convert("auto", tmp_path / "canonical", "diffusers", tmp_path / "exported", Options())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["canonical"]
    convert("auto", tmp_path / "canonical", "diffusers", tmp_path / "exported", Options(unet_only=True))
    assert sorted(p.name for p in (tmp_path / "exported").iterdir()) == ["manifest.json", "unet"]


def test_the_scheduler_of_the_export_is_the_runs(tmp_path):
    config = emoji()
    config = config.model_copy(update={"diffusion": config.diffusion.model_copy(update={"prediction": "v_prediction"})})
    trained(config, tmp_path / "canonical")
    convert("auto", tmp_path / "canonical", "diffusers", tmp_path / "exported", Options())
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "exported" / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    assert not scheduler.config.clip_sample
