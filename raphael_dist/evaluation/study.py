"""A study of a model's images: draws images for captions at several guidance scales and measures them.

Images are compared with real images, with their captions, and with the text that captions ask to render. One folder stores
the settings (protocol.json), the images of each guidance scale, features and results. A study that was stopped continues
from these files. Ranks divide the images.
"""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from raphael_dist.errors import UserError
from raphael_dist.evaluation.distances import frechet_distance, kernel_distance, precision_recall
from raphael_dist.evaluation.draw import draw_missing, image_path, read_image
from raphael_dist.evaluation.image_features import BATCH, ClipScore, Features, compute_features
from raphael_dist.evaluation.lettering import TextScore, requested_text, score_texts
from raphael_dist.evaluation.ocr import Reader
from raphael_dist.runtime.long_work import run_on_all_ranks
from raphael_dist.runtime.progress_bar import Reporter
from raphael_dist.runtime.ranks import Ranks
from raphael_dist.sampling.distributed import SamplingSettings
from raphael_dist.sampling.load_model import TrainedModel
from raphael_dist.sampling.prompts import fit_image
from raphael_dist.sampling.rank_group import gather_to_rank0
from raphael_dist.sampling.sampler import Request
from raphael_dist.storage.checksummed import read_array, write_array
from raphael_dist.storage.files import atomic_path, replace_bytes
from raphael_dist.text import counted

# From indices of images to an array with a row for each: numbers such as features, or the text that OCR has read.
Scorer = Callable[[Sequence[int]], np.ndarray]


@dataclass(frozen=True)
class Study:
    """The settings of a study: which images are generated, and what is measured in them.

    Attributes:
        folder: where images and results are stored.
        requests: captions to draw, with size and seed.
        scheduler: name of the scheduler of the denoising steps, e.g. "ddim".
        features: function that computes image features for FID, KID, precision and recall; None: not measured.
        clip: computes the CLIP score; None: not measured.
        reader: OCR engine that reads rendered text; None: not measured.
        true_texts: pairs of a real image, uint8 [H, W, 3], and the text in it. `reader` reads these images, too, to compare
            its errors in real and in generated images.
        side: images are resized and cropped to squares of this many pixels before features and CLIP scores are computed.
            None: images are used as they are.
    """

    folder: Path
    requests: Sequence[Request]
    scheduler: str
    features: Features | None = None
    clip: ClipScore | None = None
    reader: Reader | None = None
    true_texts: Sequence[tuple[np.ndarray, str]] = ()
    side: int | None = None


@dataclass(frozen=True)
class Result:
    """The measured values for one guidance scale. A value is None if it was not requested.

    Attributes:
        guidance: the guidance scale.
        images: number of images.
        fid: Frechet distance between the features of generated and real images.
        kid, kid_deviation: kernel distance between these features, and its standard deviation over random subsets.
        precision: share (0..1) of the generated images that are similar to real images.
        recall: share (0..1) of the real images that are similar to generated images.
        clip: mean CLIP score.
        text: how well the OCR engine reads the requested text in the generated images.
        true_text: how well the OCR engine reads the text in real images.
    """

    guidance: float
    images: int
    fid: float | None = None
    kid: float | None = None
    kid_deviation: float | None = None
    precision: float | None = None
    recall: float | None = None
    clip: float | None = None
    text: TextScore | None = None
    true_text: TextScore | None = None


