"""Command line: `torchrun --nproc_per_node 2 -m raphael_dist prove --out DIR` checks an installation in about ten minutes.

Exit codes: 0 all checks passed; 2 the environment does not allow training; 3 a check computed wrong numbers.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from raphael_dist.cli.common import Parser, add_config, command
from raphael_dist.config.schema import load_config
from raphael_dist.errors import EXIT_USER_ERROR, HungError, UserError
from raphael_dist.text import print_line

DEFAULT_CONFIG = "emoji-tiny"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of the command `prove`. On a mistake, argparse ends the process with exit code 2."""
    parser = Parser(
        prog="raphael_dist prove",
        example="torchrun --nproc_per_node 2 -m raphael_dist prove --out proof",
        description="Check environment, network, gradients, checkpoints and speed on the ranks of a launcher. Write "
        "report.json and report.html. A second call repeats only the checks that did not pass.",
        epilog=f"--config is used in the checks of speed, memory and data (default: {DEFAULT_CONFIG}, without data).",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the report, which all nodes share"
    )
    add_config(parser)
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> int:
    """Check network, gradients, checkpoints and speed on this rank of a launcher.

    Args:
        args: parsed arguments of the command `prove`.

    Returns:
        The exit code: 0 if all checks passed, 2 if the environment does not allow training, 3 if a check computed wrong
            numbers.

    Raises:
        UserError: a mistake that the user can correct.
    """
    config = load_config(args.config or DEFAULT_CONFIG, args.overrides)
    if args.config is None:  # no data is needed, and checkpoints are those of the checks
        data = config.data.model_copy(update={"shards": ()})
        config = config.model_copy(update={"data": data, "run": config.run.model_copy(update={"dir": args.out.absolute()})})
    from raphael_dist.cluster.prove_agent import prove

    try:
        return prove(config, args.out.absolute())
    except HungError as error:  # the process that supervises the checks of a rank (its agent) is missing
        print_line(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except OSError as error:
        raise UserError(f"--out={args.out} cannot be used: {error.strerror or error}. Choose another folder.") from None


main = command(parse, run)
