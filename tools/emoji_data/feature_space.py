"""The fixed feature space in which the emoji benchmark compares generated images with real ones.

For a held-out pair of a thing ("red heart") and a drawing style ("noto"), training had the thing in other styles and the
style with other things. A model can draw the pair only by combining the two. The features are fixed and need no download.
How well they separate things and styles is measured on the real images.

Shape legend: P pairs (generated images), N real images, B images, D features, S styles.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raphael_dist.data.features.encoders import ImageEncoder
from raphael_dist.data.sequential_samples import read_samples
from raphael_dist.errors import UserError
from raphael_dist.evaluation.distances import bootstrap, frechet_distance
from raphael_dist.evaluation.image_features import Features, compute_features, make_hed_stages
from raphael_dist.sampling.sampler import to_pixels, to_tensor
from raphael_dist.storage.checksummed import read_array, write_array

PRINCIPAL = 32  # principal components of the Frechet distance: few, as there are about a hundred held-out pairs
PENALTY = 0.1  # of the style classifier's ridge regression
PARTS = {"style": 2080, "stage 3": 256 * 16, "stage 4": 512 * 4}  # columns of each part of the features


@dataclass(frozen=True, eq=False)
class TrueImages:
    """The N images of the data set (real, not generated), each with its thing (e.g. "red-heart"), style and first caption.

    `pixels`: uint8 [H, W, 3] each. `held_out`: bool [N], whether an image is held out from training.
    """

    pixels: list[np.ndarray]
    things: list[str]
    styles: list[str]
    captions: list[str]
    held_out: np.ndarray

    @classmethod
    def read(
        cls,
        training: Sequence[str],
        held_out: Sequence[str],
        cache_dir: Path,
        size_hw: tuple[int, int],
        options: tuple[str, str] = ("data.shards", "data.val_shards"),
    ) -> "TrueImages":
        """Read all images of the shards `training` and `held_out` (patterns).

        Args:
            training: shards of training images.
            held_out: shards of images that are held out from training.
            cache_dir: folder for the index of the shards.
            size_hw: height and width to which images are resized.
            options: names of the options or fields that set `training` and `held_out`, for error messages.

        Raises:
            UserError: the key of a sample does not have the form THING__STYLE, or `training` or `held_out` has no images.
        """
        images = cls([], [], [], [], np.zeros(0, bool))
        flags: list[bool] = []
        for patterns, option in zip((training, held_out), options, strict=True):
            for sample in read_samples(patterns, cache_dir, size_hw, option) if patterns else ():
                thing, mark, style = sample.key.rpartition("__")
                if not mark:
                    raise UserError(
                        f"{option} must name the emoji shards, whose sample keys have the form THING__STYLE, but one key is "
                        f"{sample.key!r}. Make the shards with `python tools/make_emoji_dataset.py --out data/emoji`."
                    )
                images.pixels.append(sample.image.transpose(1, 2, 0).copy())
                images.things.append(thing)
                images.styles.append(style)
                images.captions.append(sample.captions[0])
                flags.append(patterns is held_out)
        if not any(flags) or all(flags):
            raise UserError(f"{', '.join(options)}: the benchmark requires images in both. Give --shards and --val-shards.")
        return cls(images.pixels, images.things, images.styles, images.captions, np.array(flags))

    def digest(self) -> str:
        """Return a checksum of all pixels (24 hex digits), which is part of the name of the file of cached features."""
        sha = hashlib.sha256()
        for pixels in self.pixels:
            sha.update(pixels.tobytes())
        return sha.hexdigest()[:24]


def make_part_features(device: torch.device) -> Features:
    """Return a function from images to features [B, D], whose columns have the parts and widths of PARTS.

    The style is described by the logarithm of the Gram matrix (Gatys et al. 2016) of stage 1 of the edge detector HED. The
    thing is described by its stages 3 and 4, averaged over 4 x 4 and 2 x 2 cells of the image.
    """
    stages = make_hed_stages(device)
    row, column = torch.triu_indices(64, 64)

    def compute(images: Tensor) -> Tensor:
        first, _, third, fourth = stages(images)
        flat = first.flatten(2)
        gram = torch.log1p(flat @ flat.transpose(1, 2) / flat.shape[2])[:, row, column]
        cells = [F.adaptive_avg_pool2d(stage, grid).flatten(1) for stage, grid in ((third, 4), (fourth, 2))]
        return torch.cat([gram, *cells], dim=1).cpu()

    return compute


class FeatureSpace:
    """Computes image features, fitted to the real images, and compares generated images with real ones.

    Features are scaled to the mean and standard deviation of the training images, and then to length 1.
    """

    def __init__(self, images: TrueImages, cache_dir: Path, device: torch.device) -> None:
        self.images, self._compute = images, make_part_features(device)
        path = cache_dir / "features" / f"hed-parts-{images.digest()}.npy"
        raw = _split_parts(_cached(path, lambda: compute_features(self._compute, images.pixels)))
        train = torch.from_numpy(~images.held_out)
        self._scale = [(x[train].mean(dim=0), x[train].std(dim=0) + 1e-6) for x in raw]
        self.true = self._scaled(raw)
        self.style_names = sorted(set(images.styles))
        self._style_N = np.array([self.style_names.index(style) for style in images.styles])
        self._classifier = self._fit_styles(self.true.style[train], self._style_N[~images.held_out])
        whole_ND = self.true.whole[train].double()
        centred_ND = whole_ND - whole_ND.mean(dim=0)
        basis_DD = torch.linalg.eigh(centred_ND.T @ centred_ND)[1].flip(1)
        self._basis_DK = basis_DD[:, : min(PRINCIPAL, *centred_ND.shape)]

    def features(self, pixels: Sequence[np.ndarray]) -> "ScaledFeatures":
        """Compute the scaled features of images, uint8 [H, W, 3] each."""
        return self._scaled(_split_parts(compute_features(self._compute, pixels)))

    def _scaled(self, raw: Sequence[Tensor]) -> "ScaledFeatures":
        style, third, fourth, whole = (
            F.normalize((x - mean) / deviation, dim=1) for x, (mean, deviation) in zip(raw, self._scale, strict=True)
        )
        return ScaledFeatures(style, torch.cat([third, fourth], dim=1) / 2**0.5, whole)

    def _fit_styles(self, x_ND: Tensor, style_N: np.ndarray) -> Tensor:
        """Fit a ridge regression from style features [N, D] to one-hot styles; return its weights, float64 [D + 1, S].

        `style_N`: number of the style of each image. The last row is the bias.
        """
        x, onehot = _append_one(x_ND), F.one_hot(torch.from_numpy(style_N), len(self.style_names)).double()
        return torch.linalg.solve(x.T @ x + PENALTY * torch.eye(x.shape[1], dtype=torch.float64), x.T @ onehot)

    def style_correct(self, features: "ScaledFeatures", styles: Sequence[str]) -> np.ndarray:
        """Return for each of P drawn images whether its predicted style is the requested one (1) or not (0), float64 [P]."""
        predicted = (_append_one(features.style) @ self._classifier).argmax(dim=1).tolist()
        return np.array([self.style_names[p] == style for p, style in zip(predicted, styles, strict=True)], np.float64)

    def rank(self, features: "ScaledFeatures", things: Sequence[str], styles: Sequence[str]) -> np.ndarray:
        """Return the retrieval rank of each of P drawn images, int [P]; 0 is best.

        The rank is the number of real images of the requested style that are more similar to the drawn image than the real
        image of the requested thing.
        """
        return np.array([self._rank(*query) for query in zip(features.cells, things, styles, strict=True)])

    def _rank(self, x_D: Tensor, thing: str, style: str) -> int:
        rows = np.flatnonzero(self._style_N == self.style_names.index(style))
        similarity = self.true.cells[torch.from_numpy(rows)] @ x_D
        target = next(i for i, row in enumerate(rows) if self.images.things[row] == thing)
        return int((similarity > similarity[target]).sum())

    def distance(self, a: Tensor, b: Tensor) -> float:
        """Return the Frechet distance of two sets of whole-image features, [., D] each.

        The distance is computed in the PRINCIPAL directions of the largest variance of the training images.
        """
        return frechet_distance(a.double() @ self._basis_DK, b.double() @ self._basis_DK)


@dataclass(frozen=True, eq=False)
class ScaledFeatures:
    """Features of B images, each [B, D] with rows of length 1: of the style, the thing by cells, and the whole image."""

    style: Tensor
    cells: Tensor
    whole: Tensor

    def __getitem__(self, rows: Tensor) -> "ScaledFeatures":
        return ScaledFeatures(self.style[rows], self.cells[rows], self.whole[rows])


def _split_parts(raw_ND: Tensor) -> list[Tensor]:
    """Split features [N, D] into style, stage 3, stage 4, and the mean of these stages over their cells."""
    style, third, fourth = raw_ND.split(list(PARTS.values()), dim=1)
    whole = [part.unflatten(1, (-1, cells)).mean(dim=2) for part, cells in ((third, 16), (fourth, 4))]
    return [style, third, fourth, torch.cat(whole, dim=1)]


def _append_one(x_ND: Tensor) -> Tensor:
    return F.pad(x_ND.double(), (0, 1), value=1.0)


def _cached(path: Path, compute: Callable[[], Tensor]) -> Tensor:
    """Return the array in the file `path`; compute and write it if it is missing or damaged."""
    try:
        return torch.from_numpy(read_array(path))
    except (OSError, ValueError):
        features = compute()
        write_array(path, features.numpy())
        return features


@dataclass(frozen=True)
class Row:
    """One row of the benchmark's result table: `what` was measured, its value, and its 95% bootstrap interval over pairs."""

    what: str
    value: float
    low: float
    high: float