def run_study(
    trained: TrainedModel,
    study: Study,
    settings: SamplingSettings,
    guidances: Sequence[float],
    reference: Sequence[Path | np.ndarray],
    ranks: Ranks,
) -> list[Result]:
    """Draw images at each guidance scale and measure them. All ranks must call this function; they divide the images.

    results.json and results.csv are written after each guidance scale.

    Args:
        trained: the model.
        study: what to draw and measure.
        settings: how to sample: steps, batch size and so on. Its guidance scale is replaced by each of `guidances`.
        guidances: guidance scales.
        reference: real images (not generated), as files or uint8 [H, W, 3]; may be empty if `study.features` is None.
        ranks: this rank and the number of ranks.

    Returns:
        A result for each guidance scale. On other ranks than rank 0 the measured values are None.
    """
    true_ND = None
    if study.features is not None:
        true_ND = _features(study, reference, study.folder / "reference.npy", "real images", ranks)
    true_images, texts = [image for image, _ in study.true_texts], [text for _, text in study.true_texts]
    true_text = _read_texts(study, true_images, texts, study.folder / "reference-text.npy", ranks)
    results: list[Result] = []
    for guidance in guidances:
        folder, at = study.folder / f"guidance-{guidance:g}", replace(settings, guidance=guidance)

        def draw(report: Reporter, folder: Path = folder, at: SamplingSettings = at) -> int:
            return draw_missing(trained, study.requests, at, study.scheduler, folder, ranks, report)

        run_on_all_ranks(f"drawing at guidance {guidance:g}", draw)
        results.append(replace(_measure(study, guidance, folder, true_ND, ranks), true_text=true_text))
        if ranks.is_main:
            write_results(study.folder, results)
    return results


def _measure(study: Study, guidance: float, folder: Path, true_ND: Tensor | None, ranks: Ranks) -> Result:
    paths = [image_path(folder, number) for number in range(len(study.requests))]
    result = Result(guidance, len(paths))
    if study.features is not None:
        drawn_ND = _features(study, paths, folder / "features.npy", f"images at guidance {guidance:g}", ranks)
        if drawn_ND is not None and true_ND is not None:
            kid, deviation = kernel_distance(drawn_ND, true_ND)
            precision, recall = precision_recall(drawn_ND, true_ND)
            result = replace(result, fid=frechet_distance(drawn_ND, true_ND), kid=kid, kid_deviation=deviation)
            result = replace(result, precision=precision, recall=recall)
    if study.clip is not None:
        scores = _compute_on_ranks(len(paths), _clip_scorer(study, paths), folder / "clip.npy", "CLIP scores", ranks)
        result = replace(result, clip=None if scores is None else float(scores.mean()))
    if study.reader is not None:
        texts = [requested_text(request.prompt) or "" for request in study.requests]
        result = replace(result, text=_read_texts(study, paths, texts, folder / "text.npy", ranks))
    return result


def _read_texts(
    study: Study, images: Sequence[Path | np.ndarray], texts: Sequence[str], path: Path, ranks: Ranks
) -> TextScore | None:
    """Let the OCR engine read the images, and return on rank 0 how well the result matches `texts`.

    All ranks must call this function. It returns None on other ranks, and if there is no OCR engine or `texts` is empty. A
    CSV file with the requested and the read text of each image is written next to `path`.

    Args:
        study: the study; its `reader` is the OCR engine.
        images: the images, as files or uint8 [H, W, 3].
        texts: for each image, the text that it should show.
        path: file for the text that the OCR engine has read; if the file exists, no image is read again.
        ranks: this rank and the number of ranks.
    """
    reader = study.reader
    if reader is None or not texts:
        return None

    def score(numbers: Sequence[int]) -> np.ndarray:
        return np.array([reader(_pixels(images[n], None)) for n in numbers])

    rows = _compute_on_ranks(len(images), score, path, "reading text", ranks)
    if rows is None:
        return None
    read = [str(text) for text in rows]
    _write_csv(path.with_suffix(".csv"), ["image", "requested", "read"], zip(range(len(read)), texts, read, strict=True))
    return score_texts(texts, read)


