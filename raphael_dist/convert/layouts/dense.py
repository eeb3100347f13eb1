"""The layout `dense`: a U-Net with the structure of Stable Diffusion 2, as a `unet/` folder of diffusers or a single file.

The tensors in a single file may have diffusers' names, or those of the original LDM code, which begin with
`model.diffusion_model.`. The sizes of the model are read from the folder's config.json, or from the shapes of the tensors in
a single file.
"""

import inspect
import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from raphael_dist.checkpoint.manifest import MANIFEST
from raphael_dist.config.schema import Config, config_from_tree
from raphael_dist.convert.layout_manifest import base_manifest, checkpoint_of, read_optional_manifest
from raphael_dist.convert.layouts import WEIGHTS, Layout
from raphael_dist.convert.layouts.canonical import gather
from raphael_dist.convert.source_checkpoint import Checkpoint, is_dense, parameter_shapes
from raphael_dist.convert.write_plan import ConversionPlan, Entry, Options, OutFile, Source, chosen_weights, parts, piece
from raphael_dist.errors import UserError
from raphael_dist.model.latents import latent_factor
from raphael_dist.storage.tensorfile import StoredTensor
from raphael_dist.storage.torchfile import file_tensors
from raphael_dist.storage.weight_files import weight_files
from raphael_dist.text import JsonObject, read_json

STEM = "diffusion_pytorch_model"
FLOW = "FlowMatchEulerDiscreteScheduler"
CLASS = "UNet2DConditionModel"
_LDM = "model.diffusion_model."
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
# Fields of a diffusers U-Net's `config.json` that may have any value: sizes, and fields that do not change the architecture.
# All others must have diffusers' default, which RaphaelUNet implements; `_LINEAR` is the only exception.
_FREE = {
    "block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "in_channels", "out_channels",
    "cross_attention_dim", "norm_num_groups", "attention_head_dim", "num_attention_heads", "sample_size", "upcast_attention",
}  # fmt: skip
_LINEAR = "use_linear_projection"  # on in Stable Diffusion 2, off by diffusers' default


# ---- sizes -----------------------------------------------------------------------------------------------------------


def config_of_unet(unet: Mapping[str, Any], where: Path, diffusion: Mapping[str, Any] | None = None) -> Config:
    """Return the configuration of this project for a dense U-Net (without experts) of diffusers.

    Args:
        unet: the content of the U-Net's config.json.
        where: path of this file, for messages.
        diffusion: settings of the section `diffusion` that the folder states (`scheduler_settings`).

    Raises:
        UserError: the structure differs from that of Stable Diffusion 2.
    """
    from diffusers import UNet2DConditionModel

    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters.items()
    for field, default in [(name, parameter.default) for name, parameter in parameters if name not in _FREE | {"self"}]:
        value, expected = unet.get(field, default), field == _LINEAR or default
        if value != expected and (value or expected):  # both None and False turn a feature off
            raise UserError(
                f"{where}: {field}={value!r} must be {expected!r}, as in U-Nets of Stable Diffusion 2. Use such a model."
            )
    sizes = sizes_of_unet(unet, where)
    if unet["in_channels"] != sizes["latent_channels"]:
        raise UserError(
            f"{where} must have as many input as output channels, but in_channels={unet['in_channels']} and "
            f"out_channels={sizes['latent_channels']}. Use another model."
        )
    return _dense_config(sizes, diffusion)


