"""Pictures drawn into a folder on any number of ranks: what is there already is not drawn again."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import make_scheduler
from raphael_dist.parallel.long_work import Tell
from raphael_dist.parallel.ranks import Ranks
from raphael_dist.sampling.load import Trained
from raphael_dist.sampling.sampling import Request
from raphael_dist.sampling.spread import Settings, draw_share
from raphael_dist.storage.files import atomic_path, replace_bytes

PROTOCOL = "protocol.json"


def claim(folder: Path, protocol: dict[str, Any]) -> None:
    """Write down how a folder's numbers are made. UserError when it holds some that were made otherwise."""
    path = folder / PROTOCOL
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            before = json.loads(path.read_text())
            now = json.loads(json.dumps(protocol))
            changed = [k for k in {**before, **now} if before.get(k) != now.get(k)]
            if changed:
                first = changed[0]
                was, is_now = before.get(first), now.get(first)
                raise UserError(f"--out {folder}: begun with {first} = {was!r}, now {is_now!r}; choose another folder")
            return
        replace_bytes(path, json.dumps(protocol, indent=1).encode())
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--out {folder}: cannot use {path}: {error}") from None


def picture_path(folder: Path, number: int) -> Path:
    """Return where picture `number` lies."""
    return folder / f"{number:06d}.png"


def draw_missing(
    trained: Trained,
    requests: Sequence[Request],
    settings: Settings,
    scheduler: str,
    folder: Path,
    ranks: Ranks,
    tell: Tell,
) -> int:
    """Draw this rank's requests that have no picture in `folder` yet; return how many these were."""
    folder.mkdir(parents=True, exist_ok=True)
    there = {path.name for path in folder.iterdir()}
    count = 0
    made = draw_share(
        trained.sampler,
        requests,
        lambda: make_scheduler(trained.config.diffusion, scheduler),
        settings,
        ranks,
        wanted=lambda number: picture_path(folder, number).name not in there,
    )
    for batch in made:
        for number, pixels in batch:
            with atomic_path(picture_path(folder, number)) as temporary:
                Image.fromarray(pixels).save(temporary, format="PNG")
        count += len(batch)
        tell(f"{folder.name}: picture {batch[-1][0]} of {len(requests)}")
    return count


def read_picture(path: Path) -> np.ndarray:
    """Return uint8 [H, W, 3]. UserError: it cannot be read."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: no picture that can be read ({error}); remove it") from None
