"""Published encoders, U-Nets and schedulers: loading, caching, training, sampling, export, and rejection."""

import ast
import codecs
import json
import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from raphael_dist import sample
from raphael_dist.cli import evaluate
from raphael_dist.config.schema import Config, load_config
from raphael_dist.convert.conversion import convert
from raphael_dist.convert.layouts import open_checkpoint
from raphael_dist.convert.layouts.dense import scheduler_settings
from raphael_dist.convert.write_plan import Options
from raphael_dist.data.features.batch_encoder import Encoders
from raphael_dist.data.features.cache import FeatureCache
from raphael_dist.data.features.encoder_files import text_folders
from raphael_dist.data.features.encoder_models import save_autoencoder, save_text_model, text_model, tokenizer_of
from raphael_dist.data.features.encoders import ImageEncoder, ImageFacts, TextEncoder, TextFacts
from raphael_dist.data.open_streams import source_of
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data_prep.build_shards import Preparer
from raphael_dist.data_prep.inputs import parts_of
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import make_scheduler
from raphael_dist.pipeline import RaphaelPipeline
from raphael_dist.sampling.sampler import Request, Sampler
from raphael_dist.storage.weight_files import DIFFUSERS, TRANSFORMERS
from raphael_dist.training.dry_run import problems
from tests.data.features.test_features import samples, train, with_data
from tests.data.shards.test_shards import write_shard
from tests.lib.launch import ROOT, run_ranks
from tests.lib.parts import FORMS, TEXTS, VAES, WIDTH, save_as, save_text, save_vae
from tests.sampling.test_pipeline import trained

CPU = torch.device("cpu")
CHANNELS = {"sd3": 16, "flux": 16, "factor 16": 8, "factor 32": 8}


