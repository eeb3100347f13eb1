"""Which rank holds which stretch of which parameter, for every ZeRO stage and every expert parallelism; no rank has to run.

ZeRO-1 and 2 lay the parameters of a group end to end, round the sum up, and cut it into equal parts. A group is either all
that is replicated, or the experts that are spread over equally many ranks. ZeRO-3 cuts every parameter by itself.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from raphael_dist.convert.source import stacked

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Topology:
    """Ranks, ranks that share a set of space and of time experts, ZeRO stage.

    alignment: elements that a parameter of ZeRO-1 and 2 is rounded up to. kept: (kind, level) of experts that every rank
    holds all the same (`placement`), of a U-Net of `levels`.
    """

    world: int = 1
    space_ep: int = 1
    time_ep: int = 1
    stage: int = 1
    alignment: int = 1
    kept: frozenset[tuple[str, int]] = frozenset()
    levels: int = 0

    def spread(self, name: str) -> int:
        """Return over how many ranks the parameter's experts are spread; 1 for what every rank holds whole."""
        found = stacked(name)
        if found is None:
            return 1
        kind = "space" if found[0].endswith("space_moe") else "time"
        if self.kept and (kind, self._level(name)) in self.kept:
            return 1
        return self.space_ep if kind == "space" else self.time_ep

    def _level(self, name: str) -> int:
        stage, number, _ = name.split(".", 2)
        if stage == "mid_block":
            return self.levels - 1
        return int(number) if stage == "down_blocks" else self.levels - 1 - int(number)


@dataclass(frozen=True)
class Slot:
    """Elements [start, start + numel) of a whole parameter, at `offset` of this rank's part of the group."""

    name: str
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class Group:
    """A parameter group as one rank of ZeRO-1 or 2 sees it.

    shapes: what this rank computes with, in order. paddings: after each parameter. part: elements that each rank steps;
    lean: those that are no padding at the end. ranks: over which it is cut; `index` is this rank's place among them.
    """

    spread: int
    shapes: dict[str, tuple[int, ...]]
    paddings: list[int]
    part: int
    lean: int
    ranks: int
    index: int
    slots: tuple[Slot, ...]

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
    part = -(-at // (2 * ranks)) * 2  # an even number each, as DeepSpeed rounds for its all-gather
    low, high = index * part, (index + 1) * part
    slots = []
    for name, offset in zip(names, offsets, strict=True):
        shape, first = here[name]
        begin, end = max(offset, low), min(offset + prod(shape), high)
        if begin < end:
            slots.append(Slot(name, first + begin - offset, end - begin, begin - low))
    lean = max(0, min(at, high) - low)
    local_shapes = {name: shape for name, (shape, _) in here.items()}
    return Group(spread, local_shapes, paddings, part, lean, ranks, index, tuple(slots))


def zero3(shapes: Shapes, world: int, rank: int) -> tuple[list[Slot], int]:
    """Return a rank's parts under ZeRO-3, and how many elements they take with padding."""
    slots, at = [], 0
    for name, shape in shapes.items():
        each = -(-prod(shape) // world)
        start = rank * each
        numel = min(each, prod(shape) - start)
        if numel > 0:
            slots.append(Slot(name, start, numel, at))
        at += each
    return slots, at


def slots(shapes: Shapes, topology: Topology, rank: int) -> Iterator[Slot]:
    """Yield what a rank owns of the fp32 weights, in any stage; under ZeRO-0 ranks share the parameters."""
    if topology.stage == 0:
        for i, (name, shape) in enumerate(shapes.items()):
            if i % topology.world == rank:
                yield Slot(name, 0, prod(shape), 0)
    elif topology.stage == 3:
        yield from zero3(shapes, topology.world, rank)[0]
    else:
        for group in groups(shapes, topology, rank):
            yield from group.slots
