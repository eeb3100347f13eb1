"""Rank: compares `exchange.reduce_scatter` with an all-reduce."""

from typing import Any

import torch
import torch.distributed as dist

from raphael_dist.parallel.async_collectives import reduce_scatter
from raphael_dist.runtime.ranks import discover, initialise
from tests.lib.launch import leave


def main(_: dict[str, Any]) -> int:
    ranks = discover()
    initialise(ranks)
    world, me = ranks.world_size, ranks.rank
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        rows = torch.randn(world * 1003, generator=torch.Generator().manual_seed(me)).to(dtype)
        exact, before = rows.to(torch.float64, copy=True), rows.clone()
        dist.all_reduce(exact)
        dist.all_reduce(summed := rows.clone())
        own, outs = slice(me * 1003, (me + 1) * 1003), [rows.new_empty(1003) for _ in range(3)]
        reduce_scatter(outs[0], rows, None).wait()
        reduce_scatter(outs[1], rows, dist.group.WORLD).wait()
        assert torch.equal(rows, before)
        part = rows[own]  # of the buffer itself, as in ZeRO-3
        reduce_scatter(part, rows, None).wait()
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], part)
        # As near to the exact sum as the all-reduce, and equal to it for two ranks.
        errors = [(value.double() - exact[own]).abs().max() for value in (outs[0], summed[own])]
        assert errors[0] <= errors[1] + torch.finfo(torch.float32).eps * world, (dtype, errors)
        assert world > 2 or torch.equal(outs[0], summed[own]), dtype
    leave()
    return 0
