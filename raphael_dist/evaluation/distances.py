"""Distances between two sets of images, computed from their features. Values equal those of torch-fidelity.

This code exists so that a benchmark can compute the distances without torch-fidelity, which requires torchvision.

Shape legend: N and M images, D features.
"""

import numpy as np
import torch
from torch import Tensor


def frechet_distance(a_ND: Tensor, b_MD: Tensor) -> float:
    """Return the Frechet distance between two sets of features (Heusel et al. 2017, Eq. 6).

    The distance is ||mu_a - mu_b||^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), with means mu and covariances S. It is computed in
    float64. With Inception features it is called FID.

    Args:
        a_ND: features of N images, at least two. If N or M is below D, the distance is biased upwards.
        b_MD: features of M images, at least two.
    """
    a, b = a_ND.double(), b_MD.double()
    mean = a.mean(dim=0) - b.mean(dim=0)
    a, b = ((x - x.mean(dim=0)) / (len(x) - 1) ** 0.5 for x in (a, b))  # then S = x^T x
    return float(mean @ mean + a.square().sum() + b.square().sum() - 2 * _trace_of_root(a, b))


def _trace_of_root(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    """Return tr((S_a S_b)^(1/2)) for the covariances S_a = a^T a and S_b = b^T b.

    `a_ND` and `b_MD` are a and b: features minus their mean, divided by the square root of (number of images - 1). The trace
    is the sum of the singular values of a b^T. It is computed from this matrix, [N, M], if N or M is less than D, and
    otherwise from matrices [D, D].
    """
    if min(len(a_ND), len(b_MD)) < a_ND.shape[1]:
        return torch.linalg.svdvals(a_ND @ b_MD.T).sum()
    value_D, vector_DD = torch.linalg.eigh(a_ND.T @ a_ND)
    root_DD = (vector_DD * value_D.clamp(min=0).sqrt()) @ vector_DD.T
    return torch.linalg.eigvalsh(root_DD @ (b_MD.T @ b_MD) @ root_DD).clamp(min=0).sqrt().sum()


def kernel_distance(
    a_ND: Tensor, b_MD: Tensor, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Return mean and standard deviation of the unbiased MMD^2 with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018).

    MMD^2 (squared maximum mean discrepancy) measures the distance between two sets of images. It is computed for pairs of
    random subsets, and the mean and standard deviation are those over the pairs. With Inception features the mean is called
    KID.

    Args:
        a_ND: features of one set of images, float [N, D].
        b_MD: features of the other set, float [M, D].
        subsets: number of pairs of random subsets that are compared.
        size: images in a subset; at most as many as the smaller set has.
        seed: determines which subsets are drawn.
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
    """Return (precision, recall), each 0..1, of generated images compared with real images (Kynkaanniemi et al. 2019).

    Precision is the share of generated images in the manifold of the real images. Recall is the share of real images in the
    manifold of the generated images. The manifold of a set of images is a union of balls, one around the features of each
    image. The radius of a ball is the distance to the `neighbours`-th nearest other image of the same set.

    Args:
        drawn_ND: features of the generated images, float [N, D].
        true_MD: features of the real images, float [M, D].
        neighbours: which of the nearest images determines the radius; at most the size of the smaller set minus 1.
        rows: number of images whose distances are computed at a time, to limit memory.
    """
    neighbours = min(neighbours, len(drawn_ND) - 1, len(true_MD) - 1)
    return _covered_share(drawn_ND, true_MD, neighbours, rows), _covered_share(true_MD, drawn_ND, neighbours, rows)


def _covered_share(points_ND: Tensor, manifold_MD: Tensor, neighbours: int, rows: int) -> float:
    """Return the share (0..1) of N points that lie in at least one of M balls, one around each row of `manifold_MD`.

    The points are the rows of `points_ND`. The radius of a ball is the distance from its centre to the `neighbours`-th
    nearest other row of `manifold_MD`. `rows`: number of points whose distances are computed at a time, to limit memory.
    """
    parts = manifold_MD.split(rows)
    radius_M = torch.cat([torch.cdist(part, manifold_MD).kthvalue(neighbours + 1).values for part in parts])
    inside = [(torch.cdist(part, manifold_MD) <= radius_M).any(dim=1) for part in points_ND.split(rows)]
    return float(torch.cat(inside).double().mean())


def bootstrap(
    values: np.ndarray, weights: np.ndarray | None = None, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95% bootstrap interval (low, high) of the mean of values [N].

    `weights`: [N], weights of the values in the mean; None: equal weights. `draws`: number of random resamples. `seed`:
    determines the resamples.
    """
    picks = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    weights = np.ones(len(values)) if weights is None else weights
    means = (np.asarray(values, np.float64) * weights)[picks].sum(axis=1) / weights[picks].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Return the 95% confidence interval (low, high) of the share `successes / count` (Wilson 1927).

    Unlike a bootstrap interval, this interval has a positive width at shares of 0 and 1.
    """
    share, z2 = successes / count, 1.96**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = 1.96 / (1 + z2 / count) * (share * (1 - share) / count + z2 / (4 * count**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)
