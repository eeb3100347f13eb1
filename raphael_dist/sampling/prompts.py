"""Reads requests (images to draw) from prompt files and image files, and divides them into batches."""

from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from raphael_dist.config.schema import Config
from raphael_dist.config.upscale import Upscale
from raphael_dist.data.buckets import resize_and_crop
from raphael_dist.data.features.hed import EdgeEncoder, canny_edges
from raphael_dist.data.image import read_image, to_rgb
from raphael_dist.errors import UserError, did_you_mean
from raphael_dist.sampling.sampler import Request, check_small
from raphael_dist.text import JsonObject, parse_json, read_text, split_lines

MAX_PROMPTS = 1_000_000
_FIELDS = ("prompt", "negative_prompt", "seed", "size", "label")


def read_requests(path: Path, default: Request) -> list[Request]:
    """Return a request (an image to draw) for each line of a prompt file; empty lines are skipped.

    A line of a .jsonl file is an object with `prompt` and optionally `negative_prompt`, `seed`, `size` ([H, W]) and `label`
    (text below the image in a grid). A line of any other file is a prompt. If a line states a seed, this seed alone
    determines the noise of its image. Otherwise the noise depends on the default seed and on the prompt's index in the file,
    from 0 and without empty lines.

    Args:
        path: the file.
        default: a request whose fields are used where a line does not state them.

    Raises:
        UserError: the file cannot be read, or a line is invalid; the message names file and line.
    """
    suffix = path.suffix.lower()
    if suffix == ".json":
        raise UserError(
            f"--prompts={path} must have one prompt per line, but a .json file is one value. Save it as .jsonl, with one "
            'object such as {"prompt": "a red heart"} per line, or as .txt, with one prompt per line.'
        )
    try:
        lines = split_lines(read_text(path, regular=False))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--prompts={path} cannot be read: {error}. Give a text file in UTF-8 with one prompt per line."
        ) from None
    requests: list[Request] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"--prompts={path}, line {number}"
            fields = _fields(line, where) if suffix == ".jsonl" else {"prompt": line.strip()}
            requests.append(_request(fields, len(requests), default, where))
    if not 0 < len(requests) <= MAX_PROMPTS:
        raise UserError(
            f"--prompts={path} must contain 1 to {MAX_PROMPTS} prompts, but it contains {len(requests)}. Write one prompt "
            "per line, and divide more prompts into several files."
        )
    return requests


def _fields(line: str, where: str) -> JsonObject:
    try:
        fields = parse_json(line)
    except ValueError as error:
        raise UserError(
            f"{where} must be JSON, but it cannot be parsed: {error}. Write the line as in "
            '{"prompt": "a red heart", "seed": 3}.'
        ) from None
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise UserError(
            f"{where} must be a JSON object with a string at the key 'prompt'. Write the line as in "
            '{"prompt": "a red heart", "seed": 3}.'
        )
    for name in fields:
        if name not in _FIELDS:
            raise UserError(
                f"{where}: the key {name!r} is unknown{did_you_mean(name, _FIELDS)}. Use only {', '.join(_FIELDS)}."
            )
    return fields


def _request(fields: JsonObject, index: int, default: Request, where: str) -> Request:
    seed, size = fields.get("seed"), fields.get("size", default.size_hw)
    negative, label = fields.get("negative_prompt"), fields.get("label")
    if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
        raise UserError(f'{where}: seed={seed!r} must be a whole number from 0 to 2**63 - 1. Write e.g. "seed": 3.')
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(type(side) is int for side in size)):
        raise UserError(f'{where}: size={size!r} must be [height, width] in pixels. Write e.g. "size": [512, 512].')
    if negative is not None and not isinstance(negative, str):
        raise UserError(f'{where}: negative_prompt={negative!r} must be a string. Write e.g. "negative_prompt": "blurry".')
    if label is not None and not isinstance(label, str):
        raise UserError(f'{where}: label={label!r} must be a string. Write e.g. "label": "held out".')
    return replace(
        default,
        prompt=fields["prompt"],
        size_hw=(size[0], size[1]),
        seed=default.seed if seed is None else seed,
        index=index if seed is None else 0,
        negative=default.negative if negative is None else negative,
        label=label,
    )


def check_sizes(requests: Sequence[Request], factor: int) -> None:
    """Raise UserError unless height and width of all images to draw, `requests`, are multiples of `factor`.

    `factor`: image pixels per latent position, in height and in width.
    """
    for size in {r.size_hw for r in requests}:
        if any(side < factor or side % factor for side in size):
            near = [max(factor, round(side / factor) * factor) for side in size]
            raise UserError(
                f"--size {size[0]} {size[1]} must be multiples of {factor}, the downsampling factor of the VAE. Use e.g. "
                f"{near[0]} {near[1]}."
            )


