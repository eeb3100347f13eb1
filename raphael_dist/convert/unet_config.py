"""Converts between the config.json of a U-Net of diffusers and the configuration of this project."""

import inspect
from collections.abc import Mapping
from pathlib import Path

from raphael_dist.config.schema import Config, config_from_tree
from raphael_dist.convert.source_checkpoint import is_dense
from raphael_dist.errors import UserError
from raphael_dist.model.latents import latent_factor
from raphael_dist.text import JsonObject, reason_unreadable

CLASS = "UNet2DConditionModel"
# Fields of a diffusers U-Net's `config.json` that may have any value: sizes, and fields that do not change the architecture.
# All others must have diffusers' default, which RaphaelUNet implements; `_LINEAR` is the only exception.
_FREE = {
    "block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "in_channels", "out_channels",
    "cross_attention_dim", "norm_num_groups", "attention_head_dim", "num_attention_heads", "sample_size", "upcast_attention",
}  # fmt: skip
_LINEAR = "use_linear_projection"  # on in Stable Diffusion 2, off by diffusers' default


def config_of_unet(unet: JsonObject, where: Path, diffusion: JsonObject | None = None) -> Config:
    """Return the configuration of this project for a dense U-Net (without experts) of diffusers.

    Args:
        unet: the content of the U-Net's config.json.
        where: path of this file, for messages.
        diffusion: settings of the section `diffusion` (noise schedule), from `scheduler_settings`. None: the defaults.

    Raises:
        UserError: the structure differs from that of Stable Diffusion 2.
    """
    from diffusers import UNet2DConditionModel

    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters.items()
    for field, default in [(name, parameter.default) for name, parameter in parameters if name not in _FREE | {"self"}]:
        value, expected = unet.get(field, default), field == _LINEAR or default
        if value != expected and (value or expected):  # both None and False turn a feature off
            raise UserError(
                f"{where}: {field}={value!r} must be {expected!r}, as in U-Nets of Stable Diffusion 2. Use a U-Net of "
                "Stable Diffusion 2."
            )
    sizes = sizes_of_unet(unet, where)
    if unet["in_channels"] != sizes["latent_channels"]:
        raise UserError(
            f"{where} must have as many input as output channels, but in_channels={unet['in_channels']} and "
            f"out_channels={sizes['latent_channels']}. Use a U-Net of Stable Diffusion 2."
        )
    return dense_config(sizes, diffusion)


def sizes_of_unet(unet: JsonObject, where: Path) -> JsonObject:
    """Return the settings of the section `model` that follow from the config.json of a U-Net of diffusers.

    `unet`: the content of config.json. `where`: path of the file, for messages.
    Raises UserError if the structure differs from that of Stable Diffusion 2.
    """
    try:
        channels = list(unet["block_out_channels"])
        attention = [str(kind).startswith("CrossAttn") for kind in unet["down_block_types"]]
        heads = unet.get("num_attention_heads") or unet["attention_head_dim"]  # in diffusers both are numbers of heads
        heads = heads if isinstance(heads, list) else [heads] * len(channels)
        widths = {c // h for c, h in zip(channels, heads, strict=True)}
        layers, latent = unet.get("layers_per_block", 2), unet.get("out_channels", unet["in_channels"])
        text, norm = unet["cross_attention_dim"], unet.get("norm_num_groups", 32)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{where} must be the configuration of a {CLASS}, but {reason_unreadable(error)}. Copy it again from its source."
        ) from None
    if len(widths) != 1 or not isinstance(layers, int):
        raise UserError(
            f"{where}: all attention heads must have the same width, and layers_per_block must be an integer, but the "
            f"widths are {sorted(widths)} and layers_per_block={layers}. Use a U-Net of Stable Diffusion 2."
        )
    return {"channels": channels, "attention": attention, "layers_per_block": layers,
             "head_dim": widths.pop(), "norm_groups": norm, "latent_channels": latent, "text_width": text}  # fmt: skip


def dense_config(sizes: JsonObject, diffusion: JsonObject | None = None) -> Config:
    experts = {"space_experts": 0, "time_experts": 0, "time_activation": "geglu"}
    model = {**sizes, **experts, "expert_width": [4 * c for c in sizes["channels"]]}
    return config_from_tree({"model": model, "edge": {"weight": 0.0}, "diffusion": dict(diffusion or {})})


