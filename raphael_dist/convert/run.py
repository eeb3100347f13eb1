"""Converts a checkpoint from one layout to another: plan, write, verify, publish.

The target appears by one rename at the end, so a conversion that is killed leaves nothing that looks like a checkpoint.
Files are divided over the ranks of `mpirun`; what each holds depends on the plan alone, so any number of ranks writes the
same bytes.
"""

import contextlib
import os
import shutil
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raphael_dist.checkpoint.manifest import seal
from raphael_dist.checkpoint.tensors import Span
from raphael_dist.config import Config
from raphael_dist.convert.adapter import Merged, read_adapter
from raphael_dist.convert.layouts import layout_of, open_checkpoint
from raphael_dist.convert.mpi import MpiRanks
from raphael_dist.convert.plan import ConversionPlan, Options, Source, check_complete, write_file
from raphael_dist.convert.source import Checkpoint, is_dense
from raphael_dist.convert.upcycle import Upcycled
from raphael_dist.errors import UserError
from raphael_dist.parallel.bar import Bar
from raphael_dist.storage.files import damage, sync, write_bytes
from raphael_dist.storage.tensorfile import HashedFile

_SYNCING = 16  # files that may be on their way to the device while others are written


@dataclass(frozen=True)
class Row:
    """One line of the report: how many tensors, parameters and bytes of a kind went where."""

    kind: str
    tensors: int
    parameters: int
    bytes: int
    files: int


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

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
) -> Report:
    """Convert `path` to the new folder `target`; return what was done. Collective over `ranks`.

    lora: adapters (`adapter.read_adapter`) to merge in, lora_scale: how much of them. Raises UserError when the source is
    damaged or incomplete, the target exists or cannot hold the model; nothing is left then.
    """
    ranks, began = ranks or MpiRanks(), time.monotonic()
    layout_of("--to", to_layout)
    opened, source, plan = ranks.agree(
        lambda: _prepare(from_layout, path, to_layout, target, options, config, lora, lora_scale)
    )
    with opened:
        store(to_layout, source, plan, target, ranks, opened.files)
    how = "sizes and SHA-256 of its manifest" if opened.files else "no manifest: only that every tensor is there once"
    left = [kind for kind in source.kinds() if kind not in plan.kinds]
    left_out = [f"{', '.join(left)}: left out, the layout holds weights alone ({plan.kinds[0]} here)"] if left else []
    notes = opened.notes + left_out + plan.notes
    return Report(opened.layout, to_layout, _rows(plan), notes, how, time.monotonic() - began)


def store(
    layout: str, source: Source, plan: ConversionPlan, target: Path, ranks: MpiRanks, vouched: dict[Path, dict[str, Any]]
) -> None:
    """Write what is planned from `source` and publish it as the new folder `target`. Collective over `ranks`.

    vouched: the source's files with their entries in its manifest, with which they are compared meanwhile. Raises UserError
    as `convert`; nothing is left then.
    """
    temporary = target.parent / f".converting-{target.name}"
    made = [parent for parent in temporary.parents if not parent.exists()]  # the innermost first
    try:
        ranks.main_only(lambda: _claim(target, temporary, plan))
        entries = _write(plan, source, vouched, temporary, ranks)
        ranks.main_only(lambda: _publish(layout, plan, entries, temporary, target))
    except BaseException:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            with contextlib.suppress(OSError):  # somebody else's files are in it
                for parent in made:
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
        raise UserError(f"--to {to_layout} {target}: exists already; give a new path, nothing is overwritten")
    opened = open_checkpoint(from_layout, path, config)
    opened.state_prediction(options.prediction)
    source: Source = opened
    if config is not None and not layout_of("--from", opened.layout).takes_config:
        if not is_dense(opened.config):
            raise UserError(f"--config: {path} says its model itself, and has experts or edge modules already; leave it out")
        source = Upcycled(opened, config)
    if lora is not None:
        source = Merged(source, read_adapter(lora, options.weights or "ema"), lora_scale)
    plan = layout_of("--to", to_layout).plan(source, options, target)
    check_complete(plan, source)
    return opened, source, plan


def _claim(target: Path, temporary: Path, plan: ConversionPlan) -> None:
    shutil.rmtree(temporary, ignore_errors=True)  # of a conversion that was killed
    try:
        temporary.mkdir(parents=True)
        free, needed = shutil.disk_usage(temporary).free, sum(f.bytes for f in plan.files)
    except OSError as error:
        raise UserError(f"--to {target}: cannot write there: {error.strerror}") from None
    if free < needed:
        raise UserError(f"--to {target}: {needed} bytes are needed, {free} are free")


def _write(
    plan: ConversionPlan, source: Source, vouched: dict[Path, dict[str, Any]], temporary: Path, ranks: MpiRanks
) -> dict[str, Any]:
    """Write this rank's files while a second thread checks its share of the source; return all ranks' manifest entries."""
    mine = _share([(f.bytes, f) for f in plan.files], ranks)
    to_check = _share([(entry["bytes"], (file, entry)) for file, entry in vouched.items()], ranks)

    def work() -> dict[str, Any]:
        verdicts: list[str | None] = []
        checking = threading.Thread(target=lambda: verdicts.append(damage(to_check)), daemon=True)
        checking.start()
        written, syncing = {}, deque[tuple[str, HashedFile]]()
        try:
            for number, file in enumerate(mine, start=1):
                bar.tell(f"file {number} of {len(mine)}")
                syncing.append((file.name, write_file(file, temporary, source)))
                if len(syncing) > _SYNCING:
                    name, oldest = syncing.popleft()
                    written[name] = oldest.entry()
        finally:  # no thread goes on writing, whatever happened
            written |= {name: file.entry() for name, file in syncing}
            checking.join()
        if not verdicts or verdicts[0] is not None:
            raise UserError(f"{source.path} is damaged: {verdicts[0] if verdicts else 'it cannot be read'}")
        return written

    with Bar("writing", shown=ranks.is_main) as bar:
        done = ranks.agree(work)
    return {name: entry for written in ranks.gather(done) for name, entry in written.items()}


def _share(weighted: list[tuple[int, Any]], ranks: MpiRanks) -> list[Any]:
    """Divide things over ranks, the heaviest first to whoever has least; return this rank's."""
    loads, mine = [0] * ranks.size, []
    order = sorted(range(len(weighted)), key=lambda i: (-weighted[i][0], i))
    for i in order:
        rank = loads.index(min(loads))
        loads[rank] += weighted[i][0] + 1
        if rank == ranks.rank:
            mine.append(weighted[i][1])
    return mine


def _publish(layout: str, plan: ConversionPlan, entries: dict[str, Any], temporary: Path, target: Path) -> None:
    """Write what belongs to the whole, read the result back by its own layout, and give it its name."""
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
        if str(path.relative_to(temporary)) not in entries:  # those are durable already
            sync(path)
    temporary.rename(target)
    sync(target.parent)


def _rows(plan: ConversionPlan) -> list[Row]:
    pieces: dict[str, list[tuple[str, int, Span]]] = {}
    for file in plan.files:
        for entry in file.entries:
            for p in entry.pieces:
                written = (file.name, p.span.numel * entry.dtype.itemsize, p.span)
                pieces.setdefault("copies" if p.duplicate else p.kind, []).append(written)
    return [_row(kind, written) for kind, written in pieces.items()]


def _row(kind: str, written: list[tuple[str, int, Span]]) -> Row:
    files, sizes, spans = zip(*written, strict=True)
    tensors, parameters = {span.name for span in spans}, sum(span.numel for span in spans)
    return Row(kind, len(tensors), parameters, sum(sizes), len(set(files)))
