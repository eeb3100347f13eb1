"""Variants of a model: named overrides of one base configuration."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ablations.size import matched_widths
from raphael_dist.config.schema import Config, load_config
from raphael_dist.errors import UserError, did_you_mean

# Fields that a campaign sets for each run, and the option of tools/ablate.py that determines each.
OWN = {"run.dir": "--out", "run.seed": "--seeds", "train.max_steps": "--images"}
WIDTH = "model.expert_width"
_FLOW = {"diffusion.prediction": "flow", "diffusion.zero_terminal_snr": "false", "diffusion.min_snr_gamma": "0"}


@dataclass(frozen=True)
class Variant:
    """One variant of the model in an ablation campaign.

    Attributes:
        name: name on the command line and of its folder.
        what: description for tables.
        overrides: settings that differ from the base configuration, as strings by field ("section.key").
        match: which number is made equal to that of the variant `full` (the base configuration itself) by scaling the
            expert width: "parameters" or "flops". None: the width is not scaled.
        seeds: number of runs of the variant, each with another seed.
    """

    name: str
    what: str
    overrides: dict[str, str]
    match: Literal["parameters", "flops"] | None = None
    seeds: int = 1


@dataclass(frozen=True)
class Base:
    """The configuration that all variants change: `name` of a preset or file, and overrides (strings by field)."""

    name: str
    overrides: dict[str, str]

    def config(self, overrides: dict[str, str] | None = None) -> Config:
        """Return the configuration with further overrides, which take precedence. UserError: it is invalid."""
        return load_config(self.name, [f"{key}={text}" for key, text in {**self.overrides, **(overrides or {})}.items()])


def read_base(name: str, overrides: Sequence[str]) -> Base:
    """Read the configuration that all variants change, and check that a campaign can use it.

    Raises UserError if `overrides` has fields that a campaign sets, if the model lacks space experts, time experts or the
    edge loss, or if there are no validation shards.
    """
    load_config(name, overrides)  # reports malformed and repeated overrides
    base = Base(name, dict(override.split("=", 1) for override in overrides))
    for key, option in OWN.items():
        if key in base.overrides:
            raise UserError(
                f"{key}={base.overrides[key]} cannot be set here, because a campaign sets {key} for each run. Use {option} "
                "instead."
            )
    config = base.config()
    for field, value in (
        ("model.space_experts", config.model.space_experts),
        ("model.time_experts", config.model.time_experts),
        ("edge.weight", config.edge.weight),
    ):
        if not value:
            raise UserError(
                f"--config={name} must describe a model with Space-MoE, Time-MoE and edge loss, because the variants leave "
                f"them out, but {field} is 0. Set {field} above 0."
            )
    if not config.data.val_shards:
        raise UserError(f"--config={name} requires held-out data, but data.val_shards is empty. Set it to other shards.")
    return base


def groups_of(base: Base, steps: int) -> dict[str, list[Variant]]:
    """Return all variants by the name of their group, the most important group first. `steps`: optimizer steps of a run."""
    config = base.config()
    space, time, last = config.model.space_experts, config.model.time_experts, config.diffusion.num_timesteps
    dense = {"model.space_experts": "0", "model.time_experts": "0"}
    shared, bands = {"model.shared_expert": "1"}, {"model.time_routing": "boundaries"}
    fixed = {**bands, "model.gate_gradient": "none", "model.gate_noise": "0", "model.balance_weight": "0"}
    attended = {"model.mask_padding": "true"}
    finer = {"model.space_experts": str(2 * space), "model.time_experts": str(2 * time)}
    return {
        "main": [
            Variant("full", "as configured", {}),
            Variant("no-space", "without Space-MoE", {"model.space_experts": "0"}),
            Variant("no-time", "without Time-MoE", {"model.time_experts": "0"}),
            Variant("no-edge", "without edge loss", {"edge.weight": "0"}),
            Variant("dense-flops", "dense at equal FLOPs", dense, "flops"),
            Variant("dense-parameters", "dense at equal parameters", dense, "parameters"),
        ],
        "experts": [Variant(f"space-{n}", f"{n} space experts", {"model.space_experts": str(n)}) for n in range(9)],
        "alpha": [
            Variant(f"alpha-{a:g}", f"alpha {a:g}", {"model.mask_threshold": f"{a:g}"}) for a in (0, 0.2, 0.4, 0.6, 0.8)
        ],
        "edges": [
            Variant(f"edges-{t}", f"edge loss only below timestep {t}", {"edge.max_timestep": str(t)})
            for t in (last * quarter // 4 for quarter in (1, 2, 3, 4))
        ],
        "later": [
            Variant("shared", "with a shared expert, narrower, at equal FLOPs", shared, "flops"),
            Variant("finer", f"{2 * space} space and {2 * time} time experts, narrower, at equal FLOPs", finer, "flops"),
            Variant("shared-finer", "with shared and twice as many experts, at equal FLOPs", {**shared, **finer}, "flops"),
            Variant("time-boundaries", "time experts with fixed boundaries", bands),
        ],
        "gates": [
            Variant("balanced", "balance loss over attended tokens", {**attended, "model.balance_weight": "0.01"}),
            Variant("unbalanced", "without balance loss", {"model.balance_weight": "0"}),
            Variant("annealed", "gate noise falls to 0 at half of the steps", {"model.gate_noise_steps": str(steps // 2)}),
            Variant("noisy", "gate noise in all steps", {"model.gate_noise_steps": "0"}),
            Variant("quiet", "a tenth of the gate noise", {"model.gate_noise": f"{config.model.gate_noise / 10:g}"}),
            Variant("padding", "padding tokens are routed as well", {"model.mask_padding": "false"}),
            Variant("fixed", "gates as initialised, no training, noise or balance; fixed time boundaries", fixed),
        ],
        "recipes": [
            Variant("muon", "Muon for hidden matrices", {"optim.kind": "muon"}),
            Variant("flow", "rectified flow", _FLOW),
        ],
    }


def choose(base: Base, words: Sequence[str], seeds: int = 1, images: int | None = None) -> list[Variant]:
    """Return the variants to train, with their numbers of seeds: `full`, and those that the user names.

    `full` is the base configuration itself, with which the other variants are compared. If a variant's field `match` is
    set, its expert width is scaled so that it has as many parameters or FLOPs as `full`, up to rounding.

    Args:
        base: the configuration that the variants change.
        words: groups, names of variants or `all`. A word "NAME:N" chooses N seeds for NAME. Of several variants with the
            same model, only the first is returned.
        seeds: number of seeds of variants that are named without ":N". `full` has at least as many seeds as any other
            variant, because differences to it are computed between runs with the same seed.
        images: images of each run, see `steps_of`.

    Raises:
        UserError: unknown name, or N is not a positive number.
    """
    groups = groups_of(base, steps_of(base, images))
    known = [variant for group in groups.values() for variant in group]
    choice = {"all": known, **groups, **{variant.name: [variant] for variant in known}}
    first, count_of = _first_of_each_model(base, known), dict[str, int]()
    for word in sorted(words, key=lambda word: ":" in word):  # NAME:N overrides the number of seeds of a group
        name, _, own = word.partition(":")
        if name not in choice:
            hint = did_you_mean(name, choice)
            raise UserError(
                f"--variants={word} must be a group or the name of a variant{hint}. The groups are "
                f"{', '.join([*groups, 'all'])}; --list shows the names."
            )
        if own and not (own.isdecimal() and int(own)):
            raise UserError(f"--variants={word} must be NAME:N with N seeds, but N is {own!r}. Use e.g. {name}:3.")
        count_of |= {first[variant.name]: int(own or seeds) for variant in choice[name]}
    full = known[0].name
    count_of[full] = max(count_of.get(full, seeds), *count_of.values(), 1)
    return [
        _matched(base, replace(v, seeds=count_of[v.name])) for v in known if v.name in count_of and first[v.name] == v.name
    ]


def steps_of(base: Base, images: int | None) -> int:
    """Return the optimizer steps of a run of `images` images, rounded up. None: train.max_steps."""
    train = base.config().train
    return train.max_steps if images is None else -(-images // train.global_batch_size)


def _first_of_each_model(base: Base, variants: Iterable[Variant]) -> dict[str, str]:
    """Return {name of a variant: name of the first variant with the same model}.

    E.g. the variant with the base's own number of experts is the same as `full`, the base itself.
    """
    first: dict[tuple[str, str | None], str] = {}
    return {v.name: first.setdefault((_text(base, v), v.match), v.name) for v in variants}


def _text(base: Base, variant: Variant) -> str:
    try:
        return base.config(variant.overrides).model_dump_json()
    except UserError:  # invalid, e.g. 7 space experts on 2 ranks; reported if it is selected
        return variant.name


def _matched(base: Base, variant: Variant) -> Variant:
    """Return `variant` with its expert width scaled as its field `match` requires.

    Raises UserError if the overrides of the variant are not valid with the base configuration.
    """
    try:
        config = base.config(variant.overrides)
    except UserError as error:
        raise UserError(f"--variants={variant.name} is incompatible with the base configuration: {error}") from None
    if variant.match is None:
        return variant
    widths = matched_widths(base.config(), config, variant.match)
    return replace(variant, overrides={**variant.overrides, WIDTH: str(list(widths)).replace(" ", "")})
