"""Which rank holds which span of which parameter, for every ZeRO stage and every expert parallelism; no rank has to run.

ZeRO-1 and 2 lay the parameters of a group end to end, round the sum up, and cut it into equal parts. A group is either all
that is replicated, or the experts that are spread over equally many ranks. ZeRO-3 cuts every parameter by itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

from raphael_dist.checkpoint.tensors import Shapes, Span, stacked
from raphael_dist.config import Config, config_from_tree
from raphael_dist.convert.plan import Options
from raphael_dist.convert.source import block_levels
from raphael_dist.engine import ds_config
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.parallel.placement import place


@dataclass(frozen=True)
class Topology:
    """How many ranks there are and how a run is divided over them.

    Attributes:
        space_ep, time_ep: ranks that share one set of space and of time experts. stage: of ZeRO.
        alignment: ZeRO-1 and 2 round each parameter in their flat buffers up to a multiple of so many elements.
        replicated: names of the layers whose experts every rank holds in spite of `space_ep` and `time_ep` (`placement`).
    """

    world: int = 1
    space_ep: int = 1
    time_ep: int = 1
    stage: int = 1
    alignment: int = 1
    replicated: frozenset[str] = frozenset()

    def spread(self, name: str) -> int:
        """Return over how many ranks the parameter's experts are spread; 1 for what every rank holds whole."""
        owner = stacked(name)
        if owner is None or owner[0] in self.replicated:
            return 1
        return self.space_ep if owner[0].endswith("space_moe") else self.time_ep


def parallel_config(config: Config, options: Options) -> Config:
    """Return the configuration with the target's expert parallelism. UserError when model, ranks or stage forbid it."""
    tree = config.model_dump(mode="json")
    tree["parallel"] |= {"space_ep": options.space_ep, "time_ep": options.time_ep}
    made = config_from_tree(tree)
    stage = {"zero_optimization": {"stage": options.stage}}
    ds_config.check_expert_parallel(made, stage, options.world)
    return made


def topology_of(config: Config, options: Options, *, aligned: bool = True) -> Topology:
    """Return where the options put everything; `config` has their expert parallelism already.

    aligned: whether ZeRO-1 and 2 round parameters up, to 16 bytes of the type of training, as `ds_config.merge` sets it.
    """
    replicated: frozenset[str] = frozenset()
    if max(options.space_ep, options.time_ep) > 1:
        stay = {(cost.kind, cost.level) for cost in place(config, BatchPlan.of(config, options.world)) if not cost.shard}
        blocks = block_levels(config).items()
        replicated = frozenset(f"{block}.{kind}_moe" for block, level in blocks for kind, at in stay if at == level)
    alignment = 16 // getattr(torch, config.train.dtype).itemsize if aligned and options.stage in (1, 2) else 1
    return Topology(options.world, options.space_ep, options.time_ep, options.stage, alignment, replicated)


@dataclass(frozen=True)
class Group:
    """A parameter group as one rank of ZeRO-1 or 2 sees it.

    shapes: what this rank computes with, in order. paddings: elements of padding after each parameter. ranks: how many share
    the group; `index` is this rank's place among them. per_rank_padded: elements of this rank's part of the flat buffer, the
    same for every rank; per_rank: those of them that are not padding at the buffer's end. spans: what lies in that part, and
    at which offset in it.
    """

    spread: int
    shapes: dict[str, tuple[int, ...]]
    paddings: list[int]
    per_rank_padded: int
    per_rank: int
    ranks: int
    index: int
    spans: dict[Span, int]

    @property
    def name(self) -> str:
        """DeepSpeed's name for the group of experts."""
        return f"ep_size_{self.spread}"


def local(name: str, shape: tuple[int, ...], topology: Topology, rank: int) -> tuple[tuple[int, ...], int]:
    """Return the shape that a rank computes with, and where it begins in the whole parameter, flattened."""
    spread = topology.spread(name)
    if spread == 1:
        return shape, 0
    experts = shape[0] // spread
    return (experts, *shape[1:]), (rank % spread) * experts * prod(shape[1:])


def groups(shapes: Shapes, topology: Topology, rank: int) -> list[Group]:
    """Return a rank's groups under ZeRO-1 or 2: what is replicated, then spread experts, smallest spread first."""
    by_spread: dict[int, list[str]] = {1: []}
    for name in shapes:
        by_spread.setdefault(topology.spread(name), []).append(name)
    return [_group(shapes, topology, rank, spread, by_spread[spread]) for spread in sorted(by_spread)]


def _group(shapes: Shapes, topology: Topology, rank: int, spread: int, names: list[str]) -> Group:
    ranks, index = topology.world // spread, rank // spread
    here = {name: local(name, shapes[name], topology, rank) for name in names}
    offsets, paddings, at = [], [], 0
    for name in names:
        offsets.append(at)
        at += prod(here[name][0])
        paddings.append(0 if name == names[-1] else -at % topology.alignment)
        at += paddings[-1]
    per_rank_padded = -(-at // (2 * ranks)) * 2  # an even number each, as DeepSpeed rounds for its all-gather
    low, high = index * per_rank_padded, (index + 1) * per_rank_padded
    spans = {}
    for name, offset in zip(names, offsets, strict=True):
        shape, first = here[name]
        begin, end = max(offset, low), min(offset + prod(shape), high)
        if begin < end:
            spans[Span(name, first + begin - offset, end - begin)] = begin - low
    per_rank = max(0, min(at, high) - low)
    local_shapes = {name: shape for name, (shape, _) in here.items()}
    return Group(spread, local_shapes, paddings, per_rank_padded, per_rank, ranks, index, spans)


def zero3(shapes: Shapes, world: int, rank: int) -> tuple[dict[Span, int], int]:
    """Return a rank's spans under ZeRO-3 with their offsets in its flat buffer, and the buffer's elements."""
    spans: dict[Span, int] = {}
    at = 0
    for name, shape in shapes.items():
        each = -(-prod(shape) // world)
        start = rank * each
        numel = min(each, prod(shape) - start)
        if numel > 0:
            spans[Span(name, start, numel)] = at
        at += each
    return spans, at


def spans(shapes: Shapes, topology: Topology, rank: int) -> Iterator[Span]:
    """Yield what a rank owns of the fp32 weights, in any stage; under ZeRO-0 ranks share the parameters."""
    if topology.stage == 0:
        for i, (name, shape) in enumerate(shapes.items()):
            if i % topology.world == rank:
                yield Span(name, 0, prod(shape))
    elif topology.stage == 3:
        yield from zero3(shapes, topology.world, rank)[0]
    else:
        for group in groups(shapes, topology, rank):
            yield from group.spans
