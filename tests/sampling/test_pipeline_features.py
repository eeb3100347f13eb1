"""Properties that users of diffusers expect of its pipelines."""

import copy
import inspect
import io
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel

from raphael_dist.convert.layouts.diffusers import expert_json
from raphael_dist.convert.lora_files import Adapter
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import make_scheduler
from raphael_dist.model.routing import Gate
from raphael_dist.pipeline import (
    RaphaelControlNet,
    RaphaelControlNetPipeline,
    RaphaelImg2ImgPipeline,
    RaphaelInpaintPipeline,
    RaphaelPipeline,
    RaphaelUNet2D,
    RaphaelUpscalePipeline,
)
from raphael_dist.sampling.pipeline_arguments import CallArguments
from tests.lib.parts import save_text
from tests.sampling.test_pipeline import emoji

PROMPTS = ["a cat", "dog"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Any]:
    folder = save_text(tmp_path_factory.mktemp("text"), "CLIP L")
    config = emoji(text_width=32)
    torch.manual_seed(0)
    return {
        "unet": RaphaelUNet2D.from_config({**expert_json(config, RaphaelUNet2D), "sample_size": 8}),
        "vae": AutoencoderKL.from_pretrained("data/vae-emoji"),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder"),
        "tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer"),
        "scheduler": make_scheduler(config.diffusion, "ddim"),
    }


def build(parts: dict[str, Any], kind: Any = RaphaelPipeline, **other: Any) -> Any:
    pipeline = kind(**parts | other, max_tokens=12, steps=3, guidance=3.0, size=[32, 32])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(parts: dict[str, Any]) -> Any:
    return build(parts)


def draw(pipeline: Any, prompt: Any = "a cat", **arguments: Any) -> np.ndarray:
    return pipeline(prompt, **{"seed": 1, "output_type": "np", **arguments}).images


def picture(seed: int = 0, side: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8))


# ---- prompts -----------------------------------------------------------------------------------------------------------


def test_embeddings_draw_what_their_prompts_draw_without_a_text_encoder(parts: dict[str, Any], pipeline: Any) -> None:
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    encoder = build(parts, unet=None, vae=None)  # encodes alone
    encoded = dict(zip(names, encoder.encode_prompt(PROMPTS, negative_prompt="bird"), strict=True))
    assert encoded["prompt_embeds"].shape == encoded["negative_prompt_embeds"].shape == (2, 12, 32)
    without = build(parts, text_encoder=None, tokenizer=None)
    assert np.array_equal(draw(without, None, **encoded), draw(pipeline, PROMPTS, negative_prompt="bird"))
    repeated = pipeline.encode_prompt(PROMPTS, num_images_per_prompt=2, do_classifier_free_guidance=False)
    assert torch.equal(repeated[0], encoded["prompt_embeds"].repeat_interleave(2, dim=0))
    assert repeated[2:] == (None, None)


