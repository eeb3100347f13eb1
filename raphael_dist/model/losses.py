"""Computes the training loss of each sample of a micro-batch.

Losses are returned per sample, so that every division of a global batch into micro-batches gives the same sum.

Shape legend: B samples, L transformer blocks, K experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raphael_dist.config.schema import Config
from raphael_dist.model.batch import Batch
from raphael_dist.model.diffusion import NoiseSchedule, denoise_loss_B, min_snr_weight_B
from raphael_dist.model.edge_supervision import edge_loss_B
from raphael_dist.model.routing import one_hot
from raphael_dist.model.super_resolution import append_small_image
from raphael_dist.model.unet_interface import UNetOutput


@dataclass
class Losses:
    """Losses of a micro-batch of B samples, multiplied by each sample's weight (0 for padding samples).

    Only `total` has a gradient. L is the number of transformer blocks, K the number of space or time experts in each.

    Attributes:
        total: the loss that is minimised, float32 [B].
        denoise: the denoising loss without min-SNR weights, float32 [B].
        edge: the edge loss multiplied by edge.weight, float32 [B]; 0 without edge modules.
        space_used: for each block and space expert, the share of image tokens that the expert processes, summed over
            samples, float32 [L, K]; None without a Space-MoE.
        time_load: for each block and time expert, the number of samples that the expert processes, float32 [L, K]; None
            without a Time-MoE.
    """

    total: Tensor
    denoise: Tensor
    edge: Tensor
    space_used: Tensor | None
    time_load: Tensor | None


def compute_losses(
    model: Callable[..., UNetOutput], batch: Batch, schedule: NoiseSchedule, config: Config, dtype: torch.dtype
) -> Losses:
    """Run the model and compute the losses of a micro-batch: L = L_denoise + L_edge of each sample (Sec. 3.2 of the paper).

    If `model.balance_weight` is above 0, the load-balance loss of the gates times this weight is added.

    Args:
        model: the U-Net, or the `engine.Engine` that wraps it.
        batch: the micro-batch, on the device of the model.
        schedule: the noise schedule.
        config: the run's configuration, with the weights of the losses.
        dtype: precision of the forward pass; the losses are float32.
    """
    noised = schedule.add_noise(batch.x0, batch.noise, batch.timestep)
    if batch.small is not None:
        noised = append_small_image(noised, batch.small, config.upscale.patch)
    edge_map = [batch.edge] if config.control.enabled else []
    out = model(
        noised.to(dtype), batch.timestep, batch.text.to(dtype), batch.text_mask, batch.end, batch.gate_noise, *edge_map
    )
    denoise = denoise_loss_B(out.prediction, schedule.target(batch.x0, batch.noise, batch.timestep)) * batch.weight
    total = denoise
    if gamma := config.diffusion.min_snr_gamma:
        total = denoise * min_snr_weight_B(schedule.abar_T[batch.timestep], gamma, schedule.prediction)
    edge = torch.zeros_like(denoise)
    if out.edge_logits and batch.edge is not None:
        per_sample = edge_loss_B(out.edge_logits, batch.edge, batch.timestep, config.edge)
        edge = config.edge.weight * per_sample * batch.weight
    total = total + edge
    if out.balance:
        total = total + config.model.balance_weight * torch.stack(out.balance).mean(dim=0) * batch.weight
    return Losses(total, denoise.detach(), edge.detach(), *_loads(out, batch.weight, config))


@torch.no_grad()
def _loads(out: UNetOutput, weight_B: Tensor, config: Config) -> tuple[Tensor | None, Tensor | None]:
    space_used = torch.einsum("lbk,b->lk", torch.stack(out.space_used), weight_B) if out.space_used else None
    time_load = None
    if out.time_expert:
        onehot = one_hot(torch.stack(out.time_expert), config.model.time_experts).float()
        time_load = torch.einsum("lbk,b->lk", onehot, weight_B)
    return space_used, time_load
