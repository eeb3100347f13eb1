"""Checks of settings that involve several sections of the configuration.

Each function yields one error message per mistake, except `check_steps`, which yields warnings.
"""

from collections.abc import Iterable, Iterator

from raphael_dist.config.data_sections import Data, Image, Text
from raphael_dist.config.model_sections import Control, Diffusion, Edge, Lora, Model, Parallel
from raphael_dist.config.run_sections import EmaConfig, Optim, RunConfig, Sample, Train
from raphael_dist.config.types import EXPERT_KINDS, Kernel
from raphael_dist.config.upscale import Upscale
from raphael_dist.text import shorten

Requirement = tuple[bool, str, str]  # whether it is fulfilled, its text, and what is so instead


def check_data(data: Data, image: Image, train: Train) -> Iterator[str]:
    """Yield an error message for each pair of incompatible settings about the data set, image sizes and micro-batch size."""
    if data.shards:
        requirement = (not data.sources, "data.sources=[]", "both are set")
        remedy = "set data.shards=[] to use the weighted sets of shards in data.sources"
        yield from _unfulfilled(f"data.shards={list(data.shards)}", [requirement], remedy)
    if data.caption_weights:
        requirement = (data.caption_from == "auto", "data.caption_from=auto", f"it is {data.caption_from}")
        yield from _unfulfilled(f"data.caption_weights={data.caption_weights}", [requirement], "set data.caption_weights={}")
    micro = train.micro_batch_size
    if len(image.buckets) > 1 and data.bucket_run < micro:
        yield (
            f"data.bucket_run={data.bucket_run} must be at least train.micro_batch_size={micro} with several image.buckets, "
            f"since a micro-batch holds one image size. Set data.bucket_run={8 * micro}, for example."
        )


def check_diffusion(diffusion: Diffusion, edge: Edge, sample: Sample) -> Iterator[str]:
    """Yield an error message for each mistake in settings of the timesteps, the noise schedule and the prediction type."""
    steps = diffusion.num_timesteps
    if edge.max_timestep > steps:
        yield (
            f"edge.max_timestep={edge.max_timestep} must be at most diffusion.num_timesteps={steps}. Set, for "
            f"example, edge.max_timestep={steps // 2}."
        )
    if sample.steps >= steps:
        yield f"sample.steps={sample.steps} must be below diffusion.num_timesteps={steps}. Lower sample.steps."
    if not diffusion.beta_start <= diffusion.beta_end < 1:
        yield (
            f"diffusion.beta_start={diffusion.beta_start} and diffusion.beta_end={diffusion.beta_end} must satisfy "
            "beta_start <= beta_end < 1. Set, for example, diffusion.beta_start=0.00085 diffusion.beta_end=0.012."
        )
    if diffusion.prediction == "flow":
        yield from _check_flow(diffusion, sample)
    if diffusion.zero_terminal_snr and diffusion.prediction == "epsilon":
        yield (
            "diffusion.zero_terminal_snr=true requires diffusion.prediction=v_prediction, but it is epsilon: the last "
            "timestep is pure noise, and its predicted noise says nothing about the image. Set "
            "diffusion.prediction=v_prediction, or diffusion.zero_terminal_snr=false."
        )


def _check_flow(diffusion: Diffusion, sample: Sample) -> Iterator[str]:
    gamma, scheduler = diffusion.min_snr_gamma, sample.scheduler
    same = f"it is {gamma:g}, and the loss of a flow has the same weight at all timesteps"
    requirements = (
        (
            not diffusion.zero_terminal_snr,
            "diffusion.zero_terminal_snr=false",
            "it is true, and a flow ends at pure noise in any case",
        ),
        (not gamma, "diffusion.min_snr_gamma=0", same),
        (scheduler != "dpm++", "sample.scheduler=euler", f"it is {scheduler}, which does not support flows"),
    )
    remedy = "set diffusion.prediction=v_prediction"
    yield from _unfulfilled("diffusion.prediction=flow", requirements, remedy)


def _unfulfilled(subject: str, requirements: Iterable[Requirement], remedy: str) -> Iterator[str]:
    """Yield an error message for each unfulfilled requirement of a setting.

    `subject`: the setting with its value. `requirements`: (whether it is fulfilled, text of the requirement, text about the
    actual value) of each requirement; what follows a comma in its text explains it. `remedy`: what the user can do instead
    of fulfilling a requirement.
    """
    for fulfilled, requirement, actual in requirements:
        if not fulfilled:
            yield f"{subject} requires {requirement}, but {actual}. Set {requirement.partition(',')[0]}, or {remedy}."


