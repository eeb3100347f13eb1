"""A study of pictures: draw, at each weight of the guidance, what captions ask for; compare with true pictures.

Everything lies in one folder: how the numbers were made (protocol.json), pictures by guidance, features, results. A study
that was ended goes on where it was. Ranks divide the pictures.
"""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from raphael_dist.errors import UserError
from raphael_dist.evaluation.distances import frechet_distance, kernel_distance, precision_recall
from raphael_dist.evaluation.drawn import draw_missing, picture_path, read_picture
from raphael_dist.evaluation.features import BATCH, ClipScore, Features, compute_all
from raphael_dist.evaluation.lettering import Reader, asked_text, edit_distance, normalised
from raphael_dist.parallel.long_work import Tell, together
from raphael_dist.parallel.ranks import Ranks
from raphael_dist.sampling.load import Trained
from raphael_dist.sampling.prompts import fit_picture
from raphael_dist.sampling.sampling import Request
from raphael_dist.sampling.spread import Settings
from raphael_dist.storage.files import atomic_path, replace_bytes


@dataclass(frozen=True)
class Study:
    """What is compared and how. `side`: pictures are cut to squares of so many pixels first; None: as they are."""

    folder: Path
    requests: Sequence[Request]
    scheduler: str
    features: Features | None = None
    clip: ClipScore | None = None
    reader: Reader | None = None
    side: int | None = None


@dataclass(frozen=True)
class Result:
    """The numbers of one weight of the guidance; None for what was not asked for."""

    guidance: float
    pictures: int
    fid: float | None = None
    kid: float | None = None
    kid_deviation: float | None = None
    precision: float | None = None
    recall: float | None = None
    clip: float | None = None
    text_exact: float | None = None
    text_edits: float | None = None


def run_study(
    trained: Trained,
    study: Study,
    settings: Settings,
    guidances: Sequence[float],
    reference: Sequence[Path | np.ndarray],
    ranks: Ranks,
) -> list[Result]:
    """Return a result for each weight of the guidance, on rank 0; write results.json and results.csv as they come.

    reference: files of true pictures, or pictures; empty without features. Collective.
    """
    true_ND = None
    if study.features is not None:
        true_ND = _features(study, reference, study.folder / "reference.npy", "true pictures", ranks)
    results: list[Result] = []
    for guidance in guidances:
        folder, at = study.folder / f"guidance-{guidance:g}", replace(settings, guidance=guidance)

        def draw(tell: Tell, folder: Path = folder, at: Settings = at) -> int:
            return draw_missing(trained, study.requests, at, study.scheduler, folder, ranks, tell)

        together(f"drawing at guidance {guidance:g}", draw)
        results.append(_result(study, guidance, folder, true_ND, ranks))
        if ranks.is_main:
            write_results(study.folder, results)
    return results


def _result(study: Study, guidance: float, folder: Path, true_ND: Tensor | None, ranks: Ranks) -> Result:
    paths = [picture_path(folder, number) for number in range(len(study.requests))]
    result = Result(guidance, len(paths))
    if study.features is not None:
        drawn_ND = _features(study, paths, folder / "features.npy", f"pictures at guidance {guidance:g}", ranks)
        if ranks.is_main:
            assert true_ND is not None
            assert drawn_ND is not None
            kid, deviation = kernel_distance(drawn_ND, true_ND)
            precision, recall = precision_recall(drawn_ND, true_ND)
            result = replace(result, fid=frechet_distance(drawn_ND, true_ND), kid=kid, kid_deviation=deviation)
            result = replace(result, precision=precision, recall=recall)
    if study.clip is not None:
        scores = _spread(paths, lambda part: _clip(study, paths, part), folder / "clip.npy", "CLIP scores", ranks)
        result = replace(result, clip=None if scores is None else float(scores.mean()))
    if study.reader is not None:
        read = _spread(paths, lambda part: _lettering(study, paths, part), folder / "text.npy", "reading text", ranks)
        if read is not None:
            known = read[read[:, 0] >= 0]
            result = replace(result, text_exact=float(known[:, 0].mean()), text_edits=float(known[:, 1].mean()))
    return result


