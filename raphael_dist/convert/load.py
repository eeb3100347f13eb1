"""A U-Net with the weights of a checkpoint, in one process."""

import torch

from raphael_dist.checkpoint.reader import CheckpointReader
from raphael_dist.errors import UserError
from raphael_dist.model.unet import RaphaelUNet


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
