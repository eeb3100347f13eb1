"""Sections of the configuration about a run: run, optim, train, ema, checkpoint, sample."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from raphael_dist.config.lr_schedule_arguments import LrSchedule
from raphael_dist.config.types import (
    FREE,
    BelowOne,
    Dtype,
    Fraction,
    Free,
    Kernel,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Scheduler,
    Section,
)


class RunConfig(Section):
    """The run: its folder, initial weights, watchdog and trackers."""

    dir: Free[Path] = Path("runs/default")
    """Folder of the run. A run resumes from the newest checkpoint in this folder. If it is not set and --config names a
    preset or a YAML file, the folder is runs/NAME, where NAME is the name of the preset or of the file without .yaml, e.g.
    runs/emoji-tiny.
    """

    seed: NonNegative = 0
    """Seed of the initial weights, the data order, the noise and the timesteps."""

    ignore_damaged: Free[bool] = False
    """If all checkpoints in run.dir are damaged: true renames them to damaged-* and starts a new run, false ends with an
    error.
    """

    init_from: Free[Path | None] = None
    """Path of the checkpoint whose weights a new run starts from; it may have any layout of docs/checkpoints.md. null:
    random weights.
    """

    reinit: Free[tuple[Literal["edge", "space", "time", "text"], ...]] = ()
    """Parts of the model whose weights may be missing in the checkpoint of run.init_from, or have other shapes there. Only
    the weights that are missing or have another shape start with random values. The other weights of these parts are loaded.
    If the checkpoint has no experts, new experts start as docs/checkpoints.md describes. edge: the modules of the edge loss.
    space: Space-MoE layers (experts for image regions) and their gates. time: Time-MoE layers (experts selected by the
    timestep) and their gates. text: key and value projections of cross-attention, and the first layer of the space gates if
    its shape differs. Empty: all weights must be in the checkpoint, with the same shapes.
    """

    hang_timeout_s: Free[PositiveFloat] = 600.0
    """If a rank makes no progress for this many seconds, the run counts as hung and ends with exit code 76."""

    lock_wait_s: Free[NonNegativeFloat] = 0.0
    """Seconds to wait if another process uses run.dir. If the folder is not free by then, the run ends with an error. 0: end
    with an error at once.
    """

    trackers: Free[tuple[Literal["wandb", "mlflow"], ...]] = ()
    """Experiment trackers that receive the metrics: wandb (Weights & Biases), mlflow. TensorBoard always receives them."""

    project: Free[str] = "raphael"
    """Name of the project in wandb, and of the experiment in mlflow."""

    log_level: Free[Literal["debug", "info", "warning", "error"]] = "warning"
    """Lowest level of log messages that the terminal shows. The order is debug, info, warning, error."""

    allow_change: Free[tuple[str, ...]] = ()
    """Keys whose values may differ from those of the run that is resumed, although they affect its results, e.g. [optim.lr].
    If the value of another such key differs, the run ends with an error.
    """


class Optim(Section):
    """The optimizer and the learning rate."""

    kind: Literal["adamw", "muon", "sgd"] = "adamw"
    """Optimizer. adamw: AdamW. muon: Muon (steps along the orthogonalised momentum) for the weights of hidden linear layers,
    experts and convolutions, and AdamW for all others, with the same learning rate; it requires ZeRO stage 0, 1 or 2. sgd:
    SGD without momentum, which is meant for numerical tests.
    """

    lr: PositiveFloat = 1e-4
    """Learning rate at the end of the warm-up. Afterwards the rate follows optim.lr_schedule."""

    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """beta1 and beta2 of Adam: decay rates of its running averages of the gradient and of the squared gradient."""

    eps: PositiveFloat = 1e-8
    """Small number that is added to the square root of Adam's second moment, so that no step divides by 0."""

    weight_decay: NonNegativeFloat = 0.0
    """Weight decay as in AdamW: each step multiplies weights by 1 - learning rate x optim.weight_decay. optim.kind=adamw and
    optim.kind=muon apply it to all trained weights except norms, biases and gates (routers of the experts). optim.kind=sgd
    does not use it. 0: none.
    """

    warmup_steps: NonNegative = 0
    """Number of steps, from the start of training, in which the learning rate rises linearly from 0 to optim.lr. 0: no
    warm-up.
    """

    lr_schedule: LrSchedule = "constant"
    """Learning-rate schedule after the warm-up, named as in transformers. constant and inverse_sqrt do not depend on
    train.max_steps; the others end at step train.max_steps.
    """

    lr_schedule_args: dict[str, float] = Field({})
    """Arguments of optim.lr_schedule, named as in transformers, e.g. {num_cycles: 3} for cosine_with_restarts."""

    max_grad_norm: NonNegativeFloat = 1.0
    """Largest norm of the gradient over all parameters. A larger gradient is scaled down to this norm (clipping). 0: no
    clipping.
    """

    @property
    def has_moments(self) -> bool:
        """Whether the optimizer stores moments, running averages of gradients (AdamW and Muon do, SGD does not)."""
        return self.kind != "sgd"


