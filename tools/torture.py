"""Inject faults at random into real ranks and a real Slurm: `python tools/torture.py --minutes 120 --seed 0`.

Each trial is compared with a run without faults. docs/reliability.md describes the kinds of faults and the outcomes.
Exit codes: 0: in each trial the run ended with the same results, or refused to continue with a message; 1: in some trial it
did neither (the trial is "lost"); 2: a mistake in the arguments, or trials cannot continue.
"""

import argparse
import importlib
import signal
import sys
from pathlib import Path

import checkout  # noqa: F401 (before the package)
from raphael_dist.cli.common import Parser
from raphael_dist.errors import UserError, run_command
from raphael_dist.text import counted


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line `argv`; a mistake in it ends the process with exit code 2."""
    parser = Parser(
        example="python tools/torture.py --minutes 120 --seed 0",
        description="Inject random faults into training on real ranks and on a Slurm that it starts on this machine.",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="start trials for this long (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kinds, places and times of faults (default 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/torture"), help="folder for results.json and table.md")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="KIND",
        help="only this kind, group or place of faults (see --list); may be repeated",
    )
    parser.add_argument("--again", metavar="SEED", help="with --only: repeat the trial that printed this seed")
    parser.add_argument("--list", action="store_true", help="list the kinds of faults")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the tool with the command line `argv` (None: that of the process); return the exit code."""
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # ends the Slurm daemons, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return run_command(lambda: int(not torture(args)))


def torture(args: argparse.Namespace) -> bool:
    """Run trials with faults until the time is over; return whether no trial was lost.

    A trial is lost if its run neither ends with the results of a run without faults, nor stops with an error message.

    Raises UserError for mistakes in `args`, and if trials cannot continue.
    """
    campaign = importlib.import_module("tests.torture.campaign")  # tests/ is not part of the installed package
    kinds = campaign.KINDS
    if args.list:
        print("\n".join(f"{kind.where:9} {kind.group:13} {name}" for name, kind in sorted(kinds.items())))
        return True
    if unknown := set(args.only) - {word for k in kinds.values() for word in (k.name, k.group, k.where)}:
        raise UserError(
            f"--only={sorted(unknown)[0]} must be a kind, group or place of faults, but none has this name. "
            "Use one that --list shows."
        )
    names, notes = campaign.available(args.only)
    for note in notes:
        print(f"skipped: {note}", flush=True)
    with campaign.Campaign(args.seed, args.out, names, lambda line: print(line, flush=True)) as trials:
        try:
            if args.again is not None:
                return all(trials.run_trial(kinds[name], args.again).outcome != "lost" for name in names)
            held = bool(trials.run(60 * args.minutes))
        except campaign.ServerDiedError as error:
            raise UserError(
                f"{error}, so that trials cannot continue. {args.out} has {counted(len(trials.results), 'result')}. "
                "Start again with another --seed; new results are added."
            ) from None
    print((args.out / "table.md").read_text())
    return held


if __name__ == "__main__":
    sys.exit(main())
