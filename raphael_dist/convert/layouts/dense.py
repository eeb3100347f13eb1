"""The dense layout: a U-Net of Stable Diffusion 2's structure, as a diffusers `unet/` folder or a single file.

A single file may have diffusers' names, or those of the original LDM code (below `model.diffusion_model.`). Sizes are read
from `config.json`, or from the shapes in a single file.
"""

import inspect
import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from raphael_dist.checkpoint.manifest import MANIFEST
from raphael_dist.config import Config, config_from_tree
from raphael_dist.convert.layouts import WEIGHTS, Layout
from raphael_dist.convert.layouts.canonical import gather_indexed
from raphael_dist.convert.manifest import base_manifest, checkpoint_of, manifest_beside
from raphael_dist.convert.plan import ConversionPlan, Entry, Options, OutFile, Source, chosen_weights, parts, piece
from raphael_dist.convert.source import Checkpoint, is_dense, parameter_shapes
from raphael_dist.errors import UserError
from raphael_dist.model.latents import latent_factor
from raphael_dist.storage.tensorfile import Stored, read_header
from raphael_dist.storage.torchfile import load_tree

STEM = "diffusion_pytorch_model"
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
# The fields of a diffusers U-Net's `config.json` that may have any value: our sizes, and what does not change the
# architecture. All others must have diffusers' default, which is what our U-Net does; `_LINEAR` is the one exception.
_FREE = {
    "block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "in_channels", "out_channels",
    "cross_attention_dim", "norm_num_groups", "attention_head_dim", "num_attention_heads", "sample_size", "upcast_attention",
}  # fmt: skip
_LINEAR = "use_linear_projection"  # Stable Diffusion 2's transformers have it, diffusers' default has not


# ---- sizes -----------------------------------------------------------------------------------------------------------


