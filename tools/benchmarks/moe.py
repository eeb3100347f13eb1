"""`tools/bench.py moe`: our expert layers compared with DeepSpeed's own `MoE`, on 1 or more ranks.

All layers run forward and backward on equally many tokens of equal width with equally many experts of equal width, in the
same processes. Layers that route differently are compared by *routed rows*: the number of computed (token, expert) pairs.
With `uneven`, half of the load goes to one expert, since real timesteps and words load experts unevenly. DeepSpeed is
configured not to drop tokens and therefore pads all experts to the load of the busiest one.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.space import SpaceCase, add_sizes, cases
from raphael_dist.engine import expert_groups
from raphael_dist.engine.engine import import_deepspeed
from raphael_dist.model.moe import SpaceMoE, TimeMoE
from raphael_dist.parallel.async_collectives import ExpertGroup, Traffic
from raphael_dist.parallel.expert_dispatch import ParallelSpaceMoE, ParallelTimeMoE, count_samples
from raphael_dist.runtime.ranks import Ranks, all_reduce_sum, discover, initialise
from raphael_dist.text import counted


@dataclass(frozen=True)
class MoeRow:
    """Results of one expert layer.

    Attributes:
        name: the layer.
        rows: number of (token, expert) pairs that all ranks computed.
        milliseconds: median time of forward and backward.
        sent: bytes that this rank sent in a forward and backward pass.
    """

    name: str
    rows: int
    milliseconds: float
    sent: int = 0

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.milliseconds * 1e3


class Blocking(ExpertGroup):
    """An expert-parallel group that waits for each exchange at once, without overlapping it with computation.

    The difference between its time and that of the usual group is the time that overlapping saves.
    """

    def all_to_all(self, *arguments: Any) -> tuple[Tensor, Any]:
        return _waited(super().all_to_all(*arguments))

    def all_gather(self, rows: Tensor) -> tuple[Tensor, Any]:
        return _waited(super().all_gather(rows))

    def reduce_scatter(self, rows: Tensor) -> tuple[Tensor, Any]:
        return _waited(super().reduce_scatter(rows))


def bench_moe(case: SpaceCase, mask: float, repeats: int, ranks: Ranks, uneven: bool = False) -> list[MoeRow]:
    """Measure each kind of expert layer; return a row for each. Collective.

    Args:
        case: sizes of the layers.
        mask: share of the image (0..1) in the region of each text token.
        repeats: number of measurements of each layer; the median counts.
        ranks: this rank and the number of ranks.
        uneven: whether half of the load goes to one expert.
    """
    measured = []
    for name, (rows, step, traffic) in _layers(case, mask, ranks, uneven).items():
        milliseconds, sent = _median_ms(step, repeats, traffic)
        measured.append(MoeRow(name, int(all_reduce_sum([rows], torch.device("cpu"))[0]), milliseconds, sent))
    return measured


def _layers(case: SpaceCase, mask: float, ranks: Ranks, uneven: bool) -> dict[str, tuple[int, Callable[[], None], Traffic]]:
    world, traffic = ranks.world_size, Traffic()
    group = expert_groups.create_groups(world, traffic) if world > 1 else None
    h_BND, mask_BNY, weight_BYK = case.inputs(mask, "cpu", torch.float32, seed=ranks.rank, uneven=uneven)
    tokens, pairs = case.batch * case.tokens, int(((mask_BNY @ weight_BYK.detach()) > 0).sum())
    expert_B = (torch.arange(case.batch) + ranks.rank) % case.experts
    if uneven:
        expert_B[: case.batch // 2] = 0
    steps: dict[str, tuple[int, Callable[[], None], Traffic]] = {}
    kinds = {"": group}
    if group is not None:
        kinds[", no overlap"] = Blocking(group.process_group, group.size, group.index, traffic)
    for suffix, to in kinds.items():
        space, moved = _space(case, to), _time(case, to)
        samples: Any = torch.nn.functional.one_hot(expert_B, case.experts).sum(dim=0)
        if to is not None:
            samples = count_samples(torch.nn.functional.one_hot(expert_B[None], case.experts), to, [True])[0]
        factor_B = torch.ones(case.batch)
        steps[f"Space-MoE{suffix}"] = (pairs, _step(space, h_BND, mask_BNY, weight_BYK), traffic)
        steps[f"Time-MoE{suffix}"] = (tokens, _step(moved, h_BND, expert_B, samples, factor_B), traffic)
    for k in (1, 2):
        steps[f"DeepSpeed MoE, k={k}"] = (k * tokens, _step(_deepspeed_moe(case, k, world, uneven), h_BND), Traffic())
    return steps


def _space(case: SpaceCase, group: ExpertGroup | None) -> nn.Module:
    whole = SpaceMoE(case.experts, case.dim, case.hidden, "auto", seed=0)
    return whole if group is None else ParallelSpaceMoE(whole, group, "auto")


def _time(case: SpaceCase, group: ExpertGroup | None) -> nn.Module:
    whole = TimeMoE(case.experts, case.dim, case.hidden)
    return whole if group is None else ParallelTimeMoE(whole, group)


def _deepspeed_moe(case: SpaceCase, k: int, world: int, uneven: bool) -> nn.Module:
    from deepspeed.moe.layer import MoE

    import_deepspeed().init_distributed(verbose=False)
    expert = nn.Sequential(nn.Linear(case.dim, case.hidden), nn.GELU(), nn.Linear(case.hidden, case.dim))
    # No token is dropped, as in ours.
    layer = MoE(case.dim, expert, case.experts, ep_size=world, k=k, drop_tokens=False, use_rts=False)
    layer.set_deepspeed_parallelism()
    if uneven:  # expert 0 gets the tokens whose first number is positive, about half of them
        with torch.no_grad():
            layer.deepspeed_moe.gate.wg.weight[0, 0] = 1e3
    return layer


def _step(layer: nn.Module, h_BND: Tensor, *inputs: Any) -> Callable[[], None]:
    def step() -> None:
        out = layer(h_BND, *inputs)
        out = out[0] if isinstance(out, tuple) else out
        torch.autograd.grad(out.square().sum(), [h_BND, *layer.parameters()], allow_unused=True)

    return step


def _median_ms(step: Callable[[], None], repeats: int, traffic: Traffic) -> tuple[float, int]:
    """Time `repeats` calls of `step`; return the median milliseconds of the slowest rank, and the bytes sent by this rank.

    The bytes are those of a single call. `traffic`: the counter of sent bytes.
    """
    times = []
    for _ in range(repeats + 1):
        traffic.take()
        dist.barrier()
        began = time.perf_counter()
        step()
        elapsed = torch.tensor((time.perf_counter() - began) * 1e3)
        dist.all_reduce(elapsed, dist.ReduceOp.MAX)
        times.append(float(elapsed))
    return statistics.median(times[1:]), traffic.take().experts


class _Done:
    def wait(self) -> None:
        """Do nothing: the exchange is complete."""


def _waited(started: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    started[1].wait()
    return started[0], _Done()


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to its parser `command`."""
    add_sizes(command, 8, [0.05, 1.0])
    command.add_argument("--uneven", action="store_true", help="give half of the load to one expert")


