"""A U-Net with the weights of a checkpoint or of a diffusers folder, in one process."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from raphael_dist.checkpoint.reader import CheckpointReader
from raphael_dist.errors import UserError
from raphael_dist.model.unet import RaphaelUNet

WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' file name


def load_unet(reader: CheckpointReader, weights: str = "ema") -> RaphaelUNet:
    """Return the model in float32 on the CPU, in eval mode, with the averaged ("ema") or last ("master") weights.

    Raises UserError when the checkpoint lacks a tensor of its own configuration's model, or has one too many.
    """
    if weights not in reader.kinds():
        raise UserError(f"--weights {weights}: the checkpoint holds only {', '.join(sorted(reader.kinds()))}")
    with torch.device("meta"):
        model = RaphaelUNet(reader.config())
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wrong = sorted(set(expected.items()) ^ set(reader.shapes.items()))
    if wrong:
        raise UserError(f"checkpoint {reader.folder}: {wrong[0][0]} does not fit the model of its own configuration")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(reader.whole(weights, name))
    return model.eval()


def load_diffusers_unet(model: nn.Module, folder: Path) -> None:
    """Copy the weights of a diffusers `unet/` folder (safetensors, whole or in parts) into a model of the same names.

    Raises UserError naming the first tensor that is missing, left over or of another shape; nothing is copied then.
    """
    index = folder / f"{WEIGHTS}.index.json"
    try:
        parts = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [WEIGHTS]
        weights = {name: tensor for part in parts for name, tensor in load_file(folder / part).items()}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"run.init_from: cannot read a diffusers unet/ folder in {folder}: {error}") from None
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise UserError(
            f"run.init_from: {len(wrong)} tensors of {folder} do not fit the model, the first {wrong[0]}: "
            f"{found.get(wrong[0], 'missing')} there, {expected.get(wrong[0], 'not in the model')} here"
        )
    model.load_state_dict(weights)
