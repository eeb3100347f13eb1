"""Command line: `python -m raphael_dist.control --run RUN_DIR --out FOLDER` writes a run's control in diffusers' layout.

Drawing with it is raphael_dist.sample --control PICTURE --control-from RUN_DIR, or the folder.
"""

import argparse
import sys
from collections.abc import Sequence

from raphael_dist.command_line import parse_export
from raphael_dist.errors import exit_code_of


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse_export("control", "control", "in diffusers' layout", sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Write the folder. Raises UserError for what the user can fix."""
    from raphael_dist.checkpoint.reader import open_newest
    from raphael_dist.convert.control import values_of, write_control

    reader = open_newest(args.run)
    values = values_of(reader, args.weights)
    write_control(values, reader.config(), args.out)
    print(f"{args.out}: {sum(v.numel() for v in values.values()):,} numbers beside {reader.config().run.init_from}")


if __name__ == "__main__":
    sys.exit(main())
