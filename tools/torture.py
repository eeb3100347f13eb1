"""Injects faults at random, against real ranks and a real Slurm: `python tools/torture.py --minutes 120 --seed 0`.

Each trial is compared with a run that nothing happens to. docs/reliability.md says what is tried and what must hold.
"""

import argparse
import importlib
import signal
import sys
from pathlib import Path

import checkout  # noqa: F401 (before the package)
from raphael_dist.errors import UserError, exit_code_of


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to go on (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of kinds, places and times")
    parser.add_argument("--out", type=Path, default=Path("runs/torture"), help="where results.json and table.md go")
    parser.add_argument("--only", action="append", default=[], metavar="KIND", help="a kind, or a group or place of kinds")
    parser.add_argument("--again", metavar="SEED", help="repeat one trial of --only, by the seed that was printed")
    parser.add_argument("--list", action="store_true", help="list the kinds of faults")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0: nothing was lost."""
    args, lost = parse(argv), []
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # a Slurm must not be left behind
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = exit_code_of(lambda: lost.append(not torture(args)))
    return code or int(any(lost))


def torture(args: argparse.Namespace) -> bool:
    """Run trials until the time is over; return whether nothing was lost."""
    campaign = importlib.import_module(
        "tests.torture.campaign"
    )  # beside the tests, which have what starts ranks and a Slurm
    kinds = campaign.KINDS
    if args.list:
        print("\n".join(f"{kind.where:9} {kind.group:13} {name}" for name, kind in sorted(kinds.items())))
        return True
    if unknown := set(args.only) - {word for k in kinds.values() for word in (k.name, k.group, k.where)}:
        raise UserError(f"--only: no kind {sorted(unknown)[0]!r}; see --list")
    names, notes = campaign.available(args.only)
    for note in notes:
        print(f"left out: {note}", flush=True)
    with campaign.Campaign(args.seed, args.out, names, lambda line: print(line, flush=True)) as trials:
        if args.again is not None:
            return all(trials.try_one(kinds[name], args.again).outcome != "lost" for name in names)
        good = bool(trials.run(60 * args.minutes))
    print((args.out / "table.md").read_text())
    return good


if __name__ == "__main__":
    sys.exit(main())
