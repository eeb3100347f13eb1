"""What sections of the configuration demand of each other. Each check raises ValueError with what to do, in one line.

`config` is a Config, whose module imports this one.
"""

from typing import Any

from raphael_dist.config_adapters import check_control, check_lora, check_pictures
from raphael_dist.config_recipes import check_decay
from raphael_dist.config_upscale import check_upscale


def check_agreement(config: Any) -> None:
    """Raise ValueError for the first disagreement."""
    _check_data(config)
    _check_diffusion(config)
    _check_spread(config)
    check_lora(config)
    check_control(config)
    check_upscale(config)
    check_pictures(config)


def _check_data(config: Any) -> None:
    if config.data.shards and config.data.sources:
        raise ValueError("data.shards and data.sources are both given; data.sources is for several sources with weights")
    if config.data.caption_weights and config.data.caption_from != "auto":
        raise ValueError(
            f"data.caption_from is {config.data.caption_from!r}, but data.caption_weights says where captions are; give one"
        )
    if len(config.image.buckets) > 1:
        micro, run = config.train.micro_batch, config.data.bucket_run
        if run < micro:
            raise ValueError(
                f"data.bucket_run = {run} must be at least train.micro_batch = {micro} with several image.buckets: a "
                f"micro-batch holds one image size, and the rest of it would be empty; e.g. data.bucket_run={8 * micro}"
            )


def _check_diffusion(config: Any) -> None:
    if config.edge.max_timestep > config.diffusion.num_timesteps:
        raise ValueError(
            f"edge.max_timestep is {config.edge.max_timestep}, "
            f"beyond diffusion.num_timesteps = {config.diffusion.num_timesteps}"
        )
    if not config.diffusion.beta_start <= config.diffusion.beta_end < 1:
        raise ValueError(
            f"diffusion.beta_start = {config.diffusion.beta_start} and beta_end = {config.diffusion.beta_end} must satisfy "
            "beta_start <= beta_end < 1"
        )
    if config.diffusion.zero_terminal_snr and config.diffusion.prediction == "epsilon":
        raise ValueError(
            "diffusion.zero_terminal_snr = true needs diffusion.prediction=v_prediction: at the last step a "
            "model sees the noise itself, and would learn nothing"
        )
    check_decay(config.optim.decay, config.optim.decay_arguments)
    if config.sample.steps >= config.diffusion.num_timesteps:
        raise ValueError(
            f"sample.steps = {config.sample.steps} must be below diffusion.num_timesteps = {config.diffusion.num_timesteps}"
        )


def _check_spread(config: Any) -> None:
    placement, levels = config.parallel.placement, len(config.model.channels)
    if len(placement) not in (1, levels):
        raise ValueError(
            f"parallel.placement has {len(placement)} entries but model.channels has {levels}; "
            "give one word (auto, shard, replicate), or one per level"
        )
    for kind in ("space", "time"):
        experts, ep = getattr(config.model, f"{kind}_experts"), getattr(config.parallel, f"{kind}_ep")
        if ep > 1 and (experts == 0 or experts % ep):
            allowed = [n for n in range(1, experts + 1) if experts % n == 0] or [1]
            raise ValueError(f"parallel.{kind}_ep = {ep} must divide model.{kind}_experts = {experts}; allowed: {allowed}")
