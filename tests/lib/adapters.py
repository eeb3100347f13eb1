"""Helpers for tests of LoRA adapters and ControlNets: train one on a tiny frozen model, write models, sample images."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from raphael_dist import sample
from raphael_dist.config.schema import Config
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.losses import compute_losses
from raphael_dist.model.unet import RaphaelUNet
from tests.lib.checkpoints import handmade_canonical
from tests.lib.synthetic import adapted_model, synthetic_batch, tiny_config

SCHEDULE = NoiseSchedule.create(tiny_config().diffusion)
STEPS = 3


def losses_of(model: RaphaelUNet, config: Config, positions: range = range(4)) -> Tensor:
    batch = synthetic_batch(config, [(p, 1.0) for p in positions], model.num_blocks)
    return compute_losses(model, batch, SCHEDULE, config, torch.float32).total


def one_process(config: Config) -> tuple[dict[str, Tensor], list[float]]:
    """Train an adapter for STEPS steps with plain PyTorch, without DeepSpeed and micro-steps: the reference for tests.

    Returns:
        The trained weights, flattened, by parameter name, and the loss of each step.
    """
    model, losses = adapted_model(config), []
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, each = torch.optim.SGD(trained, lr=config.optim.lr), config.train.global_batch_size
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = losses_of(model, config, range(step * each, (step + 1) * each)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.optim.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return {name: p.detach().flatten() for name, p in model.named_parameters() if p.requires_grad}, losses


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def canonical(folder: Path, config: Config, seed: int = 5) -> Path:
    """Write a checkpoint in the canonical layout, with random weights drawn with `seed`; return `folder`."""
    torch.manual_seed(seed)
    weights = dict(RaphaelUNet(config).named_parameters())
    return handmade_canonical(
        folder, config, {(kind, n): p.detach() for n, p in weights.items() for kind in ("ema", "master")}
    )


def sample_image(base: Path, folder: Path, name: str, *extra: str) -> NDArray[np.int_]:
    """Run the command `raphael_dist.sample` for one prompt; return its image, int [H, W, 3].

    `base`: checkpoint of the base model. `folder`, `name`: the image is written into folder/name. `extra`: more arguments.
    """
    out = folder / name
    arguments = ["--checkpoint", str(base), "--prompt", "a", "--out", str(folder / "grid.png"), "--images", str(out)]
    assert sample.main([*arguments, *extra]) == 0
    return np.asarray(Image.open(out / "000000.png")).astype(int)
