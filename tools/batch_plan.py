"""Print how a global batch is divided among different numbers of ranks: `python tools/batch_plan.py --config raphael-3b`."""

import sys

import checkout  # noqa: F401 (before the package)
from raphael_dist.cli.common import Parser
from raphael_dist.config.schema import Config, load_config
from raphael_dist.errors import run_command
from raphael_dist.parallel.batch_plan import BatchPlan

WORLDS = (1, 7, 8, 48, 64, 96, 128, 256, 512, 1000, 1024)
EPS = ((1, 1), (2, 2), (2, 4), (3, 2), (6, 4))


def table(config_name: str, overrides: list[str]) -> list[str]:
    """Return a Markdown table: a row per number of ranks, a column per expert parallelism (space_ep, time_ep).

    A cell has the micro-steps per optimizer step and in brackets the share of empty slots (samples with weight 0 that fill
    up batches). A cell is "-" if the number of ranks is not divisible by space_ep or time_ep, the numbers of ranks over
    which space and time experts are sharded. `config_name`: preset or file. `overrides`: as on the command line.
    """
    header = "| ranks | " + " | ".join(f"ep {space},{time}" for space, time in EPS) + " |"
    lines = [header, "|---" * (len(EPS) + 1) + "|"]
    for world in WORLDS:
        cells = []
        for space, time in EPS:
            sizes = [f"parallel.space_ep={space}", f"parallel.time_ep={time}"]
            cells.append(_cell(load_config(config_name, [*overrides, *sizes]), world))
        lines.append(f"| {world} | " + " | ".join(cells) + " |")
    return lines


def _cell(config: Config, world: int) -> str:
    if world % config.parallel.space_ep or world % config.parallel.time_ep:
        return "-"
    plan = BatchPlan.of(config, world)
    return f"{plan.accumulation} ({plan.waste:.1%})"


def main() -> int:
    """Read the command line of this process, print the table for its configuration, and return the exit code."""
    parser = Parser(
        example="python tools/batch_plan.py --config raphael-3b",
        description="Print micro-steps per optimizer step and the padding of batches, for many numbers of ranks.",
    )
    parser.add_argument("--config", default="raphael-3b", help="preset or YAML file (default raphael-3b)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. train.global_batch_size=512")
    args = parser.parse_args()
    return run_command(lambda: print("\n".join(table(args.config, args.overrides))))


if __name__ == "__main__":
    sys.exit(main())
