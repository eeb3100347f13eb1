"""Plans a run without GPUs: memory, speed, days, cost, and the command that runs it.

Example: python tools/plan_run.py --config raphael-3b --cluster h100x8 --nodes 125
"""

import argparse
import sys
from pathlib import Path

import checkout  # noqa: F401 (before the package)
from raphael_dist.cli.common import Parser
from raphael_dist.config.schema import load_config
from raphael_dist.errors import UserError, run_command


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line `argv`; a mistake in it ends the process with exit code 2."""
    parser = Parser(
        example="python tools/plan_run.py --config raphael-3b --cluster h100x8 --nodes 125",
        description="Predict memory, speed, days and cost of a run without GPUs, and print the command of the fastest "
        "choice.",
    )
    parser.add_argument("--config", default="raphael-3b", help="preset or YAML file (default raphael-3b)")
    parser.add_argument("--cluster", default="h100x8", help="a100x8, h100x8 (default), h200x8, b200x8, cpu, or a YAML file")
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes (default 1)")
    parser.add_argument("--ranks", type=int, help="number of GPUs, instead of --nodes")
    parser.add_argument("--images", type=int, help="images to train on (default: train.max_steps x train.global_batch_size)")
    parser.add_argument("--price", type=float, help="dollars per GPU hour (default: from the cluster's description)")
    parser.add_argument(
        "--failure-hours", type=float, help="GPU hours between two failures (default: from the cluster's description)"
    )
    parser.add_argument("--figure", type=Path, help="also write a PNG file with memory, timeline and scaling")
    parser.add_argument(
        "--memory-table",
        action="store_true",
        help="print only the largest micro-batch that fits GPUs of 24, 48, 80 and 141 GB",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="consider only plans with this setting, e.g. stage=2 or space_ep=1; may be repeated",
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="YAML",
        help="measure this machine for a minute, and write its description to this file",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the run, as for train.py")
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> None:
    """Print the plan of a run; with --memory-table its memory table instead. With --calibrate only measure this machine."""
    if args.calibrate is not None:
        from raphael_dist.planning.calibrate import calibrate

        print(calibrate(args.calibrate))
        return
    from raphael_dist.planning import plan_report
    from raphael_dist.planning.cluster_spec import load_cluster
    from raphael_dist.planning.run_plan import make_plan
    from raphael_dist.planning.search import Search, restriction

    config, cluster = load_config(args.config, args.overrides), load_cluster(args.cluster)
    world = args.ranks if args.ranks is not None else args.nodes * int(cluster.per_node.value)
    _positive(nodes=args.nodes, ranks=world, images=args.images, price=args.price, failure_hours=args.failure_hours)
    allowed = dict(map(restriction, args.only))
    search = Search(config, cluster, world, allowed)
    if args.memory_table:
        from raphael_dist.planning.memory_table import memory_table

        print(memory_table(args.config, search))
        return
    plan = make_plan(search, args.images, args.price, args.failure_hours)
    print(plan_report.describe(plan, args.config))
    if args.figure is not None:
        from raphael_dist.planning.plan_figure import draw

        draw(plan, args.figure)


def _positive(**numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')}={value} must be above 0. Give a positive number.")


def main() -> int:
    """Run the tool with the command line of the process; return the exit code."""
    args = parse()
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
