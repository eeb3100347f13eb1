"""Command line: `python -m raphael_dist.lora --run RUN_DIR --out FOLDER` writes a run's adapters as peft reads them.

Merging them into a full checkpoint is tools/convert_checkpoint.py --lora; drawing with them raphael_dist.sample --lora.
"""

import argparse
import sys
from collections.abc import Sequence

from raphael_dist.command_line import parse_export
from raphael_dist.errors import exit_code_of


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse_export("lora", "LoRA adapters", "as peft reads them", sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Write the folder. Raises UserError for what the user can fix."""
    from raphael_dist.checkpoint.reader import open_newest
    from raphael_dist.convert.adapter import adapter_of, write_adapter

    reader = open_newest(args.run)
    config, adapter = reader.config(), adapter_of(reader, args.weights, "--run")
    write_adapter(adapter, config.lora, str(config.run.init_from), args.out)
    numbers = sum(a.numel() + b.numel() for a, b in adapter.factors.values())
    print(f"{args.out}: {numbers:,} numbers beside {len(adapter.factors)} parameters of {config.run.init_from}")


if __name__ == "__main__":
    sys.exit(main())
