"""Computes which elements of which parameters each rank owns, for every ZeRO stage and expert-parallel size.

No process group is needed. A *span* is a range of consecutive elements of a flattened parameter.

- ZeRO-1 and 2 concatenate the parameters of an optimizer parameter group, pad the end, and divide the result into one equal
  part per rank. One group has the replicated parameters, and there is one group of sharded experts for each expert-parallel
  size.
- ZeRO-3 divides every parameter separately.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from raphael_dist.checkpoint.tensors import Shapes, Span, stacked
from raphael_dist.config.schema import Config, config_from_tree
from raphael_dist.config.types import bytes_per_element
from raphael_dist.convert.source_checkpoint import block_levels
from raphael_dist.convert.write_plan import Options
from raphael_dist.engine import ds_config
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.parallel.placement import choose_placement


@dataclass(frozen=True)
class Topology:
    """How the parameters of a run are divided over ranks.

    Attributes:
        world: number of ranks.
        space_ep, time_ep: number of ranks over which the space experts and the time experts are sharded.
        stage: ZeRO stage.
        alignment: ZeRO-1 and 2 pad each parameter in their flat buffers to a multiple of this many elements.
        replicated: layers whose experts are whole on every rank in spite of `space_ep` and `time_ep` (parallel.placement).
    """

    world: int = 1
    space_ep: int = 1
    time_ep: int = 1
    stage: int = 1
    alignment: int = 1
    replicated: frozenset[str] = frozenset()

    def ep_size(self, name: str) -> int:
        """Return the number of ranks over which the experts in the parameter `name` are sharded; 1 if they are not."""
        owner = stacked(name)
        if owner is None or owner[0] in self.replicated:
            return 1
        return self.space_ep if owner[0].endswith("space_moe") else self.time_ep


def parallel_config(config: Config, options: Options) -> Config:
    """Return a copy of `config` with the expert-parallel sizes in `options`, the options of a conversion's target.

    Raises UserError if the model, or the number of ranks or ZeRO stage in `options`, does not allow these sizes.
    """
    tree = config.model_dump(mode="json")
    tree["parallel"] |= {"space_ep": options.space_ep, "time_ep": options.time_ep}
    target_config = config_from_tree(tree)
    ds_config.check_expert_parallel(target_config, {"zero_optimization": {"stage": options.stage}}, options.world)
    return target_config


def topology_of(config: Config, options: Options, *, aligned: bool = True) -> Topology:
    """Return how the target of a conversion is divided over ranks.

    Args:
        config: the configuration with the target's expert parallelism (`parallel_config`).
        options: options of the target, such as the number of ranks and the ZeRO stage.
        aligned: whether ZeRO-1 and 2 pad parameters to multiples of 16 bytes in train.dtype, as this trainer does.
    """
    replicated: frozenset[str] = frozenset()
    if max(options.space_ep, options.time_ep) > 1:
        levels = {
            (cost.kind, cost.level)
            for cost in choose_placement(config, BatchPlan.of(config, options.world))
            if not cost.shard
        }
        blocks = block_levels(config).items()
        replicated = frozenset(f"{block}.{kind}_moe" for block, level in blocks for kind, at in levels if at == level)
    alignment = 16 // bytes_per_element(config.train.dtype) if aligned and options.stage in (1, 2) else 1
    return Topology(options.world, options.space_ep, options.time_ep, options.stage, alignment, replicated)


@dataclass(frozen=True)
class Group:
    """An optimizer parameter group of ZeRO-1 or 2, and the part of its flat buffer that one rank owns.

    Attributes:
        ep_size: for a group of expert parameters, the number of ranks over which the experts are sharded; else 1.
        shapes: shapes of its parameters on this rank, in their order in the flat buffer.
        paddings: number of padding elements after each parameter.
        per_rank_padded: number of elements in this rank's part of the buffer; the same on every rank.
        per_rank: number of elements in this rank's part that are not padding at the end of the buffer.
        ranks: number of ranks over which the buffer is divided.
        spans: for each parameter that this rank's part contains wholly or partly: which of its elements are in the part,
            and the offset of the first one in the part, in elements.
    """

    ep_size: int
    shapes: dict[str, tuple[int, ...]]
    paddings: list[int]
    per_rank_padded: int
    per_rank: int
    ranks: int
    spans: dict[Span, int]


def local(name: str, shape: tuple[int, ...], topology: Topology, rank: int) -> tuple[tuple[int, ...], int]:
    """Return which part of a parameter a rank has under expert parallelism, before ZeRO divides it further.

    `name` and `shape` are those of the whole parameter. `topology`: over how many ranks experts are sharded. Returns the
    part's shape, and the index of its first element in the flattened parameter: (shape, 0) unless the parameter has sharded
    experts.
    """
    ep_size = topology.ep_size(name)
    if ep_size == 1:
        return shape, 0
    experts = shape[0] // ep_size
    return (experts, *shape[1:]), (rank % ep_size) * experts * prod(shape[1:])


def groups(shapes: Shapes, topology: Topology, rank: int) -> list[Group]:
    """Return the optimizer parameter groups under ZeRO-1 or 2, each with the part that the rank `rank` owns.

    The first group has the replicated parameters. Each further group has the experts that are sharded over one number of
    ranks, in ascending order of this number. `shapes`: shape of every parameter of the whole model, by name. `topology`: how
    parameters are divided over ranks.
    """
    by_ep_size: dict[int, list[str]] = {1: []}
    for name in shapes:
        by_ep_size.setdefault(topology.ep_size(name), []).append(name)
    return [_group(shapes, topology, rank, ep_size, by_ep_size[ep_size]) for ep_size in sorted(by_ep_size)]


def _group(shapes: Shapes, topology: Topology, rank: int, ep_size: int, names: list[str]) -> Group:
    ranks, index = topology.world // ep_size, rank // ep_size
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
    return Group(ep_size, local_shapes, paddings, per_rank_padded, per_rank, ranks, spans)


def zero3(shapes: Shapes, world: int, rank: int) -> tuple[dict[Span, int], int]:
    """Return the spans that a rank owns under ZeRO-3, {span: offset in its flat buffer}, and the length of this buffer.

    A span is a range of elements of a flattened parameter. `shapes`: shape of every parameter, by name. `world`: number of
    ranks. Offsets and length are in elements.
    """
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
    """Yield the spans (ranges of elements of flattened parameters) of fp32 weights that `rank` writes into a checkpoint.

    `shapes`: shape of every parameter of the model, by name. `topology`: how parameters are divided over the ranks. Under
    ZeRO-0 every rank has all weights, and whole parameters are assigned to the ranks in turn.
    """
    if topology.stage == 0:
        for i, (name, shape) in enumerate(shapes.items()):
            if i % topology.world == rank:
                yield Span(name, 0, prod(shape))
    elif topology.stage == 3:
        yield from zero3(shapes, topology.world, rank)[0]
    else:
        for group in groups(shapes, topology, rank):
            yield from group.spans
