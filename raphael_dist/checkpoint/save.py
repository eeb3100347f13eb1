"""Writes checkpoints while training continues. A checkpoint is either complete or absent.

A save has three parts:

- `begin`: all ranks agree that the disk has room, and copy their fragments (the ranges of parameters and Adam moments that a
  rank owns under ZeRO) to host memory. A thread of each rank writes one file, calls fsync and reads the file back, while
  training continues.
- `commit`: called when all ranks have reported, at the end of a step, that their threads are done. The ranks exchange the
  sizes and checksums of their files. A thread of rank 0 writes the manifest and renames the folder to its final name.
- `finish`: wait until the two parts above are done, however long the disk takes.

Threads never call a collective. A kill at any moment leaves the previous checkpoint intact.
"""

import errno
import json
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from torch import Tensor

from raphael_dist.checkpoint import folders
from raphael_dist.checkpoint.manifest import FORMAT, MANIFEST, Manifest, seal
from raphael_dist.checkpoint.progress import Progress
from raphael_dist.checkpoint.reader import CheckpointReader
from raphael_dist.checkpoint.resume import Restorer
from raphael_dist.checkpoint.save_state import Save, WrittenFile
from raphael_dist.checkpoint.snapshot import Snapshot, write_snapshot
from raphael_dist.config.schema import Config, stored_tree
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.fragments import Fragments
from raphael_dist.errors import NonFiniteError, NotSavedError, UserError, describe_error
from raphael_dist.runtime.long_work import run_on_all_ranks, run_on_rank0
from raphael_dist.runtime.progress_bar import Reporter
from raphael_dist.runtime.ranks import Ranks, gather_objects
from raphael_dist.storage import files
from raphael_dist.storage.versions import versions

