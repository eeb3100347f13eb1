"""Writes checkpoints that are either whole or absent, while training goes on, and resumes from the newest that verifies.

A save has three parts. `begin`: all ranks agree that there is room, copy their fragments to the host and go on training; a
thread of each writes its file, syncs it and reads it back. `settle`, once every rank has said at a step's end that its
thread is done: the ranks exchange what they wrote, and a thread of rank 0 writes the manifest and renames the folder into
place. `finish`: wait for both, however long a disk takes. Threads never call a collective. A kill at any moment leaves the
previous checkpoint whole.
"""

import errno
import json
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from raphael_dist.checkpoint import folders
from raphael_dist.checkpoint.manifest import FORMAT, MANIFEST, seal
from raphael_dist.checkpoint.progress import Progress
from raphael_dist.checkpoint.reader import CheckpointReader, newest
from raphael_dist.checkpoint.restore import Restorer
from raphael_dist.checkpoint.snapshot import Snapshot, write_snapshot
from raphael_dist.config import Config
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.fragments import Fragments
from raphael_dist.errors import NonFiniteError, NotSavedError, UserError
from raphael_dist.parallel.long_work import Tell, from_main, together
from raphael_dist.parallel.ranks import Ranks, gather_objects
from raphael_dist.storage import files
from raphael_dist.storage.versions import versions

_log = logging.getLogger(__name__)


@dataclass
class Save:
    """One save on this rank. manifest: all but the files. failure: the same text on all ranks once they have agreed."""

    temporary: Path
    final: Path
    manifest: dict[str, Any]
    bytes: int = 0  # of all ranks
    stall_s: float = 0.0
    write_s: float = 0.0
    written: Future[dict[str, Any]] | None = None  # until settled
    published: Future[None] | None = None  # on rank 0, from then on
    words: str = ""  # how far this rank's thread is
    failure: str | None = None
    concluded: bool = False

    @property
    def line(self) -> str:
        """What a person reads about it."""
        cost = f"training waited {self.stall_s:.3f} s, written and read back in {self.write_s:.2f} s"
        return f"saved {self.final} ({self.bytes / 2**20:.1f} MiB, {cost})"

    def metrics(self) -> dict[str, float]:
        """Return what the save cost, by tag."""
        values = {"stall_s": self.stall_s, "write_s": self.write_s, "bytes": float(self.bytes)}
        return {f"checkpoint/{name}": value for name, value in values.items()}


