"""A look at training data: `inspect_data.py SHARDS --out sheet.png [section.key=value]`.

Says what the samples hold, what is not usable and why, which pictures look alike, how captions are, and how many samples
each image size gets of those that data.filters keep; draws a sheet of pictures with their edge maps and captions.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import checkout  # noqa: F401 (before the package)
from raphael_dist.config import load_config
from raphael_dist.errors import UserError, exit_code_of

_OVERRIDE = re.compile(r"[a-z_]+\.[a-z_]+=")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="SHARDS | section.key=value", help="tars, patterns, a folder of tars")
    parser.add_argument("--out", type=Path, help="where the sheet goes, a PNG; without one there is none")
    parser.add_argument("--count", type=int, default=1000, help="samples that are read and decoded, spread evenly")
    parser.add_argument("--pictures", type=int, default=24, help="pictures on the sheet")
    parser.add_argument("--config", default="emoji-tiny", help="whose image.buckets and choice of captions to use")
    args = parser.parse_intermixed_args(argv)
    return exit_code_of(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Look and tell. Raises UserError for what the user can fix."""
    config = load_config(args.config, [word for word in args.words if _OVERRIDE.match(word)])
    shards = [word for word in args.words if not _OVERRIDE.match(word)] or list(config.data.shards)
    if not shards:
        raise UserError("SHARDS: missing; give tars, patterns, or a folder of tars")
    if args.count < 1 or args.pictures < 1:
        raise UserError(f"--count {args.count} and --pictures {args.pictures} must be at least 1")
    from raphael_dist.data.captions import CaptionChoice
    from raphael_dist.data.dataset import ImageDataset
    from raphael_dist.data.shards import build_index, expand_shards
    from raphael_dist.data.view import columns_of, open_view
    from raphael_dist.prepare.inspect import buckets_of, lines, look
    from raphael_dist.prepare.sheet import contact_sheet

    patterns = [str(Path(shard) / "*.tar") if Path(shard).is_dir() else shard for shard in shards]
    choice = CaptionChoice(config.data.caption_from, tuple(sorted(config.data.caption_weights.items())))
    with TemporaryDirectory() as folder:
        index = build_index(expand_shards(patterns), Path(folder), columns=columns_of(config.data.filters))
        view = open_view(index, config.image.buckets, config.data.filters)
        dataset = ImageDataset(index, config.image.buckets, "auto", captions=choice)
        found = look(dataset, buckets_of(dataset).tolist(), args.count, args.pictures)
        for line in lines(found, dataset, view):
            print(line)
    if args.out is not None and found.sheet:
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            contact_sheet(found.sheet).save(args.out, "PNG")
        except OSError as error:
            raise UserError(f"--out: cannot write {args.out}: {error.strerror or error}") from error
        print(f"the sheet: {args.out}")


if __name__ == "__main__":
    sys.exit(main())
