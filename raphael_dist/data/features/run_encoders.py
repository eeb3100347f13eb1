"""Applies loaded encoders: converts token ids of captions to text features, images to latents, and latents to images.

Shape legend: B samples, Y text tokens, D text width, C latent channels, h and w latent height and width, H and W of images.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from raphael_dist.data.features.encoder_files import Model


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """B encoded captions of Y tokens, with D numbers for each token.

    Attributes:
        tokens: float32 [B, Y, D], outputs of the text encoder.
        mask: bool [B, Y], True at tokens that the text encoder attends to, False at padding.
        end: int64 [B], index of the end-of-text token of each caption.
    """

    tokens: Tensor
    mask: Tensor
    end: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return the attributes `tokens`, `mask` and `end` as a dictionary."""
        return {"tokens": self.tokens, "mask": self.mask, "end": self.end}


def run_text_encoder(model: Model, ids_BY: Tensor, attention_mask_BY: Tensor, end_id: int | None) -> TextFeatures:
    """Encode B tokenized captions of Y tokens each.

    Args:
        model: a text encoder of transformers.
        ids_BY: token numbers, int64 [B, Y], on the model's device.
        attention_mask_BY: [B, Y], 1 at tokens of the caption, 0 at padding.
        end_id: number of the end-of-text token; None: the tokenizer has none.
    """
    mask_BY = attention_mask_BY.bool()
    # Stable Diffusion runs CLIP without a mask: CLIP is causal, so only padding differs. Other encoders need the mask.
    is_clip = model.config.model_type.startswith("clip")
    tokens = model(input_ids=ids_BY, attention_mask=None if is_clip else mask_BY.long()).last_hidden_state
    return TextFeatures(tokens.float(), mask_BY, end_of_text_B(ids_BY, mask_BY, end_id))


def end_of_text_B(ids_BY: Tensor, mask_BY: Tensor, end_id: int | None) -> Tensor:
    """Return the index of each caption's first end-of-text token, int64 [B].

    Only the first one counts: CLIP also pads with this token. A caption without it gets the index of its last token that is
    not padding.

    Args:
        ids_BY: token numbers of B captions of Y tokens, int64 [B, Y].
        mask_BY: bool [B, Y], False at padding.
        end_id: number of the end-of-text token; None: the tokenizer has none.
    """
    last = (mask_BY.sum(dim=1) - 1).clamp_min(0)
    if end_id is None:
        return last
    is_end = ids_BY == end_id
    return torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1), last)


def encode_images(vae: Model, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the latents of images, each float32 [B, C, h, w].

    The VAE's shift and scale are already applied, so that training latents are mean + std * noise.

    Args:
        vae: an autoencoder of diffusers.
        images: [B, 3, H, W] in -1..1.
        device: the device on which the VAE runs. With CPU offload, its weights are moved there when it is called.
    """
    encoded = vae.encode(images.to(device, vae.dtype))[0]
    # `encoded` is a distribution if the VAE is an AutoencoderKL, otherwise a tensor.
    mean, std = (encoded, torch.zeros_like(encoded)) if isinstance(encoded, Tensor) else (encoded.mean, encoded.std)
    shift, scale = latent_shift_and_scale(vae, device)
    return (mean.float() - shift) * scale, std.float() * scale


def decode_latents(vae: Model, latents: Tensor, device: torch.device) -> Tensor:
    """Decode latents [B, C, h, w] to images, float32 [B, 3, H, W] in -1..1, with `vae`, an autoencoder of diffusers.

    The latents are shifted and scaled, as `encode_images` returns them. `device`: the device on which the VAE runs.
    """
    shift, scale = latent_shift_and_scale(vae, device)
    latents = (latents.to(device).float() / scale + shift).to(vae.dtype)
    images: Tensor = vae.decode(latents).sample
    return images.float().clamp(-1, 1)


def latent_shift_and_scale(vae: Model, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (shift, scale) of a VAE's latents, from its configuration, as float32 tensors on `device`.

    Shift and scale each have the shape [], one number for all channels, or [C, 1, 1], a number for each channel. The
    diffusion model is trained on (latents - shift) * scale. `vae`: an autoencoder of diffusers.
    """
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        shift, divisor = (torch.tensor(values, device=device).float().view(-1, 1, 1) for values in (mean, std))
        return shift, config.scaling_factor / divisor
    values = (config.get("shift_factor") or 0.0, config.scaling_factor)
    shift, scale = (torch.tensor(float(value), device=device) for value in values)
    return shift, scale
