"""Reads and writes a ControlNet (`model.controlnet`): in a run that trained it, or as a folder of diffusers.

    config.json                             the fields of diffusers' ControlNetModel, and those of the experts
    modeling_raphael.py                     the code of a ControlNet with experts, for diffusers' AutoModel
    diffusion_pytorch_model.safetensors     weights under diffusers' names, float32

`diffusers.ControlNetModel.from_pretrained` loads the folder if the model has no experts. Its input image is an edge map at
the size of the latents, in three equal channels.
"""

import inspect
import json
from pathlib import Path

import torch
from torch import Tensor

from raphael_dist.checkpoint.reader import CheckpointReader, check_architecture
from raphael_dist.config.schema import Config
from raphael_dist.convert.adapter_files import export_folder, open_run, trained_weights
from raphael_dist.convert.exported_code import model_code
from raphael_dist.convert.layouts.canonical import gather
from raphael_dist.convert.layouts.dense import STEM
from raphael_dist.convert.layouts.diffusers import config_of_experts, expert_json
from raphael_dist.convert.unet_config import unet_json
from raphael_dist.errors import UserError
from raphael_dist.model.controlnet import CONDITION_WIDTH, ControlNet
from raphael_dist.model.diffusers_model import RaphaelControlNet
from raphael_dist.storage.tensorfile import FileReader, save_tensors
from raphael_dist.storage.weight_files import weight_files
from raphael_dist.text import JsonObject, read_json, reason_unreadable

CONFIG, CLASS = "config.json", RaphaelControlNet.__name__
_PREFIX = "control."
_OPTION = "--control-from"


def read_control(path: Path, config: Config, weights: str | None = None) -> ControlNet:
    """Read a trained ControlNet from a run or an exported folder. Return it in float32 and eval mode on the CPU.

    Args:
        path: a run directory, whose newest undamaged checkpoint is read; one of its step-* folders; or a folder in
            diffusers' format.
        config: configuration of the base model with which the ControlNet is used.
        weights: which weights of a run to read, "ema" (moving average) or "master" (fp32 weights). None: the EMA if the run
            has one. A folder in diffusers' format has only one kind of weights.

    Raises:
        UserError: `path` contains no ControlNet, or the ControlNet does not fit the base model.
    """
    if (path / CONFIG).is_file():
        values = _read_folder(path)
    else:
        reader = open_run(path, CONFIG, _OPTION)
        check_architecture(reader.config(), config, str(path))
        values = control_weights(reader, weights, _OPTION)
    with torch.device("meta"):
        control = ControlNet(config)
    expected = {name: tuple(p.shape) for name, p in control.named_parameters()}
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    if wrong := sorted(expected.items() ^ shapes.items()):
        name = wrong[0][0]
        in_file, in_model = (f"of shape {list(s[name])}" if name in s else "missing" for s in (shapes, expected))
        raise UserError(
            f"{_OPTION} {path} must fit the model, but the tensor {name} is {in_file} in the file and {in_model} in the "
            "model. Use the base model that the ControlNet was trained with."
        )
    control.to_empty(device="cpu")
    control.load_state_dict(values)
    return control.eval()


def control_weights(reader: CheckpointReader, weights: str | None, option: str) -> dict[str, Tensor]:
    """Return the weights of the ControlNet in a checkpoint, float32, by the name of the parameter in the ControlNet.

    Args:
        reader: the opened checkpoint of the run that trained the ControlNet.
        weights: "ema" (moving average) or "master" (fp32 weights). None: the EMA if the checkpoint has one.
        option: name of the command line option that gave the checkpoint's path, for messages.

    Raises:
        UserError: the run trained no ControlNet.
    """
    if not reader.config().control.enabled:
        raise UserError(
            f"{option} {reader.folder} must be of a run that trained a ControlNet (control.enabled=true), but this run has "
            "control.enabled=false. Give a run that was trained with control.enabled=true."
        )
    return {name.removeprefix(_PREFIX): value for name, value in trained_weights(reader, weights).items()}


def write_control(values: dict[str, Tensor], config: Config, folder: Path) -> None:
    """Write a ControlNet as a new folder for diffusers. The folder appears only when it is complete.

    Args:
        values: the weights of the ControlNet, by parameter name.
        config: the configuration of the base model.
        folder: the new folder.

    Raises:
        UserError: `folder` exists already, or cannot be written.
    """
    with export_folder(folder) as temporary:
        content = control_json(config)
        (temporary / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
        if content["_class_name"] == CLASS:
            name, code = model_code(RaphaelControlNet)
            (temporary / f"{name}.py").write_text(code)
        with open(temporary / f"{STEM}.safetensors", "xb") as file:
            save_tensors(file, values, {"format": "pt"})


def control_json(config: Config) -> JsonObject:
    """Return the content of diffusers' config.json for the ControlNet of a base model with the configuration `config`.

    A model without experts has the fields of diffusers' ControlNetModel; a model with experts has additional fields.
    """
    model = config.model
    if model.space_experts or model.time_experts:
        return expert_json(config, RaphaelControlNet)
    from diffusers import ControlNetModel

    # A ControlNet has no edge modules.
    unet = unet_json(config.model_copy(update={"edge": config.edge.model_copy(update={"weight": 0.0})}), "--to controlnet")
    known = inspect.signature(ControlNetModel.__init__).parameters
    shared = {key: value for key, value in unet.items() if key in known}
    return {"_class_name": "ControlNetModel", **shared, "conditioning_embedding_out_channels": [CONDITION_WIDTH]}


def _read_folder(folder: Path) -> dict[str, Tensor]:
    try:
        content = read_json(folder / CONFIG)
        name = content["_class_name"]
        if name == CLASS:
            config_of_experts(content, folder / CONFIG, {}, None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{_OPTION}: {folder / CONFIG} cannot be read: {reason_unreadable(error)}. Copy it again from its source, or "
            "export the ControlNet again with --to controlnet."
        ) from None
    if name not in (CLASS, "ControlNetModel"):
        raise UserError(
            f"{_OPTION} {folder}: _class_name in {CONFIG} must be {CLASS} or ControlNetModel, but it is {name}. Give "
            "the folder of an exported ControlNet."
        )
    stored, reader = gather(weight_files(folder).paths), FileReader()
    return {name: reader.read([tensor], 0, tensor.numel).view(tensor.shape) for name, tensor in stored.items()}
