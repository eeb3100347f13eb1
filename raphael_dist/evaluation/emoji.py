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
from raphael_dist.evaluation.features import HED, compute_all, hed_features
from raphael_dist.sampling.sampling import to_pixels, to_tensor
from raphael_dist.storage.files import atomic_path

PRINCIPAL = 32  # directions that the Frechet distance is taken in: there are but a hundred held-out pairs
PENALTY = 1.0  # of the classifier of styles


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
    """The fixed feature space of the true pictures, in which drawn ones are judged."""

    def __init__(self, pictures: Pictures, cache_dir: Path, device: torch.device) -> None:
        self.pictures, self._features = pictures, hed_features(device)
        path = cache_dir / "features" / f"{HED}-{pictures.digest()}.npy"
        raw_ND = _cached(path, lambda: compute_all(self._features, pictures.pixels))
        train = torch.from_numpy(~pictures.held_out)
        self._mean, self._deviation = raw_ND[train].mean(dim=0), raw_ND[train].std(dim=0) + 1e-6
        self.true_ND = self._normed(raw_ND)
        self.style_names = sorted(set(pictures.styles))
        self._style_N = np.array([self.style_names.index(style) for style in pictures.styles])
        self._classifier = self._fit_styles(self.true_ND[train], self._style_N[~pictures.held_out])
        centred_ND = self.true_ND[train] - self.true_ND[train].mean(dim=0)
        rank = min(PRINCIPAL, *centred_ND.shape)
        self._basis_DK = torch.linalg.svd(centred_ND.double(), full_matrices=False)[2][:rank].T
        of_style = [torch.from_numpy(self._style_N == s) for s in range(self._styles)]
        self._centre_SD = torch.stack([self.true_ND[rows].mean(dim=0) for rows in of_style])

    @property
    def _styles(self) -> int:
        return len(self.style_names)

    def _normed(self, raw_ND: Tensor) -> Tensor:
        return F.normalize((raw_ND - self._mean) / self._deviation, dim=1)

    def features(self, pixels: Sequence[np.ndarray]) -> Tensor:
        """Return features [B, D] of length 1."""
        return self._normed(compute_all(self._features, pixels))

    def _fit_styles(self, x_ND: Tensor, style_N: np.ndarray) -> Tensor:
        """Return the weights [D + 1, S] of a ridge regression onto the styles, by its dual, since D may exceed N."""
        x, onehot = _with_one(x_ND), F.one_hot(torch.from_numpy(style_N), self._styles).double()
        gram = x @ x.T + PENALTY * torch.eye(len(x), dtype=torch.float64) if len(x) <= x.shape[1] else None
        if gram is not None:
            return x.T @ torch.linalg.solve(gram, onehot)
        return torch.linalg.solve(x.T @ x + PENALTY * torch.eye(x.shape[1], dtype=torch.float64), x.T @ onehot)

    def style_right(self, x_PD: Tensor, wanted: Sequence[str]) -> np.ndarray:
        """Return 1 where a picture is taken to be of the style that was asked for, else 0, float64 [P]."""
        found = (_with_one(x_PD) @ self._classifier).argmax(dim=1).tolist()
        return np.array([self.style_names[s] == style for s, style in zip(found, wanted, strict=True)], np.float64)

    def rank(self, x_PD: Tensor, things: Sequence[str], wanted: Sequence[str], gallery: str = "same") -> np.ndarray:
        """Return the rank, from 0, of the thing's true picture among those of all things in one style, int [P].

        gallery: the style that was asked for ("same"), or another in which the thing is there ("other"), where features are
        less their style's mean. -1 where there is none.
        """
        ranks = []
        for x_D, thing, style in zip(x_PD, things, wanted, strict=True):
            among = style if gallery == "same" else self._another(thing, style)
            ranks.append(-1 if among is None else self._rank(x_D, thing, style, among))
        return np.array(ranks)

    def _another(self, thing: str, style: str) -> str | None:
        p = self.pictures
        return next((s for t, s in zip(p.things, p.styles, strict=True) if t == thing and s != style), None)

    def _rank(self, x_D: Tensor, thing: str, style: str, among: str) -> int:
        number, other = self.style_names.index(style), self.style_names.index(among)
        rows = np.flatnonzero(self._style_N == other)
        query, gallery = x_D, self.true_ND[torch.from_numpy(rows)]
        if among != style:
            query, gallery = x_D - self._centre_SD[number], gallery - self._centre_SD[other]
        similar = F.normalize(gallery, dim=1) @ query
        target = next(i for i, row in enumerate(rows) if self.pictures.things[row] == thing)
        return int((similar > similar[target]).sum())

    def distance(self, a_PD: Tensor, b_MD: Tensor) -> float:
        """Return the Frechet distance in the principal directions of the training pictures."""
        return frechet_distance(a_PD.double() @ self._basis_DK, b_MD.double() @ self._basis_DK)


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


def judge(space: Space, x_PD: Tensor, things: Sequence[str], styles: Sequence[str]) -> list[Row]:
    """Return style accuracy, retrieval of the thing in the same style and in another, and the Frechet distance."""
    rows = [_mean("style accuracy", space.style_right(x_PD, styles))]
    for gallery, name in (("same", "own true picture found"), ("other", "thing found in another style")):
        rank = space.rank(x_PD, things, styles, gallery)
        known = rank[rank >= 0]
        for k in (1, 5):
            if len(known):
                rows.append(_mean(f"{name}, at {k}", (known < k).astype(np.float64)))
    rows.append(_frechet(space, x_PD))
    return rows


def _mean(what: str, values: np.ndarray) -> Row:
    return Row(what, float(values.mean()), *bootstrap(values))


def _frechet(space: Space, x_PD: Tensor, draws: int = 100) -> Row:
    true_PD = space.true_ND[torch.from_numpy(space.pictures.held_out)]
    value, draw, found = space.distance(x_PD, true_PD), np.random.default_rng(0), []
    for _ in range(draws):
        a, b = (torch.from_numpy(draw.integers(0, len(x), len(x))) for x in (x_PD, true_PD))
        found.append(space.distance(x_PD[a], true_PD[b]))
    low, high = np.quantile(found, [0.025, 0.975])
    return Row("Frechet distance", value, float(low), float(high))


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
        x_PD = space.true_ND[torch.tensor([copies[n] for n in have])]
        found["the thing in a trained style"] = judge(space, x_PD, [things[n] for n in have], [styles[n] for n in have])
    return found


@torch.no_grad()
def through(image: ImageEncoder, pixels: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return pictures after the autoencoder."""
    found: list[np.ndarray] = []
    for start in range(0, len(pixels), 16):
        mean, _ = image.encode(to_tensor(np.stack(pixels[start : start + 16])))
        found += list(to_pixels(image.decode(mean)))
    return found
