"""The variants of a model that are compared: named overrides of one base configuration."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ablations.size import matched_widths
from raphael_dist.config import Config, load_config
from raphael_dist.errors import UserError, did_you_mean

# What a campaign sets itself, and by which option.
OWN = {"run.dir": "--out", "run.seed": "--seeds", "train.max_steps": "--images"}
WIDTH = "model.expert_width"


@dataclass(frozen=True)
class Variant:
    """One model. overrides: text by field. match: the expert width is chosen so that it has as much of this as `full`."""

    name: str
    what: str
    overrides: dict[str, str]
    match: Literal["parameters", "flops"] | None = None


@dataclass(frozen=True)
class Base:
    """The configuration that all variants start from: a preset or file, and overrides by field."""

    name: str
    overrides: dict[str, str]

    def config(self, more: dict[str, str] | None = None) -> Config:
        """Return the configuration with further overrides, which go before the base's. UserError for what is wrong."""
        return load_config(self.name, [f"{key}={text}" for key, text in {**self.overrides, **(more or {})}.items()])


def read_base(name: str, overrides: Sequence[str]) -> Base:
    """Return the base. UserError: what a campaign sets itself, or a model with nothing to take out."""
    load_config(name, overrides)  # overrides that are written wrong, or twice
    base = Base(name, dict(one.split("=", 1) for one in overrides))
    for key, option in OWN.items():
        if key in base.overrides:
            raise UserError(f"{key}: given {base.overrides[key]}, but a campaign sets it for each run; use {option}")
    config = base.config()
    for field, value in (
        ("model.space_experts", config.model.space_experts),
        ("model.time_experts", config.model.time_experts),
        ("edge.weight", config.edge.weight),
    ):
        if not value:
            raise UserError(f"--config {name}: {field} is 0, and a campaign compares with the whole model; set it above 0")
    if not config.data.val_shards:
        raise UserError(f"--config {name}: data.val_shards is empty, and variants are compared by the loss on held-out data")
    return base


def groups_of(base: Base) -> dict[str, list[Variant]]:
    """Return the variants by group, the most important first."""
    config = base.config()
    space, time, last = config.model.space_experts, config.model.time_experts, config.diffusion.num_timesteps
    dense = {"model.space_experts": "0", "model.time_experts": "0"}
    shared, bands = {"model.shared_expert": "1"}, {"model.time_routing": "boundaries"}
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
            Variant(f"edges-{t}", f"edge loss below timestep {t}", {"edge.max_timestep": str(t)})
            for t in (last * quarter // 4 for quarter in (1, 2, 3, 4))
        ],
        "later": [
            Variant("shared", "a shared expert, all narrower, at equal FLOPs", shared, "flops"),
            Variant("finer", f"{2 * space} space and {2 * time} time experts, narrower, at equal FLOPs", finer, "flops"),
            Variant("shared-finer", "both of these, at equal FLOPs", {**shared, **finer}, "flops"),
            Variant("time-boundaries", "time experts with fixed boundaries", bands),
        ],
    }


def choose(base: Base, words: Sequence[str]) -> list[Variant]:
    """Return `full` and the variants that the words (groups, names, `all`) name, each model once, widths as matched.

    UserError: a word that is neither.
    """
    groups = groups_of(base)
    known = [variant for group in groups.values() for variant in group]
    names = {variant.name: [variant] for variant in known}
    choice = {"all": known, **groups, **names}
    if unknown := [word for word in words if word not in choice]:
        hint = did_you_mean(unknown[0], choice)
        raise UserError(f"--variants: given {unknown[0]!r}{hint}; groups: {', '.join([*groups, 'all'])}; --list names all")
    wanted = [variant for word in words for variant in choice[word]]
    first = _first_of_each_model(base, known)
    kept = {first[variant.name] for variant in [known[0], *wanted]}
    return [_matched(base, variant) for variant in known if variant.name in kept]


def _first_of_each_model(base: Base, variants: Iterable[Variant]) -> dict[str, str]:
    """Return, by variant, the name of the first that is the same model: 6 space experts may be the base's own number."""
    found: dict[tuple[str, str | None], str] = {}
    return {v.name: found.setdefault((_text(base, v), v.match), v.name) for v in variants}


def _text(base: Base, variant: Variant) -> str:
    try:
        return base.config(variant.overrides).model_dump_json()
    except UserError:  # it is none of the base's: 7 space experts on 2 ranks, say; told where it is wanted
        return variant.name


def _matched(base: Base, variant: Variant) -> Variant:
    """Return the variant with its width. UserError: it does not go with the base."""
    try:
        config = base.config(variant.overrides)
    except UserError as error:
        raise UserError(f"--variants: {variant.name}: {error}") from None
    if variant.match is None:
        return variant
    widths = matched_widths(base.config(), config, variant.match)
    return replace(variant, overrides={**variant.overrides, WIDTH: str(list(widths)).replace(" ", "")})