def judge(space: FeatureSpace, features: ScaledFeatures, things: Sequence[str], styles: Sequence[str]) -> list[Row]:
    """Measure drawn images; return the rows of the result table.

    The rows are style accuracy, retrieval of the thing in the requested style and in other styles, and the Frechet distance
    to the real held-out images. `things`, `styles`: what each image was requested to show.
    """
    rows = [_mean_row("style accuracy", space.style_correct(features, styles))]
    rank = space.rank(features, things, styles)
    rows += [_mean_row(f"own true image, top {k}", (rank < k).astype(np.float64)) for k in (1, 5)]
    styles_of: dict[str, set[str]] = {}
    for thing, style in zip(space.images.things, space.images.styles, strict=True):
        styles_of.setdefault(thing, set()).add(style)
    others = [sorted(styles_of[thing] - {style}) for thing, style in zip(things, styles, strict=True)]
    pairs = [n for n, other_styles in enumerate(others) if other_styles]
    if pairs:
        ranks = [[space.rank(features[torch.tensor([n])], [things[n]], [s])[0] for s in others[n]] for n in pairs]
        for k in (1, 5):
            shares = np.array([np.mean([rank < k for rank in ranks_of_pair]) for ranks_of_pair in ranks])
            rows.append(_mean_row(f"thing in another style, top {k}", shares))
    rows.append(_frechet_row(space, features))
    return rows


