"""Runs the commands: `python -m raphael_dist COMMAND ...`, or the console script raphael-COMMAND.

Some commands are scripts in the folder tools/, which lies in the repository or in the assets of an installed wheel.
"""

import argparse
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__" or Path(sys.argv[0]).name.startswith("raphael-"):
    from raphael_dist.cli.missing_packages import report_missing_packages

    report_missing_packages()

from raphael_dist import sample, train
from raphael_dist.cli import common, doctor, evaluate, prove, report, routes
from raphael_dist.config import assets, key_reference
from raphael_dist.errors import run_command

Command = Callable[[Sequence[str]], int]


def config(argv: Sequence[str]) -> int:
    """Run the command `config`: print settings of the configuration with type, default, range and description.

    `argv`: the command's arguments: a word to search for, and options. Returns the exit code: 1 if no setting is found,
    else 0.
    """
    parser = common.Parser(
        prog="raphael-config", description=COMMANDS["config"][1], example="python -m raphael_dist config memory"
    )
    parser.add_argument(
        "word",
        nargs="?",
        default="",
        help="topic (memory, resume), part of a key, or name of the setting in another trainer",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print all settings as Markdown (docs/configuration.md)")
    form.add_argument("--json-schema", action="store_true", help="print a JSON schema, by which editors check YAML files")
    args = parser.parse_args(argv)
    if args.markdown or args.json_schema:
        print(key_reference.markdown() if args.markdown else key_reference.json_schema())
        return 0
    keys, pages = key_reference.find_keys(args.word)
    print("\n".join(key.line() for key in keys) or f"no key of the configuration contains {args.word!r}")
    for page in pages:
        print(f"See docs/{page}.")
    return 0 if keys else 1


def slurm(argv: Sequence[str]) -> int:
    """Run the command `slurm`: print the path of the folder with the Slurm scripts. Returns the exit code 0.

    `argv`: the command's arguments. With --home, the parent of that folder is printed instead, which the Slurm scripts need
    as the environment variable RAPHAEL_HOME.
    """
    parser = common.Parser(
        prog="raphael-slurm",
        description=COMMANDS["slurm"][1],
        example='sbatch "$(raphael-slurm)/train_raphael.sh" --config emoji-tiny',
    )
    parser.add_argument(
        "--home", action="store_true", help="print instead the value that RAPHAEL_HOME must have for these scripts"
    )
    args = parser.parse_args(argv)
    print(assets.root() if args.home else assets.root() / "slurm")
    return 0


def _tool(name: str, argv: Sequence[str]) -> int:
    sys.argv = [name, *argv]
    folder = str(assets.root() / "tools")
    sys.path.insert(0, folder)  # as if the file itself were run, for its imports from the same folder
    try:
        runpy.run_path(f"{folder}/{name}.py", run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


COMMANDS: dict[str, tuple[Command, str]] = {
    "train": (train.main, "train a model, or resume a run"),
    "sample": (sample.main, "sample images from a checkpoint"),
    "evaluate": (evaluate.main, "measure a model: FID, KID, precision, recall, CLIP score, text in images"),
    "routes": (routes.main, "show the experts that words and timesteps are routed to"),
    "report": (report.main, "write one HTML file about one or more runs"),
    "doctor": (doctor.main, "list the problems of a run and what to do; make a bundle for a bug report"),
    "convert": (partial(_tool, "convert_checkpoint"), "convert a checkpoint between layouts, export adapters"),
    "inspect": (partial(_tool, "inspect_checkpoint"), "describe and verify a checkpoint"),
    "prepare": (partial(_tool, "prepare_data"), "make training data: shards, edge maps, features"),
    "prove": (prove.main, "check that training is correct on your machines, and write a report"),
    "config": (config, "find settings by a word, with type, default, range and description"),
    "slurm": (slurm, "print the folder of the Slurm scripts (see the README.md in it)"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names, e.g. "train"; return its exit code.

    `argv`: the arguments without the program name; None: those of this process.
    """
    argv = sys.argv[1:] if argv is None else argv
    lines = "\n".join(f"  {name:8} {summary}" for name, (_, summary) in COMMANDS.items())
    parser = common.Parser(
        prog="python -m raphael_dist",
        example="python -m raphael_dist train --config emoji-tiny",
        description="Train RAPHAEL (arXiv 2305.18295), a text-to-image diffusion mixture of experts. Runs on Linux.",
        epilog=f"commands:\n{lines}\nEach command has --help.",
        raw=True,
    )
    common.add_version(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    return _run(args.command, args.arguments)


def script() -> int:
    """Run the command of the console script raphael-COMMAND that was started; return the command's exit code.

    COMMAND is taken from sys.argv[0].
    """
    return _run(sys.argv[0].rpartition("raphael-")[2], sys.argv[1:])


def _run(name: str, argv: Sequence[str]) -> int:
    try:
        code = run_command(lambda: COMMANDS[name][0](argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, `| head` for example, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


if __name__ == "__main__":
    sys.exit(main())