def test_images_do_not_depend_on_their_batch(pipeline: Any) -> None:
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    together = draw(pipeline, PROMPTS, num_images_per_prompt=2, generator=generators)
    for i, prompt in enumerate(p for p in PROMPTS for _ in range(2)):
        alone = draw(pipeline, prompt, generator=torch.Generator().manual_seed(i))
        np.testing.assert_allclose(together[i], alone[0], atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"prompt_embeds": torch.zeros(1, 12, 7)},
            r"prompt_embeds of shape \[1, 12, 7\] must have shape \[prompts, tokens, 32\]",
        ),
        ({"prompt_embeds": torch.zeros(12, 32)}, r"prompt_embeds of shape \[12, 32\] must have"),
        (
            {"prompt_embeds": torch.zeros(1, 12, 32), "prompt_attention_mask": torch.ones(1, 11)},
            r"prompt_attention_mask of shape \[1, 11\] must have shape \[1, 12\]",
        ),
        (
            {"prompt_embeds": torch.zeros(1, 12, 32), "negative_prompt_embeds": torch.zeros(1, 5, 32)},
            r"negative_prompt_embeds of shape \[1, 5, 32\] must have shape \[1, 12, 32\]",
        ),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 12, 32)}, "prompt='a' cannot be combined with prompt_embeds"),
        (
            {"prompt": "a", "timesteps": [10, 5]},
            "timesteps=.* must be supported by DDIMScheduler, but it reports: .*does not support custom",
        ),
        ({"prompt": "a", "sigmas": [3.0, 0.1]}, "sigmas=.* must be supported by DDIMScheduler"),
        ({"prompt": "a", "eta": 1.5}, "eta=1.5 must be .* 0 to 1"),
        ({"prompt": "a", "guidance_rescale": -0.1}, "guidance_rescale=-0.1 must be"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["x"]}, r"tensor_inputs=\['x'\] must contain only .*'x'"),
        ({}, "prompt=.* must be a string"),
    ],
)
def test_wrong_argument_is_reported_in_one_line(pipeline: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        pipeline(**arguments)
    assert "\n" not in str(error.value)


def test_left_out_component_is_named_when_a_call_needs_it(parts: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"prompt=\['a'\] requires a text encoder.*Pass prompt_embeds"):
        build(parts, text_encoder=None, tokenizer=None)("a")
    without = build(parts, vae=None)
    with pytest.raises(UserError, match="output_type='pil' requires a vae"):
        without("a")
    latents = without("a", output_type="latent", seed=1).images
    assert torch.equal(latents, build(parts)("a", output_type="latent", seed=1).images)


# ---- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [s.name for s in KarrasDiffusionSchedulers])
def test_every_karras_scheduler_draws(parts: dict[str, Any], name: str) -> None:
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    pipeline = build(parts, scheduler=getattr(diffusers, name).from_config(parts["scheduler"].config))
    first, again = (draw(pipeline, num_inference_steps=5) for _ in range(2))
    assert np.isfinite(first).all()
    assert np.array_equal(first, again)
    assert pipeline.num_timesteps == len(pipeline.scheduler.timesteps)
    changed = draw(RaphaelImg2ImgPipeline.from_pipe(pipeline), image=picture(), strength=0.5, num_inference_steps=6)
    assert np.isfinite(changed).all()


def test_timesteps_and_sigmas_replace_those_of_the_scheduler(parts: dict[str, Any]) -> None:
    euler = EulerDiscreteScheduler.from_config(parts["scheduler"].config)
    pipeline = build(parts, scheduler=euler)
    expected = draw(pipeline, num_inference_steps=4)
    timesteps, sigmas = euler.timesteps.tolist(), euler.sigmas[:-1].tolist()
    assert np.array_equal(draw(pipeline, timesteps=[int(t) for t in timesteps]), expected)
    assert np.isfinite(draw(pipeline, sigmas=[*sigmas[::2], 0.0])).all()
    assert euler.sigmas.tolist() == [*sigmas[::2], 0.0]
    assert not np.array_equal(draw(pipeline, timesteps=[900, 500, 100]), expected)
    assert pipeline.num_timesteps == 3


def test_eta_adds_noise_of_the_generator(pipeline: Any) -> None:
    def noisy(seed: int) -> np.ndarray:
        return draw(pipeline, eta=1.0, latents=torch.ones(1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))

    assert np.array_equal(noisy(1), noisy(1))
    assert not np.array_equal(noisy(1), noisy(2))
    assert np.array_equal(draw(pipeline, eta=1.0), draw(pipeline, eta=1.0))  # the seed fixes it, too


def test_guidance_rescale_matches_the_formula_of_one_step(pipeline: Any) -> None:
    latents, options = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), {"output_type": "latent"}

    def step(**arguments: Any) -> Tensor:
        return pipeline("a cat", num_inference_steps=1, latents=latents.clone(), **options, **arguments).images

    # One step of DDIM is linear in the prediction, so predictions can be mixed as latents.
    plain, rescaled, half = (step(guidance_rescale=share) for share in (0.0, 1.0, 0.5))
    torch.testing.assert_close(half, (plain + rescaled) / 2, atol=1e-3, rtol=1e-3)
    assert not torch.equal(plain, rescaled)


