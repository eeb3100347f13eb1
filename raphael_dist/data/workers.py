"""Worker processes that read and decode samples for a rank, whose Python would else share one lock with them.

A worker knows the data set and nothing of torch. Requests and answers travel through a pipe, pixels through memory that both
share. A worker that dies, or takes longer than LIMIT_S for one sample (a hostile image may), is replaced, and that sample is
a bad one. Workers leave a signal to the rank, and end when its end of the pipe closes, however that came about.
"""

import logging
import multiprocessing
import pickle
import queue
import signal
import threading
from collections import defaultdict, deque
from collections.abc import Iterable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any

from raphael_dist.data.dataset import BadSampleError, DecodedSample, ImageDataset, Request
from raphael_dist.data.index import DatasetIndex

_log = logging.getLogger(__name__)
LIMIT_S = 120.0
_ROOM = 1 << 16  # bytes of shared memory beside those of pixels


class DecodePool:
    """Decodes samples in worker processes, which start when they are first needed."""

    def __init__(self, dataset: ImageDataset, workers: int) -> None:
        """What goes wrong at their start is raised by the first sample."""
        self._dataset = dataset
        self._begun: dict[Request, deque[Future[DecodedSample]]] = defaultdict(deque)
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue[tuple[Request, Future[DecodedSample]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._drive, name="decode", daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def ahead(self, requests: Iterable[Request]) -> None:
        """Begin what `load` will be called for; each request is to be called for once."""
        for request in requests:
            with self._lock:
                self._begun[request].append(self._submit(request))

    def load(self, request: Request) -> DecodedSample:
        """Return what `ImageDataset.load(*request)` returns, or raise what it raises. Safe to call from several threads."""
        with self._lock:
            begun = self._begun.get(request)
            future = begun.popleft() if begun else self._submit(request)
            if not begun:
                self._begun.pop(request, None)
        return future.result()

    def _submit(self, request: Request) -> Future[DecodedSample]:
        future: Future[DecodedSample] = Future()
        self._tasks.put((request, future))
        return future

    def close(self) -> None:
        """End the workers once they have done what was submitted."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _drive(self) -> None:
        """Give one worker its requests, in a thread of its own."""
        worker: _Worker | None = None
        while (task := self._tasks.get()) is not None:
            request, future = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                worker = worker or _Worker(self._dataset)
                future.set_result(worker.ask(request))
            except _LostError as error:
                worker = None
                shard, row = self._dataset.index.locate(request[0])
                source = self._dataset.index.shards[shard]
                _log.warning("%s:%r: %s", source.name, source.keys[row], error)
                future.set_exception(BadSampleError(source.name, source.keys[row], str(error)))
            except BaseException as error:  # whatever it is, it belongs to whoever waits for the sample
                future.set_exception(error)
        if worker is not None:
            worker.close()


class _LostError(Exception):
    """A worker that died or did not answer; the text says which."""


class _Worker:
    """One worker process, as its driver sees it."""

    def __init__(self, dataset: ImageDataset) -> None:
        # Forked from a process that has imported what is needed and has no threads.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([ImageDataset.__module__, DatasetIndex.__module__])
        pixels = max(height * width for height, width in dataset.buckets)
        self._shared = context.RawArray("B", 4 * pixels + _ROOM)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, dataset, self._shared), name="decode", daemon=True)
        self._process.start()
        # At its end Python would wait for a process that leaves SIGTERM to the rank.
        Finalize(self, self._process.kill, exitpriority=10)
        theirs.close()

    def ask(self, request: Request) -> DecodedSample:
        """Return the sample; raises what `ImageDataset.load` raised there, or _LostError."""
        try:
            self._pipe.send(request)
            if not self._pipe.poll(LIMIT_S):
                self._process.kill()
                raise _LostError(f"decoding took longer than {LIMIT_S:g} s")
            answer, sizes = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(5.0)
            raise _LostError(f"decoding ended its process (exit code {self._process.exitcode})") from error
        if isinstance(answer, BaseException):
            raise answer
        buffers, first, view = [], 0, memoryview(self._shared).cast("B")
        for size in sizes:
            buffers.append(bytearray(view[first : first + size]))
            first += size
        result: DecodedSample = pickle.loads(answer, buffers=buffers)
        return result

    def close(self) -> None:
        self._pipe.close()
        self._process.join(5.0)


def leave_signals(_: int = 0) -> None:
    """Leave to the rank what tells it to stop; Slurm tells all processes of a job. The argument is a DataLoader's."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _serve(pipe: Connection, dataset: ImageDataset, shared: Any) -> None:
    """Answer requests until the other end closes."""
    leave_signals()
    room = memoryview(shared).cast("B")
    while True:
        try:
            request = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer: tuple[Any, list[int]] = _packed(dataset.load(*request), room)
        except Exception as error:
            answer = (_portable(error), [])
        try:
            pipe.send(answer)
        except OSError:
            return


def _packed(sample: DecodedSample, room: memoryview) -> tuple[bytes, list[int]]:
    """Return a sample as a pickle without its arrays, which go to the shared memory, and their sizes in bytes."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(sample, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    if sum(view.nbytes for view in views) > len(room):
        return pickle.dumps(sample, protocol=5), []
    first = 0
    for view in views:
        room[first : first + view.nbytes] = view
        first += view.nbytes
    return data, [view.nbytes for view in views]


def _portable(error: Exception) -> Exception:
    """Return an exception that the other process can rebuild."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
