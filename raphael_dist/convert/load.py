"""A U-Net with the weights of a checkpoint, in any layout, in one process."""

import logging
from pathlib import Path

import torch
from torch import nn

from raphael_dist.checkpoint.reader import CheckpointReader
from raphael_dist.convert.run import open_checkpoint
from raphael_dist.convert.source import Checkpoint
from raphael_dist.errors import UserError
from raphael_dist.model.unet import RaphaelUNet

_log = logging.getLogger(__name__)


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


def load_initial(model: nn.Module, path: Path) -> None:
    """Copy weights (averaged ones, if there are any) of a checkpoint in any layout into a model of the same names.

    Raises UserError naming the first tensor that is missing, left over or of another shape; nothing is copied then.
    """
    try:
        found = open_checkpoint("auto", path)
        damage = found.damage()
    except UserError as error:
        raise UserError(f"run.init_from: cannot read {path}: {str(error).removeprefix('--from ')}") from None
    with found:
        if damage:
            raise UserError(f"run.init_from: {damage}")
        for note in found.notes:
            _log.warning("run.init_from: %s", note)
        _copy_weights(model, found, path)


def _copy_weights(model: nn.Module, found: Checkpoint, path: Path) -> None:
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wrong = sorted(n for n in expected.keys() | found.shapes.keys() if expected.get(n) != found.shapes.get(n))
    if wrong:
        hint = "; tools/convert_checkpoint.py --config upcycles a dense model" if found.layout == "dense" else ""
        raise UserError(
            f"run.init_from: {len(wrong)} tensors of {path} do not fit the model, the first {wrong[0]}: "
            f"{found.shapes.get(wrong[0], 'missing')} there, {expected.get(wrong[0], 'not in the model')} here{hint}"
        )
    kind = "ema" if "ema" in found.kinds() else "master"
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(found.read(kind, name, 0, p.numel()).view(p.shape))
