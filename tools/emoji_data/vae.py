"""A small VAE for small images. It is saved as an ordinary diffusers `AutoencoderKL` folder.

RAPHAEL works on the latents of an autoencoder with 4 channels. For images of 64 x 64 pixels, a downsampling factor of 4
gives latents of 16 x 16. Images are float32 (B, 3, H, W) in [-1, 1], as in diffusers.
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from webdataset import WebDataset, imagehandler

from raphael_dist.errors import UserError
from raphael_dist.rng import Purpose, generator
from raphael_dist.storage.files import apply_umask

Vae = Any  # an AutoencoderKL; type checkers do not see that diffusers' classes are modules
# Weights of the terms of the loss other than the mean absolute error, which has weight 1.
SQUARE_WEIGHT = 1.0
SLOPE_WEIGHT = 0.5
KL_WEIGHT = 2e-6
WARMUP = 100
EMA_DECAY = 0.995


def read_images(shards: Iterable[Path]) -> Tensor:
    """Return the `webp` images of all samples, uint8 (N, 3, H, W), in the order of the shards.

    Raises UserError if the shards have no images, or the images have different sizes.
    """
    paths = [str(path) for path in shards]
    images: list[Tensor] = []
    if paths:
        samples = WebDataset(paths, shardshuffle=False).decode(imagehandler("torchrgb8", ["webp"]), only=["webp"])
        images = [sample["webp"] for sample in samples if "webp" in sample]
    if len({image.shape for image in images}) != 1:
        raise UserError(
            f"--data must have shards with .webp images of one size, but it has {len(images)} such images, of "
            f"{len({image.shape for image in images})} different sizes. Make the shards with "
            "`python tools/make_emoji_dataset.py --out data/emoji`."
        )
    return torch.stack(images)


def to_unit_range(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def small_vae(seed: int) -> Vae:
    """Return an untrained VAE with downsampling factor 4 and 4 latent channels (0.9 M parameters), small enough for a CPU.

    Residual branches are initialised to zero, and the posterior noise is almost zero, so that training is faster at first.
    """
    torch.manual_seed(seed)
    model: Vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
    nn.init.zeros_(model.quant_conv.weight[4:].detach())
    nn.init.constant_(model.quant_conv.bias[4:].detach(), -6.0)  # the log-variance
    return model


def loss(model: Vae, x: Tensor, noise: Tensor) -> Tensor:
    """Return the training loss: absolute and squared error, absolute error of slopes, and KL to a unit Gaussian.

    `x`: images, (B, 3, H, W) in [-1, 1]. `noise`: standard normal numbers with which latents are sampled from the posterior,
    (B, 4, H/4, W/4). Errors are means over pixels.
    The error of slopes (differences of neighbouring pixels) keeps outlines sharp. The KL is summed over a latent; its small
    weight keeps latents bounded and smooth without blurring them.
    """
    posterior = model.encode(x).latent_dist
    error = model.decode(posterior.mean + posterior.std * noise).sample - x
    slopes = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    distortion = error.abs().mean() + SQUARE_WEIGHT * error.square().mean() + SLOPE_WEIGHT * slopes
    return distortion + KL_WEIGHT * posterior.kl().mean()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate of `step` (from 0) of `steps`: linear warm-up to `peak`, then half a cosine down to 0."""
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    return peak * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def draw_batch(images: Tensor, seed: int, step: int, batch: int, mirror: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return the images and the posterior noise of a training step, a function of (seed, step).

    Args:
        images: all images, uint8 (N, 3, H, W).
        seed: determines the random numbers, together with `step`.
        step: number of the training step.
        batch: number of images B to draw.
        mirror: probability (0..1) that an image is mirrored.

    Returns:
        Images, float32 (B, 3, H, W) in [-1, 1], and standard normal noise, float32 (B, 4, H/4, W/4).
    """
    rows = generator(seed, Purpose.ORDER, step).choice(len(images), batch, replace=False)
    mirrored = torch.from_numpy(generator(seed, Purpose.FLIP, step).random(batch) < mirror)
    x = to_unit_range(images[torch.from_numpy(rows)])
    x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
    shape = (batch, 4, x.shape[2] // 4, x.shape[3] // 4)
    noise = generator(seed, Purpose.POSTERIOR, step).standard_normal(shape, dtype=np.float32)
    return x, torch.from_numpy(noise)


def train(
    model: Vae,
    images: Tensor,
    steps: int,
    batch: int,
    peak_rate: float,
    seed: int,
    device: str,
    bf16: bool,
    report: Callable[[int, float, Vae], None],
    report_every: int = 200,
    mirror: float = 0.5,
    decoder_only: bool = False,
) -> Vae:
    """Train a VAE; return it with the moving average of its weights.

    Args:
        model: the VAE to train.
        images: training images, uint8 (N, 3, H, W).
        steps: number of optimizer steps.
        batch: number of images per step.
        peak_rate: learning rate after the warm-up.
        seed: seed of batches and noise.
        device: device of the training, "cpu" or "cuda".
        bf16: run convolutions in bfloat16; weights stay float32.
        report: called every `report_every` steps with (steps done, mean loss since the last report, averaged model).
        report_every: number of steps between two calls of `report`.
        mirror: probability (0..1) that an image is mirrored.
        decoder_only: keep the encoder, and therefore the latents, as they are.

    Raises:
        UserError: the loss is no longer finite.
    """
    model = model.to(device, memory_format=torch.channels_last)
    for part in (model.encoder, model.quant_conv):
        part.requires_grad_(not decoder_only)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    total = 0.0
    for step in range(steps):
        x, noise = (t.to(device, memory_format=torch.channels_last) for t in draw_batch(images, seed, step, batch, mirror))
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak_rate)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            value = loss(model, x, noise)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step >= WARMUP:  # the first call copies the weights
            average.update_parameters(model)
        total += value.item()
        if not math.isfinite(total):
            raise UserError(
                f"--rate={peak_rate:g} must give a finite loss, but the loss of step {step} is not finite. Lower --rate."
            )
        if (step + 1) % report_every == 0:
            report(step + 1, total / report_every, average.module)
            total = 0.0
    return average.module


@torch.no_grad()
def latent_std(model: Vae, images: Tensor, batch: int = 64) -> float:
    """Return the standard deviation of all elements of the latents of uint8 images, posterior noise included."""
    count, first, second = 0, 0.0, 0.0
    for part in images.split(batch):
        posterior = model.encode(to_unit_range(part).to(model.device)).latent_dist
        count += posterior.mean.numel()
        first += posterior.mean.double().sum().item()
        second += (posterior.mean.double().square() + posterior.var.double()).sum().item()
    return math.sqrt(second / count - (first / count) ** 2)


@torch.no_grad()
def psnr(model: Vae, images: Tensor, batch: int = 64) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of each uint8 image decoded from its mean latent; float64 (N,).

    The ratio is computed over RGB in [0, 1], clamped but not rounded. A mean squared error below 1e-10 gives 100 dB.
    """
    values = []
    for part in images.split(batch):
        x = to_unit_range(part).to(model.device)
        y = model.decode(model.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        mse = ((y - x) / 2).double().square().mean((1, 2, 3))
        values.append(-10 * mse.clamp_min(1e-10).log10().cpu())
    return torch.cat(values)


def load(folder: Path) -> Vae:
    """Load the VAE from the diffusers folder `folder`, in float32. Raises UserError if it cannot be loaded."""
    try:
        return AutoencoderKL.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False).float().eval()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} must contain an AutoencoderKL, but it cannot be loaded: {str(error).splitlines()[0]}. Use the "
            "folder of a VAE of diffusers, e.g. data/vae-emoji."
        ) from error


def save(model: Vae, images: Tensor, folder: Path) -> Vae:
    """Write the VAE as a diffusers folder with float16 weights; return the VAE reloaded from it.

    `images`: uint8 images, whose latents determine `scaling_factor` = 1 / standard deviation.
    """
    model.register_to_config(scaling_factor=round(1 / latent_std(model, images), 6))
    model.half().save_pretrained(folder, safe_serialization=True)
    apply_umask(folder)
    model.float()
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)  # a path on the machine that trained it
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return load(folder)
