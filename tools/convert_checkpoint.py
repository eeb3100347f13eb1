"""Convert a checkpoint between layouts, or export adapters (docs/checkpoints.md, docs/adapters.md).

python tools/convert_checkpoint.py --from auto runs/demo --to diffusers exported
mpirun -n 4 python tools/convert_checkpoint.py ...                              # divides the files over 4 processes
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import checkout  # noqa: F401 (before the package)
from raphael_dist.cli.common import Parser
from raphael_dist.convert.layouts import ADAPTER_FORMATS, layout_of, names
from raphael_dist.errors import UserError, run_command
from raphael_dist.text import escape_control, print_line

if TYPE_CHECKING:
    from raphael_dist.convert.conversion import ConversionReport
    from raphael_dist.convert.mpi_ranks import MpiRanks
    from raphael_dist.convert.write_plan import Options


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line `argv`; a mistake in it ends the process with exit code 2."""
    formats = "; ".join(f"{name}: {what}" for name, what in ADAPTER_FORMATS.items())
    parser = Parser(
        example="python -m raphael_dist convert --from auto models/emoji --to canonical weights",
        usage="%(prog)s --from LAYOUT PATH --to LAYOUT PATH [options]",
        description="Convert a checkpoint between layouts, or export what was trained on top of a frozen base model.",
        epilog=f"Layouts are {', '.join(names())}. Only for --to: {formats}.",
    )
    parser.add_argument(
        "--from",
        dest="source",
        nargs=2,
        required=True,
        metavar=("LAYOUT", "PATH"),
        help="checkpoint to read; LAYOUT auto: detect the layout",
    )
    parser.add_argument(
        "--to",
        dest="target",
        nargs=2,
        required=True,
        metavar=("LAYOUT", "PATH"),
        help="checkpoint to write; PATH must not exist",
    )
    ranks = parser.add_argument_group("layouts with files per rank")
    ranks.add_argument(
        "--ep", default="1,1", metavar="S,T", help="numbers of ranks over which space and time experts are sharded, e.g. 2,1"
    )
    ranks.add_argument("--world", type=int, default=1, help="number of ranks (default 1)")
    ranks.add_argument("--zero", type=int, default=1, choices=(0, 1, 2, 3), help="ZeRO stage (default 1)")
    weights = parser.add_argument_group("layouts that hold weights only")
    weights.add_argument("--weights", choices=("ema", "master"), help="weights to write (default: ema if present)")
    weights.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="data type of the weights (default float32)"
    )
    model = parser.add_argument_group("the model")
    model.add_argument(
        "--config", help="preset or YAML file: the model to upcycle a dense model to, or the model in a DeepSpeed folder"
    )
    model.add_argument(
        "--prediction",
        choices=("epsilon", "v_prediction"),
        help="what the U-Net predicts, if the checkpoint has no scheduler file that states it",
    )
    model.add_argument(
        "--lora", type=Path, metavar="PATH", help="merge these LoRA adapters: a peft folder, or a run that trained them"
    )
    model.add_argument("--lora-scale", type=float, default=1.0, help="factor of the LoRA adapters (default 1)")
    pipeline = parser.add_argument_group("diffusers pipelines")
    pipeline.add_argument(
        "--unet-only", action="store_true", help="export only the U-Net, without VAE, text encoder and scheduler"
    )
    pipeline.add_argument(
        "--text-by-name",
        action="store_true",
        help="for a text encoder whose weights a Python package contains: store its name instead of its weights",
    )
    pipeline.add_argument("--license", default="unknown", help="license in the model card, e.g. apache-2.0")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the command line `argv` (None: that of the process); return the exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Convert as the options say, and print what was written. Raises UserError for mistakes that the user can correct.

    Under mpirun only rank 0 prints.
    """
    from raphael_dist.convert.mpi_ranks import MpiRanks

    ranks = MpiRanks()
    try:
        if args.target[0] in ADAPTER_FORMATS:
            ranks.main_only(lambda: export(args))
        else:
            convert_layout(args, ranks)
    except UserError:
        if not ranks.is_main:
            sys.exit(2)
        raise


def export(args: argparse.Namespace) -> None:
    """Export LoRA adapters or a ControlNet in the format of another library, as the options say."""
    from raphael_dist.convert.adapter_export import export_adapter

    (source, path), (target, out) = args.source, args.target
    check_options(args, frozenset({"weights"}))
    for option, value in (("--config", args.config), ("--prediction", args.prediction), ("--lora", args.lora)):
        if value is not None:
            raise UserError(
                f"--to {target} does not support the option {option}, but {option} {value} is given. Leave out {option}."
            )
    print_line(export_adapter(source, Path(path), target, Path(out), args.weights))


def convert_layout(args: argparse.Namespace, ranks: "MpiRanks") -> None:
    """Convert a whole model from one checkpoint layout (format on disk) to another, and print a report on rank 0."""
    from raphael_dist.config.schema import load_config
    from raphael_dist.convert.conversion import convert

    (source, path), (target, out) = args.source, args.target
    options = options_of(args, layout_of("--to", target).options)
    config = load_config(args.config) if args.config else None
    report = convert(source, Path(path), target, Path(out), options, config, ranks, args.lora, args.lora_scale)
    if ranks.is_main:
        print_report(report, path, out)


def check_options(args: argparse.Namespace, supported: frozenset[str]) -> tuple[int, int]:
    """Check the options for the target; return the two numbers of --ep: ranks over which space and time experts are sharded.

    `supported`: fields of `Options` that the target supports. Raises UserError for options that it does not support.
    """
    target = args.target[0]
    try:
        space, time = (int(part) for part in args.ep.split(","))
    except ValueError:
        raise UserError(
            f"--ep {args.ep} must be two numbers, over how many ranks the space experts and the time experts are sharded. "
            "Use e.g. --ep 2,1."
        ) from None
    if min(space, time, args.world) < 1:
        raise UserError(
            f"--world {args.world} and both numbers of --ep {args.ep} must be at least 1. The numbers of --ep state over "
            "how many ranks the space experts and the time experts are sharded. Use e.g. --ep 1,1 --world 1."
        )
    if "world" not in supported and (space, time, args.world) != (1, 1, 1):
        raise UserError(
            f"--ep {args.ep} and --world {args.world} have no effect with --to {target}, whose files do not depend on "
            "ranks. Leave out both."
        )
    for option, value in (("weights", args.weights), ("dtype", args.dtype)):
        if value and option not in supported:
            raise UserError(f"--{option} {value} is not supported with --to {target}. Leave out --{option}.")
    for option, is_set in (("--unet-only", args.unet_only), ("--text-by-name", args.text_by_name)):
        if is_set and "unet_only" not in supported:
            raise UserError(f"{option} requires --to diffusers, but --to is {target}. Leave out {option}.")
    return space, time


def options_of(args: argparse.Namespace, supported: frozenset[str]) -> "Options":
    """Return the options for writing the target, as the command line `args` states them.

    `supported`: fields of `Options` that the target layout supports. Raises UserError if the command line has others.
    """
    import torch

    from raphael_dist.convert.write_plan import Options

    space, time = check_options(args, supported)
    return Options(
        space_ep=space,
        time_ep=time,
        world=args.world,
        stage=args.zero,
        weights=args.weights,
        dtype=getattr(torch, args.dtype or "float32"),
        unet_only=args.unet_only,
        text_by_name=args.text_by_name,
        licence=args.license,
        prediction=args.prediction,
    )


def print_report(report: "ConversionReport", path: str, out: str) -> None:
    """Print a table of the tensors and files that were written, and the notes of the conversion.

    `path`, `out`: source and target, for the title.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=escape_control(f"{report.source} {path} -> {report.target} {out}"), title_justify="left")
    table.add_column("kind")
    for column in ("tensors", "parameters", "bytes", "files"):
        table.add_column(column, justify="right")
    for row in report.rows:
        table.add_row(row.kind, f"{row.tensors:,}", f"{row.parameters:,}", f"{row.bytes:,}", f"{row.files}")
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(table)
    for note in report.notes:
        console.print(escape_control(f"  {note}"))
    rate = sum(row.bytes for row in report.rows) / 1e9 / max(report.seconds, 1e-9)
    console.print(
        f"source checked: {report.verified}; each tensor was written once and read back; "
        f"{report.seconds:.1f} s, {rate:.2f} GB/s"
    )


if __name__ == "__main__":
    sys.exit(main())