class Stage(Section):
    """A range of training steps with its own settings (an entry of train.stages)."""

    until: Positive | None = None
    """Last step of the stage. null, which only the last stage may have: train.max_steps."""

    set: dict[str, Any]
    """Settings of the stage, as section.key: value."""


class Train(Section):
    """Training: number of steps, batch sizes, precision, logging and validation, and what ends a run."""

    max_steps: Free[Positive] = 1000
    """Number of optimizer steps after which the run is complete."""

    global_batch_size: Positive = 32
    """Images per optimizer step, over all ranks; at least the number of ranks. Gradient accumulation steps =
    global_batch_size / (micro_batch_size x ranks), rounded up. With several image.buckets there can be more. Empty places in
    micro-batches have weight 0 in the loss.
    """

    micro_batch_size: Free[Positive] = 8
    """Images per rank in one forward and backward pass, at most. train.global_batch_size states how many gradient
    accumulation steps follow. If one is enough, the micro-batch is lowered to the smallest size for which one is still
    enough, except in runs with train.stages.
    """

    dtype: Dtype = "float32"
    """Precision of the forward and backward passes. The master weights are always float32."""

    compile: Free[bool] = False
    """Compile parts of the model with torch.compile. Incompatible with ZeRO stage 3."""

    cuda_graphs: Free[bool] = False
    """Run the U-Net's forward and backward passes as CUDA graphs. Requires ZeRO stage 1 or 2, and train.dtype=bfloat16."""

    kernels: Free[tuple[Kernel, ...]] = ()
    """Parts of a step that run in Triton kernels of this project instead of torch's operations. Requires a GPU. The results
    agree up to rounding. group_norm: GroupNorm with SiLU. layer_norm: the backward pass of LayerNorm.
    cross_attention: attention to the caption with the map that selects regions, for which no map of a single head is stored.
    space_moe, time_moe: experts of the Space-MoE or Time-MoE layers, each only on the tokens that are routed to it.
    space_moe_dense: each space expert on all tokens, in place of space_moe. adamw: AdamW, the moving average (EMA) and the
    model's copy of the weights in one pass; requires ZeRO stage 1 or 2. deferred_update: with adamw, the GPU decides whether
    a step is skipped, and the host reads loss and gradient norm one step later. No kernel has been tested on a GPU yet.
    """

    caption_dropout: Fraction = 0.1
    """Fraction of the captions that are replaced by the empty caption in training, so that the model supports
    classifier-free guidance.
    """

    check_gradients: Free[bool] = False
    """For debugging: stop the run if a parameter has no gradient on a rank."""

    max_skipped: Free[Positive] = 3
    """The run ends with an error after this many skipped steps in a row, or this many rollbacks to the same checkpoint. A
    step is skipped if its loss or gradient norm is not finite, or if its loss is a spike and train.spike_action=skip.
    """

    spike_sigma: Free[NonNegativeFloat] = 6.0
    """A loss counts as a spike if it exceeds the mean of the last train.spike_window losses by more than spike_sigma times
    their standard deviation. train.spike_action decides what happens then. 0: no loss counts as a spike.
    """

    spike_window: Free[Positive] = 100
    """Number of most recent losses whose mean and standard deviation decide whether a loss is a spike (train.spike_sigma).
    """

    spike_action: Free[Literal["warn", "skip", "rollback"]] = "warn"
    """What happens if the loss of a step is a spike (train.spike_sigma). warn: a warning is logged. skip: the step does not
    change the weights. rollback: the run returns to its newest checkpoint and continues with the samples after the spike.
    """

    log_every: Free[Positive] = 10
    """Number of steps between two lines of logged metrics. A line has the means over these steps."""

    load_scalars: Free[bool] = False
    """true: TensorBoard gets a curve of the load (share of the tokens) of each expert in each block, in addition to heat
    maps. false: only heat maps.
    """

    val_every: Free[NonNegative] = 0
    """Number of steps between two validations. 0: validate only at the end of the run."""

    sample_every: Free[NonNegative] = 0
    """Number of steps between two grids of sampled images. 0: sample only at the end of the run."""

    stages: tuple[Stage, ...] = ()
    """Consecutive stages of the run, with different image sizes, batch sizes or learning rates: [{until: LAST_STEP, set:
    {section.key: value}}, ...]. `until` is the last step of a stage; the last stage has no `until` and ends at
    train.max_steps. Every stage must set the same keys. Empty: the whole run has the same settings.
    """

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

    enabled: bool = True
    """Compute an exponential moving average (EMA) of the weights, for use in sampling and exports."""

    decay: Fraction = 0.9999
    """Decay of the exponential moving average (EMA) of the weights: after each step, EMA = decay * EMA + (1 - decay) *
    weights. A higher value averages over more steps.
    """

    start_step: NonNegative = 0
    """Step after which the exponential moving average (EMA) of the weights begins. Until then the EMA is a copy of the
    weights.
    """

    warmup: bool = True
    """true: in step n after ema.start_step, the moving average of the weights (EMA) uses the decay min(ema.decay, (1 + n) /
    (10 + n)), so that it follows the weights quickly at first. false: it always uses ema.decay.
    """