def check_parallel(parallel: Parallel, model: Model) -> Iterator[str]:
    """Yield an error message for each mistake in the settings of expert parallelism (experts sharded over ranks)."""
    levels = len(model.channels)
    if len(parallel.placement) not in (1, levels):
        yield (
            f"parallel.placement={list(parallel.placement)} must have one entry, or one per U-Net level, but it has "
            f"{len(parallel.placement)} and model.channels has {levels} levels. Give 1 entry or {levels} entries of auto, "
            "shard or replicate."
        )
    for kind in EXPERT_KINDS:
        experts, ep = model.num_experts(kind), parallel.ep(kind)
        if ep > 1 and (experts == 0 or experts % ep):
            divisors = [n for n in range(1, experts + 1) if experts % n == 0] or [1]
            yield (
                f"parallel.{kind}_ep={ep} must divide model.{kind}_experts={experts}. "
                f"Set parallel.{kind}_ep to one of {divisors}."
            )


def check_kernels(
    train: Train, model: Model, optim: Optim, lora: Lora, parallel: Parallel, text: Text, edge: Edge
) -> Iterator[str]:
    """Yield an error message for each setting that is incompatible with a Triton kernel that `train.kernels` selects."""
    adapted = lora.rank > 0 and "experts" in lora.targets
    experts = (
        (model.expert_backend == "auto", "model.expert_backend=auto", f"it is {model.expert_backend}"),
        (not adapted, "lora.rank=0 or lora.targets without experts", f"lora.targets={list(lora.targets)}"),
    )
    judges = train.spike_sigma > 0 and train.spike_action != "warn"
    requirements: dict[Kernel, tuple[Requirement, ...]] = {
        "group_norm": ((not train.compile, "train.compile=false", "it is true, which fuses the same operations"),),
        "layer_norm": ((max(model.channels) <= 4096, "model.channels up to 4096", f"they are {list(model.channels)}"),),
        "cross_attention": (
            (model.space_experts > 0 or edge.weight > 0, "model.space_experts or edge.weight above 0", "both are 0"),
            (text.max_tokens <= 128, "text.max_tokens up to 128", f"it is {text.max_tokens}"),
            (model.head_dim <= 64, "model.head_dim up to 64", f"it is {model.head_dim}"),
        ),
        "space_moe": ((model.space_experts > 0, "model.space_experts above 0", "it is 0"), *experts),
        "space_moe_dense": (
            ("space_moe" not in train.kernels, "train.kernels without space_moe", "both compute the same layers"),
            (model.space_experts > 0, "model.space_experts above 0", "it is 0"),
            *experts,
        ),
        "time_moe": (
            (model.time_experts > 0, "model.time_experts above 0", "it is 0"),
            (model.time_activation == "gelu", "model.time_activation=gelu", f"it is {model.time_activation}"),
            (parallel.time_ep == 1, "parallel.time_ep=1", f"it is {parallel.time_ep}"),
            *experts,
        ),
        "adamw": ((optim.kind == "adamw", "optim.kind=adamw", f"it is {optim.kind}"),),
        "deferred_update": (
            ("adamw" in train.kernels, "train.kernels with adamw", "it has none"),
            # The host judges spikes by earlier losses, and the device has none.
            (not judges, "train.spike_action=warn", f"it is {train.spike_action}"),
        ),
    }
    for name in train.kernels:
        subject = f"train.kernels={list(train.kernels)}: the kernel {name}"
        yield from _unfulfilled(subject, requirements[name], f"remove {name} from train.kernels")


def check_expert_backend(model: Model, dtype: str) -> Iterator[str]:
    """Yield an error message if MegaBlocks' product cannot compute in `dtype` (`train.dtype`), or its folder is not used."""
    folder, backend = model.megablocks_folder, model.expert_backend
    if backend == "megablocks":
        requirement = (dtype == "bfloat16", "train.dtype=bfloat16", f"it is {dtype}")
        yield from _unfulfilled("model.expert_backend=megablocks", [requirement], "set model.expert_backend=auto")
    if folder is not None:
        requirement = (backend == "megablocks", "model.expert_backend=megablocks", f"it is {backend}")
        yield from _unfulfilled(f"model.megablocks_folder={folder}", [requirement], "set model.megablocks_folder=null")


