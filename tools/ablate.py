"""Train a model and variants of it, and compare their losses: `python tools/ablate.py --out runs/ablation`.

A variant lacks a part of the model, or is a dense model of equal size. All these training runs together are a campaign. The
same command continues a campaign that was stopped. docs/evaluation.md describes the variants and the comparison.
"""

import argparse
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import checkout  # noqa: F401 (before the package)
from raphael_dist.cli.common import Once, Parser
from raphael_dist.errors import UserError, run_command
from raphael_dist.runtime.stop_request import parse_time


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line `argv`; a mistake in it ends the process with exit code 2."""
    parser = Parser(
        example="python tools/ablate.py --config emoji-tiny --out runs/ablation --images 19200",
        description="Train a model, variants of it without one part each, and dense models of equal size; compare losses.",
    )
    parser.add_argument("--config", default="emoji-tiny", action=Once, help="preset or YAML file of the full model")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder of runs and results")
    parser.add_argument(
        "--variants",
        default="main",
        help="names of variants or groups of variants (see --list), separated by commas; NAME:N: train with N seeds",
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds of each other variant (default 3)")
    parser.add_argument("--images", type=int, help="images to train on (default: train.max_steps x train.global_batch_size)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of each run (default 1)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default 1)")
    parser.add_argument(
        "--max-time", metavar="TIME", help="save and stop after this time, as in train.py; the same command continues"
    )
    parser.add_argument("--benchmark", action="store_true", help="run the emoji benchmark after each run")
    parser.add_argument(
        "--read",
        metavar="SOURCE",
        help="also sample images for captions with quoted text, and score the text in them by OCR; SOURCE: captions, as for "
        "evaluate text --captions",
    )
    parser.add_argument("--list", action="store_true", help="list the variants with their sizes and exit")
    parser.add_argument("--table", action="store_true", help="write the results of finished runs and exit")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of all runs, as for train.py")
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> None:
    """Train all variants of the campaign; with --list or --table only print its variants or results.

    Raises UserError for mistakes that the user can correct.
    """
    for name in ("seeds", "images", "ranks", "jobs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} must be at least 1. Give a larger number.")
    if missing := [name for name in ("matplotlib", "scipy") if find_spec(name) is None]:
        raise UserError(
            f"the campaign requires the package {missing[0]}, but it is not installed. "
            "Run `pip install 'raphael_dist[eval]'`."
        )
    from ablations import campaign, table, variants
    from ablations.show import show

    base = variants.read_base(args.config, args.overrides)
    chosen = variants.choose(base, args.variants.split(","), args.seeds, args.images)
    plan = campaign.Campaign(args.out, base, chosen, args.images, args.ranks, args.benchmark, args.read, args.jobs)
    if args.list:
        print(table.listing(plan))
        return
    if args.table:
        campaign.record_protocol(args.out, plan.protocol())
    else:
        with campaign.lock(plan), campaign.time_limit(None if args.max_time is None else parse_time(args.max_time)):
            campaign.run_all(plan, lambda line: print(line, flush=True), lambda: show(plan, figures=False))
    print(show(plan))


def main(argv: list[str] | None = None) -> int:
    """Run the tool with the command line `argv` (None: that of the process); return the exit code.

    SIGTERM is treated as Ctrl-C, so that training processes save and end too.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # also ends the training processes
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return run_command(lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
