"""Trains the model without each of its parts, and beside others of equal size: `python tools/ablate.py --out runs/ablation`.

The same command goes on where it was ended. docs/learning.md says what the variants are and how they are compared.
"""

import argparse
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import checkout  # noqa: F401 (before the package)
from raphael_dist.command_line import Once
from raphael_dist.errors import UserError, exit_code_of


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments; argparse exits with 2 on a mistake."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", default="emoji-tiny", action=Once, help="preset or YAML file of the whole model")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder of runs and results; continued")
    parser.add_argument("--variants", default="main", help="main, experts, alpha, edges, later, all, or names with commas")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant, with seeds from 0")
    parser.add_argument("--images", type=int, help="that each run sees (train.max_steps x train.global_batch)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of each run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--benchmark", action="store_true", help="the emoji benchmark after each run")
    parser.add_argument("--list", action="store_true", help="list variants with their sizes, and stop")
    parser.add_argument("--table", action="store_true", help="write the results of the runs that are finished, and stop")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> None:
    """Carry out the campaign, or list or show it. Raises UserError for what the user can fix."""
    for name in ("seeds", "images", "ranks", "jobs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}: given {value}, must be 1 or more")
    if missing := [name for name in ("matplotlib", "scipy") if find_spec(name) is None]:
        raise UserError(f'intervals and figures need {missing[0]}: run `pip install "raphael_dist[eval]"`')
    from ablations import campaign, table, variants
    from ablations.show import show

    base = variants.read_base(args.config, args.overrides)
    chosen = variants.choose(base, args.variants.split(","))
    plan = campaign.Campaign(args.out, base, chosen, args.seeds, args.images, args.ranks, args.benchmark, args.jobs)
    if args.list:
        print(table.listing(plan))
        return
    if args.table:
        campaign.claim(args.out, plan.protocol())
    else:
        with campaign.claimed(plan):
            campaign.carry_out(plan, lambda line: print(line, flush=True), lambda: show(plan, figures=False))
    print(show(plan))


def main(argv: list[str] | None = None) -> int:
    """Read the command line; return the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # the run at work must not be left behind
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return exit_code_of(lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