class CheckpointStore:
    """The checkpoints of one run. Methods are collective, all ranks call them alike; `written` and `news` are not.

    Use it as a context manager around training.
    """

    def __init__(self, config: Config, ranks: Ranks, fragments: Fragments, ema: Ema | None, data: Mapping[str, str]) -> None:
        self.root = config.run.dir / "checkpoints"
        self.failed = 0  # saves that were given up
        self._config, self._ranks = config, ranks
        self._restorer = Restorer(config, ranks, fragments, ema, data)
        self._snapshot = Snapshot(fragments, ema, ranks.rank, ranks.world_size)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._constant = {
            "world_size": ranks.world_size,
            "dataset": data["data.shards"],
            "data": dict(data),
            "versions": versions(),
            "config": config.model_dump(mode="json"),
            "tensors": fragments.shapes,
        }
        # A generous guess: the entries of files and ranges are not known yet.
        self._manifest_bytes = len(json.dumps(self._constant)) + 1000 * ranks.world_size + 600 * len(fragments.shapes)
        self._save: Save | None = None
        self._news: list[Save] = []

    # ---- saving -----------------------------------------------------------------------------------------------------

    def save(self, progress: Progress) -> Path:
        """Write and publish a checkpoint before returning. Raises OSError on all ranks when that failed on any."""
        self.begin(progress)
        failure = self.finish()
        if failure:
            raise OSError(failure)
        return self.last.final

    def begin(self, progress: Progress) -> None:
        """Copy the state and start writing it; waits for the save before this one. What fails is told by `finish`."""
        began = time.monotonic()
        self._wait()
        final = self.root / f"step-{progress.step:08d}"
        temporary = self.root / (folders.WRITING + final.name)
        save = self._save = Save(temporary, final, self._manifest(progress))
        save.bytes, problem = self._make_room(save)
        if problem:
            self._give_up(save, problem)
        else:
            save.written = self._thread.submit(self._write, save, self._snapshot.take())
        save.stall_s += time.monotonic() - began

    @property
    def last(self) -> Save:
        """The last save, as far as it got."""
        assert self._save is not None
        return self._save

    @property
    def written(self) -> bool:
        """Whether this rank's part is written, or failed, and waits for the others; ranks tell each other every step."""
        return self._save is not None and self._save.written is not None and self._save.written.done()

    def settle(self) -> None:
        """Exchange what was written; when all succeeded, rank 0 starts to publish it. Waits for this rank's thread."""
        save = self._save
        if save is None or save.written is None:
            return
        began = time.monotonic()
        outcomes = gather_objects(_outcome(save.written))
        save.written = None
        problem = next((f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text), None)
        if problem:
            self._give_up(save, problem)
        else:
            entries = [entry for entry, _ in outcomes]
            save.write_s = max(entry.pop("seconds") for entry in entries)
            save.manifest["files"] = {entry.pop("name"): entry for entry in entries}
            if self._ranks.is_main:
                save.published = self._thread.submit(self._publish, save)
        save.stall_s += time.monotonic() - began

    def finish(self) -> str | None:
        """Wait for the save in flight; return why the last one failed, or None. The same on all ranks."""
        began = time.monotonic()
        self._wait()
        if self._save is None:
            return None
        self._save.stall_s += time.monotonic() - began
        return self._save.failure

    def news(self) -> list[Save]:
        """Return, once each, the saves that have been published. For rank 0."""
        if self._save is not None and self._save.published is not None and self._save.published.done():
            self._conclude(self._save)
        news, self._news = self._news, []
        return news

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Wait for the save in flight; after an exception of one rank alone only for this rank's thread, unpublished."""
        try:
            if kind is None or issubclass(kind, NonFiniteError | NotSavedError):  # raised on all ranks alike
                self.finish()
        finally:
            self._thread.shutdown(wait=True)

    def amend(self, progress: Progress) -> None:
        """Note other progress in the checkpoint of the step: training goes on from it, but with other samples.

        Where that cannot be written the run goes on all the same, and says so; it is a restart that would not know.
        """
        if not self._ranks.is_main:
            return
        folder = self.root / f"step-{progress.step:08d}"
        try:
            manifest = CheckpointReader(folder).manifest | progress.as_manifest()
            files.replace_bytes(folder / MANIFEST, seal(manifest))
        except (OSError, UserError) as error:
            _log.warning(
                "cannot note in %s that it was returned to: %s; a restart would meet the same samples", folder, error
            )

    def _wait(self) -> None:
        save = self._save
        if save is None:
            return
        # Not in a collective: a rank's disk may take longer than one may wait.
        if save.written is not None:
            together("writing the checkpoint", partial(_await, save, save.written))
        self.settle()

        def concluded(_: Tell) -> str | None:
            self._conclude(save)
            return save.failure

        save.failure = from_main("publishing the checkpoint", concluded)

    def _conclude(self, save: Save) -> None:
        """Wait for what rank 0 publishes, and note how that went."""
        if save.published is None or save.concluded:
            return
        save.concluded = True
        problem = _outcome(save.published)[1]
        if problem:
            self._give_up(save, problem)
        else:
            self._news.append(save)

    def _make_room(self, save: Save) -> tuple[int, str | None]:
        """Clear the folder to write into and compare what all ranks need with what is free; return bytes and problem."""
        need, free, problem = 0, 0, None
        try:
            need = self._snapshot.prepare()
            if self._ranks.is_main:
                need += self._manifest_bytes
                if save.temporary.exists():
                    folders.remove(save.temporary)
                save.temporary.mkdir(parents=True)
            free = files.free_bytes(self.root)
        except (OSError, RuntimeError, MemoryError) as error:
            problem = str(error)
        needs = gather_objects((need, free, problem))
        total, least = sum(n for n, _, _ in needs), min(f for _, f, _ in needs)
        problem = next((f"rank {rank}: {text}" for rank, (_, _, text) in enumerate(needs) if text), None)
        if problem is None and total > least:
            problem = _no_space(total, least, self.root)
        return total, problem

    def _write(self, save: Save, values: Tensor) -> dict[str, Any]:
        name = f"rank-{self._ranks.rank:05d}.safetensors"
        layout, starts = self._snapshot.layout, self._snapshot.starts
        metadata = {"step": str(save.manifest["step"]), "rank": str(self._ranks.rank), "starts": json.dumps(starts)}
        began = time.monotonic()

        def tell(words: str) -> None:
            save.words = words

        try:
            entry = write_snapshot(save.temporary / name, layout, values, metadata, tell)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(_no_space(save.bytes, files.free_bytes(self.root), self.root) + f" ({error.strerror})") from None
        ranges = {key: (starts[key], numel) for key, numel in layout}
        return {"name": name, "seconds": max(1e-9, time.monotonic() - began), **entry, "ranges": ranges}

    def _publish(self, save: Save) -> None:
        files.write_bytes(save.temporary / MANIFEST, seal(save.manifest))
        problem = CheckpointReader(save.temporary).incomplete()
        if problem:
            raise OSError(problem)
        folders.publish(save.temporary, save.final)
        try:
            files.replace_bytes(self.root / "latest", save.final.name.encode())
            # Every file was read back before it was named here, so that older checkpoints may go.
            keep = self._config.checkpoint
            for old in folders.surplus(newest(self.root), keep.keep, keep.keep_every):
                if old != save.final:
                    folders.remove(old)
        except (OSError, UserError) as error:  # the checkpoint is there, and resuming looks for it without `latest`
            _log.warning("%s is saved, but `latest` or older checkpoints could not be updated: %s", save.final, error)

    def _give_up(self, save: Save, problem: str) -> None:
        save.failure = f"checkpoint of step {save.manifest['step']} not written, the previous one stays: {problem}"
        self.failed += 1
        if self._ranks.is_main:
            _log.warning("%s", save.failure)
            if save.temporary.exists():
                folders.remove(save.temporary)

    def _manifest(self, progress: Progress) -> dict[str, Any]:
        return {"format": FORMAT, **progress.as_manifest(), **self._constant, "files": {}}

    # ---- resuming ---------------------------------------------------------------------------------------------------

    def resume(self) -> Progress | None:
        """Restore the newest checkpoint that verifies; see Restorer.resume."""
        return self._restorer.resume()

    def rewind(self, before: int | None = None) -> Progress | None:
        """The same in the middle of training; None, and no change, without a checkpoint; see Restorer.rewind."""
        self.finish()
        return self._restorer.rewind(before)


def _await(save: Save, written: Future[Any], tell: Tell) -> None:
    """Wait for a rank's thread, and tell the others how far it is."""
    told = ""
    while wait([written], timeout=1.0).not_done:
        if save.words != told:
            told = save.words
            tell(told)


def _outcome(future: Future[Any]) -> tuple[Any, str | None]:
    """Wait for a thread; return its result and what went wrong in words."""
    try:
        return future.result(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)


def _no_space(need: int, free: int, where: Path) -> str:
    return f"no space: {need} bytes needed, {free} free in {where}"
