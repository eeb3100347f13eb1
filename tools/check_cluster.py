"""Check the nodes of a job before a long training: slurm/train_raphael.sh runs this in two steps.

1. `srun ... check_cluster.py --out DIR [train.py arguments]`, one task per rank, writes a report per rank. It takes at most
   55 seconds plus 0.1 seconds per rank.
2. `check_cluster.py --judge DIR`, once, prints the verdict.

Exit codes of --judge: 0 passed; 1 failed; 2 failed with the same fault on every node; 4 some nodes are faulty, but as many
nodes passed as the run needs (--need). With exit code 4, DIR/good-nodes lists the nodes that passed.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import checkout  # noqa: F401 (before the package)
from raphael_dist import train
from raphael_dist.cli.common import Parser
from raphael_dist.cluster.preflight_report import judge, read_reports
from raphael_dist.config.schema import load_config
from raphael_dist.engine import ds_config
from raphael_dist.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from raphael_dist.storage.files import replace_bytes
from raphael_dist.text import counted, print_line

EXIT_LEFT_OUT = 4


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        example="srun python tools/check_cluster.py --out preflight; python tools/check_cluster.py --judge preflight",
        description=__doc__,
        raw=True,
    )
    parser.add_argument("--out", type=Path, help="step 1: folder for the ranks' reports, which all nodes share")
    parser.add_argument("--judge", type=Path, metavar="DIR", help="step 2: folder with the ranks' reports")
    parser.add_argument("--ranks", type=int, default=0, help="with --judge: expected number of ranks")
    parser.add_argument("--need", type=int, default=0, help="with --judge: number of nodes that the job requires")
    parser.add_argument("--nodes", nargs="*", default=[], help="with --judge: names of all nodes")
    args, rest = parser.parse_known_args(argv)
    try:
        return verdict(args) if args.judge else probe(args.out, train.parse(rest))
    except UserError as error:
        if os.environ.get("SLURM_PROCID", "0") == "0":
            print_line(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def probe(out: Path | None, args: argparse.Namespace) -> int:
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(EXIT_INTERRUPTED))
    from raphael_dist.cluster import preflight
    from raphael_dist.runtime.ranks import discover

    if out is None:
        raise UserError("--out is missing. Give a folder for the reports, on a file system that all nodes share.")
    ranks = discover()
    config = ds_config.fit_to_ranks(load_config(args.config, args.overrides), ranks.world_size)
    out.mkdir(parents=True, exist_ok=True)
    passed = preflight.Probe(config, ranks, out).run()
    sys.stdout.flush()
    os._exit(0 if passed else 1)  # a broken process group may block a normal exit


def verdict(args: argparse.Namespace) -> int:
    result = judge(read_reports(args.judge), args.ranks, args.nodes)
    faults = (f"fault: {node}: {text}" for node, texts in result.faults.items() for text in texts)
    for line in (*result.lines, *(f"warning: {text}" for text in result.warnings), *faults):
        print_line(line)
    if not result.faults:
        print("preflight passed")
        return 0
    good = [node for node in args.nodes if node not in result.faults]
    if result.everywhere:
        print("preflight failed with the same fault on every node. Remove its cause, which the lines above state.")
        return EXIT_USER_ERROR
    if not args.need or len(good) < args.need:
        names = ", ".join(result.faults)
        print_line(f"preflight failed: exclude {names} (sbatch --exclude), or ask for spares (SPARE_NODES=1)")
        return 1
    replace_bytes(args.judge / "good-nodes", ("\n".join(good) + "\n").encode())
    print_line(f"left out: {', '.join(result.faults)}; {counted(len(good), 'node')} left")
    return EXIT_LEFT_OUT


if __name__ == "__main__":
    sys.exit(main())
