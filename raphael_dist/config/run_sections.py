"""Sections of the configuration about a run: run, optim, train, ema, checkpoint, parallel, sample."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from raphael_dist.config.lr_schedules import LrSchedule
from raphael_dist.config.types import (
    FREE,
    BelowOne,
    Dispatch,
    Dtype,
    ExpertKind,
    Fraction,
    Kernel,
    NonNegative,
    NonNegativeFloat,
    Placement,
    Positive,
    PositiveFloat,
    Scheduler,
    Section,
    free_setting,
    setting,
)


class RunConfig(Section):
    """The run: its folder, initial weights, watchdog and trackers."""

    dir: Path = free_setting(
        Path("runs/default"),
        "Folder of the run. A run resumes from the newest checkpoint in this folder. If it is not set and --config names a "
        "preset or a YAML file, the folder is runs/ and this name, e.g. runs/emoji-tiny.",
    )
    seed: NonNegative = setting(0, "Seed of the initial weights, the data order, the noise and the timesteps.")
    ignore_damaged: bool = free_setting(
        False,
        "If all checkpoints in run.dir are damaged: true renames them to damaged-* and starts a new run, false ends with "
        "an error.",
    )
    init_from: Path | None = free_setting(
        None,
        "Path of the checkpoint whose weights a new run starts from; it may have any layout of docs/checkpoints.md. null: "
        "random weights.",
    )
    reinit: tuple[Literal["edge", "space", "time", "text"], ...] = free_setting(
        (),
        "Parts of the model that may be missing in the checkpoint of run.init_from, or have other shapes there; these "
        "start with random weights. edge: the modules of the edge loss. space: Space-MoE layers (experts for image "
        "regions) and their gates. time: Time-MoE layers (experts selected by the timestep) and their gates. text: key and "
        "value projections of cross-attention. Empty: every weight must be in the checkpoint.",
    )
    hang_timeout_s: PositiveFloat = free_setting(
        600.0, "If a rank makes no progress for this many seconds, the run counts as hung and ends with exit code 76."
    )
    lock_wait_s: NonNegativeFloat = free_setting(
        0.0,
        "Seconds to wait if another process uses run.dir. If the folder is not free by then, the run ends with an "
        "error. 0: end with an error at once.",
    )
    trackers: tuple[Literal["wandb", "mlflow"], ...] = free_setting(
        (),
        "Experiment trackers that receive the metrics: wandb (Weights & Biases), mlflow. TensorBoard always receives them.",
    )
    project: str = free_setting("raphael", "Name of the project in wandb, and of the experiment in mlflow.")
    log_level: Literal["debug", "info", "warning", "error"] = free_setting(
        "warning", "Lowest level of log messages that the terminal shows. The order is debug, info, warning, error."
    )
    allow_change: tuple[str, ...] = free_setting(
        (),
        "Settings that affect results and may nevertheless differ from those of the run that is resumed, e.g. "
        "[optim.lr]. Any other such difference ends with an error.",
    )


class Optim(Section):
    """The optimizer and the learning rate."""

    kind: Literal["adamw", "muon", "sgd"] = setting(
        "adamw",
        "Optimizer. adamw: AdamW. muon: Muon (steps along the orthogonalised momentum) for the weights of hidden linear "
        "layers, experts and convolutions, and AdamW for all others, with the same learning rate; it requires ZeRO stage 0, "
        "1 or 2. sgd: SGD without momentum, which is meant for numerical tests.",
    )
    lr: PositiveFloat = setting(1e-4, "Learning rate after the warm-up.")
    betas: tuple[BelowOne, BelowOne] = setting(
        (0.9, 0.999),
        "beta1 and beta2 of Adam: decay rates of its running averages of the gradient and of the squared gradient.",
    )
    eps: PositiveFloat = setting(
        1e-8, "Small number that is added to the square root of Adam's second moment, so that no step divides by 0."
    )
    weight_decay: NonNegativeFloat = setting(
        0.0, "Weight decay of AdamW. It is not applied to norms, biases and gates (routers of the experts). 0: none."
    )
    warmup_steps: NonNegative = setting(
        0,
        "Number of steps, from the start of training, in which the learning rate rises linearly from 0 to optim.lr. 0: "
        "no warm-up.",
    )
    lr_schedule: LrSchedule = setting(
        "constant",
        "Learning-rate schedule after the warm-up, named as in transformers. constant and inverse_sqrt do not depend on "
        "train.max_steps; the others end at step train.max_steps.",
    )
    lr_schedule_args: dict[str, float] = setting(
        {}, "Arguments of optim.lr_schedule, named as in transformers, e.g. {num_cycles: 3} for cosine_with_restarts."
    )
    max_grad_norm: NonNegativeFloat = setting(
        1.0,
        "Largest norm of the gradient over all parameters. A larger gradient is scaled down to this norm (clipping). 0: "
        "no clipping.",
    )

    @property
    def has_moments(self) -> bool:
        """Whether the optimizer stores moments, running averages of gradients (AdamW and Muon do, SGD does not)."""
        return self.kind != "sgd"


class Stage(Section):
    """A range of training steps with its own settings (an entry of train.stages)."""

    until: Positive | None = Field(
        None, description="Last step of the stage. null, which only the last stage may have: train.max_steps."
    )
    set: dict[str, Any] = Field(description="Settings of the stage, as section.key: value.")


class Train(Section):
    """Training: number of steps, batch sizes, precision, logging and validation, and what ends a run."""

    max_steps: Positive = free_setting(1000, "Number of optimizer steps after which the run is complete.")
    global_batch_size: Positive = setting(
        32,
        "Images per optimizer step, over all ranks. Gradient accumulation steps = global_batch_size / (micro_batch_size x "
        "ranks).",
    )
    micro_batch_size: Positive = free_setting(
        8,
        "Images per rank in one forward and backward pass, at most. Gradient accumulation steps = global_batch_size / "
        "(micro_batch_size x ranks). If that is less than 1, the micro-batch is global_batch_size / ranks.",
    )
    dtype: Dtype = setting("float32", "Precision of the forward and backward passes. The master weights are always float32.")
    compile: bool = free_setting(False, "Compile parts of the model with torch.compile. Incompatible with ZeRO stage 3.")
    cuda_graphs: bool = free_setting(
        False,
        "Run the U-Net's forward and backward passes as CUDA graphs. Requires ZeRO stage 1 or 2, and train.dtype=bfloat16.",
    )
    kernels: tuple[Kernel, ...] = free_setting(
        (),
        "Parts of a step that run in Triton kernels of this project instead of torch's operations. Requires a GPU. The "
        "results agree up to rounding. group_norm: GroupNorm with SiLU. layer_norm: the backward pass of LayerNorm. "
        "space_moe, time_moe: experts of the Space-MoE or Time-MoE layers, each only on the tokens that are routed to it. "
        "adamw: AdamW, the moving average (EMA) and the model's copy of the weights in one pass; requires ZeRO stage 1 or "
        "2. No kernel has been tested on a GPU yet.",
    )
    caption_dropout: Fraction = setting(
        0.1,
        "Fraction of the captions that are replaced by the empty caption in training, so that the model supports "
        "classifier-free guidance.",
    )
    check_gradients: bool = free_setting(False, "For debugging: stop the run if a parameter has no gradient on a rank.")
    max_skipped: Positive = free_setting(
        3,
        "The run ends with an error after this many skipped steps in a row, or this many rollbacks to the same checkpoint. "
        "A step is skipped if its loss or gradient norm is not finite, or if its loss is a spike and "
        "train.spike_action=skip.",
    )
    spike_sigma: NonNegativeFloat = free_setting(
        6.0,
        "A loss counts as a spike if it exceeds the mean of the last train.spike_window losses by more than spike_sigma "
        "times their standard deviation. train.spike_action decides what happens then. 0: no loss counts as a spike.",
    )
    spike_window: Positive = free_setting(
        100,
        "Number of most recent losses whose mean and standard deviation decide whether a loss is a spike "
        "(train.spike_sigma).",
    )
    spike_action: Literal["warn", "skip", "rollback"] = free_setting(
        "warn",
        "What happens if the loss of a step is a spike (train.spike_sigma). warn: a warning is logged. skip: the step does "
        "not change the weights. rollback: the run returns to its newest checkpoint and continues with the samples after "
        "the spike.",
    )
    log_every: Positive = free_setting(
        10, "Number of steps between two lines of logged metrics. A line has the means over these steps."
    )
    load_scalars: bool = free_setting(
        False,
        "true: TensorBoard gets a curve of the load (share of the tokens) of each expert in each block, in addition to "
        "heat maps. false: only heat maps.",
    )
    val_every: NonNegative = free_setting(
        0, "Number of steps between two validations. 0: validate only at the end of the run."
    )
    sample_every: NonNegative = free_setting(
        0, "Number of steps between two grids of sampled images. 0: sample only at the end of the run."
    )
    stages: tuple[Stage, ...] = setting(
        (),
        "Consecutive stages of the run, with different image sizes, batch sizes or learning rates: [{until: LAST_STEP, "
        "set: {section.key: value}}, ...]. `until` is the last step of a stage; the last stage has no `until` and ends at "
        "train.max_steps. Empty: the whole run has the same settings.",
    )

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        if not self.stages:
            return self
        ends = [stage.until for stage in self.stages]
        steps = [end for end in ends if end is not None]
        if ends[-1] is not None or len(steps) != len(ends) - 1:
            raise ValueError(
                f"train.stages requires `until` in every stage but the last, but the values of `until` are "
                f"{str(ends).replace('None', 'null')}. Add `until: STEP` to each stage but the last, and none to the last."
            )
        if steps != sorted(set(steps)):
            raise ValueError(
                f"train.stages requires `until` to rise from stage to stage, but the values of `until` are {steps}. "
                "Give each stage a larger `until` than the stage before it."
            )
        keys = self.stages[0].set.keys()
        for number, stage in enumerate(self.stages, start=1):
            if stage.set.keys() != keys:
                key = min(stage.set.keys() ^ keys)
                raise ValueError(
                    f"train.stages requires the same keys under `set` in every stage, but {key} is missing in stage "
                    f"{number if key in keys else 1}. Set {key} in every stage."
                )
        return self


class EmaConfig(Section):
    """The exponential moving average (EMA) of the weights."""

    enabled: bool = setting(
        True, "Compute an exponential moving average (EMA) of the weights, for use in sampling and exports."
    )
    decay: Fraction = setting(
        0.9999,
        "Decay of the exponential moving average (EMA) of the weights: after each step, EMA = decay * EMA + (1 - decay) * "
        "weights. A higher value averages over more steps.",
    )
    start_step: NonNegative = setting(
        0,
        "Step after which the exponential moving average (EMA) of the weights begins. Until then the EMA is a copy of "
        "the weights.",
    )
    warmup: bool = setting(
        True,
        "true: in step n after ema.start_step, the moving average of the weights (EMA) uses the decay min(ema.decay, (1 + "
        "n) / (10 + n)), so that it follows the weights quickly at first. false: it always uses ema.decay.",
    )


class CheckpointConfig(Section, json_schema_extra=FREE):
    """When checkpoints of a run are saved, and which of them are kept."""

    every: NonNegative = setting(1000, "Number of steps between two checkpoints. 0: save only at the end of the run.")
    keep: Positive = setting(
        2,
        "Number of newest checkpoints that are kept. Older ones are deleted, except those that checkpoint.keep_every keeps.",
    )
    keep_every: NonNegative = setting(
        0,
        "Never delete a checkpoint whose step is a multiple of this number. 0: delete all but the newest (checkpoint.keep).",
    )
    background: bool = setting(
        True,
        "true: write checkpoints in a thread while training continues. false: training waits until a checkpoint is written.",
    )


class Parallel(Section, json_schema_extra=FREE):
    """Expert parallelism: experts of a layer are sharded over ranks, and tokens are sent to them."""

    space_ep: Positive = setting(
        1,
        "Number of ranks over which the experts of the Space-MoE layers (experts for image regions) are sharded (expert "
        "parallelism). It must divide model.space_experts and the number of ranks. 1: every rank holds all of these "
        "experts.",
    )
    time_ep: Positive = setting(
        1,
        "Number of ranks over which the experts of the Time-MoE layers (experts selected by the timestep) are sharded "
        "(expert parallelism). It must divide model.time_experts and the number of ranks. 1: every rank holds all of these "
        "experts.",
    )
    elastic: bool = setting(
        False,
        "What happens if the number of ranks is not a multiple of parallel.space_ep or parallel.time_ep. true: the one that "
        "does not fit is lowered to the largest value that divides the number of ranks and the number of its experts. "
        "false: the run ends with an error.",
    )
    dispatch: Dispatch = setting(
        "auto",
        "How image tokens are sent to experts on other ranks if parallel.space_ep is above 1. It affects speed, not "
        "results. all_to_all: a token is sent only to the ranks that hold its experts. all_gather: every token is sent to "
        "all ranks over which the experts are sharded. auto: all_gather on GPUs and wherever at least 90% of the tokens "
        "would be sent anyway, otherwise all_to_all.",
    )
    placement: tuple[Placement, ...] = setting(
        ("auto",),
        "How experts are distributed if parallel.space_ep or parallel.time_ep is above 1. shard: they are divided over "
        "ranks, and tokens are sent to them. replicate: every rank holds all experts. auto: shard or replicate, whichever "
        "sends fewer bytes between ranks. Give one value, or one per U-Net level.",
    )

    @field_validator("placement", mode="before")
    @classmethod
    def _accept_one_value(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    def ep(self, kind: ExpertKind) -> int:
        """Return the number of ranks over which the experts of Space-MoE ("space") or Time-MoE ("time") are sharded."""
        return self.space_ep if kind == "space" else self.time_ep

    @property
    def uses_expert_parallelism(self) -> bool:
        """Whether experts are sharded over several ranks (in Space-MoE, Time-MoE or both)."""
        return self.space_ep > 1 or self.time_ep > 1


class Sample(Section, json_schema_extra=FREE):
    """Images that are sampled during training, and the defaults of the sampler."""

    prompts: tuple[str, ...] = setting(
        (), "Captions for which images are sampled during training. Empty: no images are sampled."
    )
    images: tuple[Path, ...] = setting(
        (),
        "Only with upscale.factor above 0 or control.enabled=true: one image file for each caption in sample.prompts. "
        "With upscale.factor, it is the small image to enlarge; with control.enabled, the image whose edges the sample "
        "follows.",
    )
    steps: Positive = setting(25, "Number of denoising steps for an image.")
    guidance: NonNegativeFloat = setting(
        4.5,
        "Scale of classifier-free guidance. A higher value makes images follow the caption more closely. 1: no guidance.",
    )
    scheduler: Scheduler = setting(
        "ddim", "Sampler: ddim (DDIM), dpm++ (DPM-Solver++, which requires fewer steps) or euler (Euler)."
    )
    seed: NonNegative = setting(0, "Seed of the noise that sampling starts from.")