def unet_json(config: Config, where: str) -> JsonObject:
    """Return the content of config.json for a dense model as a UNet2DConditionModel of diffusers.

    Raises UserError if that class cannot represent the model. The message begins with `where`, such as "--to dense".
    """
    m = config.model
    if not is_dense(config):
        raise UserError(
            f"{where} requires a model without experts, without edge modules and with model.image_positions=false, but this "
            f"model has model.space_experts={m.space_experts}, model.time_experts={m.time_experts}, "
            f"edge.weight={config.edge.weight:g} and model.image_positions={str(m.image_positions).lower()}. Use --to "
            "canonical or --to diffusers."
        )
    expected = [4 * c for c in m.channels]
    if m.time_activation != "geglu" or list(m.expert_width) != expected:
        raise UserError(
            f"{where} requires model.time_activation=geglu and model.expert_width={expected}, but they are "
            f"{m.time_activation} and {list(m.expert_width)}. Use --to canonical."
        )
    return {"_class_name": CLASS, **unet_fields(config)}


def unet_fields(config: Config) -> JsonObject:
    """Return diffusers' config.json for the U-Net of `config`: the fields of the class UNet2DConditionModel.

    A model with experts has the same fields; the caller adds fields that describe the experts.
    """
    m = config.model
    kinds = ["CrossAttn" * has + "DownBlock2D" for has in m.attention]
    return {
        "act_fn": "silu",
        "attention_head_dim": [c // m.head_dim for c in m.channels],
        "block_out_channels": list(m.channels),
        "cross_attention_dim": m.text_width,
        "down_block_types": kinds,
        "in_channels": m.latent_channels + config.upscale.channels,
        "layers_per_block": m.layers_per_block,
        "norm_num_groups": m.norm_groups,
        "out_channels": m.latent_channels,
        "sample_size": max(config.image.buckets[0]) // latent_factor(config.image.vae),
        "up_block_types": [k.replace("Down", "Up") for k in reversed(kinds)],
        _LINEAR: True,
    }


def config_of_shapes(shapes: Mapping[str, tuple[int, ...]], where: Path) -> Config:
    """Return the configuration of a dense model (without experts), computed from the shapes of its tensors.

    The shapes show neither the width of an attention head nor the number of norm groups. Both are guessed: the largest power
    of two that divides the channels of every level, but at most 64 for the head width and 32 for the norm groups. Raises
    UserError if the model does not have the structure of Stable Diffusion 2.

    Args:
        shapes: shape of each tensor by its name in diffusers.
        where: path of the file, for messages.
    """
    levels = len({n.split(".")[1] for n in shapes if n.startswith("down_blocks.")})
    try:
        channels = [shapes[f"down_blocks.{i}.resnets.0.conv2.weight"][0] for i in range(levels)]
        attention = [f"down_blocks.{i}.attentions.0.proj_in.weight" in shapes for i in range(levels)]
        layers = len({n.split(".")[3] for n in shapes if n.startswith("down_blocks.0.resnets.")})
        text = shapes["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1]
        latent = shapes["conv_in.weight"][1]
        linear = len(shapes["mid_block.attentions.0.proj_in.weight"]) == 2
    except LookupError as error:
        raise UserError(
            f"{where} must be a U-Net of Stable Diffusion 2, but it lacks the tensor {error}. Use another U-Net."
        ) from None
    if not linear or not channels:
        raise UserError(
            f"{where} must be a U-Net of Stable Diffusion 2, but its attention layers use convolutions instead of linear "
            "layers, as in Stable Diffusion 1. Use a U-Net of Stable Diffusion 2."
        )
    head = next(h for h in (64, 32, 16, 8, 4, 2, 1) if all(c % h == 0 for c in channels))
    norm = next(g for g in (32, 16, 8, 4, 2, 1) if all(c % g == 0 for c in channels))
    return dense_config({"channels": channels, "attention": attention, "layers_per_block": layers, "head_dim": head,
                          "norm_groups": norm, "latent_channels": latent, "text_width": text})  # fmt: skip