def _features(study: Study, pictures: Sequence[Path | np.ndarray], path: Path, doing: str, ranks: Ranks) -> Tensor | None:
    """Return the features of all pictures on rank 0, kept in `path`. Collective."""
    assert study.features is not None
    features = study.features

    def compute(numbers: Sequence[int]) -> np.ndarray:
        return compute_all(features, [_picture(pictures[n], study.side) for n in numbers]).numpy()

    found = _spread(pictures, compute, path, doing, ranks)
    return None if found is None else torch.from_numpy(found)


def _picture(picture: Path | np.ndarray, side: int | None) -> np.ndarray:
    pixels = read_picture(picture) if isinstance(picture, Path) else picture
    if side is None or pixels.shape[:2] == (side, side):
        return pixels
    return fit_picture(Image.fromarray(pixels), (side, side))


def _clip(study: Study, paths: Sequence[Path], numbers: Sequence[int]) -> np.ndarray:
    assert study.clip is not None
    pictures = [_picture(paths[n], study.side) for n in numbers]
    return np.array(study.clip(pictures, [study.requests[n].prompt for n in numbers]))


def _lettering(study: Study, paths: Sequence[Path], numbers: Sequence[int]) -> np.ndarray:
    """Return (1 if read as asked for, edits per letter asked for) for each picture; -1, -1 where no text was asked for."""
    assert study.reader is not None
    rows = []
    for n in numbers:
        asked = asked_text(study.requests[n].prompt)
        if asked is None:
            rows.append((-1.0, -1.0))
            continue
        wanted, found = normalised(asked), normalised(study.reader(read_picture(paths[n])))
        rows.append((float(wanted == found), edit_distance(wanted, found) / len(wanted)))
    return np.array(rows)


def _spread(
    pictures: Sequence[Any], compute: Callable[[Sequence[int]], np.ndarray], path: Path, doing: str, ranks: Ranks
) -> np.ndarray | None:
    """Return on rank 0 what `compute` returns for the numbers of all pictures, a row for each; kept in `path`. Collective.

    Each rank leaves its part beside `path`, which rank 0 puts together.
    """
    mine = range(ranks.rank, len(pictures), ranks.world_size)

    def part(rank: int) -> Path:
        return path.with_name(f".{path.stem}-{rank}-of-{ranks.world_size}.npy")

    def work(tell: Tell) -> None:
        if path.is_file():
            return
        rows = []
        for start in range(0, len(mine), BATCH):
            rows.append(compute(mine[start : start + BATCH]))
            tell(f"{min(start + BATCH, len(mine))} of {len(mine)}")
        _save(part(ranks.rank), np.concatenate(rows) if rows else np.zeros(0))

    def join(tell: Tell) -> None:
        if ranks.is_main and not path.is_file():
            parts = [np.load(part(rank)) for rank in range(ranks.world_size)]
            whole = np.zeros((len(pictures), *parts[0].shape[1:]), parts[0].dtype)
            for rank, rows in enumerate(parts):
                if len(rows):
                    whole[rank :: ranks.world_size] = rows
            _save(path, whole)
            for rank in range(ranks.world_size):
                part(rank).unlink(missing_ok=True)

    together(doing, work)
    together(f"{doing}: putting them together", join)
    dist.barrier()
    if not ranks.is_main:
        return None
    try:
        found: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it") from None
    if len(found) != len(pictures):
        raise UserError(f"{path}: {len(found)} rows for {len(pictures)} pictures; remove it")
    return found


def _save(path: Path, rows: np.ndarray) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, rows)


def write_results(folder: Path, results: Sequence[Result]) -> None:
    """Write results.json and results.csv, a row for each weight of the guidance."""
    rows = [{name: value for name, value in asdict(result).items() if value is not None} for result in results]
    replace_bytes(folder / "results.json", json.dumps(rows, indent=1).encode())
    names = [name for name in asdict(results[0]) if any(name in row for row in rows)]
    with atomic_path(folder / "results.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