def run(args: argparse.Namespace) -> None:
    """Print our expert layers compared with DeepSpeed's, on the ranks that torchrun starts, or one."""
    ranks = discover()
    initialise(ranks)
    torch.set_num_threads(args.threads)
    load = "half of the load goes to one expert" if args.uneven else "even load"
    how = f"{load}, {counted(ranks.world_size, 'rank')}, {counted(args.threads, 'thread')} each, median of {args.repeats}"
    for case in cases(args):
        for mask in args.masks:
            rows = bench_moe(case, mask, args.repeats, ranks, args.uneven)
            if ranks.is_main:
                print(f"{case}, mask {mask}, {how}\n{_table(rows)}")
    dist.destroy_process_group()


def _table(rows: list[MoeRow]) -> str:
    lines = ["layer                        rows       ms   rows/s  time per row / DeepSpeed's k=1, k=2    MB sent"]
    native = [row for row in rows if row.name.startswith("DeepSpeed")]
    for row in rows:
        ratios = "  ".join(f"{row.rows_per_second / other.rows_per_second:8.2f}x" for other in native)
        lines.append(
            f"{row.name:<24} {row.rows:>8} {row.milliseconds:8.2f} {row.rows_per_second:8.0f}  faster by {ratios}  "
            f"{row.sent / 1e6:14.2f}"
        )
    return "\n".join(lines)