def check_lora(lora: Lora, model: Model, run: RunConfig) -> Iterator[str]:
    """Yield an error message for each setting that LoRA training (lora.rank above 0) does not allow."""
    if not lora.rank:
        return
    requirement = (run.init_from is not None, "run.init_from, the checkpoint of the base model", "it is null")
    yield from _unfulfilled(f"lora.rank={lora.rank}", [requirement], "set lora.rank=0 to train all weights")
    if "experts" in lora.targets and not model.space_experts + model.time_experts:
        yield (
            f"lora.targets={list(lora.targets)} requires experts, but model.space_experts and model.time_experts are 0. "
            "Set lora.targets=[attention]."
        )
    if run.reinit:
        yield (
            f"run.reinit={list(run.reinit)} requires lora.rank=0, but it is {lora.rank}, and LoRA would freeze the random "
            "weights of these parts. Train these parts first with lora.rank=0, or set run.reinit=[]."
        )


def check_control(control: Control, run: RunConfig, edge: Edge, lora: Lora, parallel: Parallel) -> Iterator[str]:
    """Yield an error message for each setting that training a ControlNet (control.enabled=true) does not allow."""
    if not control.enabled:
        return
    requirements = (
        (run.init_from is not None, "run.init_from, the checkpoint of the base model", "it is null"),
        (edge.weight > 0, "edge.weight above 0, so that edge maps are read", f"it is {edge.weight:g}"),
        (lora.rank == 0, "lora.rank=0", f"it is {lora.rank}"),
        (
            not parallel.uses_expert_parallelism,
            "parallel.space_ep=1 and parallel.time_ep=1",
            f"they are {parallel.space_ep} and {parallel.time_ep}",
        ),
        (not run.reinit, "run.reinit=[], since frozen weights would stay random", f"it is {list(run.reinit)}"),
    )
    yield from _unfulfilled("control.enabled=true", requirements, "set control.enabled=false")


def check_upscale(upscale: Upscale, control: Control) -> Iterator[str]:
    """Yield an error message for each mistake in the settings of super-resolution."""
    factor = upscale.factor
    if factor == 1 or factor & (factor - 1):
        yield f"upscale.factor={factor} must be a power of two. Set 0 (off), 2, 4, 8 or 16."
    if factor:
        requirement = (not control.enabled, "control.enabled=false", "it is true")
        yield from _unfulfilled(f"upscale.factor={factor}", [requirement], "set upscale.factor=0")


def check_sample_images(sample: Sample, upscale: Upscale, control: Control) -> Iterator[str]:
    """Yield an error message unless `sample.images` has one image for each of `sample.prompts`.

    Without super-resolution and ControlNet, `sample.images` must be empty.
    """
    prompts, images = len(sample.prompts), len(sample.images)
    if not upscale.factor and not control.enabled:
        if images:
            yield (
                f"sample.images={shorten(str([str(path) for path in sample.images]))} requires upscale.factor above 0 or "
                "control.enabled=true, but neither is set. Set one of them, or set sample.images=[]."
            )
    elif prompts != images:
        yield (
            f"sample.images must have one image for each caption in sample.prompts, but the number of images is {images} "
            f"and that of captions is {prompts}. Give as many images as captions, or set sample.prompts=[] "
            "sample.images=[]."
        )


def check_steps(train: Train, optim: Optim, model: Model, ema: EmaConfig) -> Iterator[str]:
    """Yield a warning for each setting whose step number is larger than train.max_steps, so that it has no effect."""
    last = train.max_steps
    ends = [stage.until for stage in train.stages if stage.until is not None]
    effects = (
        ("optim.warmup_steps", optim.warmup_steps, f"the learning rate never reaches optim.lr={optim.lr:g}"),
        ("model.gate_noise_steps", model.gate_noise_steps, "the gate noise never falls to 0"),
        ("ema.start_step", ema.start_step if ema.enabled else 0, "the moving average equals the weights to the end"),
        ("train.stages: until", max(ends, default=0), "the stages after that step are never trained"),
    )
    for name, step, effect in effects:
        if step > last:
            yield f"{name}={step} is larger than train.max_steps={last}, so {effect}"
