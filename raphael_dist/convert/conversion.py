"""Converts a checkpoint from one layout (format on disk, `layouts/`) to another: plan, write, verify, publish.

The target folder gets its final name by one rename at the end, so a killed conversion leaves no incomplete checkpoint. Files
are divided over the ranks of `mpirun`. Their contents depend on the plan only, so the target is the same for any number of
ranks.
"""

import contextlib
import os
import shutil
import threading
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from raphael_dist.checkpoint.manifest import seal
from raphael_dist.config.schema import Config
from raphael_dist.convert.layouts import layout_of, open_checkpoint
from raphael_dist.convert.lora_files import MergedSource, read_adapter
from raphael_dist.convert.mpi_ranks import MpiRanks
from raphael_dist.convert.source_checkpoint import Checkpoint, is_dense
from raphael_dist.convert.upcycle import UpcycledSource
from raphael_dist.convert.write_plan import ConversionPlan, Options, Source, check_complete, write_file
from raphael_dist.errors import UserError
from raphael_dist.runtime.progress_bar import ProgressBar
from raphael_dist.storage.files import FileEntry, integrity_error, sync, write_bytes
from raphael_dist.storage.tensorfile import HashedFile

_SYNCING = 16  # written files that may wait for fsync while others are written
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One row of the report about a conversion: how much was written of one kind of values.

    Attributes:
        kind: "master" (fp32 weights), "exp_avg", "exp_avg_sq" (Adam moments), "ema" (moving average), "zeros" (padding and
            missing moments), "step" (the optimizer's step), or "copies" for values that are stored a second time.
        tensors: number of parameter tensors of the model whose values were written.
        parameters: number of scalar values that were written.
        bytes: size of these values in the files.
        files: number of files that contain values of this kind.
    """

    kind: str
    tensors: int
    parameters: int
    bytes: int
    files: int


@dataclass(frozen=True)
class ConversionReport:
    """What the conversion of a checkpoint did, for the user.

    Attributes:
        source, target: names of the layouts (formats on disk) from which and to which the checkpoint was converted.
        rows: what was written, one row for each kind of values, such as weights or EMA.
        notes: further lines for the user, such as which values were not written.
        verified: a phrase that states how the source's files were checked.
        seconds: duration of the conversion.
    """

    source: str
    target: str
    rows: list[Row]
    notes: list[str]
    verified: str
    seconds: float


def convert(
    from_layout: str,
    path: Path,
    to_layout: str,
    target: Path,
    options: Options,
    config: Config | None = None,
    ranks: MpiRanks | None = None,
    lora: Path | None = None,
    lora_scale: float = 1.0,
) -> ConversionReport:
    """Convert a checkpoint from one layout (format on disk) to another. Collective: all processes in `ranks` call it.

    Args:
        from_layout: name of the source's layout, or "auto" to detect it.
        path: the source checkpoint.
        to_layout: name of the target's layout.
        target: the new folder, which must not exist.
        options: options of the target, such as the number of ranks or the dtype.
        config: a configuration, with one of two purposes. If the source's files do not describe their model (such as those
            of DeepSpeed), it is the configuration of the source. Otherwise the source must be dense, and it is upcycled to
            the model with experts that `config` describes. None: the source describes its model and is not upcycled.
        ranks: the processes of `mpirun`. None: this process only.
        lora: path of LoRA adapters to merge into the weights (see `read_adapter`). None: no adapters.
        lora_scale: factor of the term that these adapters add to the weights, in addition to their own scale.

    Raises:
        UserError: the source is damaged or incomplete, `target` exists, or the target's layout does not support the model.
            Before the error is raised, all files that the conversion has written are removed.
    """
    ranks, began = ranks or MpiRanks(), time.monotonic()
    layout_of("--to", to_layout)
    opened, source, plan = ranks.raise_on_all_ranks(
        lambda: _prepare(from_layout, path, to_layout, target, options, config, lora, lora_scale)
    )
    with opened:
        write_target(to_layout, source, plan, target, ranks, opened.files)
    verified = (
        "sizes and SHA-256 of its manifest"
        if opened.files
        else "every tensor is present once, but there is no manifest with checksums"
    )
    omitted = [kind for kind in source.kinds() if kind not in plan.kinds]
    notes = [*opened.notes, *plan.notes]
    if omitted:
        text = f"{', '.join(omitted)}: not written, since the layout holds only one kind of weights (here {plan.kinds[0]})"
        notes.insert(len(opened.notes), text)
    return ConversionReport(opened.layout, to_layout, _rows(plan), notes, verified, time.monotonic() - began)


def write_target(
    layout: str,
    source: Source,
    plan: ConversionPlan,
    target: Path,
    ranks: MpiRanks,
    checksummed_files: dict[Path, FileEntry],
) -> None:
    """Write the files of a planned conversion into the new folder `target`. Collective: all `ranks` call it.

    Args:
        layout: name of the target's layout (format on disk).
        source: the checkpoint that values are read from.
        plan: the files to write.
        target: the new folder.
        ranks: the processes that share the work.
        checksummed_files: size and SHA-256 of each file of the source, by path; {} if the source has no manifest. The files
            are verified while the target is written.

    Raises:
        UserError: a file of the source is damaged, or `target` cannot be written. Before the error is raised, all files that
            were written are removed.
    """
    temporary = target.parent / f".converting-{target.name}"
    new_parents = [parent for parent in temporary.parents if not parent.exists()]  # the innermost first
    try:
        ranks.main_only(lambda: _create(target, temporary, plan))
        entries = _write(plan, source, checksummed_files, temporary, ranks)
        ranks.main_only(lambda: _publish(layout, plan, entries, temporary, target))
    except BaseException:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            with contextlib.suppress(OSError):  # another process has put files into it
                for parent in new_parents:
                    parent.rmdir()
        raise


def _prepare(
    from_layout: str,
    path: Path,
    to_layout: str,
    target: Path,
    options: Options,
    config: Config | None,
    lora: Path | None,
    lora_scale: float,
) -> tuple[Checkpoint, Source, ConversionPlan]:
    if target.exists() or target.is_symlink():
        raise UserError(f"--to {to_layout} {target} exists already, and nothing is overwritten. Choose a new path.")
    opened = open_checkpoint(from_layout, path, config)
    opened.set_prediction(options.prediction)
    source: Source = opened
    if config is not None and not layout_of("--from", opened.layout).takes_config:
        if not is_dense(opened.config):
            raise UserError(
                f"--config requires a dense model, to which it adds experts (upcycling), but {path} already has experts or "
                "edge modules. Leave out --config."
            )
        source = UpcycledSource(opened, config)
    if lora is not None:
        source = MergedSource(source, read_adapter(lora, options.weights), lora_scale)
    plan = layout_of("--to", to_layout).plan(source, options, target)
    check_complete(plan, source)
    return opened, source, plan


def _create(target: Path, temporary: Path, plan: ConversionPlan) -> None:
    """Create the folder `temporary`, in which files are written before it is renamed to `target`.

    Raises UserError if the folder cannot be created, or the files of `plan` do not fit on the disk.
    """
    shutil.rmtree(temporary, ignore_errors=True)  # of a conversion that was killed
    try:
        temporary.mkdir(parents=True)
        free, needed = shutil.disk_usage(temporary).free, sum(f.bytes for f in plan.files)
    except OSError as error:
        raise UserError(f"--to {target} cannot be written: {error.strerror}. Choose another path.") from None
    if free < needed:
        raise UserError(f"--to {target} requires {needed} bytes of disk space, but {free} bytes are free. Free some space.")


def _write(
    plan: ConversionPlan, source: Source, checksummed_files: dict[Path, FileEntry], temporary: Path, ranks: MpiRanks
) -> dict[str, FileEntry]:
    """Write this rank's share of the planned files, while a second thread verifies this rank's share of the source's files.

    Collective. Returns the size and SHA-256 of the files that all ranks have written, by name. `checksummed_files`: size and
    SHA-256 of each file of the source, by path. `temporary`: folder for the written files. Raises UserError if a file of the
    source is damaged.
    """
    files = _share([(f.bytes, f) for f in plan.files], ranks)
    to_check = _share([(entry["bytes"], (file, entry)) for file, entry in checksummed_files.items()], ranks)

    def work() -> dict[str, FileEntry]:
        problems: list[str | None] = []
        checking = threading.Thread(target=lambda: problems.append(integrity_error(to_check)), daemon=True)
        checking.start()
        written, syncing = {}, deque[tuple[str, HashedFile]]()
        try:
            for number, file in enumerate(files, start=1):
                bar.report(f"file {number} of {len(files)}", number, len(files))
                syncing.append((file.name, write_file(file, temporary, source)))
                if len(syncing) > _SYNCING:
                    name, oldest = syncing.popleft()
                    written[name] = oldest.entry()
        finally:  # all threads end, even after an error
            written |= {name: file.entry() for name, file in syncing}
            checking.join()
        if not problems or problems[0] is not None:
            raise UserError(
                f"{source.path} is damaged: {problems[0] if problems else 'its files cannot be verified'}. Copy it "
                "again from its source, or use another checkpoint."
            )
        return written

    with ProgressBar("writing", enabled=ranks.is_main) as bar:
        done = ranks.raise_on_all_ranks(work)
    return {name: entry for written in ranks.gather(done) for name, entry in written.items()}


def _share(weighted: list[tuple[int, T]], ranks: MpiRanks) -> list[T]:
    """Divide items over the ranks so that each gets about the same total weight, and return those of this rank.

    `weighted`: (weight, item) of each item. The heaviest items are assigned first, each to the rank whose items have the
    smallest total weight so far.
    """
    loads, items = [0] * ranks.size, []
    order = sorted(range(len(weighted)), key=lambda i: (-weighted[i][0], i))
    for i in order:
        rank = loads.index(min(loads))
        loads[rank] += weighted[i][0] + 1
        if rank == ranks.rank:
            items.append(weighted[i][1])
    return items


def _publish(layout: str, plan: ConversionPlan, entries: dict[str, FileEntry], temporary: Path, target: Path) -> None:
    """Write the manifest and other small files, check that the result can be opened, and rename it to its final name.

    `layout`: name of the target's layout. `entries`: size and SHA-256 of each file with tensors, by name. `temporary`: the
    folder with these files. `target`: the folder's final path.
    """
    missing = {f.name for f in plan.files} ^ entries.keys()
    assert not missing, f"not written: {missing}"
    for name, data in plan.small.items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(temporary / name, data)
    if plan.finish is not None:
        plan.finish(temporary)
    home = (temporary / plan.manifest_name).parent
    files = {os.path.relpath(temporary / name, home): entries[name] for name in sorted(entries)}
    write_bytes(temporary / plan.manifest_name, seal(plan.manifest | {"files": files}))
    with open_checkpoint(layout, temporary) as again:
        assert len(plan.kinds) <= len(again.kinds())
    for path in (temporary, *temporary.rglob("*")):
        if str(path.relative_to(temporary)) not in entries:  # the others are synced already
            sync(path)
    temporary.rename(target)
    sync(target.parent)


def _rows(plan: ConversionPlan) -> list[Row]:
    written: dict[str, list[tuple[str, str, int, int]]] = defaultdict(list)  # file, parameter, elements, bytes of each piece
    for file in plan.files:
        for entry in file.entries:
            for p in entry.pieces:
                piece = (file.name, p.span.name, p.span.numel, p.span.numel * entry.dtype.itemsize)
                written["copies" if p.duplicate else p.kind].append(piece)
    rows = []
    for kind, pieces in written.items():
        files, tensors, elements, sizes = zip(*pieces, strict=True)
        rows.append(Row(kind, len(set(tensors)), sum(elements), sum(sizes), len(set(files))))
    return rows
