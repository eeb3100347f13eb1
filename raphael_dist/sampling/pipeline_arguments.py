"""The arguments of a pipeline call, which are checked before anything is computed.

Shape legend: B images, C latent channels, h and w latent height and width, Y text tokens, D text width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeGuard

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from raphael_dist.config.types import INT_LIMIT
from raphael_dist.errors import UserError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CALLBACK_INPUTS = ("latents", "prompt_embeds", "negative_prompt_embeds")
Texts = str | Sequence[str] | None  # one for all images, or one for each
# One for all prompts, or one for each. Arrays are [H, W, 3], [H, W, 1] or [H, W], tensors [3, H, W], [1, H, W] or [H, W].
# They contain floats in 0..1. A batch of B has B in front of the three dimensions.
Images = Image.Image | np.ndarray | Tensor | Sequence[Image.Image | np.ndarray | Tensor] | None
Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True, eq=False)
class CallArguments:
    """The arguments of one pipeline call, under diffusers' names (see `RaphaelPipeline.__call__`)."""

    prompt: Texts = None
    height: int
    width: int
    num_inference_steps: int
    timesteps: list[int] | None = None
    sigmas: list[float] | None = None
    guidance_scale: float
    negative_prompt: Texts = None
    num_images_per_prompt: int = 1
    eta: float = 0.0
    generator: torch.Generator | list[torch.Generator] | None = None
    latents: Tensor | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    prompt_attention_mask: Tensor | None = None
    negative_prompt_attention_mask: Tensor | None = None
    output_type: str = "pil"
    return_dict: bool = True
    guidance_rescale: float = 0.0
    callback_on_step_end: Callback | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    seed: int | None = None
    image: Images = None
    mask_image: Images = None
    strength: float = 1.0
    controlnet_conditioning_scale: float = 1.0

    @property
    def size_hw(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def num_prompts(self) -> int:
        return len(as_list(self.prompt)) if self.prompt_embeds is None else len(self.prompt_embeds)

    @property
    def embeddings(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """The embeddings of the prompts and of the negative prompts, then the masks of both."""
        masks = self.prompt_attention_mask, self.negative_prompt_attention_mask
        return self.prompt_embeds, self.negative_prompt_embeds, *masks

    @property
    def images(self) -> list[Image.Image]:
        """The input images (argument `image`) as a list with one image for each prompt; [] if there are none."""
        return [] if self.image is None else _read_images("image", self.image, self.num_prompts)

    @property
    def masks(self) -> list[Image.Image]:
        """The masks for inpainting as a list with one mask for each prompt; [] if there are none."""
        return [] if self.mask_image is None else _read_images("mask_image", self.mask_image, self.num_prompts)

    @property
    def callback_tensors(self) -> Sequence[str]:
        """Names of the tensors that the callback gets. A PipelineCallback of diffusers states them in `tensor_inputs`."""
        return getattr(self.callback_on_step_end, "tensor_inputs", self.callback_on_step_end_tensor_inputs)

    def check(self, factor: int, num_timesteps: int) -> None:
        """Check all arguments of the call. Raises UserError for a value that is not allowed.

        Args:
            factor: image height divided by latent height (and width by width); height and width must be multiples of it.
            num_timesteps: number of timesteps of the noise schedule.
        """
        check_texts(self.prompt, self.negative_prompt, *self.embeddings)
        check_whole("num_images_per_prompt", self.num_images_per_prompt, 1)
        check_whole("num_inference_steps", self.num_inference_steps, 1, num_timesteps - 1)
        for name, values in (("timesteps", self.timesteps), ("sigmas", self.sigmas)):
            if values is not None:
                _check_schedule(name, values)
        if self.seed is not None:
            check_whole("seed", self.seed, 0, INT_LIMIT - 1)
        for name, side in (("height", self.height), ("width", self.width)):
            if not _is_whole(side) or side < factor or side % factor:
                raise UserError(f"{name}={side!r} must be a multiple of {factor}. Use e.g. {name}={64 * factor}.")
        for name in ("guidance_scale", "controlnet_conditioning_scale"):
            check_real(name, getattr(self, name), math.inf)
        for name in ("strength", "eta", "guidance_rescale"):
            check_real(name, getattr(self, name), 1)
        if self.output_type not in OUTPUT_TYPES:
            allowed = ", ".join(map(repr, OUTPUT_TYPES))
            raise UserError(f"output_type={self.output_type!r} must be one of {allowed}. Use e.g. output_type='pil'.")
        if unknown := [name for name in self.callback_tensors if name not in CALLBACK_INPUTS]:
            name, remedy = "callback_on_step_end_tensor_inputs", f"Remove {unknown[0]!r}"
            if hasattr(self.callback_on_step_end, "tensor_inputs"):
                name = f"{type(self.callback_on_step_end).__name__}.tensor_inputs"
                remedy = "Use a callback for StableDiffusionPipeline"
            raise UserError(
                f"{name}={list(self.callback_tensors)} must contain only {', '.join(CALLBACK_INPUTS)}, but it contains "
                f"{unknown[0]!r}. {remedy}."
            )
        _ = self.images, self.masks  # raises UserError for a value that is no image


def check_texts(
    prompt: Texts,
    negative: Texts,
    prompt_embeds: Tensor | None,
    negative_embeds: Tensor | None,
    prompt_mask: Tensor | None = None,
    negative_mask: Tensor | None = None,
) -> None:
    """Raise UserError unless the prompts of a call are either strings or embeddings, and its negative prompts as well.

    Args:
        prompt: one prompt or several, or None.
        negative: one negative prompt for all prompts, or one for each. None: use `negative_embeds`, or else empty strings.
        prompt_embeds: embeddings of the prompts, [prompts, tokens, width], or None.
        negative_embeds: embeddings of the negative prompts, or None.
        prompt_mask: mask of `prompt_embeds`, or None.
        negative_mask: mask of `negative_embeds`, or None.
    """
    for name, texts, embeds, mask in (
        ("prompt", prompt, prompt_embeds, prompt_mask),
        ("negative_prompt", negative, negative_embeds, negative_mask),
    ):
        if texts is not None and embeds is not None:
            raise UserError(f"{name}={texts!r} cannot be combined with {name}_embeds. Pass only one of them.")
        if mask is not None and embeds is None:
            raise UserError(
                f"{name}_attention_mask requires {name}_embeds, but {name}_embeds=None. Pass both, or leave out the mask."
            )
        if embeds is not None:
            _check_floats(f"{name}_embeds", embeds)
    if prompt_embeds is None:
        _check_text_list("prompt", as_list(prompt))
    if negative_embeds is None:
        count = len(as_list(prompt)) if prompt_embeds is None else len(prompt_embeds)
        _check_text_list("negative_prompt", for_each("negative_prompt", negative or "", count))


def check_embeddings(
    name: str, embeds: Tensor, mask: Tensor | None, width: int | None, shape: Sequence[int] | None = None
) -> None:
    """Raise UserError unless text embeddings [B, Y, D] and their mask [B, Y] have the right shapes.

    Args:
        name: name of the argument with the embeddings, for messages.
        embeds: the embeddings.
        mask: True at tokens, False at padding; None: no mask to check.
        width: text width D of the model; None: any.
        shape: the exact shape that is required; None: any.
    """
    if embeds.shape[2] != (width or embeds.shape[2]) or (shape is not None and tuple(embeds.shape) != tuple(shape)):
        expected = ["prompts", "tokens", width] if shape is None else list(shape)
        raise UserError(
            f"{name} of shape {list(embeds.shape)} must have shape [{', '.join(map(str, expected))}]. Use encode_prompt() "
            "of a pipeline with this model's text encoder."
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != embeds.shape[:2]):
        mask_name = name.replace("embeds", "attention_mask")
        raise UserError(
            f"{mask_name} of {_kind(mask)} must be a tensor of shape {list(embeds.shape[:2])}, with one value for each "
            f"token of {name}. Pass the mask that encode_prompt() returns with the embeddings."
        )


def as_list(value: object) -> list[Any]:
    """Return a list: `value` itself if it is a list or tuple, otherwise a list with this one value."""
    return list(value) if isinstance(value, list | tuple) else [value]


def for_each(name: str, value: object, count: int) -> list[Any]:
    """Return a list with one value for each of `count` prompts, from a single value or a list of `count` values.

    Raises UserError if a list has another length; the message names the argument `name`.
    """
    values = list(value) if isinstance(value, list | tuple) else [value] * count
    if len(values) != count:
        raise UserError(
            f"{name} must be one value, or a list with a value for each prompt ({count}), but the list has "
            f"{len(values)} values. Pass a single value or a list of length {count}."
        )
    return values


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: object) -> TypeGuard[float]:
    """Return whether `value` is a finite number of at least 0."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < math.inf


def check_whole(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise UserError unless `value` is a whole number from `low` to `high`. If `high` is None, there is no upper limit.

    `name`: the argument of the pipeline that has this value, for the message.
    """
    if not _is_whole(value) or value < low or (high is not None and value > high):
        limits = f"from {low}" + ("" if high is None else f" to {high}")
        raise UserError(f"{name}={value!r} must be a whole number {limits}. Use a number within these limits.")


def check_real(name: str, value: object, high: float) -> None:
    """Raise UserError unless `value` is a finite number from 0 to `high`. If `high` is infinite, there is no upper limit.

    `name`: the argument of the pipeline that has this value, for the message.
    """
    if not _is_real(value) or value > high:
        limits = "from 0" + ("" if math.isinf(high) else f" to {high}")
        raise UserError(f"{name}={value!r} must be a number {limits}. Use a number within these limits.")


def _check_text_list(name: str, values: Sequence[object]) -> None:
    wrong = [value for value in values if not isinstance(value, str)]
    if wrong or not values:
        why = f"{wrong[0]!r} is not a string" if wrong else "the list is empty"
        raise UserError(
            f"{name}={list(values)!r} must be a string or a list of strings, but {why}. Pass e.g. {name}='a red heart', or "
            f"pass {name}_embeds."
        )


def _check_floats(name: str, embeds: object) -> None:
    """Raise UserError unless text embeddings, the argument `name`, are a tensor of floats [prompts, tokens, width]."""
    if not isinstance(embeds, Tensor) or not embeds.is_floating_point() or embeds.ndim != 3 or not embeds.numel():
        raise UserError(
            f"{name} of {_kind(embeds)} must be a tensor of floats of shape [prompts, tokens, width], each at least 1. "
            "Pass what encode_prompt() returns."
        )


def _kind(value: object) -> str:
    """Describe a value in a message: a tensor by its shape, and dtype if it is not floating-point; others by their type."""
    if not isinstance(value, Tensor):
        return f"type {type(value).__name__}"
    return f"shape {list(value.shape)}" if value.is_floating_point() else f"shape {list(value.shape)} and {value.dtype}"


def _check_schedule(name: str, values: Any) -> None:
    """Raise UserError unless `values`, the argument `name`, is a list or array of at least one number, none negative."""
    numbers = values.tolist() if isinstance(values, np.ndarray | Tensor) else values
    if not isinstance(numbers, list | tuple) or not numbers or not all(_is_real(value) for value in numbers):
        raise UserError(
            f"{name}={values!r} must be a list of numbers that are not negative: one number for each denoising step, and at "
            f"least one. Pass such a list, or leave out {name}."
        )


def _read_images(name: str, value: Any, count: int) -> list[Image.Image]:
    """Return a PIL image for each of `count` prompts from `value`, the value of the argument `name`.

    `value`: an image (PIL, array or tensor), which all prompts share, or a list or batch of `count` images.
    """
    is_batch = isinstance(value, np.ndarray | Tensor) and value.ndim == 4
    if is_batch or isinstance(value, list | tuple):
        return for_each(name, [_to_pil(name, image) for image in value], count)
    return for_each(name, _to_pil(name, value), count)


def _to_pil(name: str, image: Any) -> Image.Image:
    """Convert one image of the argument `name` to a PIL image, as diffusers does. PIL images are returned unchanged."""
    if isinstance(image, Image.Image):
        return image
    kind = f"type {type(image).__name__}. Pass {name}=Image.open(path)"
    if isinstance(image, np.ndarray | Tensor):
        array = image.detach().cpu().double().numpy() if isinstance(image, Tensor) else image
        array = array.transpose(1, 2, 0) if isinstance(image, Tensor) and image.ndim == 3 else array
        array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
        is_shape = array.size and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3))
        is_float = image.is_floating_point() if isinstance(image, Tensor) else array.dtype.kind == "f"
        if is_shape and is_float and array.min() >= 0 and array.max() <= 1:
            return Image.fromarray((array * 255).round().astype(np.uint8))
        limits = f" and values {array.min():g} to {array.max():g}" if array.size else ""
        kind = f"shape {list(image.shape)}, dtype {image.dtype}{limits}. Pass {name}=Image.fromarray(array), array as uint8"
    raise UserError(
        f"{name} must be a PIL image, floats in 0..1 as an array [H, W, 3] or a tensor [3, H, W], or a list with one of "
        f"these for each prompt, but an image has {kind}."
    )
