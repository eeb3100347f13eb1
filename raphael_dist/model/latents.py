"""How many pixels wide a latent is, by the image encoder's configuration file alone: `--plan` asks, without torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

USUAL_FACTOR = 8  # of Stable Diffusion's autoencoders


def latent_factor(encoder: str) -> int:
    """Return the pixels to a latent's side for a value of `image.encoder`; USUAL_FACTOR where its file cannot be read."""
    if encoder == "none":
        return 1
    folder = Path(encoder).expanduser()
    for path in (folder / "vae" / "config.json", folder / "config.json"):
        try:
            return factor_of(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError, AttributeError):
            continue
    return USUAL_FACTOR


def factor_of(config: Mapping[str, Any]) -> int:
    """Return the pixels to a latent's side for the configuration of an AutoencoderKL, which halves them between levels."""
    return int(2 ** (len(config.get("block_out_channels", (64,))) - 1))  # left out, diffusers' default holds: one level
