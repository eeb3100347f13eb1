"""The emoji benchmark, run: draw the held-out pairs, judge them beside references, one table."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from raphael_dist.evaluation.distances import bootstrap
from raphael_dist.evaluation.drawn import draw_missing, picture_path, read_picture
from raphael_dist.evaluation.emoji import Pictures, Row, Space, judge, references
from raphael_dist.evaluation.timesteps import TIMESTEPS, losses
from raphael_dist.parallel.long_work import Tell, from_main, together
from raphael_dist.parallel.ranks import Ranks
from raphael_dist.sampling.grid import caption_grid, save_image
from raphael_dist.sampling.load import Trained
from raphael_dist.sampling.ranks import to_main
from raphael_dist.sampling.sampling import Request
from raphael_dist.sampling.spread import Settings
from raphael_dist.storage.files import replace_bytes

SHOWN = 48  # pairs in the picture of drawn beside true


@dataclass(frozen=True)
class Benchmark:
    """What is drawn and how: training and held-out shards, a request without a prompt, pictures of each pair."""

    shards: Sequence[str]
    val_shards: Sequence[str]
    default: Request
    settings: Settings
    scheduler: str
    per_pair: int
    folder: Path


def run_benchmark(trained: Trained, b: Benchmark, ranks: Ranks) -> str:
    """Return the table as Markdown, on rank 0; write it, results.json and pairs.png into the folder. Collective.

    UserError: shards that are not the emoji's.
    """
    cache, size, seed = trained.config.data.cache_dir, b.default.size_hw, b.default.seed
    pictures = together("reading pictures", lambda _: Pictures.read(b.shards, b.val_shards, cache, size))
    held = np.flatnonzero(pictures.held_out)
    captions = [pictures.captions[i] for i in held]
    requests = [Request(text, size, seed, n, copy) for n, text in enumerate(captions) for copy in range(b.per_pair)]

    def work(tell: Tell) -> dict[int, np.ndarray]:
        draw_missing(trained, requests, b.settings, b.scheduler, b.folder / "pictures", ranks, tell)
        found = {}
        for n in range(ranks.rank, len(held), ranks.world_size):
            one = held[n]
            found[n] = losses(trained, [pictures.pixels[one]], [pictures.captions[one]], [n])[0]
            tell(f"losses of picture {n} of {len(held)}")
        return found

    loss_of = to_main(together("drawing held-out pairs", work))
    return from_main("judging", lambda _: _judge(trained, pictures, held, requests, loss_of, b.folder))


def _judge(
    trained: Trained,
    pictures: Pictures,
    held: np.ndarray,
    requests: Sequence[Request],
    loss_of: dict[int, np.ndarray],
    folder: Path,
) -> str:
    space = Space(pictures, trained.config.data.cache_dir, torch.device(trained.sampler.device))
    drawn = [read_picture(picture_path(folder / "pictures", n)) for n in range(len(requests))]
    of = [held[request.index] for request in requests]
    things, styles = [pictures.things[i] for i in of], [pictures.styles[i] for i in of]
    columns = {"this model": judge(space, space.features(drawn), things, styles), **references(space, trained.sampler.image)}
    by_timestep = np.array([loss_of[n] for n in range(len(held))])
    timesteps = [
        Row(f"loss at timestep {t}", float(column.mean()), *bootstrap(column))
        for t, column in zip(TIMESTEPS, by_timestep.T, strict=True)
    ]
    timesteps.append(Row("loss, all timesteps", float(by_timestep.mean()), *bootstrap(by_timestep.mean(axis=1))))
    table = _table(trained, columns, timesteps, len(held), len(requests))
    everything = {**columns, "this model": [*columns["this model"], *timesteps]}
    result = {name: [asdict(row) for row in rows] for name, rows in everything.items()}
    replace_bytes(folder / "results.json", json.dumps(result, indent=1).encode())
    replace_bytes(folder / "table.md", table.encode())
    _show(pictures, held, drawn, requests, folder / "pairs.png")
    return table


def _table(trained: Trained, columns: dict[str, list[Row]], timesteps: Sequence[Row], pairs: int, pictures: int) -> str:
    names = list(columns)
    lines = [
        f"{trained.origin}: {pairs} held-out pairs, {pictures} pictures; 95% intervals by the bootstrap over pictures.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for what in [row.what for row in columns[names[0]]]:
        cells = [next((_cell(row) for row in rows if row.what == what), "") for rows in columns.values()]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    lines += [f"| {row.what} | {_cell(row)} |" + " |" * (len(names) - 1) for row in timesteps]
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    return f"{row.value:.3f} ({row.low:.3f} to {row.high:.3f})"


def _show(
    pictures: Pictures, held: np.ndarray, drawn: Sequence[np.ndarray], requests: Sequence[Request], path: Path
) -> None:
    """Write drawn pictures with the true ones to their right."""
    first = [n for n, request in enumerate(requests) if request.copy == 0][:SHOWN]
    true = [pictures.pixels[held[requests[n].index]] for n in first]
    sides = [np.concatenate([drawn[n], one], axis=1) for n, one in zip(first, true, strict=True)]
    save_image(caption_grid(sides, [requests[n].prompt for n in first]), path)