def mark_slow_except(names: Iterable[str], *fast: str) -> list[Any]:
    """Return parameters for all names; those not in `fast` are marked slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vaes")
    return {name: save_vae(folder / name, name) for name in ("sd", "flux", "tiny")}


def vae_of(vaes: dict[str, Path], folder: Path, name: str) -> Path:
    return vaes[name] if name in vaes else save_vae(folder / "vae", name)


def config_with(vae: Path, text: Path, channels: int, *more: str) -> Config:
    """Return the small run with these encoders."""
    own = [f"image.vae={vae}", f"text.encoder={text}", "image.buckets=[[64,64]]", f"model.latent_channels={channels}",
           f"model.text_width={WIDTH}", "text.max_tokens=12", "train.global_batch_size=4"]  # fmt: skip
    return load_config(str(ROOT / "tests/fixtures/small.yaml"), [*own, *more])


def encoders_of(config: Config) -> Encoders:
    dtype = getattr(torch, config.image.dtype)
    text = TextEncoder.load(config.text.encoder, 12, CPU, torch.float32, config.text.layer)
    return Encoders(text, ImageEncoder.load(config.image.vae, CPU, dtype), None, CPU)


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", mark_slow_except(VAES, "sd", "tiny"))
def test_latents_are_scaled_as_in_diffusers(name: str, dtype: str, vaes: dict[str, Path], tmp_path: Path) -> None:
    """SD3 and FLUX: (latents - shift) * scale. Some of SDXL, with means: (latents - mean) * scale / std."""
    folder, images = (
        vae_of(vaes, tmp_path, name),
        torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1,
    )
    before = torch.get_rng_state()
    facts = ImageFacts.read(str(folder), getattr(torch, dtype))
    assert torch.equal(torch.get_rng_state(), before), "rank 0 alone reads facts"
    encoder = ImageEncoder.load(str(folder), CPU, getattr(torch, dtype))
    model, config = encoder._model, encoder._model.config
    factor = {"factor 16": 16, "factor 32": 32}.get(name, 8)
    assert (facts.factor, facts.channels) == (factor, CHANNELS.get(name, 4)) == (encoder.factor, encoder.channels)
    mean, std = encoder.encode(images)
    assert mean.shape == std.shape == (2, facts.channels, 64 // factor, 64 // factor)
    with torch.no_grad():
        raw = model.encode(images.to(model.dtype))
    raw = (raw.latent_dist.mean if "latent_dist" in raw else raw[0]).float()
    if name == "latents_mean":
        shift, scale = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("latents_mean", "latents_std"))
        expected = (raw - shift) * config.scaling_factor / scale
        latents = mean * scale / config.scaling_factor + shift
    else:
        expected = (raw - (config.get("shift_factor") or 0)) * config.scaling_factor
        latents = mean / config.scaling_factor + (config.get("shift_factor") or 0)
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)
    assert bool(std.any()) is not encoder.deterministic
    with torch.no_grad():
        decoded = model.decode(latents.to(model.dtype)).sample.float().clamp(-1, 1)
    torch.testing.assert_close(encoder.decode(mean), decoded, rtol=1e-4, atol=1e-4 if dtype == "float32" else 0.1)


def test_cached_features_train_as_online_ones(vaes: dict[str, Path], tmp_path: Path) -> None:
    """The attention in the middle block of this VAE gives latents that are not contiguous."""
    text = save_text(tmp_path / "text", "CLIP L")
    config = config_with(vaes["sd"], text, 4, f"data.cache_dir={tmp_path / 'cache'}")
    encoders, shard = encoders_of(config), write_shard(tmp_path / "a.tar", samples(4))
    online, cached = (train(with_data(config, features=name), encoders, shard)[0] for name in ("online", "cached"))
    torch.testing.assert_close(torch.tensor(cached)[:, :2], torch.tensor(online)[:, :2], rtol=2e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(VAES))
def test_all_feature_sources_train_alike(name: str, dtype: str, vaes: dict[str, Path], tmp_path: Path) -> None:
    text = save_text(tmp_path / "text", "CLIP L")
    more = [f"image.dtype={dtype}", f"data.cache_dir={tmp_path / 'cache'}"]
    config = config_with(vae_of(vaes, tmp_path, name), text, CHANNELS.get(name, 4), *more)
    check_ways(config, tmp_path)


def check_ways(config: Config, folder: Path) -> None:
    """Train on online, cached and stored features, and on features cached in the background; compare the losses."""
    encoders, plain = encoders_of(config), write_shard(folder / "a.tar", samples(4))
    (folder / "stored").mkdir()
    preparer = Preparer(folder / "stored", "stored", None, config, encoders)
    assert preparer.make(parts_of([str(plain)], 10, 0.0, None)[0]).written == 4
    cached = with_data(config, cache_dir=str(folder / "beside"))
    cache = source_of(cached, build_index([plain], folder / "index"), encoders, training=True)
    assert isinstance(cache, FeatureCache)
    cache.fill_in_background([0])
    cache._fill_thread.join()  # type: ignore[union-attr]
    cache.close()
    assert cache.missing() == []
    ways = {
        "online": (config, plain),
        "cached": (config, plain),
        "cached during training": (cached, plain),
        "stored": (config, folder / "stored" / "a.tar"),
    }
    losses = {way: train(with_data(c, features=way.split()[0]), encoders, shard)[0] for way, (c, shard) in ways.items()}
    for way, numbers in losses.items():
        # Without the gradients' norms: rounding may move a token over the threshold of a region.
        both = (torch.tensor(numbers)[:, :2] for numbers in (numbers, losses["online"]))
        torch.testing.assert_close(*both, rtol=2e-3, atol=1e-4, msg=way)


# ---- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layer", mark_slow_except(["last", "penultimate"], "penultimate"))
@pytest.mark.parametrize("name", mark_slow_except(TEXTS, "CLIP g", "T5"))
def test_tokens_come_from_layer_and_are_padded_right(name: str, layer: str, side: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

    spec = str(save_text(tmp_path / "text", name, side))
    before = torch.get_rng_state()
    facts = TextFacts.read(spec, 12, torch.float32, layer)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before), "rank 0 alone reads facts"
    encoder = TextEncoder.lazy(spec, facts, CPU, torch.float32, layer).load_weights()  # type: ignore[arg-type]
    features = encoder.encode(["a b c", ""])
    assert features.tokens.shape == (2, 12, WIDTH)
    assert features.mask.int().diff(dim=1).max() <= 0, "padding is on the right"
    assert features.end.tolist() == (features.mask.sum(dim=1) - 1).tolist()
    folders = [tmp_path / "text" / part for part in ("text_encoder", "tokenizer")]
    model_folder, tokenizer_folder = folders if folders[0].is_dir() else [tmp_path / "text"] * 2
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, padding_side="right")
    batch = tokenizer(["a b c", ""], padding="max_length", max_length=12, return_tensors="pt")
    if "CLIP" in name:
        model, mask = CLIPTextModel.from_pretrained(model_folder).eval(), None
        norm = model.final_layer_norm
    elif "T5" in name:
        model, mask = T5EncoderModel.from_pretrained(model_folder).eval(), batch["attention_mask"]
        norm = model.encoder.final_layer_norm
    else:
        return
    with torch.no_grad():
        hidden = model(input_ids=batch["input_ids"], attention_mask=mask, output_hidden_states=True)
        expected = hidden.last_hidden_state if layer == "last" else norm(hidden.hidden_states[-2])
    torch.testing.assert_close(features.tokens[0, :5], expected[0, :5], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["last", "penultimate"])
@pytest.mark.parametrize("name", list(TEXTS))
def test_all_feature_sources_train_alike_on_text(name: str, layer: str, vaes: dict[str, Path], tmp_path: Path) -> None:
    text = save_text(tmp_path / "text", name, "left")
    check_ways(config_with(vaes["tiny"], text, 4, f"text.layer={layer}", f"data.cache_dir={tmp_path / 'cache'}"), tmp_path)


def test_words_are_found_with_python_tokenizer(tmp_path: Path) -> None:
    """ByT5's tokenizer does not report the words of tokens, which the figures of a run need."""
    from raphael_dist.analysis.gate_routes import split_words

    tokenizer = TextEncoder.load(str(save_text(tmp_path, "ByT5")), 8, CPU, torch.float32).tokenizer
    assert split_words(tokenizer, "ab - cde fgh", 9) == [("ab", 0), ("cde", 5)]


