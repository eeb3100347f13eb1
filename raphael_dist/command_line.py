"""What the command lines share."""

import argparse
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from raphael_dist import __version__, shipped
from raphael_dist.config_yaml import preset_names
from raphael_dist.errors import UserError

_STANDS_ON = ("torch", "deepspeed", "diffusers", "transformers")


class Once(argparse.Action):
    """Stores an option's value, and refuses a second one: argparse would silently keep the last."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest)
        if before != self.default:
            raise UserError(f"{option}: given twice, {before!r} and {values!r}; give one")
        setattr(namespace, self.dest, values)


class _Version(argparse.Action):
    """Prints versions and ends; they are looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(version_line())
        parser.exit()


def version_line() -> str:
    """Return the versions of this package, with its git commit, of Python and of what it stands on; imports none of them."""
    commit = shipped.git_commit()
    words = [f"raphael_dist {__version__}" + (f" (git {commit})" if commit else ""), f"Python {platform.python_version()}"]
    for name in _STANDS_ON:
        try:
            words.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            words.append(f"{name} is not installed")
    return ", ".join(words)


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add `--version`."""
    parser.add_argument("--version", action=_Version, nargs=0, help="print versions and the git commit, and stop")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add `--config` and the overrides that may follow it anywhere."""
    parser.add_argument("--config", action=Once, help=f"preset ({', '.join(preset_names())}) or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. train.max_steps=50 optim.lr=1e-4")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of a command that `add_config` prepared. UserError when no configuration was chosen."""
    args = parser.parse_intermixed_args(argv)
    if args.config is None:
        raise UserError(
            f"--config: none given; name a preset ({', '.join(preset_names())}) or a YAML file, e.g. --config raphael-3b"
        )
    return args


def parse_export(name: str, what: str, layout: str, argv: Sequence[str]) -> argparse.Namespace:
    """Return `run`, `out` and `weights` of a command that writes, for others to read, what a run trained beside its base."""
    parser = argparse.ArgumentParser(prog=f"raphael_dist.{name}", description=f"Write a run's {what} {layout}.")
    parser.add_argument("--run", type=Path, required=True, help=f"a run that trained {what}, or one of its step-* folders")
    parser.add_argument("--out", type=Path, required=True, help="the new folder")
    parser.add_argument("--weights", choices=("ema", "master"), default="ema", help=f"averaged {what}, or the last")
    return parser.parse_args(argv)
