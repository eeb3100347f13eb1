"""Computes image features for FID, precision and recall, and the CLIP score.

Shape legend: B images, H and W their height and width in pixels, D features.
"""

import shlex
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raphael_dist.data.features.encoder_files import offline, reported
from raphael_dist.data.features.hed import load_hed
from raphael_dist.errors import UserError
from raphael_dist.storage.weight_files import TRANSFORMERS, weight_files

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPProcessor

# From images, uint8 [B, 3, H, W], to their features, float32 [B, D] on the CPU.
Features = Callable[[Tensor], Tensor]
BATCH = 32
INSTALL = 'Run `pip install "raphael_dist[eval]"`.'


def load_features(spec: str, device: torch.device) -> Features:
    """Return a function that computes image features of the kind that the option `--features` names.

    The function gets images, uint8 [B, 3, H, W], and returns features, float32 [B, D], on the CPU.

    Args:
        spec: value of the option: "hed", or "inception=FILE" with the weights that torch-fidelity publishes.
        device: the device that the network runs on.

    Raises:
        UserError: `spec` has another form, the file is missing or invalid, or torch-fidelity cannot be imported.
    """
    name, _, path = spec.partition("=")
    if name == "hed" and not path:
        return make_hed_features(device)
    if name == "inception" and path:
        return make_inception_features(Path(path).expanduser(), device)
    raise UserError(
        f"--features={spec} must be hed, or inception=FILE, where FILE is pt_inception-2015-12-05-6726825d.pth of "
        "torch-fidelity. Use --features hed, or download this file."
    )


def make_inception_features(path: Path, device: torch.device) -> Features:
    """Return a function that computes the Inception features of FID: uint8 [B, 3, H, W] to float32 [B, 2048], on the CPU.

    Images may have any size. `path`: file with the weights that torch-fidelity publishes. `device`: where the network runs.
    Raises UserError if the weights cannot be loaded.
    """
    if not path.is_file():
        raise UserError(
            f"--features=inception={path} must be an existing file, but there is none. Download "
            "pt_inception-2015-12-05-6726825d.pth of torch-fidelity."
        )
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:  # torchvision is missing, or was built for another torch
        raise UserError(
            f"--features=inception requires the package torch-fidelity, but it cannot be imported ({error}). {INSTALL}"
        ) from None
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(
            f"--features=inception={path} must contain the Inception weights of torch-fidelity, but the file cannot be "
            f"loaded ({reason}). Download pt_inception-2015-12-05-6726825d.pth of torch-fidelity."
        ) from None
    network = network.eval().to(device)

    @torch.no_grad()
    def compute(images: Tensor) -> Tensor:
        return network(images.to(device))[0].float().cpu()

    return compute


def make_hed_features(device: torch.device) -> Features:
    """Return a function that computes features of images with the edge detector HED.

    The features are the outputs of HED's stages 3 and 4, averaged over the image and divided by 100, so that they are about
    1. HED is a VGG-16 fine-tuned for edges, and its weights need no download. Distances of these features cannot be compared
    with published values of FID, which use Inception features.

    Args:
        device: where the network runs.

    Returns:
        A function from images, uint8 [B, 3, H, W], to features, float32 [B, 768].
    """
    stages = make_hed_stages(device)
    return lambda images: torch.cat([stage.mean(dim=(2, 3)) for stage in stages(images)[2:]], dim=1).cpu() / 100


def make_hed_stages(device: torch.device) -> Callable[[Tensor], list[Tensor]]:
    """Return a function that computes the outputs of the first four stages of the network HED.

    Args:
        device: where the network runs.

    Returns:
        A function from images, uint8 [B, 3, H, W], to the outputs of the stages. It resizes the images to 64 x 64 pixels
            first.
    """
    network = load_hed().to(device)

    @torch.no_grad()
    def compute(images: Tensor) -> list[Tensor]:
        x = F.interpolate(images.to(device).float(), (64, 64), mode="bilinear", antialias=True, align_corners=False)
        h, outputs = x.flip(1) - network.get_buffer("mean_bgr"), []
        for number, stage in enumerate(network.stages[:4]):
            h = stage(F.max_pool2d(h, 2, ceil_mode=True) if number else h)
            outputs.append(h)
        return outputs

    return compute


def compute_features(features: Features, images: Sequence[np.ndarray]) -> Tensor:
    """Return the features, float32 [B, D], of B images, uint8 [H, W, 3], whose sizes may differ.

    `features`: a function that `load_features` has returned.
    """
    batches = []
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH]
        same_size = len({image.shape for image in part}) == 1
        for pixels_BHW3 in [np.stack(part)] if same_size else [image[None] for image in part]:
            batches.append(features(torch.from_numpy(np.ascontiguousarray(pixels_BHW3)).permute(0, 3, 1, 2)))
    return torch.cat(batches)


class ClipScore:
    """Computes the CLIP score, 100 max(cos(image, caption), 0), with a CLIP model of transformers.

    This is the score of Hessel et al. 2021, with the factor 100 instead of 2.5.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Load the CLIP model in `folder`. Raises UserError if the folder has no complete CLIP with its processor."""
        self._model, self._processor = _load_clip(str(folder))
        self._model.to(device)  # type: ignore[arg-type]

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> list[float]:
        """Return the score of each image, uint8 [H, W, 3], with the caption at the same index."""
        scores: list[float] = []
        for start in range(0, len(images), BATCH):
            part, texts = list(images[start : start + BATCH]), list(captions[start : start + BATCH])
            inputs = self._processor(text=texts, images=part, return_tensors="pt", padding=True, truncation=True)
            out = self._model(**inputs.to(self._model.device))
            cosine = F.cosine_similarity(out.image_embeds.float(), out.text_embeds.float())
            scores += (100 * cosine).clamp(min=0).tolist()
        return scores


@cache
def _load_clip(folder: str) -> "tuple[CLIPModel, CLIPProcessor]":
    from transformers import CLIPModel, CLIPProcessor

    if not Path(folder).is_dir():
        raise UserError(
            f"--clip={folder} must be a folder with a CLIP model, but there is no such folder. Download a model into it "
            f"first, e.g. `hf download openai/clip-vit-base-patch32 --local-dir {shlex.quote(folder)}`."
        )
    with reported("--clip", folder):
        model = CLIPModel.from_pretrained(folder, **offline(), variant=weight_files(Path(folder), TRANSFORMERS).variant)
        return model.eval(), CLIPProcessor.from_pretrained(folder, **offline())
