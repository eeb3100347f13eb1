"""Builds micro-batches in worker processes ahead of the training step, if samples are cached or stored in encoded form.

A single thread builds about 800 samples per second, which is too slow for a small model on a GPU. torch's DataLoader runs
the processes. They are forks of the rank's process, use no device and ignore signals.
"""

import copy
import itertools
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from raphael_dist.data.batches import BatchBuilder
from raphael_dist.data.features.batch_encoder import HostEncoder, NotEncodedError, needs_encoding
from raphael_dist.data.features.cache import FeatureCache
from raphael_dist.data.prefetch import Prefetcher
from raphael_dist.data.shards.decode_workers import ATTEMPTS, ignore_signals, shorten_socket_paths
from raphael_dist.errors import UserError
from raphael_dist.model.batch import Batch
from raphael_dist.storage.files import free_bytes

_log = logging.getLogger(__name__)
Slots = Sequence[tuple[int, float]]  # (position, weight) pairs of a micro-batch
SHARED_MEMORY = Path("/dev/shm")  # through which torch passes tensors of workers
_EXIT_S = 5.0  # that a worker may need to exit after its connection was lost
_PROBED = 4  # number of samples, so that at least one very likely has a caption that was not dropped


class BatchPrefetcher(Prefetcher[Any, Batch]):
    """Iterates over micro-batches in order. Worker processes, or else a thread of the rank, build batches ahead.

    - The thread builds all batches if there are no workers, if samples must still be encoded, or if /dev/shm is too small.
    - Otherwise workers build them. The thread builds only those batches in which a sample is not encoded yet, or for which
      workers were lost 3 times.
    - If a worker dies, all workers are replaced, and the new workers build all undelivered batches again.
    """

    def __init__(self, builder: BatchBuilder, slots: Iterable[Slots], depth: int, workers: int, processes: int = 1) -> None:
        """Start prefetching.

        Args:
            builder: Builds a micro-batch.
            slots: For each micro-batch: (position, weight) of each of its samples. The position is the sample's number in
                the endless order of training. The weight is 1 for a sample, and 0 for a place that only pads the batch.
            depth: Number of batches built ahead.
            workers: Number of worker processes; 0: a thread builds the batches.
            processes: Number of ranks on this host, which share its /dev/shm.
        """
        self._builder = builder
        self._workers = workers
        self._loader: Any = None  # the iterator of a DataLoader, which owns its workers
        slots = iter(slots)
        if workers and _is_encoded(builder) and (first := next(slots, None)) is not None:
            slots = itertools.chain([first], slots)
            self._batches_per_worker = max(1, -(-depth // workers))
            self._worker_builder = _WorkerBuilder(builder)
            num_batches = workers * self._batches_per_worker + depth + 1
            if _fits_shared_memory(self._worker_builder.num_bytes(first) * num_batches * processes, workers):
                self._undelivered: deque[Slots] = deque()
                super().__init__(self._finish, self._iterate(slots), depth)
                return
        super().__init__(builder.build, slots, depth)

    def _iterate(self, slots: Iterator[Slots]) -> Iterator["_WorkerBatch"]:
        """Yield the workers' batches in order, and replace workers that are lost.

        `slots`: for each micro-batch, (position in the endless order of training, weight) of each of its samples.
        """
        shorten_socket_paths()
        losses = 0
        while True:
            undelivered = tuple(self._undelivered)
            self._undelivered.clear()
            # In a thread torch installs no SIGCHLD handler, which would raise an error in the main thread if a worker dies.
            with ThreadPoolExecutor(1) as thread:
                self._loader = thread.submit(iter, self._create_loader(itertools.chain(undelivered, slots))).result()
            try:
                for batch in self._loader:
                    self._undelivered.popleft()
                    losses = 0
                    yield batch
                return
            except (RuntimeError, EOFError, ConnectionError) as error:  # the latter two: killed while sending a batch
                # A killed process closes its connections a moment before it counts as ended.
                if not connection.wait([worker.sentinel for worker in self._loader._workers], _EXIT_S):
                    raise
                reason = (str(error) or type(error).__name__).splitlines()[0]
                _log.warning("a data worker process was lost (%s), so its batch is built again", reason)
            self._stop_workers()
            losses += 1
            if losses == ATTEMPTS and self._undelivered:
                losses = 0
                yield _WorkerBatch(self._undelivered.popleft())

    def _record(self, slots: Iterable[Slots]) -> Iterator[Slots]:
        for batch_slots in slots:
            self._undelivered.append(batch_slots)
            yield batch_slots

    def _create_loader(self, slots: Iterable[Slots]) -> "DataLoader[_WorkerBatch]":
        return DataLoader(
            self._worker_builder,
            batch_size=None,
            sampler=self._record(slots),
            num_workers=self._workers,
            prefetch_factor=self._batches_per_worker,
            worker_init_fn=ignore_signals,
            multiprocessing_context="fork",
        )

    def _finish(self, result: "_WorkerBatch") -> Batch:
        self._builder.stream.replaced += result.replaced
        if result.error is not None:
            raise UserError(result.error)
        return self._builder.build(result.slots) if result.batch is None else self._builder.finalize(result.batch)

    def close(self) -> None:
        super().close()
        self._stop_workers()

    def _stop_workers(self) -> None:
        loader, self._loader = self._loader, None
        if loader is not None:
            loader._shutdown_workers()  # otherwise its workers run until the loader is garbage-collected


@dataclass
class _WorkerBatch:
    """A worker's result for one micro-batch.

    Attributes:
        slots: (position in the endless order of training, weight) of each sample.
        batch: The built batch; None if a sample is not encoded or building failed.
        replaced: Number of bad samples for which other samples were used instead.
        error: Text of the UserError that building raised, or None.
    """

    slots: Slots
    batch: Batch | None = None
    replaced: int = 0
    error: str | None = None


class _WorkerBuilder(Dataset[_WorkerBatch]):
    """Builds micro-batches in a worker process, which has no device: `builder[slots]` returns a `_WorkerBatch`.

    `slots`: for each sample of the batch, its position in the endless order of training, and its weight in the loss.
    """

    def __init__(self, builder: BatchBuilder) -> None:
        self._builder = copy.copy(builder)
        self._builder.pin = False
        self._builder.encoder = HostEncoder(builder.encoder, builder.stream.source.null_text)

    def num_bytes(self, slots: Slots) -> int:
        """Return the bytes of shared memory that a batch takes.

        `slots`: for each sample of the batch, its position in the endless order of training, and its weight in the loss.
        """
        batch = self._builder.dummy_batch(slots)
        noise = () if batch.gate_noise is None else tuple(batch.gate_noise)
        return sum(value.nbytes for value in (*vars(batch).values(), *noise) if isinstance(value, Tensor))

    def __getitem__(self, slots: Slots) -> _WorkerBatch:
        stream = self._builder.stream
        before = stream.replaced
        try:
            batch = self._builder.build(slots)
        except NotEncodedError:
            stream.replaced = before  # the rank builds this batch itself and counts the replacements
            return _WorkerBatch(slots)
        except UserError as error:
            return _WorkerBatch(slots, error=str(error))
        return _WorkerBatch(slots, batch, stream.replaced - before)


def _fits_shared_memory(num_bytes: int, workers: int) -> bool:
    """Return whether /dev/shm has `num_bytes` free bytes; log a warning if not. `workers` is only used in the warning.

    A process that writes beyond the free space is ended by SIGBUS, without a message.
    """
    try:
        free = free_bytes(SHARED_MEMORY)
    except OSError:
        free = 0
    if free >= num_bytes:
        return True
    _log.warning(
        "data.workers=%d requires %.1f MiB of shared memory, but %s has %.1f MiB free, so the ranks build batches "
        "themselves. Enlarge the shared memory (docker run --shm-size), or lower data.workers or data.prefetch.",
        workers, num_bytes / 2**20, SHARED_MEMORY, free / 2**20,
    )  # fmt: skip
    return False


def _is_encoded(builder: BatchBuilder) -> bool:
    """Return whether worker processes can build batches.

    This requires that samples are stored in encoded form, which is checked for the first 4 samples, and that no thread of
    this process still fills the feature cache: the workers are forks, and a fork does not have its parent's threads.
    """
    stream, source = builder.stream, builder.stream.source
    if source.decodes_images or (isinstance(source, FeatureCache) and source.filling):
        return False
    return not any(needs_encoding(stream.sample(position)) for position in range(_PROBED))