def sizes_of_unet(unet: Mapping[str, Any], where: Path) -> JsonObject:
    """Return the settings of the section `model` that follow from the config.json of a U-Net of diffusers.

    Raises UserError if the structure differs from that of Stable Diffusion 2. where: path of the file, for the message.
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
            f"{where} must be the configuration of a {CLASS}, but it has a missing or wrong entry ({error!r}). Use another "
            "model."
        ) from None
    if len(widths) != 1 or not isinstance(layers, int):
        raise UserError(
            f"{where} must have attention heads of one width and one number of layers per block, but the widths are "
            f"{sorted(widths)} and layers_per_block={layers}. Use another model."
        )
    return {"channels": channels, "attention": attention, "layers_per_block": layers,
             "head_dim": widths.pop(), "norm_groups": norm, "latent_channels": latent, "text_width": text}  # fmt: skip


def _dense_config(sizes: JsonObject, diffusion: Mapping[str, Any] | None = None) -> Config:
    experts = {"space_experts": 0, "time_experts": 0, "time_activation": "geglu"}
    model = {**sizes, **experts, "expert_width": [4 * c for c in sizes["channels"]]}
    return config_from_tree({"model": model, "edge": {"weight": 0.0}, "diffusion": dict(diffusion or {})})


def unet_json(config: Config, where: str) -> JsonObject:
    """Return the content of config.json for a dense model as a UNet2DConditionModel of diffusers.

    Raises UserError, which begins with `where`, if that class cannot represent the model.
    """
    m = config.model
    if not is_dense(config):
        raise UserError(
            f"{where} requires a model without experts, without edge modules and with model.image_positions=false, but "
            "this model does not meet all three. Use --to canonical or --to diffusers."
        )
    expected = [4 * c for c in m.channels]
    if m.time_activation != "geglu" or list(m.expert_width) != expected:
        raise UserError(
            f"{where} requires model.time_activation=geglu and model.expert_width={expected}, but they are "
            f"{m.time_activation} and {list(m.expert_width)}. Use --to canonical."
        )
    return {"_class_name": CLASS, **unet_fields(config)}


def unet_fields(config: Config) -> JsonObject:
    """Return the fields of a U-Net's config.json that diffusers' class UNet2DConditionModel has.

    A model with experts has them too; the caller adds the fields of the experts.
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


