"""What pictures are compared by: Inception for FID, the trunk of HED where nothing may be downloaded, CLIP for captions.

Shape legend: B pictures, H and W their height and width in pixels, D features.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raphael_dist.data.hed import load_hed
from raphael_dist.errors import UserError

# uint8 [B, 3, H, W] to float32 [B, D] on the CPU.
Features = Callable[[Tensor], Tensor]
BATCH = 32
INSTALL = 'run `pip install "raphael_dist[eval]"`'


def features_of(spec: str, device: torch.device) -> Features:
    """Return the features that an option names: "hed", or "inception=FILE" with torch-fidelity's weights.

    UserError: an unknown name, a missing file, torch-fidelity that is not installed or cannot be imported.
    """
    name, _, path = spec.partition("=")
    if name == HED and not path:
        return hed_features(device)
    if name == "inception" and path:
        return inception_features(Path(path).expanduser(), device)
    raise UserError(
        f"--features: given {spec!r}, allowed hed, or inception=FILE (the weights that torch-fidelity publishes)"
    )


def inception_features(path: Path, device: torch.device) -> Features:
    """Return the 2048 pooled features of the Inception network that FID is defined by, of pictures of any size."""
    if not path.is_file():
        raise UserError(f"--features: {path} is not a file; get pt_inception-2015-12-05-6726825d.pth of torch-fidelity")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:  # without torchvision, or with one that was built for another torch
        raise UserError(
            f"--features inception needs torch-fidelity, which cannot be imported ({error}); {INSTALL}"
        ) from None
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--features: {path} does not hold the weights of Inception: {reason}") from None
    network = network.eval().to(device)

    @torch.no_grad()
    def compute(pictures: Tensor) -> Tensor:
        return network(pictures.to(device))[0].float().cpu()

    return compute


HED = "hed"


def hed_features(device: torch.device) -> Features:
    """Return stages 3 and 4 of the trunk of HED (VGG-16 by its weights for edges), averaged over pictures of any size.

    D = 768, in hundreds, which makes them about 1. For comparisons where nothing may be downloaded; they are no FID.
    """
    trunk = _trunk(device, 4)
    return lambda pictures: torch.cat([stage.mean(dim=(2, 3)) for stage in trunk(pictures)[2:]], dim=1).cpu() / 100


PARTS = {"style": 2080, "stage 3": 256 * 16, "stage 4": 512 * 4}  # of `hed_parts`: how many features each has


def hed_parts(device: torch.device) -> Features:
    """Return, side by side, what PARTS names: of the trunk of HED the logarithms of stage 1's Gram matrix, which tell a
    style (Gatys et al. 2016), and stages 3 and 4 averaged over 4 x 4 and 2 x 2 cells, which tell a thing.

    Why these: docs/learning.md, by what they tell of true pictures.
    """
    trunk = _trunk(device, 4)
    row, column = torch.triu_indices(64, 64)

    def compute(pictures: Tensor) -> Tensor:
        first, _, third, fourth = trunk(pictures)
        flat = first.flatten(2)
        gram = torch.log1p(flat @ flat.transpose(1, 2) / flat.shape[2])[:, row, column]
        cells = [F.adaptive_avg_pool2d(stage, grid).flatten(1) for stage, grid in ((third, 4), (fourth, 2))]
        return torch.cat([gram, *cells], dim=1).cpu()

    return compute


def _trunk(device: torch.device, stages: int) -> Callable[[Tensor], list[Tensor]]:
    """Return the first stages of HED for pictures, uint8 [B, 3, H, W], brought to 64 x 64 pixels."""
    network = load_hed().to(device)

    @torch.no_grad()
    def compute(pictures: Tensor) -> list[Tensor]:
        x = F.interpolate(pictures.to(device).float(), (64, 64), mode="bilinear", antialias=True, align_corners=False)
        h, found = x.flip(1) - network.get_buffer("mean_bgr"), []
        for number, stage in enumerate(network.stages[:stages]):
            h = stage(F.max_pool2d(h, 2, ceil_mode=True) if number else h)
            found.append(h)
        return found

    return compute


def compute_all(features: Features, pictures: Sequence[np.ndarray]) -> Tensor:
    """Return the features [B, D] of pictures, uint8 [H, W, 3], which may differ in size."""
    found = []
    for start in range(0, len(pictures), BATCH):
        part = pictures[start : start + BATCH]
        if len({p.shape for p in part}) == 1:
            found.append(features(_tensor(np.stack(part))))
        else:
            found += [features(_tensor(one[None])) for one in part]
    return torch.cat(found)


def _tensor(pixels_BHW3: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels_BHW3)).permute(0, 3, 1, 2)


class ClipScore:
    """100 max(cos(image, caption), 0) (Hessel et al. 2021, without their factor 2.5), by a CLIP of transformers."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """UserError: the folder does not hold a whole CLIP with its processor."""
        self._model, self._processor = _clip(str(folder))
        self._model.to(device)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> list[float]:
        """Return the score of each picture, uint8 [H, W, 3], with its caption."""
        scores = []
        for start in range(0, len(pictures), BATCH):
            images, texts = list(pictures[start : start + BATCH]), list(captions[start : start + BATCH])
            given = self._processor(text=texts, images=images, return_tensors="pt", padding=True, truncation=True)
            out = self._model(**given.to(self._model.device))
            cosine = F.cosine_similarity(out.image_embeds.float(), out.text_embeds.float())
            scores += (100 * cosine).clamp(min=0).tolist()
        return scores


@cache
def _clip(folder: str) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPProcessor

    if not Path(folder).is_dir():
        raise UserError(f"--clip: {folder!r} is not a folder; give a local CLIP (nothing is downloaded)")
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True)
        return model.eval(), CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UserError(f"--clip: cannot load {folder!r}: {str(error).splitlines()[0]}") from None