class CheckpointConfig(Section, json_schema_extra=FREE):
    """When checkpoints of a run are saved, and which of them are kept."""

    every: NonNegative = 1000
    """Number of steps between two checkpoints. 0: save only at the end of the run."""

    keep: Positive = 2
    """Number of newest checkpoints that are kept. Older ones are deleted, except those that checkpoint.keep_every keeps."""

    keep_every: NonNegative = 0
    """Never delete a checkpoint whose step is a multiple of this number. 0: delete all but the newest (checkpoint.keep)."""

    background: bool = True
    """true: write checkpoints in a thread while training continues. false: training waits until a checkpoint is written."""


class Sample(Section, json_schema_extra=FREE):
    """Images that are sampled during training, and the defaults of the sampler."""

    prompts: tuple[str, ...] = ()
    """Captions for which images are sampled during training. Empty: no images are sampled."""

    images: tuple[Path, ...] = ()
    """Only with upscale.factor above 0 or control.enabled=true: one image file for each caption in sample.prompts. With
    upscale.factor, it is the small image to enlarge; with control.enabled, the image whose edges the sample follows.
    """

    steps: Positive = 25
    """Number of denoising steps for an image."""

    guidance: NonNegativeFloat = 4.5
    """Scale of classifier-free guidance. A higher value makes images follow the caption more closely. 1: no guidance."""

    scheduler: Scheduler = "ddim"
    """Sampler: ddim (DDIM), dpm++ (DPM-Solver++, which requires fewer steps) or euler (Euler)."""

    seed: NonNegative = 0
    """Seed of the noise that sampling starts from."""
