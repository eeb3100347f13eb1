"""Reads the captions and the real images of a study, from COCO annotations, folders, shards or prompt files."""

import logging
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from raphael_dist.data.folder_files import files_below
from raphael_dist.data.image import IMAGE_SUFFIXES
from raphael_dist.data.image_files import CaptionFiles, image_files
from raphael_dist.data.sequential_samples import read_samples
from raphael_dist.errors import UserError
from raphael_dist.evaluation.lettering import normalise_text, requested_text
from raphael_dist.runtime.launcher_env import rank_of
from raphael_dist.sampling.prompts import read_requests
from raphael_dist.sampling.sampler import Request
from raphael_dist.text import json_type, read_json, read_text

_log = logging.getLogger(__name__)


def read_captions(spec: str, count: int | None, seed: int, default: Request, cache_dir: Path) -> list[Request]:
    """Return the requests (captions with size and seed) for the images to draw.

    Args:
        spec: coco=FILE (captions_val2014.json: one caption of each image, as in zero-shot FID-30k), folder=DIR (NAME.txt
            next to images), shards=PATTERN, or prompts=FILE.
        count: number of captions: the first ones of a prompt file, else a random choice. None: all.
        seed: determines the random choice. The noise of an image does not depend on it.
        default: a request whose size, seed and negative prompt are used, except where a line of a prompt file has its own.
        cache_dir: folder for the index of the shards.

    Raises:
        UserError: the source cannot be read or has fewer than `count` captions.
    """
    kind, _, where = spec.partition("=")
    if kind == "prompts" and where:
        requests = read_requests(Path(where), default)
        _check_count(count, len(requests), where)
        return requests[:count]
    if kind == "coco" and where:
        captions = _coco_captions(Path(where), seed)
    elif kind == "folder" and where:
        captions = _folder_captions(Path(where))
    elif kind == "shards" and where:
        captions = [s.captions[0] for s in read_samples([where], cache_dir, (8, 8), "--captions")]
    else:
        raise UserError(
            f"--captions={spec} must be coco=FILE, folder=DIR, shards=PATTERN or prompts=FILE. Use e.g. --captions "
            "prompts=prompts.txt."
        )
    _check_count(count, len(captions), where)
    if count is not None and count < len(captions):
        captions = random.Random(seed).sample(captions, count)
    return [
        Request(caption, default.size_hw, default.seed, index, negative=default.negative)
        for index, caption in enumerate(captions)
    ]


def _check_count(count: int | None, available: int, where: str) -> None:
    if count is not None and count > available:
        raise UserError(
            f"--count={count} must be at most the number of captions, but {where} has {available}. Give a smaller --count."
        )


def _coco_captions(path: Path, seed: int) -> list[str]:
    """Return one caption of each image in the file `path` of COCO annotations, in the order of the image ids.

    The caption is chosen randomly from those of the image; `seed` determines the choice.
    """
    try:
        by_image: dict[int, list[str]] = {}
        for annotation in read_json(path)["annotations"]:
            image, caption = int(annotation["image_id"]), annotation["caption"]
            if not isinstance(caption, str):
                raise ValueError(f"the caption of image {image} must be a string, but it is {json_type(caption)}")
            by_image.setdefault(image, []).append(" ".join(caption.split()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        known = isinstance(error, OSError | ValueError)
        reason = error if known else "it has no list `annotations` of objects with image_id and caption"
        raise UserError(
            f"--captions=coco={path} must be a JSON file of COCO captions, but the file cannot be read: {reason}. Give "
            "a file such as captions_val2014.json."
        ) from None
    draw = random.Random(seed)
    return [draw.choice(by_image[image]) for image in sorted(by_image)]


def _folder_captions(folder: Path) -> list[str]:
    images, files = list_images(folder, "--captions"), CaptionFiles(files_below(folder), ".txt")
    texts = [path for path in map(files.of, images) if path is not None]
    if not texts:
        raise UserError(
            f"--captions=folder={folder} requires a .txt file of the same name next to at least one image, but there is "
            "none. Add files with captions, e.g. cat.txt for cat.png."
        )
    try:
        return [" ".join(read_text(path).split()) for path in texts]
    except (OSError, ValueError) as error:
        raise UserError(
            f"--captions=folder={folder} requires readable .txt files in UTF-8, but one cannot be read: {error}. Save it "
            "again as UTF-8, or remove it."
        ) from None


def read_reference(spec: str, cache_dir: Path, size_hw: tuple[int, int]) -> Sequence[Path | np.ndarray]:
    """Return the real images that the option --reference names: as paths, or for shards as uint8 [H, W, 3].

    Args:
        spec: the option's value, folder=DIR or shards=PATTERN.
        cache_dir: folder for the index of the shards.
        size_hw: (height, width) in pixels to which images of shards are resized and cropped.

    Raises:
        UserError: the folder has fewer than two images, or the shards cannot be read.
    """
    kind, _, where = spec.partition("=")
    if kind == "folder" and where:
        return list_images(Path(where), "--reference")
    if kind == "shards" and where:
        samples = read_samples([where], cache_dir, size_hw, "--reference")
        return [sample.image.transpose(1, 2, 0).copy() for sample in samples]
    raise UserError(f"--reference={spec} must be folder=DIR or shards=PATTERN. Use e.g. --reference folder=images.")


def read_lettering(spec: str, cache_dir: Path, size_hw: tuple[int, int]) -> list[tuple[np.ndarray, str]]:
    """Return real images with text in them, to measure how well OCR reads it, as pairs (uint8 [H, W, 3], text).

    These are the images whose captions ask for text, such as a sign with the text "open".

    Args:
        spec: value of the option --reference, which must be shards=PATTERN.
        cache_dir: folder for the index of the shards.
        size_hw: (height, width) in pixels to which images are resized and cropped.

    Raises:
        UserError: `spec` has another form, the shards cannot be read, or no caption quotes text.
    """
    kind, _, where = spec.partition("=")
    if kind != "shards" or not where:
        raise UserError(
            f"--reference={spec} must be shards=PATTERN for this command. Use e.g. --reference 'shards=data/val-*.tar'."
        )
    images = []
    for sample in read_samples([where], cache_dir, size_hw, "--reference"):
        text = requested_text(sample.captions[0])
        if text and normalise_text(text):
            images.append((sample.image.transpose(1, 2, 0).copy(), text))
    if not images:
        raise UserError(
            f"--reference={spec} must have captions with quoted text, but no caption has any. Use shards with captions such "
            'as: a sign with the text "open".'
        )
    return images


def list_images(folder: Path, option: str) -> list[Path]:
    """Return the paths of all images in a folder and its subfolders, sorted. Raises UserError if there are fewer than two.

    Hidden files and edge maps are left out, as in data preparation. A warning states how many files are left out, and why.

    `option`: the command line option that named the folder, e.g. "--reference", for messages.
    """
    if not folder.is_dir():
        raise UserError(f"{option}=folder={folder} must be a folder, but there is no such folder. Correct the path.")
    paths, skipped = image_files(folder, files_below(folder))
    if skipped.counts and rank_of() == "0":
        _log.warning("%s=folder=%s: files that are left out: %s", option, folder, "; ".join(skipped.lines()))
    if len(paths) < 2:
        raise UserError(
            f"{option}=folder={folder} must contain at least 2 images ({', '.join(IMAGE_SUFFIXES)}), but it has "
            f"{len(paths)}. Add images, or give another folder."
        )
    return paths