_log = logging.getLogger(__name__)
T = TypeVar("T")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointStore:
    """Saves and resumes the checkpoints of one run. Use it as a context manager around training.

    Saving runs in the background: `begin` starts it, `commit` completes it once all ranks have written, `finish` waits. All
    ranks must call the methods in the same order, except `written` and `finished_saves`.
    """

    def __init__(self, config: Config, ranks: Ranks, fragments: Fragments, ema: Ema | None, data: Mapping[str, str]) -> None:
        self.root = config.run.dir / "checkpoints"
        self.failed = 0  # number of saves that failed
        self._config, self._ranks = config, ranks
        self._restorer = Restorer(config, ranks, fragments, ema, data)
        self._snapshot = Snapshot(fragments, ema, ranks.rank, ranks.world_size)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._constant = {
            "world_size": ranks.world_size,
            "dataset": data["data.shards"],
            "data": dict(data),
            "versions": versions(),
            "config": stored_tree(config),
            "tensors": fragments.shapes,
        }
        # Estimated too large rather than too small: the entries of files and ranges are not known yet.
        self._manifest_bytes = len(json.dumps(self._constant)) + 1000 * ranks.world_size + 600 * len(fragments.shapes)
        self._save: Save | None = None
        self._finished: list[Save] = []  # published, not yet returned by `finished_saves`

    # ---- saving -----------------------------------------------------------------------------------------------------

    def save(self, progress: Progress) -> Path:
        """Write a checkpoint of the current training state, wait until it is complete, and return its folder. Collective.

        `progress` (step, ...) is stored in the checkpoint. Raises OSError on all ranks if writing failed on any rank.
        """
        self.begin(progress)
        failure = self.finish()
        if failure:
            raise OSError(failure)
        return self.last.final

    def begin(self, progress: Progress) -> None:
        """Wait for the previous save, copy the training state to host memory, and start a thread that writes a checkpoint.

        `progress` (step, ...) is stored in the checkpoint. Collective. Errors are not raised: `finish` returns them.
        """
        began = time.monotonic()
        self._wait()
        final = self.root / f"step-{progress.step:08d}"
        temporary = self.root / (folders.WRITING + final.name)
        save = self._save = Save(temporary, final, self._manifest(progress))
        save.bytes, problem = self._make_room(save)
        if problem:
            self._give_up(save, problem)
        else:
            try:
                save.written = self._thread.submit(self._write, save, self._snapshot.take())
            except Exception as error:  # raised by `commit`, so that this rank fails together with the others
                save.written = Future()
                save.written.set_exception(error)
        save.stall_s += time.monotonic() - began

    @property
    def last(self) -> Save:
        """The save that was begun last, finished or not. `begin` must have been called."""
        assert self._save is not None
        return self._save

    @property
    def written(self) -> bool:
        """Whether the thread that writes this rank's file has ended (also by an error), and `commit` was not called yet.

        The ranks exchange this value at the end of every step, and call `commit` when it is true on all of them.
        """
        return self._save is not None and self._save.written is not None and self._save.written.done()

    def commit(self) -> None:
        """Wait for the thread that writes this rank's file of the checkpoint; exchange results with all ranks. Collective.

        If all ranks succeeded, a thread of rank 0 completes the checkpoint: it writes the manifest and gives the folder its
        final name. Does nothing if no file is being written.
        """
        save = self._save
        if save is None or save.written is None:
            return
        began = time.monotonic()
        outcome = _outcome(save.written)
        outcomes = gather_objects(outcome)
        save.written = None
        problem = next((f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text), None)
        if problem:
            self._give_up(save, problem)
        else:
            written = [file for file, _ in outcomes if file is not None]
            save.write_s = max(file.seconds for file in written)
            save.manifest["files"] = {file.name: {**file.entry, "ranges": file.ranges} for file in written}
            if self._ranks.is_main:
                save.published = self._thread.submit(self._publish, save)
        save.stall_s += time.monotonic() - began

    def finish(self) -> str | None:
        """Wait until the checkpoint that is being saved is complete or has failed. Collective.

        Returns why the save failed, the same text on all ranks; None if the checkpoint is complete, or no save was begun.
        """
        began = time.monotonic()
        self._wait()
        if self._save is None:
            return None
        self._save.stall_s += time.monotonic() - began
        return self._save.failure

    def finished_saves(self) -> list[Save]:
        """Return a record of each checkpoint that was completed since the last call of this method. Call it on rank 0."""
        if self._save is not None and self._save.published is not None and self._save.published.done():
            self._conclude(self._save)
        finished = self._finished
        self._finished = []
        return finished

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Wait for the save in progress. After an exception on one rank, wait only for this rank's thread."""
        try:
            if kind is None or issubclass(kind, NonFiniteError | NotSavedError):  # these are raised on all ranks
                self.finish()
        finally:
            self._thread.shutdown(wait=True)

    def amend(self, progress: Progress) -> None:
        """Replace the progress in the saved checkpoint of step `progress.step`, after a rollback to this checkpoint.

        After a rollback, training skips the samples of the bad steps. A restart skips them too, since it reads
        `samples_seen` from the manifest. If the manifest cannot be read or written, the error is only logged, because it
        affects a restart and not this process.
        """
        if not self._ranks.is_main:
            return
        folder = self.root / f"step-{progress.step:08d}"
        try:
            manifest = CheckpointReader(folder).manifest | progress.as_manifest()
            files.replace_bytes(folder / MANIFEST, seal(manifest))
        except (OSError, UserError) as error:
            _log.warning(
                "the rollback cannot be recorded in the manifest of %s (%s), so after a restart the run would train again "
                "on the samples that the rollback skipped. Check free space and permissions.",
                folder,
                error,
            )

    def _wait(self) -> None:
        save = self._save
        if save is None:
            return
        # Not in a collective: a slow disk may take longer than the time-out of a collective.
        if save.written is not None:
            run_on_all_ranks("writing the checkpoint", partial(_report_until_written, save, save.written))
        self.commit()
        save.failure = run_on_rank0("publishing the checkpoint", lambda _: self._conclude(save))

    def _conclude(self, save: Save) -> str | None:
        """Wait until rank 0 has published the checkpoint, and record the result; return why the save failed, or None."""
        if save.published is not None and not save.concluded:
            save.concluded = True
            problem = _outcome(save.published)[1]
            if problem:
                self._give_up(save, problem)
            else:
                self._finished.append(save)
        return save.failure

    def _make_room(self, save: Save) -> tuple[int, str | None]:
        """Create the folder `save.temporary`, and compare the bytes of all ranks with the free space. Collective.

        Returns:
            The number of bytes that all ranks will write, and the reason why they cannot be written, or None.
        """
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
            problem = describe_error(error)
        answers = gather_objects((need, free, problem))
        total, free = sum(n for n, _, _ in answers), min(f for _, f, _ in answers)
        problem = next((f"rank {rank}: {text}" for rank, (_, _, text) in enumerate(answers) if text), None)
        if problem is None and total > free:
            problem = _no_space(total, free, self.root)
        return total, problem

    def _write(self, save: Save, values: Tensor) -> WrittenFile:
        """Write this rank's file of the checkpoint `save`, in a thread. `values`: the copy of this rank's training state."""
        name = f"rank-{self._ranks.rank:05d}.safetensors"
        ranges = self._snapshot.ranges
        layout = [(key, numel) for key, (_, numel) in ranges.items()]
        starts = json.dumps({key: start for key, (start, _) in ranges.items()})
        metadata = {"step": str(save.manifest["step"]), "rank": str(self._ranks.rank), "starts": starts}
        began = time.monotonic()

        def report(text: str, done: int | None = None, total: int | None = None) -> None:
            save.status = text

        try:
            entry = write_snapshot(save.temporary / name, layout, values, metadata, report)
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            raise OSError(_no_space(save.bytes, files.free_bytes(self.root), self.root) + f" ({error.strerror})") from None
        return WrittenFile(name, max(1e-9, time.monotonic() - began), entry, ranges)

    def _publish(self, save: Save) -> None:
        """Write the manifest, rename the folder into place, and remove expired checkpoints. Runs in rank 0's thread."""
        files.write_bytes(save.temporary / MANIFEST, seal(save.manifest))
        problem = CheckpointReader(save.temporary).incomplete()
        if problem:
            raise OSError(problem)
        folders.publish(save.temporary, save.final)
        try:
            files.replace_bytes(self.root / "latest", save.final.name.encode())
            # Every file has been read back, so older checkpoints may be removed.
            keep = self._config.checkpoint
            for old in folders.expired(folders.newest(self.root), keep.keep, keep.keep_every):
                if old != save.final:
                    folders.remove(old)
        except (OSError, UserError) as error:  # resuming does not need `latest`
            _log.warning(
                "checkpoint %s is saved, but updating the file `latest` or removing older checkpoints failed afterwards: "
                "%s. Check free space and permissions.",
                save.final,
                error,
            )

    def _give_up(self, save: Save, problem: str) -> None:
        save.failure = (
            f"the checkpoint of step {save.manifest['step']} was not written, and the previous one remains: {problem}"
        )
        self.failed += 1
        if self._ranks.is_main:
            _log.warning("%s", save.failure)
            if save.temporary.exists():
                folders.remove(save.temporary)

    def _manifest(self, progress: Progress) -> Manifest:
        return {"format": FORMAT, **progress.as_manifest(), **self._constant, "files": {}}

    # ---- resuming ---------------------------------------------------------------------------------------------------

    def resume(self) -> Progress | None:
        """Restore weights, Adam moments and EMA from the newest undamaged checkpoint at the start of a run. Collective.

        Returns the progress (step, ...) that the checkpoint states; None if there is no checkpoint. Errors: see
        Restorer.resume.
        """
        return self._restorer.resume()

    def rewind(self, before: int | None = None) -> Progress | None:
        """Wait for the save in progress, then restore the newest undamaged checkpoint. Collective.

        `before`: a step number. A checkpoint of an earlier step is restored, and those of this step and later steps are
        renamed to damaged-*. None: the checkpoint may be of any step. Returns the progress (step, ...) of the restored
        checkpoint; None if there is no such checkpoint.
        """
        self.finish()
        return self._restorer.rewind(before)


def _report_until_written(save: Save, written: Future[WrittenFile], report: Reporter) -> None:
    """Wait until this rank's thread has written its file. Report what the thread does (`save.status`) at each change."""
    reported = ""
    while wait([written], timeout=1.0).not_done:
        if save.status != reported:
            reported = save.status
            report(reported)


def _outcome(future: Future[T]) -> tuple[T | None, str | None]:
    """Wait for work in a thread; return (its result, None), or (None, the error message) if it raised an exception."""
    try:
        return future.result(), None
    except Exception as error:
        return None, describe_error(error)


def _no_space(need: int, free: int, where: Path) -> str:
    return f"no space: {need} bytes are required, but {free} are free in {where}"
