"""Draws images into a folder, on any number of ranks. Images that are already in the folder are not drawn again."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from raphael_dist.data.image import decode_image, reason_of
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import make_scheduler
from raphael_dist.runtime.progress_bar import Reporter
from raphael_dist.runtime.ranks import Ranks
from raphael_dist.sampling.distributed import SamplingSettings, draw_share
from raphael_dist.sampling.load_model import TrainedModel
from raphael_dist.sampling.sampler import Request
from raphael_dist.storage.files import atomic_path, replace_bytes
from raphael_dist.text import hide_secrets_in_tree, read_json

PROTOCOL = "protocol.json"


def record_protocol(folder: Path, protocol: Mapping[str, object]) -> None:
    """Write the settings that determine a folder's results to the file protocol.json in it.

    If the file exists already, nothing is written, and UserError is raised if the file has other settings: results of other
    settings must not be mixed. `protocol`: the settings by name. Raises UserError also if the folder cannot be used.
    """
    path = folder / PROTOCOL
    protocol = json.loads(json.dumps(hide_secrets_in_tree(dict(protocol))))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            replace_bytes(path, json.dumps(protocol, indent=1).encode())
            return
        before = read_json(path)
        changed = [key for key in {**before, **protocol} if before.get(key) != protocol.get(key)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--out={folder} cannot be used: {path}: {error}. Choose another folder.") from None
    if changed:
        key = changed[0]
        raise UserError(
            f"--out={folder} contains results with {key}={before.get(key)!r}, but {key} is {protocol.get(key)!r} now. Use "
            f"the earlier value of {key}, or choose another folder."
        )


def image_path(folder: Path, number: int) -> Path:
    """Return the path of an image in `folder`. `number`: index of its request (caption) in the list of requests."""
    return folder / f"{number:06d}.png"


def draw_missing(
    trained: TrainedModel,
    requests: Sequence[Request],
    settings: SamplingSettings,
    scheduler: str,
    folder: Path,
    ranks: Ranks,
    report: Reporter,
) -> int:
    """Draw this rank's share of the images, except those that are in `folder` already, and write them as PNG files.

    Returns how many images this rank has drawn.

    Args:
        trained: the model to sample from.
        requests: captions with size and seed, for the images of all ranks.
        settings: how images are sampled: steps, guidance scale, batch size.
        scheduler: name of the scheduler, as for `make_scheduler`.
        folder: the folder for the images; it is created if it is missing.
        ranks: this rank and the number of ranks.
        report: called after each batch with a line of progress, the number (from 1) of the batch's last image in `requests`,
            and the number of all requests.
    """
    folder.mkdir(parents=True, exist_ok=True)
    existing = {path.name for path in folder.iterdir()}
    count = 0
    batches = draw_share(
        trained.sampler,
        requests,
        lambda: make_scheduler(trained.config.diffusion, scheduler),
        settings,
        ranks,
        is_selected=lambda number: image_path(folder, number).name not in existing,
    )
    for batch in batches:
        for number, pixels in batch:
            with atomic_path(image_path(folder, number)) as temporary:
                Image.fromarray(pixels).save(temporary, format="PNG")
        count += len(batch)
        report(f"{folder.name}: image {batch[-1][0] + 1} of {len(requests)}", batch[-1][0] + 1, len(requests))
    return count


def read_image(path: Path) -> np.ndarray:
    """Read an image file, uint8 [H, W, 3]. Raises UserError if it cannot be read."""
    try:
        return np.array(decode_image(path.read_bytes()))
    except Exception as error:  # image decoders raise nearly any exception
        raise UserError(
            f"{path} cannot be read as an image ({reason_of(error)}). Delete the file; if the evaluation drew it, the next "
            "start draws it again."
        ) from None
