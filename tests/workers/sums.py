"""Rank: compares `reduce_scatter` and `all_gather` of the package with torch's collectives.

The keys of the argument `spec` are
    nodes: number of each rank's node
    two_stages: whether sums are computed within each node first and then between nodes; allows a larger rounding error
"""

import os
from typing import Any

import torch
import torch.distributed as dist

from raphael_dist.parallel.async_collectives import all_gather, reduce_scatter
from raphael_dist.runtime.ranks import discover, initialise
from tests.lib.launch import leave

SIZE = 1003  # elements of a part


def main(spec: dict[str, Any]) -> int:
    ranks = discover()
    os.environ["SLURMD_NODENAME"] = f"node{spec['nodes'][ranks.rank]}"
    initialise(ranks)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        _compare(dtype, spec["nodes"], spec["two_stages"])
    _in_flight()
    leave()
    return 0


def _compare(dtype: torch.dtype, nodes: list[int], two_stages: bool) -> None:
    world, me = dist.get_world_size(), dist.get_rank()
    all_rows = torch.stack([torch.randn(world * SIZE, generator=torch.Generator().manual_seed(r)) for r in range(world)])
    rows, own, outs = all_rows[me].to(dtype), slice(me * SIZE, (me + 1) * SIZE), []
    exact = rows.to(torch.float64, copy=True)
    dist.all_reduce(exact)
    before = rows.clone()
    for group in (None, dist.group.WORLD):
        outs.append(rows.new_empty(SIZE))
        reduce_scatter(outs[-1], rows, group).wait()
    assert torch.equal(rows, before)
    part = rows[own]  # of the buffer itself, as in ZeRO-3
    reduce_scatter(part, rows, None).wait()
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], part)
    # The result is rounded, and in two stages the sum of each node. In between, bfloat16 is added in float32.
    addends = all_rows.to(dtype).double()[:, own]
    rounded = [exact[own], *(addends[torch.tensor(nodes) == n].sum(0) for n in set(nodes) if two_stages)]
    adding = torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype).eps * world * addends.abs().sum(0)
    bound = 1.01 * torch.finfo(dtype).eps / 2 * torch.stack(rounded).abs().sum(0) + adding
    assert ((outs[0].double() - exact[own]).abs() <= bound).all(), dtype
    gathered, expected = rows.new_empty(world * SIZE), rows.new_empty(world * SIZE)
    dist.all_gather_into_tensor(expected, part)
    all_gather(gathered, part.clone(), None).wait()
    assert torch.equal(gathered, expected)
    gathered.zero_()[own] = part
    all_gather(gathered, gathered[own], None).wait()  # a part of the result, as in ZeRO-1 and 2
    assert torch.equal(gathered, expected)


def _in_flight() -> None:
    """Start sums and gathers of different sizes without waiting, wait for them in another order, and check the results."""
    world, me = dist.get_world_size(), dist.get_rank()
    works, outs, exact = [], [], []
    for number in range(12):
        size, generator = 1 + 317 * number, torch.Generator().manual_seed(100 * number + me)
        rows = torch.randint(-999, 999, (world * size, 3), generator=generator).double()
        if number % 3 == 2:
            outs.append(rows.new_empty(world * size, 3))
            works.append(all_gather(outs[-1], rows[:size], None))
            dist.all_gather_into_tensor(expected := torch.empty_like(rows), rows[:size])
        else:
            outs.append(rows.new_empty(size, 3))
            works.append(reduce_scatter(outs[-1], rows, None))
            dist.all_reduce(summed := rows.clone())
            expected = summed.chunk(world)[me]
        exact.append(expected)
    for number in torch.randperm(len(works), generator=torch.Generator().manual_seed(0)).tolist():
        works[number].wait()
        assert torch.equal(outs[number], exact[number]), number
