"""Makes training data of what you have: `prepare_data.py SOURCE --out SHARDS`.

SOURCE is a folder of pictures with captions (a .txt or .json beside each, metadata.jsonl, a CSV, a Hugging Face `datasets`
folder) or webdataset shards. Every picture is decoded once, edge maps are added (HED, or Canny without its weights), with
--features latents and tokens too, for data.features=stored. What is done is not done again. Several processes divide the
shards: --part and --parts, as slurm/prepare_data.sh gives them, or the ranks of mpirun and srun.

Without --out it fills the feature cache of a run instead: `prepare_data.py --config C data.shards=...`
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import checkout  # noqa: F401 (before the package)
from raphael_dist.config import Config, load_config
from raphael_dist.errors import UserError, exit_code_of

_OVERRIDE = re.compile(r"[a-z_]+\.[a-z_]+=")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="SOURCE | section.key=value", help="what to prepare; as for training")
    parser.add_argument("--out", type=Path, help="folder for the shards")
    parser.add_argument("--edges", default="auto", help="auto, hed, canny, stored (those that are there), none")
    parser.add_argument("--features", action="store_true", help="latents and tokens too, by the encoders of --config")
    parser.add_argument("--caption", help="the column or field with the captions, where it has no usual name")
    parser.add_argument("--per-shard", type=int, default=1000, help="pictures of a folder that go into one shard")
    parser.add_argument("--held-out", type=float, default=0.0, help="share of a folder's pictures for validation, e.g. 0.02")
    parser.add_argument("--config", help="as for training: whose encoders and image sizes to use, or whose cache to fill")
    parser.add_argument("--part", type=int, help="which part of the work, from 0")
    parser.add_argument("--parts", type=int, help="number of parts")
    args = parser.parse_intermixed_args(argv)
    return exit_code_of(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Do what the command line says. Raises UserError for what the user can fix."""
    from raphael_dist.prepare.run import EDGES, my_part, prepare

    sources = [word for word in args.words if not _OVERRIDE.match(word)]
    if args.out is None and sources:
        raise UserError(f"--out: missing; give the folder that the shards of {sources[0]} go to")
    if args.config is None and (args.features or args.out is None):
        raise UserError("--config: none given; name the preset or YAML file of the run that is to be prepared for")
    config = load_config(args.config or "emoji-tiny", [word for word in args.words if _OVERRIDE.match(word)])
    part, parts = my_part(args.part, args.parts)
    if args.out is None:
        return fill(config, part, parts)
    if not sources:
        raise UserError("SOURCE: missing; give a folder of pictures or shards, e.g. 'shards/*.tar'")
    if args.edges not in EDGES:
        raise UserError(f"--edges: given {args.edges!r}; allowed: {', '.join(EDGES)}")
    if args.per_shard < 1 or not 0 <= args.held_out <= 0.5:
        raise UserError(f"--per-shard {args.per_shard} must be at least 1, --held-out {args.held_out} from 0 to 0.5")
    prepare(
        sources, args.out, config, edges=args.edges, features=args.features, caption=args.caption,
        per_shard=args.per_shard, held_out=args.held_out, part=part, parts=parts,
    )  # fmt: skip
    return None


def fill(config: Config, part: int, parts: int) -> None:
    """Fill the feature cache of a run."""
    if not config.data.shards and not config.data.sources:
        raise UserError("data.shards: none given; e.g. data.shards='data/emoji/train-*'")
    from raphael_dist.prepare.run import fill_caches

    fill_caches(config, part, parts)


if __name__ == "__main__":
    sys.exit(main())
