"""The emoji benchmark: held-out pairs of a thing and a style, drawn and compared with the true pictures. No download.

A pair was never trained on, but its thing was in other styles and its style with other things. So a picture can be right
only by composing the two. Features are fixed (features.py); what they can tell at best is measured beside the model, on
the true pictures themselves.
Shape legend: P pairs, N true pictures, D features, S styles.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raphael_dist.data.encoders import ImageEncoder
from raphael_dist.data.plain import read_samples
from raphael_dist.errors import UserError
from raphael_dist.evaluation.distances import bootstrap, frechet_distance
from raphael_dist.evaluation.features import HED, PARTS, compute_all, hed_parts
from raphael_dist.sampling.sampling import to_pixels, to_tensor
from raphael_dist.storage.files import atomic_path

PRINCIPAL = 32  # directions that the Frechet distance is taken in: there are but a hundred held-out pairs
PENALTY = 0.1  # of the classifier of styles


@dataclass(frozen=True, eq=False)
class Pictures:
    """True pictures: uint8 [H, W, 3] each, their things and styles, their first caption, and whether they are held out."""

    pixels: list[np.ndarray]
    things: list[str]
    styles: list[str]
    captions: list[str]
    held_out: np.ndarray

    @classmethod
    def read(cls, training: Sequence[str], held_out: Sequence[str], cache_dir: Path, size_hw: tuple[int, int]) -> "Pictures":
        """Read both kinds of shards. UserError: keys that are not THING__STYLE, or no held-out picture."""
        found = cls([], [], [], [], np.zeros(0, bool))
        flags: list[bool] = []
        for patterns, option in ((training, "data.shards"), (held_out, "data.val_shards")):
            for sample in read_samples(patterns, cache_dir, size_hw, option) if patterns else ():
                thing, mark, style = sample.key.rpartition("__")
                if not mark:
                    raise UserError(
                        f"{option}: sample {sample.key!r} is not named THING__STYLE; the benchmark is for the emoji shards"
                    )
                found.pixels.append(sample.image.transpose(1, 2, 0).copy())
                found.things.append(thing)
                found.styles.append(style)
                found.captions.append(sample.captions[0])
                flags.append(option == "data.val_shards")
        if not any(flags) or all(flags):
            raise UserError("data.shards, data.val_shards: the benchmark needs training pictures and held-out ones")
        return cls(found.pixels, found.things, found.styles, found.captions, np.array(flags))

    def digest(self) -> str:
        """Return a checksum of the pictures, for a cache of their features."""
        found = hashlib.sha256()
        for pixels in self.pixels:
            found.update(pixels.tobytes())
        return found.hexdigest()[:24]


class Space:
    """The fixed feature space of the true pictures, in which drawn ones are judged (`features.hed_parts`).

    Features are scaled to the mean and deviation of the training pictures, and to length 1.
    """

    def __init__(self, pictures: Pictures, cache_dir: Path, device: torch.device) -> None:
        self.pictures, self._compute = pictures, hed_parts(device)
        path = cache_dir / "features" / f"{HED}-parts-{pictures.digest()}.npy"
        raw = _views(_cached(path, lambda: compute_all(self._compute, pictures.pixels)))
        train = torch.from_numpy(~pictures.held_out)
        self._scale = [(x[train].mean(dim=0), x[train].std(dim=0) + 1e-6) for x in raw]
        self.true = self._judged(raw)
        self.style_names = sorted(set(pictures.styles))
        self._style_N = np.array([self.style_names.index(style) for style in pictures.styles])
        self._classifier = self._fit_styles(self.true.style[train], self._style_N[~pictures.held_out])
        whole_ND = self.true.whole[train].double()
        centred_ND = whole_ND - whole_ND.mean(dim=0)
        basis_DD = torch.linalg.eigh(centred_ND.T @ centred_ND)[1].flip(1)
        self._basis_DK = basis_DD[:, : min(PRINCIPAL, *centred_ND.shape)]

    def _judged(self, raw: Sequence[Tensor]) -> "Judged":
        style, third, fourth, whole = (
            F.normalize((x - mean) / deviation, dim=1) for x, (mean, deviation) in zip(raw, self._scale, strict=True)
        )
        return Judged(style, torch.cat([third, fourth], dim=1) / 2**0.5, whole)

    def features(self, pixels: Sequence[np.ndarray]) -> "Judged":
        """Return the features of pictures, uint8 [H, W, 3]."""
        return self._judged(_views(compute_all(self._compute, pixels)))

    def _fit_styles(self, x_ND: Tensor, style_N: np.ndarray) -> Tensor:
        """Return the weights [D + 1, S] of a ridge regression onto the styles."""
        x, onehot = _with_one(x_ND), F.one_hot(torch.from_numpy(style_N), len(self.style_names)).double()
        return torch.linalg.solve(x.T @ x + PENALTY * torch.eye(x.shape[1], dtype=torch.float64), x.T @ onehot)

    def style_right(self, judged: "Judged", wanted: Sequence[str]) -> np.ndarray:
        """Return 1 where a picture is taken to be of the style that was asked for, else 0, float64 [P]."""
        found = (_with_one(judged.style) @ self._classifier).argmax(dim=1).tolist()
        return np.array([self.style_names[s] == style for s, style in zip(found, wanted, strict=True)], np.float64)

    def rank(self, judged: "Judged", things: Sequence[str], among: Sequence[str]) -> np.ndarray:
        """Return the rank, from 0, of the thing's true picture among those of all things in the style `among`, int [P]."""
        return np.array([self._rank(*one) for one in zip(judged.cells, things, among, strict=True)])

    def _rank(self, x_D: Tensor, thing: str, among: str) -> int:
        rows = np.flatnonzero(self._style_N == self.style_names.index(among))
        similar = self.true.cells[torch.from_numpy(rows)] @ x_D
        target = next(i for i, row in enumerate(rows) if self.pictures.things[row] == thing)
        return int((similar > similar[target]).sum())

    def distance(self, a: Tensor, b: Tensor) -> float:
        """Return the Frechet distance of features over whole pictures, in the principal directions of the training's."""
        return frechet_distance(a.double() @ self._basis_DK, b.double() @ self._basis_DK)


