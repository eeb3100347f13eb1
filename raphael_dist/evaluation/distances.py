"""Distances between two sets of pictures by their features, as torch-fidelity computes them.

Here rather than called there: that package needs torchvision to be imported, and the emoji benchmark needs neither.
Shape legend: N and M pictures, D features.
"""

import numpy as np
import torch
from torch import Tensor


def frechet_distance(a_ND: Tensor, b_MD: Tensor) -> float:
    """Return ||mu_a - mu_b||^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017, Eq. 6), in float64.

    FID, where the features are Inception's. Needs two pictures a set; few of them (fewer than D) bias it upwards.
    """
    a, b = a_ND.double(), b_MD.double()
    mean = a.mean(dim=0) - b.mean(dim=0)
    a, b = ((x - x.mean(dim=0)) / (len(x) - 1) ** 0.5 for x in (a, b))  # S = x^T x
    return float(mean @ mean + a.square().sum() + b.square().sum() - 2 * _trace_of_root(a, b))


def _trace_of_root(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    """Return tr (S_a S_b)^(1/2), the sum of the singular values of a b^T, by the smaller of two symmetric problems."""
    if min(len(a_ND), len(b_MD)) < a_ND.shape[1]:
        return torch.linalg.svdvals(a_ND @ b_MD.T).sum()
    value_D, vector_DD = torch.linalg.eigh(a_ND.T @ a_ND)
    root_DD = (vector_DD * value_D.clamp(min=0).sqrt()) @ vector_DD.T
    return torch.linalg.eigvalsh(root_DD @ (b_MD.T @ b_MD) @ root_DD).clamp(min=0).sqrt().sum()


def kernel_distance(
    a_ND: Tensor, b_MD: Tensor, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Return mean and deviation over subsets of the unbiased MMD^2 with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018).

    KID, where the features are Inception's. Subsets have `size` pictures, or as many as the smaller set.
    """
    size, draw = min(size, len(a_ND), len(b_MD)), np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        a, b = (x[torch.from_numpy(draw.choice(len(x), size, replace=False))].double() for x in (a_ND, b_MD))
        aa, bb, ab = _polynomial(a, a), _polynomial(b, b), _polynomial(a, b)
        within = (aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (size * (size - 1))
        values.append(float(within - 2 * ab.mean()))
    return float(np.mean(values)), float(np.std(values))


def _polynomial(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    return (a_ND @ b_MD.T / a_ND.shape[1] + 1) ** 3


def precision_recall(drawn_ND: Tensor, true_MD: Tensor, neighbours: int = 3, rows: int = 4096) -> tuple[float, float]:
    """Return the share of drawn pictures within the manifold of the true ones, and the reverse (Kynkaanniemi et al. 2019).

    A manifold is the union of balls around its pictures, as far as their `neighbours`-th nearest.
    """
    neighbours = min(neighbours, len(drawn_ND) - 1, len(true_MD) - 1)
    return _covered(drawn_ND, true_MD, neighbours, rows), _covered(true_MD, drawn_ND, neighbours, rows)


def _covered(of_ND: Tensor, by_MD: Tensor, neighbours: int, rows: int) -> float:
    """Return the share of `of` that lies in a ball around one of `by`."""
    radius_M = torch.cat([torch.cdist(part, by_MD).kthvalue(neighbours + 1).values for part in by_MD.split(rows)])
    inside = [(torch.cdist(part, by_MD) <= radius_M).any(dim=1) for part in of_ND.split(rows)]
    return float(torch.cat(inside).double().mean())


def bootstrap(values: np.ndarray, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Return the 95% interval of the mean of values [N], by resampling them."""
    picks = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(np.asarray(values, np.float64)[picks].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)
