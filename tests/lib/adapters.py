"""Helpers for tests of adapters and controls: a small frozen model, trained in one process, and its files."""

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
    """Train in this process with torch alone, the full batch at once."""
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
    """Write a model with random weights."""
    torch.manual_seed(seed)
    weights = dict(RaphaelUNet(config).named_parameters())
    return handmade_canonical(
        folder, config, {(kind, n): p.detach() for n, p in weights.items() for kind in ("ema", "master")}
    )


def sample_image(base: Path, folder: Path, name: str, *extra: str) -> NDArray[np.int_]:
    """Return the image that the command samples with these arguments into folder/name, int [H, W, 3]."""
    out = folder / name
    arguments = ["--checkpoint", str(base), "--prompt", "a", "--out", str(folder / "grid.png"), "--images", str(out)]
    assert sample.main([*arguments, *extra]) == 0
    return np.asarray(Image.open(out / "000000.png")).astype(int)
