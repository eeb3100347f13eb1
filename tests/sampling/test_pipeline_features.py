"""Properties that users of diffusers expect of its pipelines."""

import inspect
import io
from dataclasses import fields
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.callbacks import SDCFGCutoffCallback, SDXLCFGCutoffCallback
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image
from torch import Tensor

from raphael_dist.convert.layouts.diffusers import expert_json
from raphael_dist.data.image import to_rgb
from raphael_dist.errors import UserError
from raphael_dist.pipeline import (
    RaphaelControlNet,
    RaphaelControlNetPipeline,
    RaphaelImg2ImgPipeline,
    RaphaelInpaintPipeline,
    RaphaelPipeline,
    RaphaelUpscalePipeline,
)
from raphael_dist.sampling import pipeline_arguments, pipeline_variants, prompts
from raphael_dist.sampling.pipeline_arguments import CallArguments
from tests.sampling.small_pipeline import PROMPTS, build, copy_of, draw, picture
from tests.sampling.test_pipeline import emoji

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
        (
            {"prompt_embeds": torch.zeros(12, 32)},
            r"prompt_embeds of shape \[12, 32\] must be a tensor .* of shape \[prompts, tokens, width\]",
        ),
        ({"prompt_embeds": torch.tensor(1.0)}, r"prompt_embeds of shape \[\] must be a tensor"),
        ({"prompt_embeds": torch.zeros(0, 12, 32)}, r"prompt_embeds of shape \[0, 12, 32\] must be .* at least 1"),
        (
            {"prompt_embeds": torch.zeros(1, 12, 32).long()},
            r"prompt_embeds of shape \[1, 12, 32\] and torch.int64 must .*floats",
        ),
        ({"prompt_embeds": np.zeros((1, 12, 32))}, "prompt_embeds of type ndarray must be a tensor of floats"),
        ({"prompt_embeds": [[[0.0] * 32] * 12]}, "prompt_embeds of type list must be a tensor of floats"),
        (
            {"prompt": "a", "negative_prompt_embeds": np.zeros((1, 12, 32))},
            "negative_prompt_embeds of type ndarray must be a tensor of floats",
        ),
        (
            {"prompt_embeds": torch.zeros(1, 5, 32)},
            r"^prompt_embeds of shape \[1, 5, 32\] require .* encoded to 12 tokens. Pass negative_prompt_embeds",
        ),
        (
            {"prompt": "a", "prompt_attention_mask": torch.ones(1, 12)},
            "prompt_attention_mask requires prompt_embeds, but prompt_embeds=None",
        ),
        (
            {"prompt": "a", "negative_prompt_attention_mask": torch.ones(1, 12)},
            "negative_prompt_attention_mask requires negative_prompt_embeds",
        ),
        (
            {"prompt_embeds": torch.zeros(1, 12, 32), "prompt_attention_mask": [[1] * 12]},
            r"prompt_attention_mask of type list must be a tensor of shape \[1, 12\]",
        ),
        ({"prompt": "a", "timesteps": []}, r"timesteps=\[\] must be a list of numbers.*at least one"),
        ({"prompt": "a", "sigmas": []}, r"sigmas=\[\] must be a list of numbers.*at least one"),
        ({"prompt": "a", "timesteps": 900}, "timesteps=900 must be a list of numbers"),
        ({"prompt": "a", "sigmas": [1.0, float("nan")]}, "sigmas=.*nan.* must be a list of numbers"),
        (
            {"prompt_embeds": torch.zeros(1, 12, 32), "prompt_attention_mask": torch.ones(1, 11)},
            r"prompt_attention_mask of shape \[1, 11\] must be a tensor of shape \[1, 12\]",
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


def test_embeddings_of_any_length_need_no_encoded_negative_prompts(pipeline: Any) -> None:
    embeds = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    assert draw(pipeline, None, prompt_embeds=embeds, guidance_scale=1.0).shape == (1, 32, 32, 3)
    assert draw(pipeline, None, prompt_embeds=embeds, negative_prompt_embeds=embeds.double()).shape == (1, 32, 32, 3)


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
    generators = [[torch.Generator().manual_seed(3)] for _ in range(2)]
    pair = [draw(pipeline, num_inference_steps=5, seed=None, generator=generator) for generator in generators]
    assert np.array_equal(*pair)
    changed = draw(RaphaelImg2ImgPipeline.from_pipe(pipeline), image=picture(), strength=0.5, num_inference_steps=6)
    assert np.isfinite(changed).all()


def test_noise_of_a_scheduler_without_generator_is_fixed_by_the_call(parts: dict[str, Any]) -> None:
    scheduler = EulerDiscreteScheduler.from_config(parts["scheduler"].config)
    scheduler.register_to_config(noise_sampler_seed=None)  # as DPMSolverSDEScheduler has
    pipeline, seeds = build(parts, scheduler=scheduler), []
    for arguments in ({"seed": 1}, {"seed": 1}, {"seed": 2}, {"seed": None}):
        draw(pipeline, PROMPTS, num_inference_steps=1, **arguments)
        seeds.append(scheduler.noise_sampler_seed)
    assert seeds[0] == seeds[1] != seeds[2]
    assert len(set(seeds[0])) == 2  # one for each image
    assert seeds[3] is None
    scheduler.register_to_config(noise_sampler_seed=7)
    scheduler.noise_sampler_seed = 7
    draw(pipeline, PROMPTS, num_inference_steps=1)
    assert scheduler.noise_sampler_seed == 7


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
        assert tensors["prompt_embeds"].shape == (2, 12, 32)  # with guidance, as in diffusers
        seen.append(step)
        pipe._interrupt = step == 1
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    names = RaphaelPipeline._callback_tensor_inputs
    changed = draw(pipeline, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names, num_inference_steps=4)
    assert seen == [0, 1]
    assert pipeline.interrupt
    assert not np.array_equal(changed, draw(pipeline, num_inference_steps=4))
    assert not pipeline.interrupt


def stop_guidance(share: float, halve: bool = True) -> dict[str, Any]:
    """Return the arguments of a call with the callback in diffusers' guide, which turns guidance off."""

    def callback(pipe: Any, step: int, timestep: Tensor, callback_kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == int(pipe.num_timesteps * share):
            pipe._guidance_scale = 0.0
            if halve:
                callback_kwargs["prompt_embeds"] = callback_kwargs["prompt_embeds"].chunk(2)[-1]
        return callback_kwargs

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
def test_guidance_is_turned_off_as_in_the_guide_of_diffusers(pipeline: Any, prompts: list[str]) -> None:
    seen: list[Tensor] = []

    def latents_after(share: float, **arguments: Any) -> Tensor:
        return pipeline(
            prompts, seed=1, output_type="latent", num_images_per_prompt=2, **stop_guidance(share), **arguments
        ).images

    def keep(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"])
        return {}

    half = latents_after(0.4, num_inference_steps=4)
    assert (pipeline.guidance_scale, pipeline.do_classifier_free_guidance) == (0.0, False)
    # Two steps with guidance, then two without.
    pipeline(prompts, seed=1, num_inference_steps=4, num_images_per_prompt=2, callback_on_step_end=keep)
    assert (pipeline.guidance_scale, pipeline.do_classifier_free_guidance, pipeline.num_timesteps) == (3.0, True, 4)
    latents, scheduler = seen[1], pipeline.scheduler
    text, mask, _, _ = pipeline.encode_prompt(prompts, None, 2, False)
    for t in scheduler.timesteps[2:]:
        with torch.no_grad():
            prediction = pipeline.unet(latents, t, encoder_hidden_states=text, encoder_attention_mask=mask).sample
        latents = scheduler.step(prediction, t, latents).prev_sample
    torch.testing.assert_close(half, latents, atol=1e-4, rtol=1e-4)
    assert torch.equal(half, pipeline(prompts, seed=1, output_type="latent", num_images_per_prompt=2, num_inference_steps=4,
                                      **stop_guidance(0.4, halve=False)).images)  # fmt: skip


def test_callback_replaces_negative_embeddings_and_reports_a_wrong_shape(pipeline: Any) -> None:
    names = RaphaelPipeline._callback_tensor_inputs

    def drawn(change: Any) -> np.ndarray:
        def callback(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return change(tensors) if step == 0 else {}

        return draw(pipeline, PROMPTS, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)

    def erase(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["prompt_embeds"].zero_()
        return {}

    other = pipeline.encode_prompt(["bird"] * 2, do_classifier_free_guidance=False)[0]
    by_name = drawn(lambda tensors: {"negative_prompt_embeds": other})
    by_half = drawn(lambda tensors: {"prompt_embeds": torch.cat([other, tensors["prompt_embeds"][2:]])})
    assert np.array_equal(by_name, by_half)
    assert not np.array_equal(by_name, draw(pipeline, PROMPTS))
    assert not np.array_equal(drawn(erase), draw(pipeline, PROMPTS))
    with pytest.raises(UserError, match=r"prompt_embeds of shape \[4, 12, 32\], but it is \[2, 12, 32\]") as error:
        drawn(lambda tensors: {"prompt_embeds": tensors["prompt_embeds"][2:]})
    assert "\n" not in str(error.value)


def test_callbacks_of_diffusers_turn_guidance_off_or_are_refused(pipeline: Any) -> None:
    def latents(callback: Any) -> Tensor:
        options = {**stop_guidance(0.5), "callback_on_step_end": callback, "num_inference_steps": 4}
        return pipeline("a cat", seed=1, output_type="latent", **options).images

    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    assert torch.equal(latents(cutoff), latents(stop_guidance(0.5)["callback_on_step_end"]))
    for wrong, message in (
        (SDXLCFGCutoffCallback(), r"SDXLCFGCutoffCallback.tensor_inputs=\[.*\] must contain only .*'add_text_embeds'"),
        (lambda *_: None, r"callback_on_step_end must return a dict .* but it returned NoneType. Return \{\}"),
    ):
        with pytest.raises(UserError, match=message) as error:
            latents(wrong)
        assert "\n" not in str(error.value)


# ---- pipelines with shared parts ---------------------------------------------------------------------------------------


def test_from_pipe_shares_parts_and_settings(parts: dict[str, Any], pipeline: Any) -> None:
    for kind in (RaphaelImg2ImgPipeline, RaphaelInpaintPipeline, RaphaelUpscalePipeline):
        other = kind.from_pipe(pipeline)
        assert other.components == pipeline.components
        back = RaphaelPipeline.from_pipe(other)
        assert {k: v for k, v in back.config.items() if k != "_class_name"} == dict(pipeline.config)
    small = RaphaelImg2ImgPipeline.from_pipe(copy_of(pipeline), vae=None, torch_dtype=torch.float16)
    assert small.unet.dtype == torch.float16
    assert RaphaelPipeline.from_pipe(small).unet.dtype == torch.float16
    assert RaphaelPipeline.from_pipe(small, dtype=torch.float32, text_encoder=None).unet.dtype == torch.float32
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


@pytest.mark.parametrize("name", [s.name for s in KarrasDiffusionSchedulers])
def test_inpainting_with_every_karras_scheduler_keeps_the_rest(parts: dict[str, Any], name: str) -> None:
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    scheduler = getattr(diffusers, name).from_config(parts["scheduler"].config)
    inpaint, image = build(parts, RaphaelInpaintPipeline, scheduler=scheduler), picture()
    left = Image.fromarray(np.repeat([[255] * 16 + [0] * 16], 32, axis=0).astype(np.uint8))
    options = {"image": image, "num_inference_steps": 6, "seed": 1, "output_type": "latent"}
    same = RaphaelImg2ImgPipeline.from_pipe(inpaint)("a", strength=0.0, **options).images
    for strength in (0.5, 1.0):
        filled = inpaint("a cat", mask_image=left, strength=strength, **options).images
        assert torch.equal(filled[..., 4:], same[..., 4:])
        assert filled.isfinite().all()
        assert not torch.isclose(filled[..., :4], same[..., :4], atol=1e-3).all()


def test_inpainting_converts_image_and_mask_once(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[Image.Image] = []

    def convert(image: Image.Image, *rest: str) -> Image.Image:
        converted.append(image)
        return to_rgb(image, *rest)

    for module in (pipeline_arguments, pipeline_variants, prompts):
        monkeypatch.setattr(module, "to_rgb", convert, raising=False)
    inpaint, image, mask = RaphaelInpaintPipeline.from_pipe(pipeline), picture(), Image.new("L", (32, 32), 255)
    inpaint("a cat", image=image, mask_image=mask, num_inference_steps=1, output_type="latent")
    assert converted == [image, mask]


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
