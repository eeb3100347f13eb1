"""A control (`model.control`) in files: of a run that trained it, or alone in diffusers' layout of a ControlNet.

    config.json                             that of diffusers' ControlNetModel, or, with experts, the model's configuration
    diffusion_pytorch_model.safetensors     weights under diffusers' names, float32

A model without experts gives a folder that `diffusers.ControlNetModel.from_pretrained` loads. Its condition is an edge map
at the latents' size, in three equal channels.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raphael_dist.checkpoint.reader import CheckpointReader, check_architecture
from raphael_dist.config import Config, config_from_tree
from raphael_dist.convert.beside import exported, open_run, read_tensors
from raphael_dist.convert.layouts.dense import STEM, unet_json
from raphael_dist.errors import UserError
from raphael_dist.model.control import READER_WIDTH, ControlNet
from raphael_dist.storage.files import read_text

CONFIG, CLASS = "config.json", "RaphaelControlNet"
_PREFIX = "control."


def read_control(path: Path, config: Config, weights: str = "ema", option: str = "--control-from") -> ControlNet:
    """Read the control of a run (its newest checkpoint that verifies), one of its step folders, or a folder of diffusers'.

    config: of the model that it is to control. weights: of a run, "ema" (if it has an average) or "master". UserError: there
    is none, or it is for another model.
    """
    if (path / CONFIG).is_file() and (path / f"{STEM}.safetensors").is_file():
        values = _read_folder(path, option)
    else:
        reader = open_run(path, CONFIG, option)
        check_architecture(reader.config(), config, str(path))
        values = values_of(reader, weights, option)
    with torch.device("meta"):
        control = ControlNet(config)
    wanted = {name: tuple(p.shape) for name, p in control.named_parameters()}
    found = {name: tuple(value.shape) for name, value in values.items()}
    if wrong := sorted(wanted.items() ^ found.items()):
        raise UserError(f"{option} {path}: {wrong[0][0]} does not fit the model; give the one that it was trained beside")
    control.to_empty(device="cpu")
    control.load_state_dict(values)
    return control.eval()


def values_of(reader: CheckpointReader, weights: str = "ema", option: str = "--run") -> dict[str, Tensor]:
    """Return the weights of a checkpoint's control by name. UserError: its run trained none."""
    if not reader.config().control.enabled:
        raise UserError(f"{option} {reader.folder}: that run trained no control (control.enabled = false)")
    kind = weights if weights in reader.kinds() else "master"
    return {name.removeprefix(_PREFIX): reader.whole(kind, name) for name in reader.shapes}


def write_control(values: dict[str, Tensor], config: Config, folder: Path) -> None:
    """Write a control as diffusers' folder, which must not exist; it appears whole or not at all."""
    from safetensors.torch import save_file

    with exported(folder) as temporary:
        (temporary / CONFIG).write_text(json.dumps(control_json(config), indent=2) + "\n")
        save_file(values, str(temporary / f"{STEM}.safetensors"), metadata={"format": "pt"})


def control_json(config: Config) -> dict[str, Any]:
    """Return config.json: of diffusers' class where the model has no experts."""
    model = config.model
    if model.space_experts or model.time_experts:
        tree = config.model_dump(mode="json")
        return {"_class_name": CLASS, "tree": {name: tree[name] for name in ("model", "edge")}}
    from diffusers import ControlNetModel

    # The U-Net's edge modules are no part of it.
    unet = unet_json(config.model_copy(update={"edge": config.edge.model_copy(update={"weight": 0.0})}), "--out")
    known = inspect.signature(ControlNetModel.__init__).parameters
    same = {key: value for key, value in unet.items() if key in known}
    return {"_class_name": "ControlNetModel", **same, "conditioning_embedding_out_channels": [READER_WIDTH]}


def _read_folder(folder: Path, option: str) -> dict[str, Tensor]:
    try:
        said = json.loads(read_text(folder / CONFIG))
        name = said["_class_name"]
        if name == CLASS:
            config_from_tree(said["tree"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{option} {folder / CONFIG} cannot be read: {error}") from None
    if name not in (CLASS, "ControlNetModel"):
        raise UserError(f"{option} {folder}: it holds a {name}; known: {CLASS}, ControlNetModel")
    return read_tensors(folder / f"{STEM}.safetensors")
