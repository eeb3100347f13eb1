"""Runs the emoji benchmark: draws pairs of a thing ("red heart") and a style ("noto") that training has not seen.

The images are measured, and the results are written as a table. For comparison, the table has the values of a perfect model,
and those of a model that copies a training image of the same thing.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from emoji_data.feature_space import FeatureSpace, Row, TrueImages, judge, judge_references
from emoji_data.timestep_losses import TIMESTEPS, timestep_losses
from raphael_dist.evaluation.distances import bootstrap
from raphael_dist.evaluation.draw import draw_missing, image_path, read_image
from raphael_dist.runtime.long_work import run_on_all_ranks, run_on_rank0
from raphael_dist.runtime.progress_bar import Reporter
from raphael_dist.runtime.ranks import Ranks
from raphael_dist.sampling.distributed import SamplingSettings
from raphael_dist.sampling.grid import caption_grid, save_image
from raphael_dist.sampling.load_model import TrainedModel
from raphael_dist.sampling.rank_group import gather_to_rank0
from raphael_dist.sampling.sampler import Request
from raphael_dist.storage.files import replace_bytes

SHOWN = 48  # pairs in pairs.png


@dataclass(frozen=True)
class Benchmark:
    """The settings of the emoji benchmark: what it draws, and how.

    Attributes:
        shards, val_shards: patterns of the training shards and of the held-out shards.
        default: a request that has the size and the seed of all images.
        settings, scheduler: how images are sampled.
        per_pair: number of images of each held-out pair of a thing and a style.
        folder: where results are written.
        options: names of the options or configuration fields that set `shards` and `val_shards`, for error messages.
    """

    shards: Sequence[str]
    val_shards: Sequence[str]
    default: Request
    settings: SamplingSettings
    scheduler: str
    per_pair: int
    folder: Path
    options: tuple[str, str]


def run_benchmark(trained: TrainedModel, b: Benchmark, ranks: Ranks) -> str:
    """Run the emoji benchmark; write table.md, results.json and pairs.png into its folder. Collective.

    Args:
        trained: the model with its encoders.
        b: what to draw, and how.
        ranks: this rank and the number of ranks, which share the work.

    Returns:
        The table as Markdown, on rank 0.

    Raises:
        UserError: the shards are not those of the emoji data.
    """
    cache, size, seed = trained.config.data.cache_dir, b.default.size_hw, b.default.seed
    true = run_on_all_ranks("reading images", lambda _: TrueImages.read(b.shards, b.val_shards, cache, size, b.options))
    held_out = np.flatnonzero(true.held_out)
    captions = [true.captions[i] for i in held_out]
    requests = [Request(text, size, seed, n, copy) for n, text in enumerate(captions) for copy in range(b.per_pair)]

    def work(report: Reporter) -> dict[int, np.ndarray]:
        draw_missing(trained, requests, b.settings, b.scheduler, b.folder / "images", ranks, report)
        losses = {}
        for n in ranks.share(len(held_out)):
            losses[n] = timestep_losses(trained, [true.pixels[held_out[n]]], [captions[n]], [n])[0]
            report(f"losses of image {n + 1} of {len(held_out)}", n + 1, len(held_out))
        return losses

    loss_of = gather_to_rank0(run_on_all_ranks("drawing held-out pairs", work))
    return run_on_rank0("judging", lambda _: _judge_and_write(trained, true, held_out, requests, loss_of, b.folder))


def _judge_and_write(
    trained: TrainedModel,
    true: TrueImages,
    held_out: np.ndarray,
    requests: Sequence[Request],
    loss_of: dict[int, np.ndarray],
    folder: Path,
) -> str:
    space = FeatureSpace(true, trained.config.data.cache_dir, torch.device(trained.sampler.device))
    drawn = [read_image(image_path(folder / "images", n)) for n in range(len(requests))]
    pairs = [held_out[request.index] for request in requests]
    things, styles = [true.things[i] for i in pairs], [true.styles[i] for i in pairs]
    columns = {
        "this model": judge(space, space.features(drawn), things, styles),
        **judge_references(space, trained.sampler.image),
    }
    loss_rows = _loss_rows(np.array([loss_of[n] for n in range(len(held_out))]))
    table = _table(trained, columns, loss_rows, len(held_out), len(requests))
    everything = {**columns, "this model": [*columns["this model"], *loss_rows]}
    result = {name: [asdict(row) for row in rows] for name, rows in everything.items()}
    replace_bytes(folder / "results.json", json.dumps(result, indent=1).encode())
    replace_bytes(folder / "table.md", table.encode())
    _draw_pairs(true, held_out, drawn, requests, folder / "pairs.png")
    return table


def _loss_rows(loss_PT: np.ndarray) -> list[Row]:
    rows = [
        Row(f"loss at timestep {t}", float(column.mean()), *bootstrap(column))
        for t, column in zip(TIMESTEPS, loss_PT.T, strict=True)
    ]
    return [*rows, Row("loss, all timesteps", float(loss_PT.mean()), *bootstrap(loss_PT.mean(axis=1)))]


def _table(trained: TrainedModel, columns: dict[str, list[Row]], loss_rows: Sequence[Row], pairs: int, images: int) -> str:
    names = list(columns)
    lines = [
        f"{trained.origin}: {pairs} held-out pairs, {images} images; 95% bootstrap intervals over images.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for what in [row.what for row in columns[names[0]]]:
        cells = [next((_cell(row) for row in rows if row.what == what), "") for rows in columns.values()]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    lines += [f"| {row.what} | {_cell(row)} |" + " |" * (len(names) - 1) for row in loss_rows]
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    return f"{row.value:.3f} ({row.low:.3f} to {row.high:.3f})"


def _draw_pairs(
    true: TrueImages, held_out: np.ndarray, drawn: Sequence[np.ndarray], requests: Sequence[Request], path: Path
) -> None:
    """Write a PNG file with the first SHOWN drawn images, each with the real image on its right and its prompt below."""
    shown = [n for n, request in enumerate(requests) if request.copy == 0][:SHOWN]
    pairs = [np.concatenate([drawn[n], true.pixels[held_out[requests[n].index]]], axis=1) for n in shown]
    save_image(caption_grid(pairs, [requests[n].prompt for n in shown]), path)