def _config_of_shapes(shapes: Mapping[str, tuple[int, ...]], where: Path) -> Config:
    """Return the configuration of a dense model, computed from the shapes of its tensors by diffusers' names.

    The shapes do not show the width of a head and the number of norm groups: the largest up to 64 and 32 are used.
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
            f"{where} must be a U-Net of Stable Diffusion 2, but it lacks the tensor {error}. Use another model."
        ) from None
    if not linear or not channels:
        raise UserError(
            f"{where} must be a U-Net of Stable Diffusion 2, but its attention layers use convolutions instead of linear "
            "layers, as in Stable Diffusion 1. Use another model."
        )
    head = next(h for h in (64, 32, 16, 8, 4, 2, 1) if all(c % h == 0 for c in channels))
    norm = next(g for g in (32, 16, 8, 4, 2, 1) if all(c % g == 0 for c in channels))
    return _dense_config({"channels": channels, "attention": attention, "layers_per_block": layers, "head_dim": head,
                          "norm_groups": norm, "latent_channels": latent, "text_width": text})  # fmt: skip


# ---- names -----------------------------------------------------------------------------------------------------------


def ldm_key(name: str, layers: int, attention: tuple[bool, ...]) -> str:
    """Translate the name of a parameter from diffusers' U-Net to the original LDM code.

    Args:
        name: the name in diffusers.
        layers: number of residual blocks per level.
        attention: for each U-Net level, whether it has transformer blocks.
    """
    owner, _, leaf = name.rpartition(".")
    if owner in _OUTER:
        return f"{_OUTER[owner]}.{leaf}"
    part, _, rest = name.partition(".")
    if part == "mid_block":
        kind, index, inner = rest.split(".", 2)
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{_inner(kind, inner)}"
    level, kind, index, inner = rest.split(".", 3)
    i, j = int(level), int(index)
    if part == "down_blocks":
        block = 1 + i * (layers + 1) + (layers if kind == "downsamplers" else j)
        place = {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}[kind]
        return f"input_blocks.{block}.{place}.{_inner(kind, inner)}"
    block = i * (layers + 1) + (layers if kind == "upsamplers" else j)
    after = 2 if attention[len(attention) - 1 - i] else 1
    place = {"resnets": "0", "attentions": "1", "upsamplers": f"{after}.conv"}[kind]
    return f"output_blocks.{block}.{place}.{_inner(kind, inner)}"


def _inner(kind: str, inner: str) -> str:
    if kind == "resnets":
        owner, _, leaf = inner.rpartition(".")
        return f"{_RESNET[owner]}.{leaf}"
    return inner.removeprefix("conv.") if kind in ("downsamplers", "upsamplers") else inner


def _from_ldm(stored: dict[str, StoredTensor], where: Path) -> dict[str, StoredTensor]:
    """Return the tensors of an LDM file's U-Net by diffusers' names. Raises UserError if it is not Stable Diffusion 2."""
    unet = {key.removeprefix(_LDM): tensor for key, tensor in stored.items() if key.startswith(_LDM)}
    blocks = {int(m[1]) for key in unet if (m := re.match(r"input_blocks\.(\d+)\.", key))}
    downs = sorted(int(m[1]) for key in unet if (m := re.match(r"input_blocks\.(\d+)\.0\.op\.weight", key)))
    layers = downs[0] - 1 if downs else len(blocks) - 1
    levels = range(len(blocks) // (layers + 1) if layers else 0)
    try:
        channels = [unet[f"input_blocks.{1 + i * (layers + 1)}.0.out_layers.3.weight"].shape[0] for i in levels]
        attention = tuple(f"input_blocks.{1 + i * (layers + 1)}.1.norm.weight" in unet for i in levels)
        text = unet["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
        latent = unet["input_blocks.0.0.weight"].shape[1]
    except LookupError as error:
        raise UserError(
            f"{where} must be a U-Net of Stable Diffusion 2, but it lacks the tensor {_LDM}{error.args[0]}. Use another "
            "model."
        ) from None
    sizes = {"channels": channels, "attention": attention, "layers_per_block": layers, "head_dim": 1, "norm_groups": 1,
             "latent_channels": latent, "text_width": text}  # fmt: skip
    names = {ldm_key(name, layers, attention): name for name in parameter_shapes(_dense_config(sizes))}
    if different := sorted(unet.keys() ^ names.keys()):
        raise UserError(
            f"{where} must be a U-Net of Stable Diffusion 2, but the tensor {_LDM}{different[0]} is "
            f"{'not part of such a U-Net' if different[0] in unet else 'missing'}. Use another model."
        )
    return {names[key]: tensor for key, tensor in unet.items()}


# ---- reading and writing ---------------------------------------------------------------------------------------------


def open_dense(path: Path, config: Config | None = None) -> Checkpoint:
    """Open a dense U-Net: a `unet/` folder of diffusers, the folder of a pipeline that contains it, or a single file.

    `config` is not used: the configuration is read from the folder, or computed from the shapes in the file.
    Raises UserError if the U-Net does not have the structure of Stable Diffusion 2.
    """
    if path.is_file():
        return _open_file(path)
    folder = path / "unet" if (path / "unet").is_dir() else path
    manifest = read_optional_manifest(folder, "dense")
    if manifest is not None:
        config = config_from_tree(manifest["config"])
    else:
        unet = read_object(folder / "config.json")
        if unet.get("_class_name") != CLASS:
            raise UserError(
                f"{folder / 'config.json'}: _class_name must be {CLASS}, but it is {unet.get('_class_name')}. Use another "
                "model."
            )
        diffusion = scheduler_settings(folder)
        config = config_of_unet(unet, folder / "config.json", diffusion)
    checkpoint = weights_by_name(folder, config, gather(weight_files(folder).paths), manifest)
    checkpoint.says_prediction = manifest is not None or "prediction" in diffusion
    return checkpoint


def _open_file(path: Path) -> Checkpoint:
    stored = file_tensors(path)
    if any(key.startswith(_LDM) for key in stored):
        stored = _from_ldm(stored, path)
    config = _config_of_shapes({key: tensor.shape for key, tensor in stored.items()}, path)
    checkpoint = weights_by_name(path, config, stored, None)
    checkpoint.says_prediction = False
    return checkpoint


def weights_by_name(
    folder: Path, config: Config, stored: dict[str, StoredTensor], manifest: JsonObject | None
) -> Checkpoint:
    """Make a Checkpoint from stored tensors, each of which is one whole parameter under the trainer's name.

    Args:
        folder: the path that was opened, for messages.
        config: configuration of the model.
        stored: where each tensor is in its file, by name.
        manifest: manifest of the folder; None: it has none.

    Raises:
        UserError: a tensor is missing, or does not belong to the model or has another shape.
    """
    expected = parameter_shapes(config)
    unfit = sorted(n for n in expected.keys() | stored.keys() if n not in stored or expected.get(n) != stored[n].shape)
    if unfit:
        of_file = list(stored[unfit[0]].shape) if unfit[0] in stored else "missing"
        of_model = list(expected[unfit[0]]) if unfit[0] in expected else "missing"
        raise UserError(
            f"{folder} must contain the tensors that its configuration requires, but {len(unfit)} of them differ, for "
            f"example the shape of {unfit[0]}: {of_file} in the file, {of_model} in the model. Use another checkpoint."
        )
    spans = {("master", name): [tensor] for name, tensor in stored.items()}
    if manifest is not None:
        return checkpoint_of(folder, manifest, spans)
    checkpoint = Checkpoint(folder, config, spans)
    checkpoint.check()
    return checkpoint


def read_object(path: Path) -> JsonObject:
    """Read a JSON file that contains an object. Raises UserError if it cannot be read or has another kind of value."""
    try:
        tree = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Restore the file.") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must be a JSON object, but it is a {type(tree).__name__}. Restore the file.")
    return tree


def scheduler_settings(folder: Path) -> JsonObject:
    """Read the scheduler of a diffusers pipeline as settings of the section `diffusion`; {} without a scheduler.

    Args:
        folder: the pipeline's folder, or its unet/.

    Raises:
        UserError: the scheduler's noise schedule is neither scaled_linear nor linear.
    """
    paths = [home / "scheduler" / "scheduler_config.json" for home in (folder, folder.parent)]
    scheduler = next((read_object(path) for path in paths if path.is_file()), {})
    names = {"num_train_timesteps": "num_timesteps", "beta_schedule": "schedule", "beta_start": "beta_start",
             "beta_end": "beta_end", "prediction_type": "prediction",
             "rescale_betas_zero_snr": "zero_terminal_snr"}  # fmt: skip
    if scheduler.get("_class_name") == FLOW and not scheduler.get("use_dynamic_shifting") and scheduler.get("shift") == 1:
        return {"num_timesteps": scheduler["num_train_timesteps"], "prediction": "flow"}
    no_betas = "_class_name" in scheduler and "beta_schedule" not in scheduler  # another scheduler of flow matching
    if no_betas or scheduler.get("trained_betas") is not None:
        raise UserError(
            f"{folder}: the noise schedule must have beta_schedule scaled_linear or linear, but its "
            f"{scheduler.get('_class_name')} uses another kind of schedule. Use a U-Net that was trained with such a "
            "schedule."
        )
    return {ours: scheduler[theirs] for theirs, ours in names.items() if scheduler.get(theirs) is not None}


def unet_files(source: Source, options: Options, folder: str) -> tuple[list[OutFile], dict[str, bytes], str]:
    """Plan the weight files of a U-Net of diffusers. Each parameter is one tensor in them, under the parameter's name.

    Args:
        source: the checkpoint to convert.
        options: options of the conversion: kind and dtype of the weights, size of a file.
        folder: prefix of the files' names, such as "unet/".

    Returns:
        The files; {name: content} of their index, {} for a single file; and the kind of weights, "ema" or "master".
    """
    kind = chosen_weights(source, options)
    entries = [Entry(n, s, (piece(kind, n, 0, prod(s)),), options.dtype) for n, s in source.shapes.items()]
    return *parts(entries, f"{folder}{STEM}", options.part_bytes), kind


def plan(source: Source, options: Options, target: Path) -> ConversionPlan:
    """Return the plan of a U-Net folder of diffusers. Raises UserError if the model is not dense (has experts).

    `source`: the checkpoint to convert. `options`: options of the conversion. `target` is not used.
    """
    unet = unet_json(source.config, "--to dense")
    files, small, kind = unet_files(source, options, "")
    small["config.json"] = json.dumps(unet, indent=2).encode()
    manifest = base_manifest("dense", source) | {"weights": kind}
    return ConversionPlan(files, (kind,), MANIFEST, manifest, small)


def detect(path: Path) -> bool:
    """Return whether `path` may be a dense U-Net: a file of any kind, or a diffusers model's folder (not a pipeline's)."""
    return path.is_file() or ((path / "config.json").is_file() and not (path / "model_index.json").is_file())


def pickles(path: Path) -> list[Path]:
    """Return the files that would be unpickled: a single file that is not safetensors, or a folder's .bin files."""
    if path.is_file():
        return [path] if path.suffix != ".safetensors" else []
    files = weight_files(path / "unet" if (path / "unet").is_dir() else path)
    return list(files.paths) if files.pickled else []


LAYOUT = Layout("dense", "weights", detect, open_dense, plan, WEIGHTS, pickles=pickles)
