"""Every knob, typed and strict. Importing this module does not import torch, so `--help` and `--dry-run` are instant.

Precedence, lowest first: the defaults below, the preset or YAML file of `--config`, then dotted overrides
(`train.max_steps=50`) from left to right. Numbers that DeepSpeed also has (micro-batch, accumulation, clipping, dtype)
are owned here; see `ds_config.py`.
"""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from raphael_dist.config_errors import explain
from raphael_dist.errors import UserError, did_you_mean

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dispatch = Literal["auto", "all_to_all", "all_gather"]
Placement = Literal["auto", "move", "keep"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Run(Section):
    dir: Path = Field(Path("runs/default"), description="checkpoints, logs, metrics and samples of one run")
    seed: Seed = Field(0, description="fixes weights, data order, noise and timesteps")
    fresh: bool = Field(False, description="start anew where checkpoints exist but none verifies; they are kept aside")
    init_from: Path | None = Field(None, description="checkpoint in any layout whose weights a new run starts from")
    hang_timeout_s: PositiveFloat = Field(600.0, description="a step that takes longer ends the run; see watchdog.py")
    lock_wait_s: NonNegativeFloat = Field(0.0, description="how long to wait for a run.dir that is in use")


class Model(Section):
    channels: tuple[Positive, ...] = Field(
        (320, 640, 1280, 1280), min_length=1, description="U-Net width per level, outermost first"
    )
    attention: tuple[bool, ...] = Field((True, True, True, False), description="which levels hold transformer blocks")
    layers_per_block: Positive = 2
    head_dim: Positive = Field(64, description="width of one attention head")
    norm_groups: Positive = 32
    latent_channels: Positive = Field(4, description="channels of the image encoder's latents (3 in pixel space)")
    text_width: Positive = Field(1024, description="width of the text encoder's tokens")
    space_experts: NonNegative = Field(6, description="experts of each Space-MoE; 0 turns the layer off")
    time_experts: NonNegative = Field(4, description="experts of each Time-MoE; 0 keeps the dense feed-forward layer")
    expert_width: tuple[Positive, ...] = Field((1280, 2560, 5120, 5120), description="hidden width of an expert per level")
    time_activation: Literal["gelu", "geglu"] = Field("gelu", description="geglu only to upcycle a dense checkpoint")
    gate_width: Positive = Field(128, description="hidden width of the text and time gates")
    gate_noise: NonNegativeFloat = Field(
        1.0, description="standard deviation of the noise on the gates' logits, in training"
    )
    gate_gradient: Literal["straight_through", "none", "scaled"] = "straight_through"
    mask_threshold: Fraction = Field(0.2, description="alpha of Sec. 3.1: a token's region, relative to its largest weight")
    balance_weight: NonNegativeFloat = Field(0.0, description="weight of the text gates' load-balance loss; 0 in the paper")
    mask_padding: bool = Field(False, description="leave padding tokens out of the Space-MoE")
    space_backend: Literal["auto", "grouped", "wide", "literal", "megablocks"] = Field(
        "auto", description="how the Space-MoE runs; megablocks: its grouped product for all experts, on a GPU"
    )
    checkpoint_activations: bool = Field(True, description="recompute transformer blocks in the backward pass")

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        for name in ("attention", "expert_width"):
            given = getattr(self, name)
            if len(given) != len(self.channels):
                raise ValueError(
                    f"model.{name} has {len(given)} entries but model.channels has {len(self.channels)}; give one per level"
                )
        for channels in self.channels:
            if channels % self.norm_groups or channels % self.head_dim:
                raise ValueError(
                    f"model.channels {channels} must be a multiple of model.norm_groups ({self.norm_groups}) "
                    f"and of model.head_dim ({self.head_dim})"
                )
        return self


class Edge(Section):
    weight: NonNegativeFloat = Field(1.0, description="weight of the edge loss; 0 removes the edge modules")
    max_timestep: NonNegative = Field(500, description="T_c of Sec. 3.2: no edge loss at or above this timestep")
    focal_alpha: Fraction = 0.5
    focal_gamma: NonNegativeFloat = 2.0
    channels: Positive = Field(16, description="width of the edge modules")


class Diffusion(Section):
    num_timesteps: Positive = 1000
    schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    beta_start: PositiveFloat = 0.00085
    beta_end: PositiveFloat = 0.012
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    stratified: bool = Field(True, description="spread the timesteps of a global batch evenly over the range")


class Text(Section):
    encoder: str = Field("minilm", description="'minilm' (ships in a package) or the folder of a transformers text encoder")
    max_tokens: Positive = 77


class Image(Section):
    encoder: str = Field("none", description="'none' (pixel space) or the folder of a diffusers AutoencoderKL")
    buckets: tuple[tuple[Positive, Positive], ...] = Field(((64, 64),), description="image sizes [height, width]")

    @model_validator(mode="after")
    def _has_buckets(self) -> Self:
        if not self.buckets or len(set(self.buckets)) != len(self.buckets):
            raise ValueError(f"image.buckets must be distinct sizes [height, width], given {list(self.buckets)}")
        return self


class Data(Section):
    shards: tuple[str, ...] = Field((), description="webdataset tars: paths, globs, {000..999} ranges")
    val_shards: tuple[str, ...] = Field((), description="held-out shards; empty: no validation")
    cache_dir: Path = Field(Path(".cache/raphael_dist"), description="indices, embeddings and latents, computed once")
    edges: Literal["stored", "none"] = Field("stored", description="edge maps: members of the shard, or none (no edge loss)")
    flip: bool = Field(False, description="mirror half of the images")
    window_shards: Positive = Field(16, description="samples are shuffled within this many shards at a time")
    bucket_run: Positive = Field(1, description="consecutive sample positions that share an aspect-ratio bucket")
    prefetch: NonNegative = Field(2, description="micro-batches read ahead")
    allow_change: bool = Field(False, description="let a run continue on other shards than it began with")
    max_bad_fraction: Fraction = Field(0.05, description="stop when more of the data set than this is unreadable")


class Optim(Section):
    kind: Literal["adamw", "sgd"] = Field("adamw", description="sgd (no momentum) is for numerical tests")
    lr: PositiveFloat = 1e-4
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    warmup_steps: NonNegative = 0
    decay: Literal["constant", "cosine"] = Field("constant", description="after warm-up; cosine ends at train.max_steps")
    clip: NonNegativeFloat = Field(1.0, description="largest global gradient norm; 0 turns clipping off")


class Train(Section):
    max_steps: Positive = 1000
    global_batch: Positive = Field(32, description="images per optimizer step, on any number of ranks")
    micro_batch: Positive = Field(8, description="images per rank per forward pass")
    dtype: Literal["float32", "bfloat16"] = "float32"
    caption_drop: Fraction = Field(0.1, description="share of captions replaced by the empty one, for guidance")
    check_gradients: bool = Field(False, description="debug: stop when a parameter got no gradient on some rank")
    max_skipped: Positive = Field(3, description="end the run at this many steps in a row without a usable gradient")
    spike_sigma: NonNegativeFloat = Field(6.0, description="a spike is so many deviations above the mean; 0: no rule")
    spike_window: Positive = Field(100, description="last losses that the mean and the deviation are taken over")
    spike_action: Literal["warn", "skip", "rollback"] = Field("warn", description="rollback: to the newest checkpoint")
    log_every: Positive = 10
    val_every: NonNegative = Field(0, description="0: only at the end")
    sample_every: NonNegative = Field(0, description="0: only at the end")


class Ema(Section):
    enabled: bool = True
    decay: Fraction = 0.9999
    warmup: bool = Field(True, description="use min(decay, (1 + step) / (10 + step))")


class Checkpoint(Section):
    every: NonNegative = Field(1000, description="steps; 0: only at the end")
    keep: Positive = Field(2, description="newest checkpoints to keep")
    keep_every: NonNegative = Field(0, description="also keep each checkpoint of a multiple of this step; 0: none")
    background: bool = Field(True, description="write while training goes on")


class Parallel(Section):
    space_ep: Positive = Field(1, description="ranks that share one set of space experts")
    time_ep: Positive = Field(1, description="ranks that share one set of time experts")
    elastic: bool = Field(False, description="make space_ep and time_ep smaller where they do not fit the number of ranks")
    dispatch: Dispatch = Field("auto", description="tokens go only where needed, everywhere, or as density says")
    placement: tuple[Placement, ...] = Field(
        ("auto",),
        description="move rows to spread experts, keep all on every rank, or what sends less; one, or one per level",
    )

    @field_validator("placement", mode="before")
    @classmethod
    def _one_for_all_levels(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class Sample(Section):
    prompts: tuple[str, ...] = ()
    steps: Positive = 25
    guidance: NonNegativeFloat = 4.5
    scheduler: Literal["ddim", "dpm++"] = "ddim"
    seed: Seed = 0


class Config(Section):
    run: Run = Run()
    model: Model = Model()
    edge: Edge = Edge()
    diffusion: Diffusion = Diffusion()
    text: Text = Text()
    image: Image = Image()
    data: Data = Data()
    optim: Optim = Optim()
    train: Train = Train()
    ema: Ema = Ema()
    checkpoint: Checkpoint = Checkpoint()
    parallel: Parallel = Parallel()
    sample: Sample = Sample()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.edge.max_timestep > self.diffusion.num_timesteps:
            raise ValueError(
                f"edge.max_timestep is {self.edge.max_timestep}, "
                f"beyond diffusion.num_timesteps = {self.diffusion.num_timesteps}"
            )
        if len(self.image.buckets) > 1:
            micro, run = self.train.micro_batch, self.data.bucket_run
            if run % micro:
                raise ValueError(
                    f"data.bucket_run = {run} must be a multiple of train.micro_batch = {micro} with several image.buckets: "
                    f"a micro-batch holds one image size; nearest: {-(-run // micro) * micro}"
                )
        placement, levels = self.parallel.placement, len(self.model.channels)
        if len(placement) not in (1, levels):
            raise ValueError(
                f"parallel.placement has {len(placement)} entries but model.channels has {levels}; "
                "give one word (auto, move, keep), or one per level"
            )
        if not self.diffusion.beta_start <= self.diffusion.beta_end < 1:
            raise ValueError(
                f"diffusion.beta_start = {self.diffusion.beta_start} and beta_end = {self.diffusion.beta_end} must satisfy "
                "beta_start <= beta_end < 1"
            )
        if self.sample.steps >= self.diffusion.num_timesteps:
            raise ValueError(
                f"sample.steps = {self.sample.steps} must be below diffusion.num_timesteps = {self.diffusion.num_timesteps}"
            )
        for kind in ("space", "time"):
            experts, ep = getattr(self.model, f"{kind}_experts"), getattr(self.parallel, f"{kind}_ep")
            if ep > 1 and (experts == 0 or experts % ep):
                allowed = [n for n in range(1, experts + 1) if experts % n == 0] or [1]
                raise ValueError(
                    f"parallel.{kind}_ep = {ep} must divide model.{kind}_experts = {experts}; allowed: {allowed}"
                )
        return self


# What must be equal for a checkpoint's weights to fit; everything else may change on resume.
ARCHITECTURE_FIELDS = (
    "channels", "attention", "layers_per_block", "head_dim", "norm_groups", "latent_channels", "text_width",
    "space_experts", "time_experts", "expert_width", "time_activation", "gate_width",
)  # fmt: skip


def preset_names() -> list[str]:
    """Return the names of the presets that ship with the package."""
    folder = resources.files("raphael_dist") / "presets"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """Read a preset or YAML file, apply `key=value` overrides, validate. Raises UserError naming field and values."""
    tree = _read_yaml(name_or_path)
    for override in overrides:
        _apply_override(tree, override)
    return config_from_tree(tree)


def config_from_tree(tree: dict[str, Any]) -> Config:
    """Validate a nested dict. Raises UserError with one line for what is wrong."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError("; ".join(explain(e, Config) for e in error.errors())) from None


def to_yaml(config: Config) -> str:
    """Return the whole resolved tree as YAML that `load_config` reads back unchanged."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)


def _read_yaml(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise UserError(f"--config {name_or_path}: no such file")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--config {name_or_path}: cannot be read: {error}") from None
    elif name_or_path in preset_names():
        text = (resources.files("raphael_dist") / "presets" / f"{name_or_path}.yaml").read_text()
    else:
        hint = did_you_mean(name_or_path, preset_names())
        raise UserError(
            f"--config {name_or_path}: no such preset{hint}; presets: {', '.join(preset_names())}, or a .yaml file"
        )
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"--config {name_or_path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"--config {name_or_path}: must be a mapping of sections, got {type(tree).__name__}")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    section, dot, field = key.partition(".")
    if not (separator and dot and section and field) or "." in field:
        raise UserError(f"argument {override!r}: overrides are written section.key=value, e.g. train.max_steps=50")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if not isinstance(tree.setdefault(section, {}), dict):
        raise UserError(f"{section}: must be a section of keys in the configuration file")
    tree[section][field] = _as_field_type(section, field, value, text)


def _as_field_type(section: str, field: str, value: Any, text: str) -> Any:
    """YAML reads 1e-4 as a string and a single shard as a scalar; give the field what it plainly means."""
    info = Config.model_fields.get(section)
    known = info.annotation.model_fields.get(field) if info and isinstance(info.annotation, type) else None
    kind = str(known.annotation) if known is not None else ""
    if ("Path" in kind or kind == "<class 'str'>") and value is not None:
        return text
    if kind.startswith("tuple") and not isinstance(value, list):
        return [text if kind.startswith("tuple[str") else value]
    return value
