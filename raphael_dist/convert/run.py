"""Converts a checkpoint from one layout to another: plan, write, verify, publish.

The target appears by one rename at the end, so a conversion that is killed leaves nothing that looks like a checkpoint.
Files are divided over the ranks of `mpirun`; what each holds depends on the plan alone, so any number of ranks writes the
same bytes.
"""

import json
import os
import shutil
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raphael_dist.checkpoint.folders import sync_folder, write_bytes
from raphael_dist.checkpoint.reader import damage
from raphael_dist.config import Config
from raphael_dist.convert.layouts import canonical, dense, megablocks
from raphael_dist.convert.layouts import diffusers as diffusers_folder
from raphael_dist.convert.layouts import raphael as run_layout
from raphael_dist.convert.layouts.deepspeed import read as deepspeed_read
from raphael_dist.convert.layouts.deepspeed import write as deepspeed_write
from raphael_dist.convert.mpi import Ranks
from raphael_dist.convert.plan import Options, Plan, Source, Take, check_complete, write_file
from raphael_dist.convert.source import Checkpoint
from raphael_dist.convert.upcycle import Upcycled
from raphael_dist.errors import UserError, did_you_mean
from raphael_dist.storage.tensorfile import HashedFile

_SYNCING = 16  # files that may be on their way to the device while others are written
LAYOUTS = ("raphael", "deepspeed", "canonical", "diffusers", "megablocks", "dense")


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


def detect(path: Path) -> str:
    """Return the layout of what lies at `path`. UserError when it is none that is known."""
    if not path.exists():
        raise UserError(f"--from {path}: no such file or folder")
    if path.is_file():
        return "dense"
    manifest = path / "manifest.json"
    if manifest.is_file():
        try:
            said = json.loads(manifest.read_text()).get("layout", "raphael")
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"--from {path}: manifest.json is unreadable: {error}") from None
        return check_layout("--from", str(said))
    tests = {
        "raphael": (path / "checkpoints").is_dir() or any(path.glob("step-*")),
        "deepspeed": deepspeed_read.tag_folder(path) is not None,
        "diffusers": (path / "model_index.json").is_file(),
        "dense": (path / "config.json").is_file(),
    }
    found = next((layout for layout, holds in tests.items() if holds), None)
    if found is None:
        raise UserError(f"--from {path}: no layout is recognised there; known: {', '.join(LAYOUTS)}")
    return found


def check_layout(option: str, layout: str) -> str:
    """Return `layout`, or raise UserError when it is unknown."""
    if layout not in LAYOUTS:
        raise UserError(f"{option} {layout}: unknown layout{did_you_mean(layout, LAYOUTS)}; known: {', '.join(LAYOUTS)}")
    return layout


def open_checkpoint(layout: str, path: Path, config: Config | None = None) -> Checkpoint:
    """Open a checkpoint in a layout ("auto": by what is there); only headers are read. UserError for what does not fit.

    `config`: the model, for layouts that may not say it (a folder that DeepSpeed wrote).
    """
    try:
        layout = detect(path) if layout == "auto" else check_layout("--from", layout)
        if not path.exists():
            raise UserError(f"--from {layout} {path}: no such file or folder")
        return _open(layout, path, config)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"--from {layout} {path}: {error.strerror or error}") from None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        # Whatever a stranger's files lack of what the layout's have.
        raise UserError(f"--from {layout} {path}: not of this layout: {type(error).__name__}: {error}") from None


def _open(layout: str, path: Path, config: Config | None) -> Checkpoint:
    if layout == "raphael":
        return run_layout.open_run(path)
    if layout == "canonical":
        return canonical.open_canonical(path)
    if layout == "deepspeed":
        return deepspeed_read.open_deepspeed(path, config)
    if layout == "diffusers":
        return diffusers_folder.open_diffusers(path)
    return megablocks.open_megablocks(path) if layout == "megablocks" else dense.open_dense(path)


def make_plan(layout: str, source: Source, options: Options, target: Path) -> Plan:
    """Return what is to be written. UserError when the layout cannot hold the model, or the topology is impossible."""
    if layout == "raphael":
        return run_layout.plan(source, options, target)
    if layout == "canonical":
        return canonical.plan(source, options.part_bytes)
    if layout == "deepspeed":
        return deepspeed_write.plan(source, options)
    if layout == "diffusers":
        return diffusers_folder.plan(source, options)
    return megablocks.plan(source, options) if layout == "megablocks" else dense.plan(source, options)


def convert(
    from_layout: str,
    path: Path,
    to_layout: str,
    target: Path,
    options: Options,
    config: Config | None = None,
    ranks: Ranks | None = None,
) -> Report:
    """Convert `path` to the new folder `target`; return what was done. Collective over `ranks`.

    Raises UserError when the source is damaged or incomplete, the target exists or cannot hold the model; nothing is left
    then.
    """
    ranks, began = ranks or Ranks(), time.monotonic()
    check_layout("--to", to_layout)
    opened, source, plan = ranks.agree(lambda: _prepare(from_layout, path, to_layout, target, options, config))
    with opened:
        store(source, plan, target, ranks, opened.files)
    how = "sizes and SHA-256 of its manifest" if opened.files else "no manifest: only that every tensor is there once"
    return Report(opened.layout, to_layout, _rows(plan), opened.notes + plan.notes, how, time.monotonic() - began)


