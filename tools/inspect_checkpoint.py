"""Inspect a checkpoint: `python tools/inspect_checkpoint.py runs/demo`.

Exit codes:
0: the checkpoint is intact;
1: the checkpoint is damaged, or experts are dead (all weights are zero), identical, or have NaN or infinity;
2: the path is not a checkpoint, or the headers of its files are damaged.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import checkout  # noqa: F401 (before the package)
from raphael_dist.cli.common import Parser
from raphael_dist.errors import run_command


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line `argv`; a mistake in it ends the process with exit code 2."""
    parser = Parser(
        example="python -m raphael_dist inspect models/emoji",
        description="Print a checkpoint's layout and contents, verify its checksums, and list dead or equal experts.",
    )
    parser.add_argument("path", type=Path, help="checkpoint in any layout, or run directory")
    parser.add_argument("--config", help="preset or YAML file of the model; required for a folder that DeepSpeed wrote")
    parser.add_argument(
        "--unpickle", action="store_true", help="also read the weights of .pt files that have no checksum in a manifest"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the command line `argv` (None: that of the process); return the exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        from raphael_dist.config.schema import load_config
        from raphael_dist.convert.inspect_checkpoint import open_for_inspection, show

        config = load_config(args.config) if args.config else None
        return int(not show(open_for_inspection(args.path, args.unpickle, config)))

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