def test_text_encoder_of_pipeline_uses_its_own_tokenizer(tmp_path: Path) -> None:
    """Stable Diffusion 3 has three text encoders and tokenizers."""
    save_text(tmp_path / "a", "T5")
    (tmp_path / "a" / "text_encoder").rename(tmp_path / "a" / "text_encoder_3")
    (tmp_path / "a" / "tokenizer").rename(tmp_path / "a" / "tokenizer_3")
    assert TextFacts.read(str(tmp_path / "a" / "text_encoder_3"), 12, torch.float32).width == WIDTH


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", mark_slow_except(FORMS, "sharded bin"))
def test_weights_load_from_all_file_formats(form: str, vaes: dict[str, Path], tmp_path: Path) -> None:
    tolerance = 2e-2 if "fp16" in form else 0
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    vae = save_as(vaes["flux"], tmp_path / "vae", form, DIFFUSERS)
    mean, _ = ImageEncoder.load(str(vae), CPU, torch.float32).encode(images)
    expected, _ = ImageEncoder.load(str(vaes["flux"]), CPU, torch.float32).encode(images)
    torch.testing.assert_close(mean, expected, rtol=tolerance, atol=tolerance)
    whole = save_text(tmp_path / "whole", "BERT")
    text = save_as(whole, tmp_path / "text", form, TRANSFORMERS)
    tokens, expected = (TextEncoder.load(str(spec), 12, CPU, torch.float32).encode(["a b"]).tokens for spec in (text, whole))
    torch.testing.assert_close(tokens, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("kind", "prefix"), [("BertForMaskedLM", "bert."), ("RobertaForMaskedLM", "roberta.")])
