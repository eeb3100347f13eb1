"""What the command lines share."""

import argparse
from collections.abc import Sequence
from typing import Any

from raphael_dist.config_yaml import preset_names
from raphael_dist.errors import UserError


class Once(argparse.Action):
    """Stores an option's value, and refuses a second one: argparse would silently keep the last."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest)
        if before != self.default:
            raise UserError(f"{option}: given twice, {before!r} and {values!r}; give one")
        setattr(namespace, self.dest, values)


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