def _features(study: Study, images: Sequence[Path | np.ndarray], path: Path, doing: str, ranks: Ranks) -> Tensor | None:
    """Return the features of all images, float32 [N, D], on rank 0; None on other ranks. All ranks must call this function.

    `path`: file for the features; if the file exists, the features are read from it. `doing`: description for the progress
    display.
    """
    assert study.features is not None
    features = study.features

    def score(numbers: Sequence[int]) -> np.ndarray:
        return compute_features(features, [_pixels(images[n], study.side) for n in numbers]).numpy()

    rows = _compute_on_ranks(len(images), score, path, doing, ranks)
    return None if rows is None else torch.from_numpy(rows)


def _pixels(image: Path | np.ndarray, side: int | None) -> np.ndarray:
    pixels = read_image(image) if isinstance(image, Path) else image
    if side is None or pixels.shape[:2] == (side, side):
        return pixels
    return fit_image(Image.fromarray(pixels), (side, side))


def _clip_scorer(study: Study, paths: Sequence[Path]) -> Scorer:
    def score(numbers: Sequence[int]) -> np.ndarray:
        assert study.clip is not None
        images = [_pixels(paths[n], study.side) for n in numbers]
        return np.array(study.clip(images, [study.requests[n].prompt for n in numbers]))

    return score


def _compute_on_ranks(count: int, score: Scorer, path: Path, doing: str, ranks: Ranks) -> np.ndarray | None:
    """Compute a row of numbers or a text for each of `count` images. All ranks call this function and divide the images.

    Args:
        count: number of images.
        score: function from a list of image indices to an array with the numbers or the text of each of these images.
        path: file for the results; if the file exists, the results are read from it.
        doing: description for the progress display.
        ranks: this rank and the number of ranks.

    Returns:
        On rank 0 an array with the results of all images, [count, ...]; None on other ranks.
    """
    numbers = ranks.share(count)

    def work(report: Reporter) -> dict[int, np.ndarray]:
        rows: dict[int, np.ndarray] = {}
        if not path.is_file():
            for start in range(0, len(numbers), BATCH):
                part = numbers[start : start + BATCH]
                rows |= zip(part, score(part), strict=True)
                done = min(start + BATCH, len(numbers))
                report(f"{done} of {len(numbers)}", done, len(numbers))
        return rows

    row_of = gather_to_rank0(run_on_all_ranks(doing, work))
    return run_on_all_ranks(f"{doing}: saving", lambda _: _save_rows(path, count, row_of) if ranks.is_main else None)


def _save_rows(path: Path, count: int, row_of: dict[int, np.ndarray]) -> np.ndarray:
    """Return the array in the file `path`: the results of `count` images, one row for each image.

    If the file does not exist, it is written first. `row_of`: the rows to write, by the index of the image. Raises UserError
    if the file cannot be read, or if the number of rows is not `count`.
    """
    if not path.is_file():
        write_array(path, np.stack([row_of[number] for number in range(count)]))
    try:
        rows = read_array(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). Remove the file; the next start computes it again.") from None
    if len(rows) != count:
        raise UserError(
            f"{path} must have {counted(count, 'row')}, one for each image, but it has {len(rows)}. Remove the file; the "
            "next start computes it again."
        )
    return rows


def write_results(folder: Path, results: Sequence[Result]) -> None:
    """Write the measured values of a study to results.json and results.csv in `folder`, a row for each guidance scale."""
    rows = [_as_row(result) for result in results]
    replace_bytes(folder / "results.json", json.dumps(rows, indent=1).encode())
    _write_csv(folder / "results.csv", list(rows[0]), (row.values() for row in rows))


def _as_row(result: Result) -> dict[str, object]:
    """Return the measured values of a result by name, without None.

    Each field of a `TextScore` gets its own entry: e.g. field `exact` of `text` becomes "text_exact".
    """
    row: dict[str, object] = {}
    for name, value in asdict(result).items():
        if isinstance(value, dict):
            row |= {f"{name}_{part}": number for part, number in value.items()}
        elif value is not None:
            row[name] = value
    return row


def _write_csv(path: Path, names: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *rows])