def read_fitted_image(
    path: Path, size_hw: tuple[int, int], option: str = "--image", background: str = "white"
) -> np.ndarray:
    """Read an image file, resize and crop the image to `size_hw` (height, width); return it as RGB, uint8 [H, W, 3].

    Transparent pixels get the colour `background`. Raises UserError if the file cannot be read; the message names `option`,
    the command line option with the path.
    """
    return fit_image(read_image(path, option, background), size_hw)


def read_edges(path: Path, size_hw: tuple[int, int], kind: str, option: str = "--control") -> np.ndarray:
    """Return the edge map of an image, float32 [H, W] in 0..1, resized and cropped to `size_hw`.

    Args:
        path: the image.
        size_hw: height and width in pixels.
        kind: "map": the image is an edge map, white lines on black. "hed" or "canny": detect the edges by this method.
        option: name of the command line option, for messages.

    Raises:
        UserError: the image cannot be read.
    """
    pixels_HW3 = read_fitted_image(path, size_hw, option, background="black" if kind == "map" else "white")
    if kind == "map":
        return pixels_HW3.mean(axis=2).astype(np.float32) / 255
    image = torch.from_numpy(pixels_HW3).permute(2, 0, 1).unsqueeze(0)
    if kind == "hed":  # as training detects the edges of images that have no edge map
        return EdgeEncoder(None, torch.device("cpu")).encode(image.float() / 127.5 - 1)[0].numpy()
    return canny_edges(image)[0, 0].numpy()


def sample_requests(config: Config, drawn: Container[int] | None = None) -> list[Request]:
    """Return the requests of all images that are sampled during training, one for each caption in `sample.prompts`.

    The setting `sample.images`, if it is not empty, names an input image for each request: an image from which an edge map
    is computed (ControlNet), or a small image to enlarge (super-resolution).

    Args:
        config: the run's configuration.
        drawn: indices of the requests that this rank draws; only their image files are read. None: read all image files.

    Raises:
        UserError: an image cannot be read or has the wrong size.
    """
    s, size, requests = config.sample, config.image.buckets[0], []
    for index, (prompt, path) in enumerate(zip(s.prompts, s.images or [None] * len(s.prompts), strict=True)):
        request = Request(prompt, size, s.seed, index)
        if path is not None and (drawn is None or index in drawn):
            if config.control.enabled:
                request = replace(request, edges=read_edges(path, size, "hed", "sample.images"))
            else:
                request = replace(request, small=read_small(path, config.upscale, size, "sample.images"))
        requests.append(request)
    return requests


def read_small(
    path: Path | None, upscale: Upscale, size_hw: tuple[int, int], option: str = "--upscale"
) -> np.ndarray | None:
    """Read the small input image of a super-resolution model, uint8 [Hs, Ws, 3]. Transparent pixels become white.

    Args:
        path: the image file; None: return None.
        upscale: the model's super-resolution settings.
        size_hw: height and width of the large image.
        option: name of the command line option, for messages.

    Raises:
        UserError: the image cannot be read or has the wrong size, or the model requires one and `path` is None.
    """
    pixels_HsWs3 = None if path is None else np.array(read_image(path, option))
    check_small(upscale.factor, pixels_HsWs3, size_hw, option if path is None else f"{option} {path}")
    return pixels_HsWs3


def fit_image(image: Image.Image, size_hw: tuple[int, int]) -> np.ndarray:
    """Convert a PIL image to RGB, uint8 [H, W, 3], resized and cropped to `size_hw` (height, width)."""
    return fit_rgb(to_rgb(image), size_hw)


def fit_rgb(image: Image.Image, size_hw: tuple[int, int]) -> np.ndarray:
    """Resize and crop an RGB image to `size_hw` (height, width); return it as uint8 [H, W, 3]."""
    return resize_and_crop(image, size_hw, flip=False).transpose(1, 2, 0).copy()


def batches(requests: Sequence[Request], numbers: Sequence[int], size: int) -> list[list[int]]:
    """Divide requests (images to draw) into batches of at most `size`, each with images of one height and width.

    `numbers`: indices in `requests` of the images to draw. Returns a list of such indices for each batch.
    """
    by_size: dict[tuple[int, int], list[int]] = {}
    for number in numbers:
        by_size.setdefault(requests[number].size_hw, []).append(number)
    return [same[i : i + size] for same in by_size.values() for i in range(0, len(same), size)]
