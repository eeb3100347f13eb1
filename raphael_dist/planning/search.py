"""Which expert parallelism, ZeRO stage, micro-batch, recomputation and placement to run, ranked by images a second.

Every choice that the configuration and DeepSpeed allow is reckoned: the memory of a rank, and the time of a step. What does
not fit is kept too, to say why it is not chosen.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

from raphael_dist.config import Config
from raphael_dist.engine import ds_config
from raphael_dist.errors import UserError
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.parallel.placement import mean_tokens, place
from raphael_dist.planning import memory
from raphael_dist.planning.cluster import ClusterSpec
from raphael_dist.planning.step import StepTime, step_time
from raphael_dist.planning.trace import RECOMPUTE, Profile, Recompute, profile

MICRO_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
FILLED = 0.95  # share of a device's memory that may be used: the driver, NCCL and cuDNN want the rest
# The JSON of each choice; `overlap` reduces gradients during the backward pass.
JSONS = {(0, False): "zero0", (1, False): "zero1", (2, False): "zero2", (2, True): "zero2_overlap", (3, False): "zero3"}


@dataclass(frozen=True)
class Choice:
    """One way to run: its overrides of the configuration are `settings`, and `json` is its file in `ds_configs/`."""

    space_ep: int
    time_ep: int
    stage: int
    overlap: bool
    micro_batch: int
    recompute: Recompute
    placement: str

    @property
    def json(self) -> str:
        return f"ds_configs/{JSONS[self.stage, self.overlap]}.json"

    @property
    def spreads(self) -> bool:
        """Whether ranks share experts."""
        return self.space_ep > 1 or self.time_ep > 1

    def settings(self) -> list[str]:
        """Return the overrides, written as the command line takes them."""
        found = [f"train.micro_batch={self.micro_batch}", f"model.checkpoint_activations={self.recompute}"]
        if self.spreads:
            found += [f"parallel.space_ep={self.space_ep}", f"parallel.time_ep={self.time_ep}"]
            found += [f"parallel.placement={self.placement}"]
        return found

    def apply(self, config: Config) -> Config:
        """Return the configuration as this choice runs it."""
        parallel = {"space_ep": self.space_ep, "time_ep": self.time_ep, "placement": (self.placement,)}
        return config.model_copy(
            update={
                "train": config.train.model_copy(update={"micro_batch": self.micro_batch}),
                "model": config.model.model_copy(update={"checkpoint_activations": self.recompute}),
                "parallel": config.parallel.model_copy(update=parallel),
            }
        )

    def __str__(self) -> str:
        zero = f"ZeRO-{self.stage}{' overlapped' if self.overlap else ''}"
        spread = f"ep {self.space_ep},{self.time_ep} {self.placement}" if self.spreads else "ep 1"
        return f"{zero}, {spread}, micro-batch {self.micro_batch}, recompute {self.recompute}"


@dataclass(frozen=True)
class Outcome:
    """What a choice takes: memory of a rank, time of a step, and how the batch divides."""

    choice: Choice
    memory: memory.Memory
    step: StepTime
    plan: BatchPlan
    fits: bool


@dataclass
class Search:
    """The choices for a configuration on `world` devices of a cluster.

    allowed: values that choices are restricted to, by the names of `Choice`'s fields.
    """

    config: Config
    cluster: ClusterSpec
    world: int
    allowed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    _held: dict[tuple[Any, ...], memory.Held] = field(default_factory=dict)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole model's parameters."""
        return memory.shapes_of(self.config)

    @property
    def parameters(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())

    @cached_property
    def profile(self) -> Profile:
        """What a micro-step of any size does."""
        return profile(self.config)

    def choices(self) -> Iterator[tuple[Choice, Config, BatchPlan]]:
        """Yield every choice that configuration and DeepSpeed allow, with its configuration and batch plan."""
        m = self.config.model
        sizes = [[n for n in range(1, max(1, k) + 1) if max(1, k) % n == 0] for k in (m.space_experts, m.time_experts)]
        for space, time in product(*sizes):
            for (stage, overlap), micro in product(JSONS, MICRO_BATCHES):
                for recompute, placement in product(RECOMPUTE, ("auto", "shard")):
                    choice = Choice(space, time, stage, overlap, micro, recompute, placement)
                    if self._is_wanted(choice) and (checked := self.checked(choice)):
                        yield choice, *checked

    def _is_wanted(self, choice: Choice) -> bool:
        if choice.space_ep == choice.time_ep == 1 and choice.placement != "auto":
            return False  # says nothing
        if choice.overlap and self.cluster.device == "cpu":
            return False
        return all(getattr(choice, name) in values for name, values in self.allowed.items())

    def checked(self, choice: Choice) -> tuple[Config, BatchPlan] | None:
        """Return the choice's configuration and plan, None where either is refused."""
        config = choice.apply(self.config)
        if choice.micro_batch > -(-config.train.global_batch // self.world):
            return None
        if len(config.image.buckets) > 1 and config.data.bucket_run % choice.micro_batch:
            return None
        tree = {"zero_optimization": {"stage": choice.stage, "overlap_comm": choice.overlap}}
        try:
            plan = BatchPlan.of(config, self.world)
            ds_config.merge(config, tree, plan.accumulation, self.world)
        except UserError:
            return None
        if choice.spreads:
            placed = place(config, plan)
            # `auto` that shards nothing, or all, is the same as another choice.
            if choice.placement == "auto" and len({cost.shard for cost in placed}) == 1:
                return None
        return config, plan

    def reckon(self, choice: Choice) -> Outcome | None:
        """Return what a choice comes to, None where it is refused."""
        checked = self.checked(choice)
        return None if checked is None else self.outcome(choice, *checked)

    def outcome(self, choice: Choice, config: Config, plan: BatchPlan) -> Outcome:
        """Return what a choice comes to that was checked."""
        trace = self.profile.at(choice.micro_batch, choice.recompute)
        where = memory.topology(config, choice.stage, self.world)
        activations = trace.peak + exchanged_bytes(config, plan)
        gpu = self.cluster.device == "gpu"
        held = self._states_of(config, where, plan, choice.overlap)
        whole = memory.memory(config, held, activations, allocator=gpu)
        step = step_time(config, plan, trace, held, self.cluster, self.parameters, len(self.shapes), choice.overlap)
        return Outcome(choice, whole, step, plan, whole.total <= FILLED * self.cluster.memory_gb.value * 1e9)

    def _states_of(self, config: Config, where: memory.Topology, plan: BatchPlan, overlap: bool) -> memory.Held:
        """Return what a rank holds; many choices hold the same."""
        key = where, plan.accumulation > 1, overlap
        if key not in self._held:
            self._held[key] = memory.held(config, self.shapes, where, plan.accumulation, overlap)
        return self._held[key]

    def ranked(self) -> list[Outcome]:
        """Return all outcomes: first what fits, by images a second, then what does not, by memory. UserError: no choice."""
        found = [self.outcome(*each) for each in self.choices()]
        if not found:
            raise UserError(
                f"train.global_batch = {self.config.train.global_batch} on {self.world} ranks: no choice is possible"
                f"{f' with {self.allowed}' if self.allowed else ''}; use fewer ranks or a larger global batch"
            )
        fastest = max((o.step.images_per_s for o in found if o.fits), default=0.0)

        def order(o: Outcome) -> tuple[float, ...]:
            if not o.fits:
                return (1, o.memory.total)
            # What is within a hundredth of the fastest counts as equal: least recomputation first, then least memory.
            equal = o.step.images_per_s > 0.99 * fastest
            return (0, not equal, RECOMPUTE.index(o.choice.recompute) if equal else -o.step.images_per_s, o.memory.total)

        return sorted(found, key=order)


def exchanged_bytes(config: Config, plan: BatchPlan) -> int:
    """Return the activations that exchanges with spread experts add to a rank's peak.

    On each level where space experts are sharded, a block keeps the rows of the other ranks (fixed sizes): as they come,
    put together, and the outputs for them. With recomputation one block at a time has them.
    """
    width, extra = 2 if config.train.dtype == "bfloat16" else 4, []
    for cost in place(config, plan):
        if cost.shard and cost.kind == "space":
            rows = plan.micro_batch * mean_tokens(config, cost.level) * (cost.ep - 1)
            one = 3 * rows * config.model.channels[cost.level] * width
            extra.append(one * (cost.blocks if config.model.checkpoint_activations == "none" else 1))
    if not extra:
        return 0
    return sum(extra) if config.model.checkpoint_activations == "none" else max(extra)


def reasons(best: Outcome, ranked: list[Outcome], limit_gb: float) -> list[str]:
    """Return why the first is the first: what is near it and slower, or would be faster and does not fit."""
    found = []
    for name, text in (
        ("micro_batch", "micro-batch"),
        ("recompute", "recompute"),
        ("stage", "ZeRO-"),
        ("space_ep", "space_ep"),
        ("time_ep", "time_ep"),
    ):
        others = [o for o in ranked if _differs_in(o.choice, best.choice, name)]
        if not others:
            continue
        rival = max(others, key=lambda o: o.step.images_per_s)
        value = getattr(rival.choice, name)
        speed = f"{rival.step.images_per_s / best.step.images_per_s - 1:+.1%} images/s"
        size = f"{rival.memory.total / 1e9:.1f} GB"
        fits = "" if rival.fits else f", over the {FILLED * limit_gb:.0f} GB that may be used"
        found.append(f"{text}{'' if text.endswith('-') else ' '}{value} instead: {speed}, {size}{fits}")
    return found


def _differs_in(one: Choice, other: Choice, name: str) -> bool:
    names = {"micro_batch", "recompute", "stage", "space_ep", "time_ep"} - {name}
    if name != "stage" and one.overlap != other.overlap:
        return False
    return getattr(one, name) != getattr(other, name) and all(getattr(one, n) == getattr(other, n) for n in names)


def restriction(text: str) -> tuple[str, tuple[Any, ...]]:
    """Return a field of `Choice` and the values that `NAME=VALUE[,VALUE]` allows. Raises UserError."""
    name, _, given = text.partition("=")
    known = {"space_ep": int, "time_ep": int, "stage": int, "micro_batch": int, "recompute": str, "placement": str}
    try:
        return name, tuple(known[name](value) for value in given.split(","))
    except (KeyError, ValueError):
        raise UserError(
            f"--only {text}: give one of {', '.join(known)} and its value, e.g. stage=2 or micro_batch=4,8"
        ) from None
