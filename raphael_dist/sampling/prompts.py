"""What to draw: prompts from the command line or a file, and how they are divided into batches and over ranks."""

import json
from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from raphael_dist.config import Config
from raphael_dist.config_upscale import Upscale
from raphael_dist.data.buckets import resize_and_crop
from raphael_dist.data.dataset import decode_image
from raphael_dist.data.hed import EdgeEncoder, edge_map
from raphael_dist.errors import UserError, did_you_mean
from raphael_dist.sampling.sampling import Request, check_small

MAX_PROMPTS = 1_000_000
_FIELDS = ("prompt", "negative_prompt", "seed", "size")


def read_requests(path: Path, default: Request) -> list[Request]:
    """Return a request for each line of a prompt file; lines without text are passed over.

    A line of a .jsonl file is an object with `prompt` and, if wanted, `negative_prompt`, `seed` and `size` ([H, W]); a line
    of any other file is a prompt. What a line does not say is as in `default`. A prompt's noise follows from the seed and
    its number among the prompts, or from its own seed alone. UserError names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: cannot be read: {error}") from None
    requests: list[Request] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"--prompts {path}, line {number}"
            fields = _fields(line, where) if path.suffix == ".jsonl" else {"prompt": line.strip()}
            requests.append(_request(fields, len(requests), default, where))
    if not 0 < len(requests) <= MAX_PROMPTS:
        raise UserError(f"--prompts {path}: {len(requests)} prompts there, allowed 1 to {MAX_PROMPTS}")
    return requests


def _fields(line: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no JSON: {error}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise UserError(f'{where}: must be an object with a "prompt", e.g. {{"prompt": "a red heart", "seed": 3}}')
    for name in fields:
        if name not in _FIELDS:
            raise UserError(f"{where}: unknown field {name!r}{did_you_mean(name, _FIELDS)}; known: {', '.join(_FIELDS)}")
    return fields


def _request(fields: dict[str, Any], index: int, default: Request, where: str) -> Request:
    seed, size, negative = fields.get("seed"), fields.get("size", default.size_hw), fields.get("negative_prompt")
    if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
        raise UserError(f"{where}: seed is {seed!r}, allowed 0 to 2**63 - 1")
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(type(side) is int for side in size)):
        raise UserError(f"{where}: size is {size!r}, must be [height, width] in pixels")
    if negative is not None and not isinstance(negative, str):
        raise UserError(f"{where}: negative_prompt is {negative!r}, must be a text")
    return replace(
        default,
        prompt=fields["prompt"],
        size_hw=(size[0], size[1]),
        seed=default.seed if seed is None else seed,
        index=index if seed is None else 0,
        negative=default.negative if negative is None else negative,
    )


def check_sizes(requests: Sequence[Request], factor: int, option: str = "--size") -> None:
    """Raise UserError for a size that is no multiple of the image encoder's factor."""
    for size in {r.size_hw for r in requests}:
        if any(side < factor or side % factor for side in size):
            raise UserError(f"{option}: given {list(size)}, must be multiples of the image encoder's factor {factor}")


def read_picture(path: Path, size_hw: tuple[int, int], option: str = "--image") -> np.ndarray:
    """Return a picture, uint8 [H, W, 3], scaled and cut to a size. UserError: it cannot be read."""
    try:
        with Image.open(path) as image:
            return fit_picture(image, size_hw)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{option} {path}: cannot be read: {error}") from None


def read_edges(path: Path, size_hw: tuple[int, int], kind: str, option: str = "--control") -> np.ndarray:
    """Return an edge map to follow, float32 [H, W] in 0..1, of a picture scaled and cut to a size.

    kind: "map", the picture is one (white lines on black); "hed" or "canny", made of it. UserError: it cannot be read.
    """
    pixels_HW3 = read_picture(path, size_hw, option)
    if kind == "map":
        return pixels_HW3.mean(axis=2).astype(np.float32) / 255
    image = torch.from_numpy(pixels_HW3).permute(2, 0, 1).unsqueeze(0)
    if kind == "hed":  # as the data's maps are made where they have none
        return EdgeEncoder(None, torch.device("cpu")).encode(image.float() / 127.5 - 1)[0].numpy()
    return edge_map(image, kind)[0, 0].numpy()


def sample_requests(config: Config, drawn: Container[int] | None = None) -> list[Request]:
    """Return what is drawn while training, `sample.prompts` with their pictures.

    drawn: the numbers of those whose pictures are read, None: all. UserError: a picture cannot be read or does not fit.
    """
    s, size, requests = config.sample, config.image.buckets[0], []
    for index, (prompt, path) in enumerate(zip(s.prompts, s.pictures or [None] * len(s.prompts), strict=True)):
        request = Request(prompt, size, s.seed, index)
        if path is not None and (drawn is None or index in drawn):
            if config.control.enabled:
                request = replace(request, edges=read_edges(path, size, "hed", "sample.pictures"))
            else:
                request = replace(request, small=read_small(path, config.upscale, size, "sample.pictures"))
        requests.append(request)
    return requests


def read_small(
    path: Path | None, upscale: Upscale, size_hw: tuple[int, int], option: str = "--upscale"
) -> np.ndarray | None:
    """Return the small picture that one of `size_hw` is drawn from, uint8 [Hs, Ws, 3], what is transparent on white.

    None for a model that draws from captions alone. UserError: it cannot be read, or does not fit the model and the size.
    """
    pixels_HsWs3 = None
    if path is not None:
        option = f"{option} {path}"
        try:
            pixels_HsWs3 = np.array(decode_image(path.read_bytes()))
        except Exception as error:  # decoders raise nearly anything
            raise UserError(f"{option}: cannot be read: {error}") from None
    check_small(upscale, pixels_HsWs3, size_hw, option)
    return pixels_HsWs3


def fit_picture(image: Image.Image, size_hw: tuple[int, int]) -> np.ndarray:
    """Return a PIL image scaled and cut to a size, uint8 [H, W, 3]."""
    return resize_and_crop(image.convert("RGB"), size_hw, flip=False).transpose(1, 2, 0).copy()


def batches(requests: Sequence[Request], numbers: Sequence[int], size: int) -> list[list[int]]:
    """Cut the requests with these numbers into batches of at most `size`, each of one image size."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for number in numbers:
        by_size.setdefault(requests[number].size_hw, []).append(number)
    return [same[i : i + size] for same in by_size.values() for i in range(0, len(same), size)]