def store(source: Source, plan: Plan, target: Path, ranks: Ranks, vouched: dict[Path, dict[str, Any]]) -> None:
    """Write what is planned from `source` and publish it as the new folder `target`. Collective over `ranks`.

    vouched: the source's files with their entries in its manifest, with which they are compared meanwhile. Raises UserError
    as `convert`; nothing is left then.
    """
    temporary = target.parent / f".converting-{target.name}"
    try:
        ranks.main_only(lambda: _claim(target, temporary, plan))
        entries = _write(plan, source, vouched, temporary, ranks)
        ranks.main_only(lambda: _publish(plan, entries, temporary, target))
    except BaseException:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _prepare(
    from_layout: str, path: Path, to_layout: str, target: Path, options: Options, config: Config | None
) -> tuple[Checkpoint, Source, Plan]:
    if target.exists() or target.is_symlink():
        raise UserError(f"--to {to_layout} {target}: exists already; give a new path, nothing is overwritten")
    opened = open_checkpoint(from_layout, path, config)
    source: Source = opened
    if config is not None and opened.layout != "deepspeed":
        if not diffusers_folder.is_dense(opened.config):
            raise UserError(f"--config: {path} says its model itself, and has experts or edge modules already; leave it out")
        source = Upcycled(opened, config)
    plan = make_plan(to_layout, source, options, target)
    check_complete(plan, source)
    return opened, source, plan


def _claim(target: Path, temporary: Path, plan: Plan) -> None:
    shutil.rmtree(temporary, ignore_errors=True)  # of a conversion that was killed
    try:
        temporary.mkdir(parents=True)
        free, needed = shutil.disk_usage(temporary).free, sum(f.bytes for f in plan.files)
    except OSError as error:
        raise UserError(f"--to {target}: cannot write there: {error.strerror}") from None
    if free < needed:
        raise UserError(f"--to {target}: {needed} bytes are needed, {free} are free")


def _write(plan: Plan, source: Source, vouched: dict[Path, dict[str, Any]], temporary: Path, ranks: Ranks) -> dict[str, Any]:
    """Write this rank's files while a second thread checks its share of the source; return all ranks' manifest entries."""
    mine = _share([(f.bytes, f) for f in plan.files], ranks)
    to_check = _share([(entry["bytes"], (file, entry)) for file, entry in vouched.items()], ranks)

    def work() -> dict[str, Any]:
        found: list[str | None] = []
        checking = threading.Thread(target=lambda: found.append(damage(to_check)), daemon=True)
        checking.start()
        written, syncing = {}, deque[tuple[str, HashedFile]]()
        try:
            for file in mine:
                syncing.append((file.name, write_file(file, temporary, source)))
                if len(syncing) > _SYNCING:
                    name, oldest = syncing.popleft()
                    written[name] = oldest.entry()
        finally:  # no thread goes on writing, whatever happened
            written |= {name: file.entry() for name, file in syncing}
            checking.join()
        if not found or found[0] is not None:
            raise UserError(f"{source.path} is damaged: {found[0] if found else 'it cannot be read'}")
        return written

    return {name: entry for written in ranks.gather(ranks.agree(work)) for name, entry in written.items()}


def _share(weighted: list[tuple[int, Any]], ranks: Ranks) -> list[Any]:
    """Divide things over ranks, the heaviest first to whoever has least; return this rank's."""
    loads, mine = [0] * ranks.size, []
    order = sorted(range(len(weighted)), key=lambda i: (-weighted[i][0], i))
    for i in order:
        rank = loads.index(min(loads))
        loads[rank] += weighted[i][0] + 1
        if rank == ranks.rank:
            mine.append(weighted[i][1])
    return mine


def _publish(plan: Plan, entries: dict[str, Any], temporary: Path, target: Path) -> None:
    """Write what belongs to the whole, read the result back by its own layout, and give it its name."""
    missing = {f.name for f in plan.files} ^ entries.keys()
    assert not missing, f"not written: {missing}"
    for name, data in plan.small.items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(temporary / name, data)
    if plan.finish is not None:
        plan.finish(temporary)
        _sync([path for path in temporary.rglob("*") if path.is_file() and str(path.relative_to(temporary)) not in entries])
    home = (temporary / plan.manifest_name).parent
    files = {os.path.relpath(temporary / name, home): entries[name] for name in sorted(entries)}
    write_bytes(temporary / plan.manifest_name, json.dumps(plan.manifest | {"files": files}, indent=1).encode())
    with open_checkpoint(plan.layout, temporary) as again:
        assert len(plan.kinds) <= len(again.kinds())
    _sync([path for path in (temporary, *temporary.rglob("*")) if path.is_dir()])
    temporary.rename(target)
    sync_folder(target.parent)


def _sync(paths: list[Path]) -> None:
    """Wait until files, or the entries of folders, are on the device."""
    for path in paths:
        sync_folder(path)


def _rows(plan: Plan) -> list[Row]:
    takes: dict[str, list[tuple[str, int, Take]]] = {}
    for file in plan.files:
        for entry in file.entries:
            for take in entry.takes:
                size = take.numel * entry.dtype.itemsize
                takes.setdefault("copies" if take.copy else take.kind, []).append((file.name, size, take))
    return [_row(kind, found) for kind, found in takes.items()]


def _row(kind: str, takes: list[tuple[str, int, Take]]) -> Row:
    tensors, files = {take.name for _, _, take in takes}, {file for file, _, _ in takes}
    parameters, size = sum(take.numel for _, _, take in takes), sum(size for _, size, _ in takes)
    return Row(kind, len(tensors), parameters, size, len(files))
