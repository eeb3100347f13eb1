"""The emoji benchmark: `python tools/emoji_benchmark.py --checkpoint RUN_DIR --out FOLDER`. It downloads nothing.

The model draws things ("red heart") in drawing styles ("noto"), for pairs of thing and style that were held out from
training. The tool compares the images with the real emoji and prints a table. The ranks of a launcher divide the work. The
same command continues a benchmark that was stopped.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import checkout  # noqa: F401 (before the package)
from raphael_dist.cli.common import Parser
from raphael_dist.cli.evaluate import add_common_arguments, check_arguments, drawing_settings, protocol_of
from raphael_dist.errors import UserError, run_command
from raphael_dist.text import escape_control


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line `argv`; a mistake in it ends the process with exit code 2."""
    parser = Parser(
        prog="emoji_benchmark.py",
        example="python tools/emoji_benchmark.py --checkpoint models/emoji --out runs/emoji-benchmark",
        usage="%(prog)s --checkpoint PATH --out DIR [options]",
        description="Draw things in styles (red heart, noto) that training did not combine; compare with the real emoji.",
    )
    add_common_arguments(parser)
    parser.add_argument("--shards", nargs="+", help="training images (default: data.shards of the run)")
    parser.add_argument("--val-shards", nargs="+", help="held-out images (default: data.val_shards of the run)")
    parser.add_argument("--per-pair", type=int, default=1, help="images of each pair of thing and style (default 1)")
    parser.set_defaults(study="emoji")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the command line `argv` (None: that of the process); return the exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Run this rank's part of the emoji benchmark. Collective.

    This function starts no ranks. A launcher such as torchrun starts them, and all of them must call this function. Without
    a launcher there is one rank. Raises UserError for mistakes that the user can correct.
    """
    check_arguments(args)
    if args.guidance and len(args.guidance) > 1:
        raise UserError(
            f"--guidance {' '.join(map(str, args.guidance))} must be one value for the emoji benchmark. Leave out the "
            "others."
        )

    from emoji_data.benchmark import Benchmark, run_benchmark
    from raphael_dist.evaluation.draw import record_protocol
    from raphael_dist.runtime.ranks import raise_on_all_ranks
    from raphael_dist.sampling.load_model import open_model

    with open_model(args.checkpoint, args.weights) as (trained, ranks):
        settings, scheduler, default = raise_on_all_ranks(lambda: drawing_settings(args, trained))
        data = trained.config.data
        shards, val_shards = args.shards or list(data.shards), args.val_shards or list(data.val_shards)
        guidance = args.guidance[0] if args.guidance else settings.guidance
        own = {"guidance": guidance, "shards": shards, "val_shards": val_shards, "per_pair": args.per_pair}
        raise_on_all_ranks(lambda: record_protocol(args.out, protocol_of(args, trained, **own)) if ranks.is_main else None)
        settings = replace(settings, guidance=guidance)
        options = ("--shards" if args.shards else "data.shards", "--val-shards" if args.val_shards else "data.val_shards")
        benchmark = Benchmark(shards, val_shards, default, settings, scheduler, args.per_pair, args.out, options)
        table = run_benchmark(trained, benchmark, ranks)
        if ranks.is_main:
            print(escape_control(table, keep="\n"))


if __name__ == "__main__":
    sys.exit(main())