def test_callback_reads_and_replaces_tensors_and_interrupts(pipeline: Any) -> None:
    seen: list[int] = []

    def watch(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert set(tensors) == set(RaphaelPipeline._callback_tensor_inputs)
        assert tensors["prompt_embeds"].shape == (1, 12, 32)
        seen.append(step)
        pipe._interrupt = step == 1
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    names = RaphaelPipeline._callback_tensor_inputs
    changed = draw(pipeline, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names, num_inference_steps=4)
    assert seen == [0, 1]
    assert pipeline.interrupt
    assert not np.array_equal(changed, draw(pipeline, num_inference_steps=4))
    assert not pipeline.interrupt

    def turn_off_guidance(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._guidance_scale = 0.0  # as in diffusers' guide to callbacks
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}

    draw(pipeline, callback_on_step_end=turn_off_guidance, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert (pipeline.guidance_scale, pipeline.do_classifier_free_guidance) == (0.0, False)
    draw(pipeline, guidance_scale=2.5)
    assert (pipeline.guidance_scale, pipeline.do_classifier_free_guidance, pipeline.num_timesteps) == (2.5, True, 3)


# ---- files and memory --------------------------------------------------------------------------------------------------


def test_saved_pipeline_comes_back_in_every_form(parts: dict[str, Any], pipeline: Any, tmp_path: Path) -> None:
    expected = draw(pipeline)
    pipeline.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded" / "unet").glob("*.safetensors"))) > 1
    assert np.array_equal(draw(build_from(tmp_path / "sharded")), expected)

    without = build(parts, text_encoder=None, tokenizer=None)
    without.save_pretrained(tmp_path / "without")
    loaded = build_from(tmp_path / "without")
    assert loaded.text_encoder is None
    assert loaded.config.size == [32, 32]
    assert build_from(tmp_path / "sharded", text_encoder=None, tokenizer=None).text_encoder is None

    half = build_from(tmp_path / "sharded", torch_dtype=torch.float16)
    assert {half.unet.dtype, half.vae.dtype} == {torch.float16}
    np.testing.assert_allclose(draw(half), expected, atol=0.05)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half" / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    again = build_from(tmp_path / "half", variant="fp16", torch_dtype=torch.float16)
    assert np.array_equal(draw(again), draw(half))


def build_from(folder: Path, **options: Any) -> Any:
    pipeline = RaphaelPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_offload_and_slicing_change_no_image(parts: dict[str, Any], tmp_path: Path) -> None:
    build(parts).save_pretrained(tmp_path / "saved")
    expected = draw(build_from(tmp_path / "saved"), PROMPTS)
    pipeline = build_from(tmp_path / "saved")
    pipeline.enable_model_cpu_offload(device="cpu")
    np.testing.assert_allclose(draw(pipeline, PROMPTS), expected, atol=1e-5)
    pipeline.remove_all_hooks()
    pipeline.vae.enable_slicing()
    np.testing.assert_allclose(draw(pipeline, PROMPTS), expected, atol=1e-5)
    pipeline.vae.enable_tiling()
    assert draw(pipeline, height=128, width=128).shape == (1, 128, 128, 3)
    # Sequential offload gives a module its weights only during its own forward pass, so every gate must run its own.
    gates = [module for module in pipeline.unet.modules() if isinstance(module, Gate)]
    runs: list[Gate] = []
    for gate in gates:
        gate.net[0]._hf_hook = None
        gate.register_forward_pre_hook(lambda module, _: runs.append(module))
    np.testing.assert_allclose(draw(pipeline, PROMPTS), expected, atol=1e-3)
    assert set(runs) == set(gates)
    pipeline.unet.to("meta")
    pipeline._lora.adapters["x"] = adapter(pipeline.unet)
    with pytest.raises(UserError, match="before enable_sequential_cpu_offload"):
        pipeline.set_adapters("x")


def test_group_offload_to_disk_changes_no_image(pipeline: Any, tmp_path: Path) -> None:
    expected, other = draw(pipeline), build_from_parts(pipeline)
    with pytest.raises(ValueError, match="offload_type='block_level' must be 'leaf_level'"):
        other.unet.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    other.unet.enable_group_offload(torch.device("cpu"), offload_to_disk_path=str(tmp_path))
    assert list(tmp_path.iterdir())
    assert np.array_equal(draw(other), expected)


def test_layerwise_casting_keeps_the_image(pipeline: Any) -> None:
    expected, other = draw(pipeline), build_from_parts(pipeline)
    other.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert other.unet.down_blocks[0].resnets[0].conv1.weight.dtype == torch.float8_e4m3fn
    assert np.abs(draw(other) - expected).mean() < 0.05


def build_from_parts(pipeline: Any) -> Any:
    """Return the same pipeline with a copy of its U-Net."""
    other = RaphaelPipeline.from_pipe(pipeline, unet=copy.deepcopy(pipeline.unet))
    other.set_progress_bar_config(disable=True)
    return other


def test_folder_that_is_no_pipeline_is_reported_in_one_line(tmp_path: Path) -> None:
    for content in (None, "{", "[]", json.dumps({"unet": ["a", "b"]})):
        if content is not None:
            (tmp_path / "model_index.json").write_text(content)
        with pytest.raises(UserError, match=r"must be the folder of a pipeline.*model_index.json cannot be used") as error:
            RaphaelPipeline.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"must be the folder of a pipeline.*No such file"):
        RaphaelPipeline.from_pretrained(tmp_path / "missing")


# ---- pipelines with shared parts ---------------------------------------------------------------------------------------


def test_from_pipe_shares_parts_and_settings(parts: dict[str, Any], pipeline: Any) -> None:
    for kind in (RaphaelImg2ImgPipeline, RaphaelInpaintPipeline, RaphaelUpscalePipeline):
        other = kind.from_pipe(pipeline)
        assert other.components == pipeline.components
        back = RaphaelPipeline.from_pipe(other)
        assert {k: v for k, v in back.config.items() if k != "_class_name"} == dict(pipeline.config)
    with pytest.raises(UserError, match=r"RaphaelControlNetPipeline.from_pipe requires controlnet"):
        RaphaelControlNetPipeline.from_pipe(pipeline)
    with pytest.raises(UserError, match="requires a super-resolution model"):
        other("a", image=picture())


@pytest.mark.parametrize(
    "kind", [RaphaelImg2ImgPipeline, RaphaelInpaintPipeline, RaphaelControlNetPipeline, RaphaelUpscalePipeline]
)
def test_call_shows_every_argument_that_it_takes(kind: Any) -> None:
    shown = set(inspect.signature(kind.__call__).parameters)
    assert shown > set(inspect.signature(RaphaelPipeline.__call__).parameters)
    assert shown - {"self"} <= {field.name for field in fields(CallArguments)}
    assert "options" not in shown


def test_inpainting_keeps_what_the_mask_excludes(parts: dict[str, Any], pipeline: Any) -> None:
    inpaint, image = RaphaelInpaintPipeline.from_pipe(pipeline), picture()
    left = Image.fromarray(np.repeat([[255] * 16 + [0] * 16], 32, axis=0).astype(np.uint8))

    def filled(mask: Image.Image, **arguments: Any) -> Tensor:
        return inpaint("a cat", image=image, mask_image=mask, seed=1, output_type="latent", **arguments).images

    known = RaphaelImg2ImgPipeline.from_pipe(pipeline)("a", image=image, strength=0.0, output_type="latent").images
    assert torch.equal(filled(Image.new("L", (32, 32), 0)), known)
    half = filled(left)
    assert torch.equal(half[..., 4:], known[..., 4:])
    assert not (half[..., :4] == known[..., :4]).any()
    everything = filled(Image.new("L", (32, 32), 255))
    assert torch.equal(everything, pipeline("a cat", seed=1, output_type="latent").images)
    assert not torch.equal(filled(left, strength=0.5)[..., :4], half[..., :4])
    for wrong, message in (
        (Image.new("L", (16, 32)), "mask_image of 16 x 32 .* 32 x 32"),
        (None, "mask_image=None"),
    ):
        with pytest.raises(UserError, match=message):
            filled(wrong)
    with pytest.raises(UserError, match="image=None must be a PIL image"):
        inpaint("a cat", mask_image=left)


def test_masks_are_read_as_other_images(pipeline: Any) -> None:
    """16-bit grey keeps its high bytes, transparent pixels are black, and the EXIF orientation is applied, also to sizes."""
    inpaint, left = RaphaelInpaintPipeline.from_pipe(pipeline), np.repeat([[255] * 16 + [0] * 16], 32, axis=0)
    sideways, upright = Image.Exif(), Image.fromarray(left.astype(np.uint8))
    sideways[0x0112] = 6

    def stored(image: Image.Image, **options: Any) -> Image.Image:
        image.save(buffer := io.BytesIO(), "PNG", **options)
        return Image.open(buffer)

    def filled(mask: Image.Image, image: Image.Image | None = None) -> Tensor:
        image = picture() if image is None else image
        return inpaint("a cat", image=image, mask_image=mask, seed=1, output_type="latent").images

    nothing, half = filled(Image.new("L", (32, 32), 0)), filled(upright)
    assert torch.equal(filled(stored(Image.fromarray(np.full((32, 32), 300, np.uint16)))), nothing)
    assert torch.equal(filled(stored(Image.fromarray((left * 257).astype(np.uint16)))), half)
    assert torch.equal(filled(Image.new("RGBA", (32, 32), (255, 255, 255, 0))), nothing)
    clear = Image.merge("LA", (Image.new("L", (32, 32), 255), upright))
    assert torch.equal(filled(clear), half)
    assert torch.equal(filled(stored(upright.transpose(Image.Transpose.ROTATE_90), exif=sideways)), half)
    photo, wide = picture(1).resize((48, 32)), Image.new("L", (48, 32), 255)
    turned = stored(photo.transpose(Image.Transpose.ROTATE_90), exif=sideways)
    assert turned.size == (32, 48)
    assert torch.equal(filled(wide, turned), filled(wide, photo))
    with pytest.raises(UserError, match=r"mask_image of 32 x 48 .* 48 x 32"):
        filled(wide.transpose(Image.Transpose.ROTATE_90), turned)


def test_control_of_scale_zero_changes_nothing(parts: dict[str, Any], pipeline: Any, tmp_path: Path) -> None:
    config = emoji(text_width=32)
    torch.manual_seed(1)
    control = RaphaelControlNet.from_config(expert_json(config, RaphaelControlNet))
    # They start at zero.
    embedding = control.controlnet_cond_embedding.conv_out
    for block in (*control.controlnet_down_blocks, control.controlnet_mid_block, embedding):
        torch.nn.init.normal_(block.weight, std=0.3)
    controlled = RaphaelControlNetPipeline.from_pipe(pipeline, controlnet=control)
    edges = picture(3)
    assert np.array_equal(draw(controlled, image=edges, controlnet_conditioning_scale=0.0), draw(pipeline))
    followed = draw(controlled, image=edges)
    assert not np.array_equal(followed, draw(pipeline))
    assert not np.array_equal(followed, draw(controlled, image=picture(4)))
    controlled.save_pretrained(tmp_path / "saved")
    loaded = RaphaelControlNetPipeline.from_pretrained(tmp_path / "saved")
    assert np.array_equal(draw(loaded, image=edges), followed)


# ---- adapters ----------------------------------------------------------------------------------------------------------


def adapter(unet: Any, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in unet.named_parameters() if name.endswith(("attn1.to_q.weight", "space_moe.w1"))}
    factors = {
        name: tuple(torch.randn(*s, generator=generator) for s in ((*shape[:-2], 2, shape[-1]), (*shape[:-1], 2)))
        for name, shape in shapes.items()
    }
    return Adapter(Path("blue"), 0.5, factors)


def test_adapters_are_combined_fused_and_removed_exactly(parts: dict[str, Any], tmp_path: Path) -> None:
    build(parts).save_pretrained(tmp_path / "saved")
    pipeline = build_from(tmp_path / "saved")
    own = {name: p.detach().clone() for name, p in pipeline.unet.named_parameters()}
    a, b = adapter(pipeline.unet), adapter(pipeline.unet, 1)
    pipeline._lora.adapters |= {"a": a, "b": b}

    def expected(weights: dict[str, float]) -> dict[str, Tensor]:
        sums = {name: value.clone() for name, value in own.items()}
        for key, weight in weights.items():
            for name in a.factors:
                sums[name] += weight * {"a": a, "b": b}[key].delta(name)
        return sums

    def assert_weights(weights: dict[str, Tensor]) -> None:
        for name, p in pipeline.unet.named_parameters():
            assert torch.equal(p, weights[name]), name

    pipeline.set_adapters(["a", "b"], [0.3, 0.7])
    assert pipeline.get_active_adapters() == ["a", "b"]
    assert_weights(expected({"a": 0.3, "b": 0.7}))
    assert RaphaelImg2ImgPipeline.from_pipe(pipeline).get_active_adapters() == ["a", "b"]
    pipeline.set_adapters("b")
    assert_weights(expected({"b": 1.0}))
    pipeline.delete_adapters("a")
    assert pipeline.get_list_adapters() == {"unet": ["b"]}
    pipeline.fuse_lora(lora_scale=0.5)
    assert_weights(expected({"b": 0.5}))
    pipeline.unload_lora_weights()  # fused weights stay
    assert_weights(expected({"b": 0.5}))
    pipeline.unfuse_lora()
    assert_weights(own)
    with pytest.raises(UserError, match="adapter_names='c' must be a loaded adapter"):
        pipeline.set_adapters("c")
    with pytest.raises(UserError, match="load_lora_weights"):
        pipeline.load_lora_weights(tmp_path)
