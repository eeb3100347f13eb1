"""Searches for the fastest settings: expert parallelism, ZeRO stage, micro-batch, recomputation and placement of experts.

A choice is one combination of these settings. For every choice that the configuration and DeepSpeed allow, the memory of a
rank and the time of a step are predicted. Choices that do not fit into memory stay in the ranking, so that a report can
state why they were rejected.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import prod

from raphael_dist.config.schema import Config
from raphael_dist.config.types import bytes_per_element
from raphael_dist.convert.source_checkpoint import parameter_shapes
from raphael_dist.convert.zero_partition import Topology
from raphael_dist.engine import ds_config
from raphael_dist.errors import UserError
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.parallel.placement import choose_placement, mean_tokens
from raphael_dist.planning.cluster_spec import ClusterSpec
from raphael_dist.planning.memory import MemoryFootprint, RankMemory, memory_footprint, rank_memory, topology
from raphael_dist.planning.step_time import StepTime, step_time
from raphael_dist.planning.trace import RECOMPUTE, Profile, Recompute, profile
from raphael_dist.text import counted

MICRO_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
USABLE = 0.95  # share of a device's memory; the driver, NCCL and cuDNN need the rest
# The JSON file by ZeRO stage and whether gradients are reduced during the backward pass.
JSONS = {(0, False): "zero0", (1, False): "zero1", (2, False): "zero2", (2, True): "zero2_overlap", (3, False): "zero3"}
# Fields of `Choice` that `--only` restricts, with their types.
_RESTRICTABLE: dict[str, type[int] | type[str]] = {
    "space_ep": int, "time_ep": int, "stage": int, "micro_batch_size": int, "recompute": str, "placement": str,
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """One combination of settings for a run.

    Attributes:
        space_ep, time_ep: ranks over which the space and the time experts are sharded.
        stage: ZeRO stage.
        overlap: whether gradients are reduced during the backward pass.
        micro_batch_size: images per rank and micro-step.
        recompute: activations that the backward pass recomputes: "none", "blocks" (those of transformer blocks) or "all".
        placement: value of `parallel.placement`. "shard": shard all experts. "auto": on each U-Net level, shard experts if
            sharding sends fewer bytes than replication.
    """

    space_ep: int
    time_ep: int
    stage: int
    overlap: bool
    micro_batch_size: int
    recompute: Recompute
    placement: str

    @property
    def json(self) -> str:
        return f"ds_configs/{JSONS[self.stage, self.overlap]}.json"

    @property
    def uses_expert_parallelism(self) -> bool:
        return self.space_ep > 1 or self.time_ep > 1

    def settings(self) -> list[str]:
        """Return these settings as command-line overrides, such as "train.micro_batch_size=4".

        ZeRO stage and overlap are not among them, because the DeepSpeed JSON file (the property `json`) sets them.
        """
        settings = [f"train.micro_batch_size={self.micro_batch_size}", f"model.checkpoint_activations={self.recompute}"]
        if self.uses_expert_parallelism:
            settings += [f"parallel.space_ep={self.space_ep}", f"parallel.time_ep={self.time_ep}"]
            settings += [f"parallel.placement={self.placement}"]
        return settings

    def apply(self, config: Config) -> Config:
        """Return a copy of `config` with these settings, except ZeRO stage and overlap, which the DeepSpeed JSON sets."""
        parallel = {"space_ep": self.space_ep, "time_ep": self.time_ep, "placement": (self.placement,)}
        return config.model_copy(
            update={
                "train": config.train.model_copy(update={"micro_batch_size": self.micro_batch_size}),
                "model": config.model.model_copy(update={"checkpoint_activations": self.recompute}),
                "parallel": config.parallel.model_copy(update=parallel),
            }
        )

    def __str__(self) -> str:
        zero = f"ZeRO-{self.stage}{' overlapped' if self.overlap else ''}"
        ep = f"ep {self.space_ep},{self.time_ep} {self.placement}" if self.uses_expert_parallelism else "ep 1"
        return f"{zero}, {ep}, micro-batch {self.micro_batch_size}, recompute {self.recompute}"


@dataclass(frozen=True)
class Outcome:
    """The predictions for one choice of settings.

    Attributes:
        choice: the settings (ZeRO stage, micro-batch, recomputation, expert parallelism).
        memory: predicted peak memory per rank.
        step: predicted time of an optimizer step.
        plan: how the batch is divided over ranks.
        fits: whether a device has enough memory.
    """

    choice: Choice
    memory: RankMemory
    step: StepTime
    plan: BatchPlan
    fits: bool


@dataclass
class Search:
    """Predicts memory and speed of a run on `world` devices of a cluster, for all its possible settings.

    The settings are ZeRO stage, micro-batch, recomputation and expert parallelism. One combination of them is a `Choice`.

    Attributes:
        config: the configuration of the run.
        cluster: devices and links.
        world: number of devices.
        allowed: fields of `Choice` that the user restricts, e.g. {"stage": (1, 2)}. Only these values are considered.
        profile: traced operations of the model; None: trace the model when needed. Searches for the same model can share
            this object.
    """

    config: Config
    cluster: ClusterSpec
    world: int
    allowed: dict[str, tuple[int | str, ...]] = field(default_factory=dict)
    profile: Profile | None = None
    _footprints: dict[tuple[Topology, bool, bool], MemoryFootprint] = field(default_factory=dict)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters of the whole model, by name."""
        return parameter_shapes(self.config)

    @property
    def parameters(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())

    def get_profile(self) -> Profile:
        """Return the traced operations of a micro-step. The model is traced at the first call only."""
        if self.profile is None:
            self.profile = profile(self.config)
        return self.profile

    def choices(self) -> Iterator[tuple[Choice, Config, BatchPlan]]:
        """Yield every possible choice of settings that `allowed` permits.

        A choice is yielded with the configuration that has these settings, and with the division of the batch over ranks.
        """
        m = self.config.model
        sizes = [[n for n in range(1, max(1, k) + 1) if max(1, k) % n == 0] for k in (m.space_experts, m.time_experts)]
        for space, time in product(*sizes):
            for (stage, overlap), micro in product(JSONS, MICRO_BATCHES):
                for recompute, placement in product(RECOMPUTE, ("auto", "shard")):
                    choice = Choice(space, time, stage, overlap, micro, recompute, placement)
                    if self._is_candidate(choice) and (checked := self.check(choice)):
                        yield choice, *checked

    def _is_candidate(self, choice: Choice) -> bool:
        if not choice.uses_expert_parallelism and choice.placement != "auto":
            return False  # placement has no effect
        if choice.overlap and self.cluster.device == "cpu":
            return False
        return all(getattr(choice, name) in values for name, values in self.allowed.items())

    def check(self, choice: Choice) -> tuple[Config, BatchPlan] | None:
        """Return the configuration with the settings `choice`, and the division of the batch over ranks.

        Returns None in two cases:

        - The choice is not possible, e.g. because the micro-batch is too large.
        - Placement "auto" shards all experts or none. Another choice with placement "shard", or without expert parallelism,
          has the same effect.
        """
        config = choice.apply(self.config)
        if choice.micro_batch_size > -(-config.train.global_batch_size // self.world):
            return None
        if len(config.image.buckets) > 1 and config.data.bucket_run % choice.micro_batch_size:
            return None
        tree = {"zero_optimization": {"stage": choice.stage, "overlap_comm": choice.overlap}}
        try:
            plan = BatchPlan.of(config, self.world)
            ds_config.merge(config, tree, plan.accumulation, self.world)
        except UserError:
            return None
        uses_auto_placement = choice.uses_expert_parallelism and choice.placement == "auto"
        if uses_auto_placement and len({cost.shard for cost in choose_placement(config, plan)}) == 1:
            return None  # all levels have the same placement, so another choice is identical
        return config, plan

    def evaluate(self, choice: Choice) -> Outcome | None:
        """Predict memory and step time for a choice of settings. Returns None if the run cannot use these settings."""
        checked = self.check(choice)
        return None if checked is None else self._outcome(choice, *checked)

    def _outcome(self, choice: Choice, config: Config, plan: BatchPlan) -> Outcome:
        trace = self.get_profile().at(choice.micro_batch_size, choice.recompute)
        where = topology(config, choice.stage, self.world)
        footprint = self._footprint(config, where, plan, choice.overlap)
        activations = trace.peak + exchange_bytes(config, plan)
        memory = rank_memory(config, footprint, activations, allocator=self.cluster.device == "gpu")
        step = step_time(config, plan, trace, footprint, self.cluster, self.parameters, len(self.shapes), choice.overlap)
        return Outcome(choice, memory, step, plan, memory.total <= USABLE * self.cluster.memory_gb.value * 1e9)

    def _footprint(self, config: Config, where: Topology, plan: BatchPlan, overlap: bool) -> MemoryFootprint:
        key = where, plan.accumulation > 1, overlap  # shared by many choices
        if key not in self._footprints:
            self._footprints[key] = memory_footprint(config, self.shapes, where, plan.accumulation, overlap)
        return self._footprints[key]

    def ranked(self) -> list[Outcome]:
        """Predict memory and time of all possible choices of settings, and return the predictions, the best first.

        Choices that fit into memory come first, ordered by speed. Choices within 1% of the fastest count as equally fast and
        are ordered by the least recomputation, then by the least memory. Choices that do not fit follow, ordered by memory.

        Raises:
            UserError: no choice is possible.
        """
        outcomes = [self._outcome(*candidate) for candidate in self.choices()]
        if not outcomes:
            only = "".join(f" --only {name}={','.join(map(str, values))}" for name, values in self.allowed.items())
            raise UserError(
                f"train.global_batch_size={self.config.train.global_batch_size} cannot be divided over "
                f"{counted(self.world, 'rank')} with any ZeRO stage, expert parallelism and micro-batch "
                f"size{only and f' that the options allow:{only}'}. "
                f"Use fewer ranks, or a larger train.global_batch_size{only and ', or leave out --only'}."
            )
        fastest = max((o.step.images_per_s for o in outcomes if o.fits), default=0.0)

        def order(o: Outcome) -> tuple[float, ...]:
            if not o.fits:
                return (1, o.memory.total)
            # Within 1% of the fastest all choices count as equal: least recomputation first, then least memory.
            equal = o.step.images_per_s > 0.99 * fastest
            return (0, not equal, RECOMPUTE.index(o.choice.recompute) if equal else -o.step.images_per_s, o.memory.total)

        return sorted(outcomes, key=order)


def exchange_bytes(config: Config, plan: BatchPlan) -> int:
    """Return by how many bytes the exchanges of expert parallelism raise the peak memory of the activations.

    On each U-Net level with sharded space experts, a transformer block stores three tensors for the tokens of other ranks:
    the received tokens, the concatenated tokens and the outputs of the experts. All tokens of the other ranks are counted,
    although an exchange may send only those that are routed to this rank. With recomputation, only one block at a time
    stores these tensors. `config`: the run's configuration. `plan`: how the batch is divided over ranks.
    """
    recomputes = config.model.checkpoint_activations != "none"
    sizes = [0]
    for cost in choose_placement(config, plan):
        if cost.shard and cost.kind == "space":
            rows = plan.micro_batch_size * mean_tokens(config, cost.level) * (cost.ep - 1)
            block = 3 * rows * config.model.channels[cost.level] * bytes_per_element(config.train.dtype)
            sizes.append(block * (1 if recomputes else cost.blocks))
    return max(sizes) if recomputes else sum(sizes)


def reasons(best: Outcome, ranked: list[Outcome], limit_gb: float) -> list[str]:
    """Return lines that compare the best choice of settings with choices that differ from it in one setting.

    There is a line for each setting, e.g. for the micro-batch: "micro-batch 8 instead: -3.1% images/s, 60.2 GB". The line
    describes the fastest of the choices that differ from the best choice in this setting only.

    Args:
        best: the best choice, with predicted memory and speed.
        ranked: all choices, with predictions.
        limit_gb: memory of a device in GB.
    """
    lines = []
    for name, text in (
        ("micro_batch_size", "micro-batch "),
        ("recompute", "recompute "),
        ("stage", "ZeRO-"),
        ("space_ep", "space_ep "),
        ("time_ep", "time_ep "),
    ):
        others = [o for o in ranked if _differs_only_in(o.choice, best.choice, name)]
        if not others:
            continue
        rival = max(others, key=lambda o: o.step.images_per_s)
        speed = f"{rival.step.images_per_s / best.step.images_per_s - 1:+.1%} images/s"
        fits = "" if rival.fits else f", more than the usable {USABLE * limit_gb:.0f} GB"
        value = getattr(rival.choice, name)
        lines.append(f"{text}{value} instead: {speed}, {rival.memory.total / 1e9:.1f} GB{fits}")
    return lines


def _differs_only_in(choice: Choice, other: Choice, name: str) -> bool:
    names = {"micro_batch_size", "recompute", "stage", "space_ep", "time_ep"} - {name}
    if name != "stage" and choice.overlap != other.overlap:
        return False
    return getattr(choice, name) != getattr(other, name) and all(getattr(choice, n) == getattr(other, n) for n in names)


def restriction(text: str) -> tuple[str, tuple[int | str, ...]]:
    """Parse a value of the option --only, which restricts a setting: "stage=1,2" becomes ("stage", (1, 2)).

    Raises:
        UserError: unknown name or invalid value.
    """
    name, _, values = text.partition("=")
    try:
        return name, tuple(_RESTRICTABLE[name](value) for value in values.split(","))
    except (KeyError, ValueError):
        raise UserError(
            f"--only {text} must have the form NAME=VALUE or NAME=VALUE,VALUE, where NAME is {', '.join(_RESTRICTABLE)}. "
            "Write e.g. --only stage=2 or --only micro_batch_size=4,8."
        ) from None
