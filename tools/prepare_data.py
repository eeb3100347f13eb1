"""Prepare training data: `prepare_data.py SOURCE --out SHARDS`.

SOURCE is a folder of images with captions (a .txt or .json for each image, metadata.jsonl, a CSV, a Hugging Face `datasets`
folder) or webdataset shards. Each image is decoded once and gets an edge map (HED, or Canny without HED's weights). With
--features, latents and tokens are added for data.features=stored. Finished shards are not written again. Several processes
divide the shards by --part and --parts, as in slurm/prepare_data.sh, or by the ranks of mpirun and srun.

Without --out, the feature cache of a run is filled: `prepare_data.py --config C data.shards=...`
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import checkout  # noqa: F401 (before the package)
from raphael_dist.cli.common import Parser
from raphael_dist.config.schema import Config, load_config
from raphael_dist.errors import UserError, did_you_mean, run_command

_OVERRIDE = re.compile(r"[a-z_]+\.[a-z_]+=")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        description=__doc__,
        raw=True,
        example="python -m raphael_dist prepare data/emoji-demo/val-0000.tar --out shards",
        usage="%(prog)s SOURCE --out DIR [options]",
    )
    parser.add_argument(
        "words", nargs="*", metavar="SOURCE | section.key=value", help="image folder or shards; settings as for training"
    )
    parser.add_argument("--out", type=Path, help="output folder for the shards")
    parser.add_argument(
        "--edges",
        default="auto",
        help="edge maps: hed, canny, stored (keep existing ones), none; auto: hed if installed, otherwise canny",
    )
    parser.add_argument(
        "--features", action="store_true", help="also store latents and tokens, made with the encoders of --config"
    )
    parser.add_argument("--caption", help="column or field with the captions, if it has an unusual name")
    parser.add_argument("--per-shard", type=int, default=1000, help="number of images per shard, for an image folder")
    parser.add_argument("--held-out", type=float, default=0.0, help="share of samples for validation, for example 0.02")
    parser.add_argument("--config", help="preset or YAML file of the run: encoders, image sizes, cache")
    parser.add_argument("--part", type=int, help="number of this part of the work, from 0")
    parser.add_argument("--parts", type=int, help="number of parts")
    args = parser.parse_intermixed_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Prepare shards; without --out fill the feature cache of a run. UserError: mistakes that the user can correct."""
    from raphael_dist.data_prep.prepare import EDGES, prepare, select_part

    sources = [word for word in args.words if not _OVERRIDE.match(word)]
    if args.out is None and sources:
        raise UserError(f"--out is required for SOURCE={sources[0]}. Add `--out DIR`, the output folder for the shards.")
    if args.config is None and (args.features or args.out is None):
        raise UserError(
            "--config is required with --features and without --out. Add `--config CONFIG`, the preset or YAML file of the "
            "run."
        )
    config = load_config(args.config or "emoji-tiny", [word for word in args.words if _OVERRIDE.match(word)])
    part, parts = select_part(args.part, args.parts)
    if args.out is None:
        return fill(config, part, parts)
    if not sources:
        raise UserError("SOURCE is required with --out. Add a folder of images or shards, for example 'shards/*.tar'.")
    if args.edges not in EDGES:
        raise UserError(
            f"--edges={args.edges} must be one of {', '.join(EDGES)}{did_you_mean(args.edges, EDGES)}. Use e.g. "
            "--edges=auto."
        )
    if args.per_shard < 1 or not 0 <= args.held_out <= 0.5:
        raise UserError(
            f"--per-shard={args.per_shard} must be at least 1, and --held-out={args.held_out} must be from 0 to 0.5. "
            "Use e.g. --per-shard=1000 --held-out=0.02."
        )
    prepare(
        sources, args.out, config, edges=args.edges, features=args.features, caption=args.caption,
        per_shard=args.per_shard, held_out=args.held_out, part=part, parts=parts,
    )  # fmt: skip
    return None


def fill(config: Config, part: int, parts: int) -> None:
    """Encode this process's share of a run's samples into the feature cache: share number `part` (from 0) of `parts`."""
    from raphael_dist.data.shards.open_index import require_shards
    from raphael_dist.data_prep.prepare import fill_caches

    require_shards(config)
    fill_caches(config, part, parts)


if __name__ == "__main__":
    sys.exit(main())
