"""Code that all command lines use: parser, common options, checks of numbers, versions."""

import argparse
import math
import platform
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn, get_args

from raphael_dist import __version__
from raphael_dist.config import assets
from raphael_dist.config.key_suggestions import known_key, near_key
from raphael_dist.config.load import preset_names
from raphael_dist.config.types import INT_LIMIT, WEIGHTS, Scheduler
from raphael_dist.errors import UserError, did_you_mean, run_command

_DEPENDENCIES = ("torch", "deepspeed", "diffusers", "transformers")
_WIDTH = 120  # of help texts, in characters


class Parser(argparse.ArgumentParser):
    """An argument parser whose help begins with an example. For an unknown option, it suggests an option or setting."""

    _argv: Sequence[str] = ()

    def __init__(self, *, example: str = "", raw: bool = False, **kwargs: Any) -> None:
        """Create a parser. Options must be written in full: `--neg` is not accepted for `--negative`.

        Args:
            example: a command that works, shown first in the help.
            raw: keep the line breaks of description and epilog.
            **kwargs: arguments of argparse's parser.
        """
        kind = argparse.RawDescriptionHelpFormatter if raw else argparse.HelpFormatter
        kwargs.setdefault("formatter_class", lambda prog: kind(prog, max_help_position=28, width=_WIDTH))
        super().__init__(**kwargs, allow_abbrev=False)
        self._example = example

    def format_help(self) -> str:
        """Return the help text of argparse, with the example command in front of it (if the parser has one)."""
        return (f"example: {self._example}\n\n" if self._example else "") + super().format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse arguments as argparse does. Keep the command line, so that `error` can suggest a correction."""
        self._argv = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print argparse's message, with a suggestion if there is one, and exit with code 2."""
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        switch = re.match(r"argument (--\w+): ignored explicit argument", message)
        if unknown:
            message += self._suggest(next((i for i, word in enumerate(self._argv) if word.startswith(unknown[1])), None))
        elif switch:
            message += did_you_mean(f"{switch[1]}_config", self._long_options())
        elif "arguments are required" in message:
            options = self._long_options()
            strange = [i for i, word in enumerate(self._argv) if word.startswith("--") and _name(word) not in options]
            leading = [0] if self._argv and not self._argv[0].startswith("-") else []
            message += self._suggest(next(iter(strange + leading), None))
        super().error(message)

    def _suggest(self, index: int | None) -> str:
        """Return " (did you mean ...?)" for argument number `index` of the command line; "" if nothing is similar.

        Also returns "" if `index` is None (unknown).
        """
        if index is None:
            return ""
        word, options = self._argv[index], self._long_options()
        if not word.startswith("-"):
            return f" (did you mean --prompt {word!r}? Several words need quotes)" if "--prompt" in options else ""
        name = _name(word)
        words = set(re.split("[-_]+", name))
        inside = [option for option in options if set(re.split("[-_]+", option)) <= words]
        near = f" (did you mean {max(inside, key=len)!r}?)" if inside else did_you_mean(name, options)
        if any(action.dest == "overrides" for action in self._actions):
            from raphael_dist.config.schema import Config

            following = [other for other in self._argv[index + 1 : index + 2] if not other.startswith("-")]
            value = word.partition("=")[2] or "".join(following) or "VALUE"
            if key := known_key(name, Config) or (None if near else near_key(name, Config)):
                return f" (did you mean '{key}={value}'?)"
        return near

    def _long_options(self) -> list[str]:
        inner = [action.choices for action in self._actions if isinstance(action.choices, dict)]  # of subcommands
        parsers = [self, *(parser for choices in inner for parser in choices.values() if isinstance(parser, Parser))]
        options = [option for parser in parsers for option in parser._option_string_actions]
        return [option for option in options if option.startswith("--") and option != "--help"]


def _name(word: str) -> str:
    return word.partition("=")[0]


def command(
    parse: Callable[[Sequence[str]], argparse.Namespace], run: Callable[[argparse.Namespace], int | None]
) -> Callable[[Sequence[str]], int]:
    """Return the function `main` of a command, which takes the command's arguments and returns the exit code.

    `parse`: parses the arguments. `run`: does the work, and may return an exit code.
    """

    def main(argv: Sequence[str] | None = None) -> int:
        """Run the command with the arguments `argv` (None: those of this process), and return the exit code."""
        return run_command(lambda: run(parse(sys.argv[1:] if argv is None else argv)))

    return main


class Once(argparse.Action):
    """An argparse action for an option that may be given only once. By default argparse silently keeps the last value."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest)
        if before != self.default:
            raise UserError(
                f"{option} must be given once, but it is given twice, as {before!r} and {values!r}. Leave out one of the "
                "two."
            )
        setattr(namespace, self.dest, values)


class _Version(argparse.Action):
    """An argparse action that prints the versions of this package, Python and dependencies, and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(version_line())
        parser.exit()


def version_line() -> str:
    """Return one line with the versions of this package (and its git commit), Python and the main dependencies.

    The dependencies are not imported.
    """
    commit = assets.git_commit()
    words = [f"raphael_dist {__version__}" + (f" (git {commit})" if commit else ""), f"Python {platform.python_version()}"]
    for name in _DEPENDENCIES:
        try:
            words.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            words.append(f"{name} is not installed")
    return ", ".join(words)


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add the option `--version`, which prints versions and exits."""
    parser.add_argument("--version", action=_Version, nargs=0, help="print versions and the git commit")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the option `--config`, and positional arguments `section.key=value`, which override settings of --config."""
    parser.add_argument("--config", action=Once, metavar="NAME", help=f"YAML file or preset: {', '.join(preset_names())}")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. train.max_steps=50 optim.lr=1e-4")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options --checkpoint and --weights, which select a trained model, and --steps (denoising steps)."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="run directory, step-* folder or exported pipeline")
    parser.add_argument(
        "--weights", choices=WEIGHTS, help="weights to use: moving average (ema) or last (master); default: ema if present"
    )
    parser.add_argument("--steps", type=int, help="denoising steps (default: sample.steps of the run)")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide how images are sampled: model, weights, steps, scheduler, image size, batch size."""
    add_model(parser)
    parser.add_argument("--scheduler", choices=get_args(Scheduler), help="sampler (default: sample.scheduler of the run)")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="image size in pixels (default: first size in image.buckets)"
    )
    parser.add_argument("--batch", type=int, default=16, help="images sampled at a time on each rank (default 16)")


def check_range(option: str, value: float | None, low: float, high: float = math.inf) -> None:
    """Raise UserError unless an option's value is a finite number from `low` to `high`, or None (not given)."""
    if value is None or (low <= value <= high and math.isfinite(value)):
        return
    limits = "a finite number" if low == -math.inf else f"at least {low:g}"
    limits += f" and at most {high:g}" if high < math.inf else ""
    raise UserError(f"{option} {value} must be {limits}. Set {option} to such a number.")


def check_seed(seed: int | None) -> None:
    """Raise UserError unless --seed is an integer from 0 to 2**63 - 1, or None (not given)."""
    if seed is not None and not 0 <= seed < INT_LIMIT:
        raise UserError(f"--seed {seed} must be from 0 to 2**63 - 1. Give, for example, --seed 0.")
