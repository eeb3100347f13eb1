"""Command line: `python -m raphael_dist report RUN [RUN2 ...] --out FILE.html` writes an HTML report about runs."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from raphael_dist.cli.common import Parser, command
from raphael_dist.cli.doctor import add_cluster
from raphael_dist.errors import UserError
from raphael_dist.text import print_line


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of the command `report`. On a mistake, argparse ends the process with exit code 2."""
    parser = Parser(
        prog="raphael_dist report",
        example="python -m raphael_dist report runs/demo --out report.html  # after `make demo`",
        description="Write a report of one or more runs as one HTML file, which needs no server and no network: curves, "
        "speed, samples, routes, experts, memory, faults, configuration.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories; the first is the reference")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="the file to write")
    add_cluster(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Write an HTML report about the runs `args.runs` to the file `args.out`. Raises UserError for mistakes of the user."""
    if args.out.suffix != ".html":
        raise UserError(f"--out={args.out} must end in .html. Use, for example, --out report.html.")
    from raphael_dist.reporting.page import build_page
    from raphael_dist.reporting.run_facts import examine
    from raphael_dist.storage.files import replace_bytes

    examined = [examine(folder, args.cluster, with_data=False) for folder in args.runs]
    for one_run in examined:
        if not one_run.run.series:
            raise UserError(
                f"RUN={one_run.run.folder}: a report requires metrics.jsonl with at least one line, but the run has no "
                "such line. Train for at least train.log_every steps, or run "
                f"`python -m raphael_dist doctor {shlex.quote(str(one_run.run.folder))}`."
            )
    page = build_page(examined).encode()
    try:
        replace_bytes(args.out, page)
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written: {error.strerror or error}. Choose another file.") from None
    print_line(f"report: {args.out} ({len(page) / 1e6:.1f} MB)")


main = command(parse, run)