def _mean_row(what: str, values: np.ndarray) -> Row:
    return Row(what, float(values.mean()), *bootstrap(values))


def _frechet_row(space: FeatureSpace, features: ScaledFeatures, draws: int = 100) -> Row:
    drawn, true = features.whole, space.true.whole[torch.from_numpy(space.images.held_out)]
    value, draw, resampled = space.distance(drawn, true), np.random.default_rng(0), []
    for _ in range(draws):
        a, b = (torch.from_numpy(draw.integers(0, len(x), len(x))) for x in (drawn, true))
        resampled.append(space.distance(drawn[a], true[b]))
    # A resample repeats images, which changes means and covariances and so raises the distance. Therefore the interval is
    # the spread of the resampled distances around their own mean, placed around the distance of all images.
    low, high = np.quantile(resampled, [0.025, 0.975]) - np.mean(resampled) + value
    return Row("Frechet distance", value, max(0.0, float(low)), float(high))


def judge_references(space: FeatureSpace, image: ImageEncoder) -> dict[str, list[Row]]:
    """Return the table rows of two reference models, by column name: a perfect model, and one that copies training images.

    The perfect model "draws" the real held-out images, encoded and decoded by the autoencoder. The copy of a held-out image
    is a training image of the same thing in another style.
    """
    true = space.images
    held_out = np.flatnonzero(true.held_out)
    things, styles = [true.things[i] for i in held_out], [true.styles[i] for i in held_out]
    decoded = reconstruct(image, [true.pixels[i] for i in held_out])
    columns = {"true images, through the autoencoder": judge(space, space.features(decoded), things, styles)}
    trained = [(thing, i) for i, thing in enumerate(true.things) if not true.held_out[i]]
    copy_of = dict(reversed(trained))  # the first image of each thing
    pairs = [n for n, thing in enumerate(things) if thing in copy_of]
    if len(pairs) > 1:
        copies = space.true[torch.tensor([copy_of[things[n]] for n in pairs])]
        columns["the thing in a trained style"] = judge(
            space, copies, [things[n] for n in pairs], [styles[n] for n in pairs]
        )
    return columns


@torch.no_grad()
def reconstruct(image: ImageEncoder, pixels: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return images, uint8 [H, W, 3], after encoding and decoding by the autoencoder."""
    images: list[np.ndarray] = []
    for start in range(0, len(pixels), 16):
        mean, _ = image.encode(to_tensor(np.stack(pixels[start : start + 16])))
        images += list(to_pixels(image.decode(mean)))
    return images
