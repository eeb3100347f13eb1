"""`python -m raphael_dist COMMAND ...`: everything that can be run, by one name; raphael-COMMAND is a console script.

Tools are run as they lie in tools/, in the repository or where a wheel brought them.
"""

import argparse
import os
import runpy
import sys
from collections.abc import Callable, Sequence

from raphael_dist import command_line, config_reference, control, evaluate, lora, paths, sample, shipped, train
from raphael_dist.errors import exit_code_of

Command = Callable[[Sequence[str]], int]


def config(argv: Sequence[str]) -> int:
    """print every key of the configuration with type, default, range and what it does"""
    parser = argparse.ArgumentParser(prog="raphael-config", description=config.__doc__)
    parser.add_argument("word", nargs="?", default="", help="only keys whose line contains this word")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="docs/configuration.md")
    form.add_argument("--json-schema", action="store_true", help="a schema for editors that complete and check YAML")
    args = parser.parse_args(argv)
    if args.markdown or args.json_schema:
        print(config_reference.markdown() if args.markdown else config_reference.json_schema())
        return 0
    found = config_reference.keys(args.word)
    print("\n".join(key.line() for key in found) or f"no key of the configuration contains {args.word!r}")
    return 0 if found else 1


def slurm(argv: Sequence[str]) -> int:
    """print the folder of the Slurm scripts (docs: README.md in there)"""
    parser = argparse.ArgumentParser(prog="raphael-slurm", description=slurm.__doc__)
    parser.add_argument("--home", action="store_true", help="print what RAPHAEL_HOME must be for them instead")
    args = parser.parse_args(argv)
    print(shipped.root() if args.home else shipped.root() / "slurm")
    return 0


def convert(argv: Sequence[str]) -> int:
    """convert a checkpoint between layouts"""
    return _tool("convert_checkpoint", argv)


def inspect(argv: Sequence[str]) -> int:
    """say what a checkpoint is, and whether it verifies"""
    return _tool("inspect_checkpoint", argv)


def prepare(argv: Sequence[str]) -> int:
    """compute what training needs of the data before it starts"""
    return _tool("prepare_data", argv)


def training(argv: Sequence[str]) -> int:
    """train, or continue a run"""
    return train.main(argv)


def sampling(argv: Sequence[str]) -> int:
    """draw pictures from a checkpoint"""
    return sample.main(argv)


def evaluating(argv: Sequence[str]) -> int:
    """judge a model: distances, CLIP score, lettering, the emoji benchmark"""
    return evaluate.main(argv)


def showing_paths(argv: Sequence[str]) -> int:
    """show which experts words and timesteps go through"""
    return paths.main(argv)


def exporting_lora(argv: Sequence[str]) -> int:
    """write a run's LoRA adapters as peft reads them"""
    return lora.main(argv)


def exporting_control(argv: Sequence[str]) -> int:
    """write a run's control in diffusers' layout"""
    return control.main(argv)


COMMANDS: dict[str, Command] = {
    "train": training,
    "sample": sampling,
    "evaluate": evaluating,
    "paths": showing_paths,
    "convert": convert,
    "inspect": inspect,
    "prepare": prepare,
    "lora": exporting_lora,
    "control": exporting_control,
    "config": config,
    "slurm": slurm,
}


def _tool(name: str, argv: Sequence[str]) -> int:
    sys.argv = [name, *argv]
    folder = str(shipped.root() / "tools")
    sys.path.insert(0, folder)  # as when the file itself is run, for what lies beside it
    try:
        runpy.run_path(f"{folder}/{name}.py", run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    epilog = "\n".join(f"  {name:8} {command.__doc__}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m raphael_dist",
        description="Trains RAPHAEL (arXiv 2305.18295). Runs on Linux.",
        epilog=f"commands:\n{epilog}\nEach takes --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command_line.add_version(parser)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    return _run(COMMANDS[args.command], args.arguments)


def script() -> int:
    """Be the console script raphael-COMMAND, by the name it was called by."""
    return _run(COMMANDS[sys.argv[0].rpartition("raphael-")[2]], sys.argv[1:])


def _run(command: Command, argv: Sequence[str]) -> int:
    codes: list[int] = []
    try:
        return exit_code_of(lambda: codes.append(command(argv))) or codes[0]
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


if __name__ == "__main__":
    sys.exit(main())
