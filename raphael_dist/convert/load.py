"""A U-Net with the weights of a checkpoint, in any layout, in one process."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from raphael_dist.checkpoint.reader import CheckpointReader
from raphael_dist.config import Config
from raphael_dist.convert.layouts import open_checkpoint
from raphael_dist.convert.source import Checkpoint, is_dense
from raphael_dist.engine.fragments import Fragments
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


def load_initial(
    fragments: Fragments, path: Path, config: Config, *, verify: bool = True, tell: Callable[[str], None] = lambda _: None
) -> None:
    """Copy weights (averaged ones, if there are any) of a checkpoint in any layout into this rank's fp32 weights.

    Each rank reads what it owns, in float32, so that nothing is rounded to the type that the model computes in; call
    `fragments.sync_model` after it. verify: hash the files first, which one rank does for all. tell: gets a word about every
    parameter. Raises UserError naming the first tensor that is missing, left over or of another shape, or where the model
    predicts another thing than `config` trains, and copies nothing.
    """
    try:
        checkpoint = open_checkpoint("auto", path)
        tell("its checksums")
        damage = checkpoint.damage() if verify else None
    except UserError as error:
        raise UserError(f"run.init_from: cannot read {path}: {str(error).removeprefix('--from ')}") from None
    with checkpoint:
        if damage:
            raise UserError(f"run.init_from: {damage}")
        for note in checkpoint.notes:
            _log.warning("run.init_from: %s", note)
        _check_shapes(fragments.shapes, checkpoint, path)
        checkpoint.check_prediction(config.diffusion.prediction)
        kind = "ema" if "ema" in checkpoint.kinds() else "master"
        with torch.no_grad():
            for f in fragments:
                tell(f.name)
                f.master.copy_(checkpoint.read(kind, f.name, f.start, f.numel).view(-1))


def _check_shapes(expected: dict[str, tuple[int, ...]], checkpoint: Checkpoint, path: Path) -> None:
    wrong = sorted(n for n in expected.keys() | checkpoint.shapes.keys() if expected.get(n) != checkpoint.shapes.get(n))
    if wrong:
        hint = "; tools/convert_checkpoint.py --config upcycles a dense model" if is_dense(checkpoint.config) else ""
        raise UserError(
            f"run.init_from: {len(wrong)} tensors of {path} do not fit the model, the first {wrong[0]}: "
            f"{checkpoint.shapes.get(wrong[0], 'missing')} there, {expected.get(wrong[0], 'not in the model')} here{hint}"
        )