@dataclass(frozen=True, eq=False)
class Judged:
    """Features of length 1, each [P, D]: of the style, of the thing by cells, and of pictures as a whole."""

    style: Tensor
    cells: Tensor
    whole: Tensor

    def __getitem__(self, rows: Tensor) -> "Judged":
        return Judged(self.style[rows], self.cells[rows], self.whole[rows])


def _views(raw_ND: Tensor) -> list[Tensor]:
    """Return the parts of features, and the stages averaged over their cells."""
    style, third, fourth = raw_ND.split(list(PARTS.values()), dim=1)
    whole = [part.unflatten(1, (-1, cells)).mean(dim=2) for part, cells in ((third, 16), (fourth, 4))]
    return [style, third, fourth, torch.cat(whole, dim=1)]


def _with_one(x_ND: Tensor) -> Tensor:
    return F.pad(x_ND.double(), (0, 1), value=1.0)


def _cached(path: Path, compute: Callable[[], Tensor]) -> Tensor:
    """Return what lies in `path`, or compute and keep it."""
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError):
        pass
    found = compute()
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, found.numpy())
    return found


@dataclass(frozen=True)
class Row:
    """A line of the table: a value with its 95% interval by the bootstrap over pairs."""

    what: str
    value: float
    low: float
    high: float


def judge(space: Space, judged: Judged, things: Sequence[str], styles: Sequence[str]) -> list[Row]:
    """Return style accuracy, retrieval of the thing in the style asked for and in the others, and the Frechet distance."""
    rows = [_mean("style accuracy", space.style_right(judged, styles))]
    rank = space.rank(judged, things, styles)
    rows += [_mean(f"own true picture found, at {k}", (rank < k).astype(np.float64)) for k in (1, 5)]
    of_thing: dict[str, set[str]] = {}
    for thing, style in zip(space.pictures.things, space.pictures.styles, strict=True):
        of_thing.setdefault(thing, set()).add(style)
    others = [sorted(of_thing[thing] - {style}) for thing, style in zip(things, styles, strict=True)]
    known = [n for n, of in enumerate(others) if of]
    if known:
        ranks = [[space.rank(judged[torch.tensor([n])], [things[n]], [s])[0] for s in others[n]] for n in known]
        for k in (1, 5):
            found = np.array([np.mean([rank < k for rank in of_pair]) for of_pair in ranks])
            rows.append(_mean(f"thing found in another style, at {k}", found))
    rows.append(_frechet(space, judged))
    return rows


def _mean(what: str, values: np.ndarray) -> Row:
    return Row(what, float(values.mean()), *bootstrap(values))


def _frechet(space: Space, judged: Judged, draws: int = 100) -> Row:
    drawn, true = judged.whole, space.true.whole[torch.from_numpy(space.pictures.held_out)]
    value, draw, found = space.distance(drawn, true), np.random.default_rng(0), []
    for _ in range(draws):
        a, b = (torch.from_numpy(draw.integers(0, len(x), len(x))) for x in (drawn, true))
        found.append(space.distance(drawn[a], true[b]))
    # A resample repeats pictures, which moves both means and covariances and so adds to the distance: what it tells is how
    # far the distance scatters, around its own mean.
    low, high = np.quantile(found, [0.025, 0.975]) - np.mean(found) + value
    return Row("Frechet distance", value, max(0.0, float(low)), float(high))


def references(space: Space, image: ImageEncoder) -> dict[str, list[Row]]:
    """Return the same rows for the true held-out pictures after the autoencoder, and for the thing in another style.

    The first is what a perfect model would reach, the second what copying a training picture would.
    """
    p = space.pictures
    held = np.flatnonzero(p.held_out)
    things, styles = [p.things[i] for i in held], [p.styles[i] for i in held]
    true = [p.pixels[i] for i in held]
    found = {"true pictures, through the autoencoder": judge(space, space.features(through(image, true)), things, styles)}
    copies = [next((i for i in range(len(p.things)) if p.things[i] == p.things[h] and not p.held_out[i]), -1) for h in held]
    have = [n for n, i in enumerate(copies) if i >= 0]
    if len(have) > 1:
        copied = space.true[torch.tensor([copies[n] for n in have])]
        found["the thing in a trained style"] = judge(space, copied, [things[n] for n in have], [styles[n] for n in have])
    return found


@torch.no_grad()
def through(image: ImageEncoder, pixels: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return pictures after the autoencoder."""
    found: list[np.ndarray] = []
    for start in range(0, len(pixels), 16):
        mean, _ = image.encode(to_tensor(np.stack(pixels[start : start + 16])))
        found += list(to_pixels(image.decode(mean)))
    return found