def config_of_unet(unet: Mapping[str, Any], where: Path, diffusion: Mapping[str, Any] | None = None) -> Config:
    """Return the configuration of a diffusers U-Net's `config.json`. UserError for a structure that ours does not have."""
    from diffusers import UNet2DConditionModel

    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters.items()
    for field, default in [(name, parameter.default) for name, parameter in parameters if name not in _FREE | {"self"}]:
        given, wanted = unet.get(field, default), field == _LINEAR or default
        if given != wanted and (given or wanted):  # None and False turn the same things off
            raise UserError(
                f"{where}: {field} = {given!r}; only U-Nets like Stable Diffusion 2's fit ({field} = {wanted!r})"
            )
    try:
        channels, kinds = list(unet["block_out_channels"]), list(unet["down_block_types"])
        heads = unet.get("num_attention_heads") or unet["attention_head_dim"]  # diffusers' names: both mean heads
        heads = heads if isinstance(heads, list) else [heads] * len(channels)
        widths = {c // h for c, h in zip(channels, heads, strict=True)}
        layers, latent = unet.get("layers_per_block", 2), unet["in_channels"]
        text, norm = unet["cross_attention_dim"], unet.get("norm_num_groups", 32)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not the configuration of a {CLASS}: {error!r}") from None
    if len(widths) > 1 or latent != unet.get("out_channels", latent) or not isinstance(layers, int):
        raise UserError(f"{where}: attention heads of {sorted(widths)} channels, {latent} latent channels in, "
                        f"{unet.get('out_channels')} out, layers {layers}; each must be one number")  # fmt: skip
    sizes = {"channels": channels, "attention": [k.startswith("CrossAttn") for k in kinds], "layers_per_block": layers,
             "head_dim": widths.pop(), "norm_groups": norm, "latent_channels": latent, "text_width": text}  # fmt: skip
    return _dense_config(sizes, diffusion)


def _dense_config(sizes: dict[str, Any], diffusion: Mapping[str, Any] | None = None) -> Config:
    experts = {"space_experts": 0, "time_experts": 0, "time_activation": "geglu"}
    model = {**sizes, **experts, "expert_width": [4 * c for c in sizes["channels"]]}
    return config_from_tree({"model": model, "edge": {"weight": 0.0}, "diffusion": dict(diffusion or {})})


def unet_json(config: Config, where: str) -> dict[str, Any]:
    """Return the `config.json` of a dense model. UserError for one that diffusers' U-Net cannot be."""
    m = config.model
    if not is_dense(config):
        raise UserError(f"{where}: the model has experts or edge modules, which a dense U-Net cannot hold; use canonical")
    if m.time_activation != "geglu" or list(m.expert_width) != [4 * c for c in m.channels]:
        raise UserError(f"{where}: diffusers' U-Net has GEGLU of width 4 x channels; model.expert_width is {m.expert_width}")
    kinds = ["CrossAttn" * has + "DownBlock2D" for has in m.attention]
    return {
        "_class_name": CLASS,
        "act_fn": "silu",
        "attention_head_dim": [c // m.head_dim for c in m.channels],
        "block_out_channels": list(m.channels),
        "cross_attention_dim": m.text_width,
        "down_block_types": kinds,
        "in_channels": m.latent_channels + config.upscale.channels,
        "layers_per_block": m.layers_per_block,
        "norm_num_groups": m.norm_groups,
        "out_channels": m.latent_channels,
        "sample_size": max(config.image.buckets[0]) // latent_factor(config.image.encoder),
        "up_block_types": [k.replace("Down", "Up") for k in reversed(kinds)],
        _LINEAR: True,
    }


def _config_of_shapes(shapes: Mapping[str, tuple[int, ...]], where: Path) -> Config:
    """Work out a model's sizes from the shapes of its tensors, by diffusers' names; heads of 64 channels, 32 norm groups."""
    levels = len({n.split(".")[1] for n in shapes if n.startswith("down_blocks.")})
    try:
        channels = [shapes[f"down_blocks.{i}.resnets.0.conv2.weight"][0] for i in range(levels)]
        attention = [f"down_blocks.{i}.attentions.0.proj_in.weight" in shapes for i in range(levels)]
        layers = len({n.split(".")[3] for n in shapes if n.startswith("down_blocks.0.resnets.")})
        text = shapes["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1]
        latent = shapes["conv_in.weight"][1]
        linear = len(shapes["mid_block.attentions.0.proj_in.weight"]) == 2
    except KeyError as error:
        raise UserError(f"{where}: no U-Net of Stable Diffusion's structure: {error} is missing") from None
    if not linear or not channels:
        raise UserError(
            f"{where}: its projections are convolutions (Stable Diffusion 1); only Stable Diffusion 2's structure fits"
        )
    head = next(h for h in (64, 32, 16, 8, 4, 2, 1) if all(c % h == 0 for c in channels))
    norm = next(g for g in (32, 16, 8, 4, 2, 1) if all(c % g == 0 for c in channels))
    return _dense_config({"channels": channels, "attention": attention, "layers_per_block": layers, "head_dim": head,
                          "norm_groups": norm, "latent_channels": latent, "text_width": text})  # fmt: skip


# ---- names -----------------------------------------------------------------------------------------------------------


def ldm_key(name: str, layers: int, attention: tuple[bool, ...]) -> str:
    """Return the name that the original LDM code gives a parameter of diffusers' U-Net."""
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


def _from_ldm(stored: dict[str, Stored], where: Path) -> dict[str, Stored]:
    """Return the tensors of an LDM file's U-Net by diffusers' names."""
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
    except KeyError as error:
        raise UserError(f"{where}: no U-Net of Stable Diffusion's structure: {_LDM}{error.args[0]} is missing") from None
    sizes = {"channels": channels, "attention": attention, "layers_per_block": layers, "head_dim": 1, "norm_groups": 1,
             "latent_channels": latent, "text_width": text}  # fmt: skip
    ours = {ldm_key(name, layers, attention): name for name in parameter_shapes(_dense_config(sizes))}
    wrong = sorted(unet.keys() ^ ours.keys())
    if wrong:
        raise UserError(f"{where}: {_LDM}{wrong[0]} {'does not fit' if wrong[0] in unet else 'is missing'}")
    return {ours[key]: tensor for key, tensor in unet.items()}


# ---- reading and writing ---------------------------------------------------------------------------------------------


def open_dense(path: Path, config: Config | None = None) -> Checkpoint:
    """Open a `unet/` folder (or a pipeline's, for its unet/), or a single file. UserError for another architecture."""
    if path.is_file():
        return _open_file(path)
    folder = path / "unet" if (path / "unet").is_dir() else path
    manifest = manifest_beside(folder, "dense")
    if manifest is not None:
        config = config_from_tree(manifest["config"])
    else:
        unet = read_json(folder / "config.json")
        if unet.get("_class_name") != CLASS:
            raise UserError(f"{folder / 'config.json'}: holds a {unet.get('_class_name')}, not a {CLASS}")
        diffusion = diffusion_beside(folder)
        config = config_of_unet(unet, folder / "config.json", diffusion)
    found = weights_by_name(folder, config, gather_indexed(folder, STEM), manifest)
    found.says_prediction = manifest is not None or "prediction" in diffusion
    return found


def _open_file(path: Path) -> Checkpoint:
    if path.suffix == ".safetensors":
        stored = read_header(path)[0]
    else:
        tree = load_tree(path)
        tree = tree.get("state_dict", tree) if isinstance(tree, dict) else {}
        stored = {str(key): value for key, value in tree.items() if isinstance(value, Stored)}
    if any(key.startswith(_LDM) for key in stored):
        stored = _from_ldm(stored, path)
    config = _config_of_shapes({key: tensor.shape for key, tensor in stored.items()}, path)
    found = weights_by_name(path, config, stored, None)
    found.says_prediction = False
    return found


def weights_by_name(folder: Path, config: Config, stored: dict[str, Stored], manifest: dict[str, Any] | None) -> Checkpoint:
    """Return a checkpoint whose tensors have the trainer's names. UserError naming the first that does not fit the model."""
    expected = parameter_shapes(config)
    wrong = sorted(n for n in expected.keys() | stored.keys() if n not in stored or expected.get(n) != stored[n].shape)
    if wrong:
        there = list(stored[wrong[0]].shape) if wrong[0] in stored else "missing"
        here = list(expected[wrong[0]]) if wrong[0] in expected else "not in the model"
        raise UserError(
            f"{folder}: {len(wrong)} tensors do not fit the model, the first {wrong[0]}: {there} there, {here} here"
        )
    spans = {("master", name): [tensor] for name, tensor in stored.items()}
    if manifest is not None:
        return checkpoint_of(folder, manifest, spans)
    checkpoint = Checkpoint(folder, config, spans)
    checkpoint.check()
    return checkpoint


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object. UserError when there is none."""
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is no JSON object")
    return tree


def diffusion_beside(folder: Path) -> dict[str, Any]:
    """Return what the scheduler of a pipeline says of diffusion, {} without one. folder: its own, or that of its unet/."""
    paths = [home / "scheduler" / "scheduler_config.json" for home in (folder, folder.parent)]
    scheduler = next((read_json(path) for path in paths if path.is_file()), {})
    names = {"num_train_timesteps": "num_timesteps", "beta_schedule": "schedule", "beta_start": "beta_start",
             "beta_end": "beta_end", "prediction_type": "prediction"}  # fmt: skip
    return {ours: scheduler[theirs] for theirs, ours in names.items() if theirs in scheduler}


def unet_files(source: Source, options: Options, folder: str) -> tuple[list[OutFile], dict[str, bytes], str]:
    """Return the weight files of a `unet/` folder under the parameters' own names, their index, and the kind in them."""
    kind = chosen_weights(source, options)
    entries = [Entry(n, s, (piece(kind, n, 0, prod(s)),), options.dtype) for n, s in source.shapes.items()]
    return *parts(entries, f"{folder}{STEM}", options.part_bytes), kind


def plan(source: Source, options: Options, target: Path) -> ConversionPlan:
    """Plan a diffusers `unet/` folder of a dense model. UserError when the model is none."""
    unet = unet_json(source.config, "--to dense")
    files, small, kind = unet_files(source, options, "")
    small["config.json"] = json.dumps(unet, indent=2).encode()
    manifest = base_manifest("dense", source) | {"weights": kind}
    return ConversionPlan(files, (kind,), MANIFEST, manifest, small)


def detect(path: Path) -> bool:
    """Return whether this is a single file, or a folder as diffusers saves a model (not a pipeline)."""
    return path.is_file() or ((path / "config.json").is_file() and not (path / "model_index.json").is_file())


def pickles(path: Path) -> list[Path]:
    """Return the file itself unless it is safetensors; a folder is read from safetensors alone."""
    return [path] if path.is_file() and path.suffix != ".safetensors" else []


LAYOUT = Layout("dense", "weights", detect, open_dense, plan, WEIGHTS, pickles=pickles)
