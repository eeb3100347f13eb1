"""Convert a checkpoint between layouts (docs/checkpoints.md); `mpirun -n 4 python tools/convert_checkpoint.py` shares it.

python tools/convert_checkpoint.py --from auto runs/demo --to diffusers exported
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import checkout  # noqa: F401 (before the package)
from raphael_dist.convert.layouts import names
from raphael_dist.errors import UserError, exit_code_of


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments; argparse exits with 2 on a mistake."""
    parser = argparse.ArgumentParser(
        description="Convert a checkpoint between layouts.", epilog=f"layouts: {', '.join(names())}"
    )
    pair = {"nargs": 2, "required": True, "metavar": ("LAYOUT", "PATH")}
    parser.add_argument("--from", dest="source", help="what to read; LAYOUT may be auto", **pair)  # type: ignore[arg-type]
    parser.add_argument("--to", dest="target", help="what to write; PATH must not exist", **pair)  # type: ignore[arg-type]
    parser.add_argument(
        "--ep", default="1,1", metavar="S,T", help="of layouts with files per rank: ranks per set of space, time experts"
    )
    parser.add_argument("--world", type=int, default=1, help="of layouts with files per rank: how many ranks (default 1)")
    parser.add_argument(
        "--zero", type=int, default=1, choices=(0, 1, 2, 3), help="of layouts with files per rank: ZeRO stage (default 1)"
    )
    parser.add_argument("--weights", choices=("ema", "master"), help="of layouts that hold one kind (default: ema if there)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of layouts of weights alone")
    parser.add_argument("--config", help="preset or YAML: the model to upcycle to, or of a folder that DeepSpeed wrote")
    parser.add_argument(
        "--prediction", choices=("epsilon", "v_prediction"), help="what a U-Net predicts, where no scheduler beside it says"
    )
    parser.add_argument(
        "--lora", type=Path, metavar="PATH", help="merge adapters in: peft's folder, or a run that trained them"
    )
    parser.add_argument("--lora-scale", type=float, default=1.0, help="how much of them (default 1)")
    parser.add_argument("--unet-only", action="store_true", help="of a pipeline: leave out encoders and scheduler")
    parser.add_argument(
        "--text-by-name", action="store_true", help="of a pipeline: name a text encoder that ships in a package, not copy it"
    )
    parser.add_argument("--license", default="unknown", help="of a pipeline: what its model card says, e.g. apache-2.0")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Convert and print the table. Raises UserError for what the user can fix; under mpirun rank 0 alone speaks."""
    from raphael_dist.config import load_config
    from raphael_dist.convert.command import options_of, print_report
    from raphael_dist.convert.mpi import MpiRanks
    from raphael_dist.convert.run import convert

    ranks = MpiRanks()
    try:
        config = load_config(args.config) if args.config else None
        switches = (args.unet_only, args.text_by_name)
        options = options_of(args.target[0], args.ep, args.world, args.zero, args.weights, args.dtype, *switches)
        options = replace(options, prediction=args.prediction, licence=args.license)
        (source, path), (target, out) = args.source, args.target
        report = convert(source, Path(path), target, Path(out), options, config, ranks, args.lora, args.lora_scale)
    except UserError:
        if not ranks.is_main:
            sys.exit(2)
        raise
    if ranks.is_main:
        print_report(report, path, out)


if __name__ == "__main__":
    sys.exit(main())
