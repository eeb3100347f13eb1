"""`tools/bench.py balance`: how evenly samples are distributed over time experts, for three ways to draw timesteps.

A time expert processes the samples whose timestep is in its range. All ranges have the same length.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from raphael_dist.config.schema import load_config
from raphael_dist.model.diffusion import draw_timestep


@dataclass(frozen=True)
class BalanceRow:
    """How unevenly samples are distributed over the time experts, for one way to draw timesteps.

    A time expert processes the samples in a range of timesteps. The imbalance of a micro-step is the number of samples of
    its busiest expert, divided by the mean number per expert. 1 is perfectly even.

    Attributes:
        name: the way to draw timesteps.
        mean, worst: mean and maximum of the imbalance over all micro-steps.
    """

    name: str
    mean: float
    worst: float


def bench_balance(draws: dict[str, Callable[[int], list[int]]], steps: int, group: int, experts: int) -> list[BalanceRow]:
    """Compare ways to draw timesteps by how evenly they load the time experts; return a row for each.

    Args:
        draws: the ways to draw timesteps, by name. Each is a function from the number of a step to the time experts (0 to
            `experts` - 1) of all samples in the step's global batch, in sample order.
        steps: number of steps.
        group: samples that a group of ranks processes in a micro-step; the group waits for its busiest expert.
        experts: number of time experts, each for an equal range of timesteps.
    """
    rows = []
    for name, draw in draws.items():
        largest = []
        for step in range(steps):
            expert_P = torch.tensor(draw(step))
            expert_GP = expert_P[: len(expert_P) // group * group].view(-1, group)
            loads_GK = torch.nn.functional.one_hot(expert_GP, experts).sum(dim=1)
            largest.append(loads_GK.amax(dim=1).float() * experts / group)
        every = torch.cat(largest)
        rows.append(BalanceRow(name, float(every.mean()), float(every.max())))
    return rows


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to its parser `command`."""
    command.add_argument("--global-batch", type=int, default=2000, help="samples of a step (default 2000)")
    command.add_argument("--experts", type=int, default=4, help="number of time experts (default 4)")
    command.add_argument("--steps", type=int, default=20, help="number of steps (default 20)")
    command.add_argument(
        "--group",
        type=int,
        nargs="+",
        default=[4, 8, 16, 64],
        help="samples of a micro-step on all ranks over which experts are sharded (default 4 8 16 64)",
    )


def run(args: argparse.Namespace) -> None:
    """Print how evenly samples are distributed over time experts, each of which processes a range of timesteps.

    Timesteps are drawn in three ways: independently, one per stratum in random order, and as the trainer draws them.
    """
    config, seed = load_config("raphael-3b").diffusion, 0
    total, T = args.global_batch, config.num_timesteps

    def bins(uniform: object) -> list[int]:
        return (np.asarray(uniform) * args.experts).astype(int).tolist()

    draws = {
        "independent": lambda step: bins(np.random.default_rng(step).random(total)),
        "strata in random order": lambda step: bins((np.random.default_rng(step).permutation(total) + 0.5) / total),
        "strata as in training (ours)": lambda step: bins(
            [draw_timestep(config, seed, step * total + i, total) / T for i in range(total)]
        ),
    }
    for group in args.group:
        print(f"global batch {total}, {args.experts} time experts, {group} samples per micro-step, {args.steps} steps")
        for row in bench_balance(draws, args.steps, group, args.experts):
            print(f"  {row.name:<26} busiest expert {row.mean:5.2f}x an even share on average, {row.worst:5.2f}x at worst")
