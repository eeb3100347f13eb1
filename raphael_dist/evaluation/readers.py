"""Where captions and true pictures come from: COCO's annotations, folders, shards, prompt files."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from raphael_dist.data.plain import read_samples
from raphael_dist.errors import UserError
from raphael_dist.sampling.prompts import read_requests
from raphael_dist.sampling.sampling import Request

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def read_captions(spec: str, count: int | None, seed: int, default: Request, cache_dir: Path) -> list[Request]:
    """Return what to draw: `count` captions, drawn with `seed` where there are more; their noise follows from their number.

    spec: coco=FILE (captions_val2014.json: one caption of each image, as zero-shot FID-30k has it), folder=DIR (NAME.txt
    beside pictures), shards=PATTERN, or prompts=FILE (sampling.prompts). UserError: unreadable, or fewer than `count`.
    """
    kind, _, where = spec.partition("=")
    if kind == "prompts" and where:
        requests = read_requests(Path(where), default)
        if count is not None and count > len(requests):
            raise UserError(f"--count: given {count}, but {where} holds {len(requests)} prompts")
        return requests[:count]
    if kind == "coco" and where:
        captions = _coco(Path(where), seed)
    elif kind == "folder" and where:
        captions = _folder_captions(Path(where))
    elif kind == "shards" and where:
        captions = [s.captions[0] for s in read_samples([where], cache_dir, (8, 8), "--captions")]
    else:
        raise UserError(f"--captions: given {spec!r}, allowed coco=FILE, folder=DIR, shards=PATTERN, prompts=FILE")
    if count is not None and count > len(captions):
        raise UserError(f"--count: given {count}, but {where} holds {len(captions)} captions")
    if count is not None and count < len(captions):
        captions = random.Random(seed).sample(captions, count)
    return [
        Request(caption, default.size_hw, default.seed, index, negative=default.negative)
        for index, caption in enumerate(captions)
    ]


def _coco(path: Path, seed: int) -> list[str]:
    """Return one caption of each image, drawn with `seed`, by the images' numbers."""
    try:
        annotations = json.loads(path.read_text(encoding="utf-8"))["annotations"]
        by_image: dict[int, list[str]] = {}
        for one in annotations:
            by_image.setdefault(int(one["image_id"]), []).append(" ".join(str(one["caption"]).split()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--captions coco={path}: no annotations of COCO captions ({type(error).__name__}: {error})"
        ) from None
    draw = random.Random(seed)
    return [draw.choice(by_image[image]) for image in sorted(by_image)]


def _folder_captions(folder: Path) -> list[str]:
    texts = [path.with_suffix(".txt") for path in picture_files(folder, "--captions") if path.with_suffix(".txt").is_file()]
    if not texts:
        raise UserError(f"--captions folder={folder}: no picture there has a .txt beside it")
    try:
        return [" ".join(path.read_text(encoding="utf-8").split()) for path in texts]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--captions folder={folder}: {error}") from None


def read_reference(spec: str, cache_dir: Path, size_hw: tuple[int, int]) -> Sequence[Path | np.ndarray]:
    """Return the true pictures: files below folder=DIR, or uint8 [H, W, 3] of shards=PATTERN, cut to a size."""
    kind, _, where = spec.partition("=")
    if kind == "folder" and where:
        return picture_files(Path(where), "--reference")
    if kind == "shards" and where:
        samples = read_samples([where], cache_dir, size_hw, "--reference")
        return [sample.image.transpose(1, 2, 0).copy() for sample in samples]
    raise UserError(f"--reference: given {spec!r}, allowed folder=DIR, shards=PATTERN")


def picture_files(folder: Path, option: str) -> list[Path]:
    """Return the pictures below a folder, sorted. UserError: fewer than two."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if len(found) < 2:
        raise UserError(f"{option}: {folder} holds {len(found)} pictures ({', '.join(PICTURES)}); two are needed at least")
    return found
