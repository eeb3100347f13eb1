"""Command line: `python -m raphael_dist.lora --run RUN_DIR --out FOLDER` writes a run's adapters as peft reads them.

Merging them into a full checkpoint is tools/convert_checkpoint.py --lora; drawing with them raphael_dist.sample --lora.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from raphael_dist.errors import exit_code_of


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments; argparse exits with 2 on a mistake."""
    parser = argparse.ArgumentParser(prog="raphael_dist.lora", description="Write a run's LoRA adapters as peft reads them.")
    parser.add_argument("--run", type=Path, required=True, help="a run that trained adapters, or one of its step-* folders")
    parser.add_argument("--out", type=Path, required=True, help="the new folder")
    parser.add_argument("--weights", choices=("ema", "master"), default="ema", help="averaged adapters, or the last ones")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
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
