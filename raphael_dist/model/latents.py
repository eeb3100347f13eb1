"""The downsampling factor of an image encoder, read from its configuration file.

This module does not import torch, so that `--plan` starts fast.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raphael_dist.text import read_json

USUAL_FACTOR = 8  # of Stable Diffusion's autoencoders
_DEFAULT_LEVELS = {"AutoencoderTiny": 4, "AutoencoderDC": 6}  # where a configuration omits them; 1 for other classes


def latent_factor(encoder: str) -> int:
    """Return by how much an image encoder reduces height and width: image size divided by latent size.

    `encoder`: the setting image.vae, the folder of an autoencoder or "none". The result is 1 for "none", and 8 if the folder
    has no configuration file that can be read.
    """
    if encoder == "none":
        return 1
    folder = Path(encoder).expanduser()
    for path in (folder / "vae" / "config.json", folder / "config.json"):
        try:
            return downscale_factor(read_json(path))
        except (OSError, ValueError, TypeError, AttributeError):
            continue
    return USUAL_FACTOR


def downscale_factor(config: Mapping[str, Any]) -> int:
    """Return by how much an autoencoder reduces height and width: by a factor of 2 from each level to the next.

    `config`: the content of the autoencoder's config.json, which lists its levels. With 4 levels the result is 8.
    """
    levels = config.get("encoder_block_out_channels") or config.get("block_out_channels")
    count = len(levels) if levels else _DEFAULT_LEVELS.get(str(config.get("_class_name")), 1)
    return int(2 ** (count - 1))
