"""Command line: `python -m raphael_dist doctor RUN` lists the problems of a run and what to do about them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raphael_dist.cli.common import Parser, command
from raphael_dist.errors import UserError
from raphael_dist.text import escape_control, hide_secrets_in_text, print_line

if TYPE_CHECKING:
    from raphael_dist.reporting.run_facts import Examined

FOUND = 1  # exit code if there are problems


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of the command `doctor`. On a mistake, argparse ends the process with exit code 2."""
    parser = Parser(
        prog="raphael_dist doctor",
        example="python -m raphael_dist doctor runs/demo  # after `make demo`",
        description="List the problems of a run, in progress or ended, and what to do. Exit code 1: there are problems, 0: "
        "there are none.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--bundle", type=Path, metavar="FILE", help="also write a .tar.gz for a bug report, without secrets")
    parser.add_argument("--no-data", action="store_true", help="do not check samples of the training data")
    add_cluster(parser)
    return parser.parse_args(argv)


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """Add the option `--cluster`, which names the devices for which speed and memory are predicted."""
    parser.add_argument(
        "--cluster", default="auto", metavar="NAME",
        help="also predict speed and memory on these devices: h100x8, cpu, ..., or a YAML file; none: no prediction "
        "(default: cpu, for runs on CPUs)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the problems of the run `args.run`, and write an archive for a bug report if --bundle is given.

    Returns the exit code: 1 (FOUND) if there are problems, else 0. Raises UserError for mistakes that the user can correct.
    """
    if args.bundle is not None and not args.bundle.name.endswith((".tar.gz", ".tgz")):
        raise UserError(f"--bundle {args.bundle} must end in .tar.gz. Use, for example, --bundle bug.tar.gz.")
    from raphael_dist.reporting.bundle import write_bundle
    from raphael_dist.reporting.run_facts import NO_PLAN, examine

    # Only the bundle shows the plan, which takes a while to trace.
    examined = examine(args.run, args.cluster if args.bundle else NO_PLAN, with_data=not args.no_data)
    text = "".join(escape_control(hide_secrets_in_text(line)) + "\n" for line in describe(examined))
    print(text, end="")
    if args.bundle is not None:
        names = write_bundle(examined, text, args.bundle)
        print_line(f"bundle: {args.bundle} ({len(names)} files); read it before you publish it")
    return FOUND if examined.findings else 0


def describe(examined: "Examined") -> list[str]:
    """Return the lines to print about an examined run: its state, its problems, and what was checked."""
    from raphael_dist.reporting.run_events import ending

    lines = [f"{examined.run.folder}: {ending(examined.run, examined.history, examined.now)}"]
    for number, finding in enumerate(examined.findings, 1):
        lines.append(f"{number}. {finding}")
    if not examined.findings:
        lines.append("No problem was found.")
    lines.append(f"Checked: {', '.join(examined.looked_at)}.")
    if examined.not_looked_at:
        lines.append(f"Not checked, since the run directory has no data about it: {', '.join(examined.not_looked_at)}.")
    return [*lines, *examined.notes]


main = command(parse, run)