def test_masked_language_model_without_pooler_is_an_encoder(kind: str, prefix: str, tmp_path: Path) -> None:
    """The weights of most of them, such as roberta-base, lack a pooler, which encoding does not need."""
    import transformers

    whole, folder = save_text(tmp_path / "whole", "BERT"), tmp_path / "masked"
    shutil.copytree(whole, folder)
    if kind != "BertForMaskedLM":
        fields = json.loads((folder / "config.json").read_text())
        fields |= {"model_type": "roberta", "architectures": [kind]}
        (folder / "config.json").write_text(json.dumps(fields))
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, kind)(config).eval()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    assert not [name for name in load_file(folder / "model.safetensors") if "pooler" in name]
    TextFacts.read(str(folder), 12, torch.float32)
    encoder = TextEncoder.load(str(folder), 12, CPU, torch.float32)
    save_text_model(str(folder), "last", tmp_path / "saved")
    again = load_file(tmp_path / "saved" / "model.safetensors")
    assert {f"{prefix}{name}" for name in again} <= set(load_file(folder / "model.safetensors"))
    batch = encoder.tokenizer(["a b"], padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad():
        inner = getattr(model, prefix[:-1])
        expected = inner(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    torch.testing.assert_close(encoder.encode(["a b"]).tokens[0, :3], expected[0, :3])


@pytest.mark.slow
@pytest.mark.parametrize("form", list(FORMS))
def test_weights_are_exported_from_all_file_formats(form: str, vaes: dict[str, Path], tmp_path: Path) -> None:
    vae = save_as(vaes["flux"], tmp_path / "vae", form, DIFFUSERS)
    text = save_as(save_text(tmp_path / "whole", "BERT"), tmp_path / "text", form, TRANSFORMERS)
    check_export(config_with(vae, text, 16), tmp_path)


def check_export(config: Config, folder: Path, prompt: str = "a b") -> None:
    """Export a model with random weights: the pipeline draws the same images as the sampler."""
    model, _ = trained(config, folder / "canonical")
    encoders = encoders_of(config)
    size = config.image.buckets[0]
    requests = [Request(prompt, size, 3, 0)]
    scheduler = make_scheduler(config.diffusion, "ddim")
    drawn = Sampler.of(model, encoders.text, encoders.image).draw(requests, scheduler, steps=2, guidance=3.0)
    convert("canonical", folder / "canonical", "diffusers", folder / "exported", Options())
    pipeline = RaphaelPipeline.from_pretrained(folder / "exported", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(prompt, seed=3, num_inference_steps=2, guidance_scale=3.0).images
    assert np.abs(np.asarray(images[0]).astype(int) - drawn[0].astype(int)).max() <= 1
    index = json.loads((folder / "exported" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "RaphaelPipeline"]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(VAES))
@pytest.mark.parametrize("text", ["T5", "CLIP g"])
def test_all_autoencoders_sample_and_export(name: str, text: str, tmp_path: Path) -> None:
    vae, encoder = save_vae(tmp_path / "vae", name), save_text(tmp_path / "text", text)
    check_export(config_with(vae, encoder, CHANNELS.get(name, 4), "text.layer=penultimate"), tmp_path)


def test_byt5_letters_are_tokens_in_training_sampling_and_export(vaes: dict[str, Path], tmp_path: Path) -> None:
    prompt = 'a "BIRD"'
    config = config_with(vaes["tiny"], save_text(tmp_path / "text", "ByT5"), 4)
    encoders, shard = encoders_of(config), write_shard(tmp_path / "a.tar", samples(4))
    assert encoders.text.tokenizer(prompt)["input_ids"] == [*(byte + 3 for byte in prompt.encode()), 1]
    features = encoders.text.encode([prompt, 'a "BARD"'])
    assert features.mask.sum(dim=1).tolist() == [9, 9]  # eight characters and the end
    assert not torch.equal(features.tokens[0, 4], features.tokens[1, 4])
    assert np.isfinite(train(with_data(config, features="online"), encoders, shard)[0]).all()
    check_export(config, tmp_path, prompt)


@pytest.mark.slow
def test_sd_pipeline_is_exported_only_with_equal_latent_scaling(vaes: dict[str, Path], tmp_path: Path) -> None:
    text = save_text(tmp_path / "text", "CLIP L")
    dense = ["model.space_experts=0", "model.time_experts=0", "model.time_activation=geglu", "edge.weight=0"]
    sizes = ["model.channels=[8,16]", "model.expert_width=[32,64]"]
    for name, kind in (("sd", "StableDiffusionPipeline"), ("flux", ["pipeline", "RaphaelPipeline"])):
        config = config_with(vaes[name], text, CHANNELS.get(name, 4), *dense, *sizes)
        trained(config, tmp_path / name)
        convert("canonical", tmp_path / name, "diffusers", tmp_path / f"{name} exported", Options())
        assert json.loads((tmp_path / f"{name} exported" / "model_index.json").read_text())["_class_name"] == kind


@pytest.mark.parametrize("form", mark_slow_except(FORMS, "bin"))
def test_unet_opens_from_all_file_formats(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=8, norm_num_groups=4,
        attention_head_dim=(1, 2), use_linear_projection=True,
    )  # fmt: skip
    unet.save_pretrained(tmp_path / "whole")
    DDIMScheduler(beta_schedule="scaled_linear", prediction_type="epsilon").save_pretrained(tmp_path / "scheduler")
    save_as(tmp_path / "whole", tmp_path / "unet", form, DIFFUSERS)
    checkpoint = open_checkpoint("auto", tmp_path / "unet")
    name = "conv_in.weight"
    values = checkpoint.read("master", name, 0, 8 * 4 * 9)
    torch.testing.assert_close(values, unet.state_dict()[name].flatten(), rtol=1e-3, atol=1e-4 if "fp16" in form else 0)
    assert checkpoint.says_prediction


def test_diffusers_scheduler_files_are_read(tmp_path: Path) -> None:
    stable = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    cases = {
        "SD 1": (PNDMScheduler(**stable, skip_prk_steps=True, steps_offset=1), ("epsilon", False)),
        "SD 2": (DDIMScheduler(**stable, prediction_type="v_prediction", clip_sample=False), ("v_prediction", False)),
        "SDXL": (EulerDiscreteScheduler(**stable, timestep_spacing="leading"), ("epsilon", False)),
        "zero SNR": (DDIMScheduler(**stable, **zero), ("v_prediction", True)),
    }
    for name, (scheduler, (prediction, zero_snr)) in cases.items():
        scheduler.save_pretrained(tmp_path / name / "scheduler")
        found = scheduler_settings(tmp_path / name)
        assert (found["schedule"], found["prediction"]) == ("scaled_linear", prediction), name
        assert found.get("zero_terminal_snr", False) is zero_snr, name
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path / "SD 3" / "scheduler")
    with pytest.raises(UserError, match=r"must have beta_schedule .* FlowMatchEulerDiscreteScheduler uses another kind"):
        scheduler_settings(tmp_path / "SD 3")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_run_with_published_encoders_trains_samples_and_evaluates(tmp_path: Path) -> None:
    """Uses the commands, FLUX's autoencoder as an fp16 variant, and ByT5 in sharded .bin files."""
    vae = save_as(save_vae(tmp_path / "flux", "flux"), tmp_path / "vae", "fp16", DIFFUSERS)
    save_text(tmp_path / "whole", "ByT5")
    text = save_as(tmp_path / "whole", tmp_path / "text", "sharded bin", TRANSFORMERS)
    run, cache = tmp_path / "run", tmp_path / "cache"
    own = [f"image.vae={vae}", f"text.encoder={text}", "image.buckets=[[64,64]]", "model.latent_channels=16",
           f"model.text_width={WIDTH}", "text.max_tokens=40", "text.layer=penultimate", f"run.dir={run}",
           f"data.cache_dir={cache}", "data.cache_fill=during", "train.max_steps=6", "train.global_batch_size=4",
           "sample.prompts=[a lemon]"]  # fmt: skip
    run_ranks(["tests/workers/train_run.py", "--config=tests/fixtures/small.yaml", *own], 2)
    assert list((run / "samples").iterdir())
    picture = tmp_path / "a.png"
    assert sample.main(["--checkpoint", str(run), "--prompt", "a lemon", "--out", str(picture), "--steps", "2"]) == 0
    (tmp_path / "true").mkdir()
    for number in range(4):
        Image.open(picture).save(tmp_path / "true" / f"{number}.png")
        (tmp_path / "true" / f"{number}.txt").write_text("a lemon")
    true = f"folder={tmp_path / 'true'}"
    study = ["--captions", true, "--reference", true, "--features", "hed", "--out", str(tmp_path / "study"), "--steps", "2"]
    assert evaluate.main(["images", "--checkpoint", str(run), *study, "--guidance", "2", "--side", "64"]) == 0


# ---- refused before a run --------------------------------------------------------------------------------------------


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lose_shard(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')


def mark(path: Path) -> None:
    """Put a byte order mark in front of a text file, as editors on Windows do."""
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())


VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
SPOILED_VAES = {
    "byte order mark": (lambda f: mark(f / "config.json"), r"cannot be loaded: .*config\.json' is not a valid JSON file"),
    "class": (lambda f: edit(f / "config.json", _class_name="AutoencoderKLWan"), r"has the class AutoencoderKLWan"),
    "no class": (lambda f: (f / "config.json").write_text("{}"), r"has the class None"),
    "colours": (lambda f: edit(f / "config.json", in_channels=4, out_channels=4), r"has 4 colour channels"),
    "levels": (lambda f: edit(f / "config.json", down_block_types=["Nope"] * 4), r"cannot be loaded"),
    "channels": (
        lambda f: edit(f / "config.json", latent_channels=4),
        r"the shape of .* is \[.*\] by config.json, but \[.*\] in the weight files",
    ),
    "no weights": (lambda f: (f / VAE_WEIGHTS).unlink(), r"diffusion_pytorch_model.safetensors and .* are missing"),
    "cut short": (lambda f: cut(f / VAE_WEIGHTS), r"cannot be read"),
    "no shard": (lose_shard, r"b.safetensors is missing, but diffusion_pytorch_model.safetensors.index.json lists it"),
}


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def save_short_bin(folder: Path, legacy: bool = False) -> None:
    """Replace model.safetensors by pytorch_model.bin, whose last 200 bytes are missing. `legacy`: as before torch 1.6."""
    tensors, path = load_file(folder / "model.safetensors"), folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[:-200])


LAST_WEIGHT = "encoder.layer.1.output.dense.weight"
SPOILED_TEXTS = {
    "byte order mark": (lambda f: mark(f / "config.json"), r"cannot be loaded: .*config\.json' is not a valid JSON file"),
    "type": (lambda f: edit(f / "config.json", model_type="vit"), r"must be a text encoder, but its model_type is 'vit'"),
    "heads": (lambda f: edit(f / "config.json", num_attention_heads=5), r"cannot be loaded"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model.safetensors and .* are missing"),
    "cut short": (lambda f: cut(f / "model.safetensors"), r"cannot be read"),
    "cut bin": (save_short_bin, r"pytorch_model\.bin cannot be read: "),
    "cut old bin": (partial(save_short_bin, legacy=True), r"pytorch_model\.bin cannot be read: unexpected EOF"),
    "no tensor": (
        lambda f: edit_tensors(f / "model.safetensors", lambda tensors: tensors.pop(LAST_WEIGHT)),
        rf"the weight {LAST_WEIGHT} is missing",
    ),
    "short tensor": (
        lambda f: edit_tensors(f / "model.safetensors", lambda t: t.update({LAST_WEIGHT: t[LAST_WEIGHT][:, :9].clone()})),
        rf"the shape of {LAST_WEIGHT} is \[32, 64\] by config.json, but \[32, 9\] in the weight files",
    ),
    "one layer": (
        lambda f: edit(f / "config.json", num_hidden_layers=1),
        r"requires an encoder with at least two transformer layers",
    ),
}


@pytest.mark.parametrize("name", mark_slow_except(SPOILED_VAES, "byte order mark", "class", "channels", "cut short"))
def test_dry_run_rejects_unusable_vae(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    spoil, message = SPOILED_VAES[name]
    spoil(save_vae(tmp_path / "vae", "sd3"))
    text = save_text(tmp_path / "text", "BERT")
    check_rejected(config_with(tmp_path / "vae", text, 16, f"run.dir={tmp_path}/run"), message)


@pytest.mark.parametrize(
    "name", mark_slow_except(SPOILED_TEXTS, "byte order mark", "type", "one layer", "cut bin", "no tensor")
)
def test_dry_run_rejects_unusable_text_encoder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    spoil, message = SPOILED_TEXTS[name]
    spoil(save_text(tmp_path / "text", "BERT"))
    layer = "penultimate" if name == "one layer" else "last"
    vae = save_vae(tmp_path / "vae", "sd3")
    check_rejected(config_with(vae, tmp_path / "text", 16, f"text.layer={layer}", f"run.dir={tmp_path}/run"), message)


def test_dry_run_rejects_encoders_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    vae, text = save_vae(tmp_path / "vae", "sd3"), save_text(tmp_path / "text", "BERT")
    check_rejected(config_with(vae, text, 4, f"run.dir={tmp_path}/run"), r"Set model.latent_channels=16")
    padded = save_text(tmp_path / "padded", "CLIP L")
    edit(padded / "tokenizer" / "tokenizer_config.json", pad_token="[PAD]")
    check_rejected(config_with(vae, padded, 16, f"run.dir={tmp_path}/run"), r"must have an embedding for each token")


def check_rejected(config: Config, message: str) -> None:
    lines = problems(config)
    assert len(lines) == 1, (message, lines)
    assert "\n" not in lines[0]
    with pytest.raises(AssertionError if lines == [] else UserError, match=message):
        raise UserError(lines[0])


def test_missing_weight_is_rejected_not_randomly_initialized(tmp_path: Path) -> None:
    text = save_text(tmp_path / "text", "BERT")
    edit_tensors(text / "model.safetensors", lambda tensors: tensors.pop(LAST_WEIGHT))
    with pytest.raises(UserError, match=rf"text\.encoder=.* weight {LAST_WEIGHT} is missing"):
        text_model(str(text), torch.float32)


VOCABULARY = {
    "CLIP L": ["merges.txt", "tokenizer.json", "vocab.json"],
    "BERT": ["tokenizer.json", "tokenizer_config.json", "vocab.txt"],
    "ByT5": ["tokenizer_config.json"],
}


@pytest.mark.parametrize("name", VOCABULARY)
def test_tokenizer_without_vocabulary_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers makes an empty tokenizer then, which maps all words to one token."""
    monkeypatch.chdir(ROOT)
    text = save_text(tmp_path / "text", name)
    for file in VOCABULARY[name]:
        (text_folders(str(text))[1] / file).unlink()
    config = config_with(Path("none"), text, 3, f"run.dir={tmp_path}/run")
    check_rejected(config, rf"\(.*, \d+ tokens\) maps all words to the same token: .* lacks .*{', '.join(VOCABULARY[name])}")
    with pytest.raises(UserError, match="maps all words to the same token"):
        TextEncoder.load(str(text), 12, CPU, torch.float32)


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    text = save_text(tmp_path / "text", "T5")
    (text / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"the files of its tokenizer are missing, such as tokenizer\.json\. Download"):
        TextEncoder.load(str(text), 12, CPU, torch.float32)


def test_sound_tokenizers_are_accepted(tmp_path: Path) -> None:
    for spec in ("minilm", *(str(save_text(tmp_path / name, name)) for name in TEXTS)):
        assert tokenizer_of(spec).pad_token is not None, spec
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "red": 1, "dog": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]").save_pretrained(tmp_path / "words")
    assert len(tokenizer_of(str(tmp_path / "words"))) == 3, "it knows no letters"


def test_code_in_encoder_folder_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("a question was asked"))
    monkeypatch.chdir(ROOT)
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    auto_map = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoModelForTextEncoding": "evil.M"}
    own = save_text(tmp_path / "own", "BERT")
    (own / "evil.py").write_text(code)
    edit(own / "config.json", model_type="own", auto_map=auto_map)
    (line,) = problems(config_with(Path("none"), own, 3, f"run.dir={tmp_path}/run"))
    assert "requires Python code from its folder (auto_map), which is never run" in line
    assert "\n" not in line
    known = save_text(tmp_path / "known", "BERT")
    (known / "evil.py").write_text(code)
    edit(
        known / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoModelForTextEncoding": "evil.M"}
    )
    assert TextEncoder.load(str(known), 12, CPU, torch.float32).width == WIDTH, "a class of transformers' own is used"
    assert not (tmp_path / "ran").exists()


def test_no_transformers_model_is_loaded_with_remote_code() -> None:
    files = [*(ROOT / "raphael_dist").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    for path in (path for path in files if "from_pretrained(" in path.read_text()):
        tree = ast.parse(path.read_text())
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)):
            if call.func.attr == "from_pretrained" and "diffusers" not in ast.unparse(call.func):  # type: ignore[attr-defined]
                text = ast.unparse(call)
                known = text.startswith(("AutoencoderKL.", "super()."))
                assert known or "**offline()" in text or "torch_dtype" in text, (path, text)


def test_deepspeed_latest_with_missing_tag_is_reported(tmp_path: Path) -> None:
    (tmp_path / "global_step2").mkdir()
    torch.save({}, tmp_path / "global_step2" / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text("global_step9")
    for layout in ("auto", "deepspeed"):
        with pytest.raises(
            UserError, match=r"latest must contain the name of .* contains 'global_step9',.* Write one of global_step2"
        ):
            open_checkpoint(layout, tmp_path)


# ---- files that are written ------------------------------------------------------------------------------------------


def test_written_files_have_permissions_of_umask(tmp_path: Path, vaes: dict[str, Path]) -> None:
    """The writer of safetensors makes private files, which would make a shared cache useless to others."""
    text = save_text(tmp_path / "text", "BERT")
    config = config_with(vaes["tiny"], text, 4, f"data.cache_dir={tmp_path / 'cache'}")
    encoders, shard = encoders_of(config), write_shard(tmp_path / "a.tar", samples(2))
    before = os.umask(0o027)
    try:
        index = build_index([shard], tmp_path / "cache")
        source = source_of(config, index, encoders, training=True)
        assert isinstance(source, FeatureCache)
        source.build([0])
        assert source.null_text is not None
        save_text_model(str(text), "penultimate", tmp_path / "saved" / "text")
        save_autoencoder(str(vaes["tiny"]), tmp_path / "saved" / "vae")
    finally:
        os.umask(before)
    files = [p for part in ("cache", "saved") for p in (tmp_path / part).rglob("*") if p.is_file()]
    assert len([p for p in files if p.suffix == ".safetensors"]) >= 4
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in files if p.stat().st_mode & 0o777 != 0o640} == {}


def test_failure_to_fill_cache_ends_training(tmp_path: Path, vaes: dict[str, Path]) -> None:
    config = config_with(vaes["tiny"], save_text(tmp_path / "text", "BERT"), 4, f"data.cache_dir={tmp_path / 'cache'}")
    encoders, shard = encoders_of(config), write_shard(tmp_path / "a.tar", samples(2))
    encoders.image._model.encode = lambda _: [None]  # as a class that changed under us
    source = source_of(config, build_index([shard], tmp_path / "cache"), encoders, training=True)
    assert isinstance(source, FeatureCache)
    source.fill_in_background([0])
    source._fill_thread.join()  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"data\.cache_fill=during: the cache cannot be filled \(AttributeError"):
        source.get(0, 0, lambda _: 0, False)
    with pytest.raises(UserError, match=r"data\.cache_fill=during: the cache cannot be filled \(AttributeError"):
        source.close()
