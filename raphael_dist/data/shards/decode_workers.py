"""Worker processes that read and decode samples for a rank.

- A worker has its own copy of the data set object and does not import torch.
- Requests and results go through a pipe, pixels through shared memory.
- A worker that dies or stalls is replaced, and its sample is read again. After 3 lost workers (ATTEMPTS) the rank reads the
  sample itself. So a fault of the machine never makes a sample count as unusable.
- A sample is unusable if decoding takes more than 120 s of CPU time (LIMIT_S), as a malicious image may, or crashes all 3
  workers.
- Workers ignore signals, which the rank handles. They exit when the rank's end of the pipe is closed, for any reason.
"""

import logging
import mmap
import multiprocessing
import os
import pickle
import queue
import signal
import tempfile
import threading
from collections import defaultdict, deque
from collections.abc import Iterable
from concurrent.futures import Future
from multiprocessing import reduction, util
from multiprocessing.connection import Connection
from typing import Any

import psutil

from raphael_dist.data.shards.dataset_index import BadSampleError, DatasetIndex
from raphael_dist.data.shards.decode_sample import DecodedSample, ImageDataset, Request
from raphael_dist.runtime.clock import RunningClock

_log = logging.getLogger(__name__)
LIMIT_S = 120.0  # of CPU time for one sample, and of wall time without any CPU time
ATTEMPTS = 3  # workers that may be lost over one sample or batch
_MAX_TMPDIR = 70  # bytes; multiprocessing appends the names of a folder and a socket
_POLL_S = 1.0
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}  # by which a decoder ends its own process
_EXTRA_BYTES = 1 << 16  # of shared memory, in addition to the pixels


def shorten_socket_paths() -> None:
    """Let multiprocessing create its sockets in a folder with a short path, such as /tmp, if the path in TMPDIR is long.

    The path of a socket may have at most 107 bytes, and multiprocessing would create its sockets in TMPDIR.
    """
    if len(os.fsencode(tempfile.gettempdir())) <= _MAX_TMPDIR:
        return
    short = next((folder for folder in ("/tmp", "/var/tmp", "/dev/shm") if os.access(folder, os.W_OK | os.X_OK)), None)
    before, tempfile.tempdir = tempfile.tempdir, short
    try:
        util.get_temp_dir()  # multiprocessing remembers it, also in the processes that it starts
    finally:
        tempfile.tempdir = before


def ignore_signals(_: int = 0) -> None:
    """Ignore SIGINT, SIGTERM and similar signals in a worker process, since the rank handles them.

    The argument is not used; DataLoader passes the worker's number to its init function.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class DecodePool:
    """Decodes samples in worker processes. A worker process starts when it gets its first sample to decode."""

    def __init__(self, dataset: ImageDataset, workers: int) -> None:
        """Create a pool of `workers` processes, each with a copy of `dataset`, which reads and decodes samples.

        If no worker process can be started, samples are decoded in a thread of this process.
        """
        shorten_socket_paths()
        self._dataset = dataset
        self._prefetched: dict[Request, deque[Future[DecodedSample]]] = defaultdict(deque)
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue[tuple[Request, Future[DecodedSample]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._drive_worker, name="decode", daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def prefetch(self, requests: Iterable[Request]) -> None:
        """Start to decode samples in the background. `load` must then be called exactly once for each of `requests`.

        A request is (sample id, number of the image size, whether to mirror): the arguments of `ImageDataset.decode`.
        """
        for request in requests:
            with self._lock:
                self._prefetched[request].append(self._submit(request))

    def load(self, request: Request) -> DecodedSample:
        """Decode a sample in a worker process and return it, or return the result of `prefetch`. Thread-safe.

        `request`: (sample id, number of the image size, whether to mirror), the arguments of `ImageDataset.decode`. Raises
        the errors of that method, and BadSampleError if decoding takes too long or crashes 3 workers.
        """
        with self._lock:
            futures = self._prefetched.get(request)
            future = futures.popleft() if futures else self._submit(request)
            if not futures:
                self._prefetched.pop(request, None)
        return future.result()

    def _submit(self, request: Request) -> Future[DecodedSample]:
        future: Future[DecodedSample] = Future()
        self._tasks.put((request, future))
        return future

    def close(self) -> None:
        """Wait until all submitted requests are complete, and stop the workers."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _drive_worker(self) -> None:
        """Send requests to one worker process until the pool is closed, and replace the process when it is lost.

        The pool runs this method in a separate thread for each worker.
        """
        worker: _Worker | None = None
        while (task := self._tasks.get()) is not None:
            request, future = task
            if not future.set_running_or_notify_cancel():
                continue
            losses: list[_WorkerLostError] = []
            while not future.done():
                try:
                    if worker is None and len(losses) < ATTEMPTS:
                        worker = _Worker(self._dataset)
                    future.set_result(self._dataset.decode(*request) if worker is None else worker.load(request))
                except _WorkerLostError as error:
                    worker = None
                    losses.append(error)
                    self._handle_loss(request, losses, future)
                except BaseException as error:  # raised where the sample is waited for
                    future.set_exception(error)
        if worker is not None:
            worker.close()

    def _handle_loss(self, request: Request, losses: "list[_WorkerLostError]", future: Future[DecodedSample]) -> None:
        """Log that a worker process was lost while it decoded a sample. If decoding is the cause, mark the sample as bad.

        `request`: the sample. `losses`: the errors of all worker processes that were lost while they decoded this sample.
        `future`: receives a BadSampleError if the sample is bad.
        """
        last = losses[-1]
        sample = self._dataset.index.bad_sample(request[0], str(last))
        if last.is_endless or (len(losses) == ATTEMPTS and all(loss.is_crash for loss in losses)):
            future.set_exception(BadSampleError(sample))
            return
        _log.warning(
            "shard %s, sample %r: a worker process of data.workers failed (%s), so the sample is read again",
            sample.shard, sample.key, last,
        )  # fmt: skip


class _WorkerLostError(Exception):
    """Raised if a worker process cannot be started, has died, stalls or lacks memory.

    Attributes:
        is_crash: Whether the decoder crashed the process, as opposed to a fault of the machine.
        is_endless: Whether decoding exceeded its time limit.
    """

    def __init__(self, text: str, *, is_crash: bool = False, is_endless: bool = False) -> None:
        super().__init__(text)
        self.is_crash, self.is_endless = is_crash, is_endless


class _Worker:
    """One worker process, as seen by the rank: starts it, sends requests and receives samples."""

    def __init__(self, dataset: ImageDataset) -> None:
        # Workers are forks of a server process, which has no threads and has imported what they need.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([ImageDataset.__module__, DatasetIndex.__module__])
        pixels = max(height * width for height, width in dataset.buckets)
        try:
            self._shared = _SharedMemory(4 * pixels + _EXTRA_BYTES)
            self._pipe, remote_pipe = context.Pipe()
            self._process = context.Process(
                target=_serve, args=(remote_pipe, dataset, self._shared), name="decode", daemon=True
            )
            self._process.start()
        except (OSError, EOFError) as error:
            raise _WorkerLostError(f"data.workers: a worker process cannot be started: {error}") from error
        # At exit Python would wait for a process that ignores SIGTERM.
        util.Finalize(self, self._process.kill, exitpriority=10)
        remote_pipe.close()

    def load(self, request: Request) -> DecodedSample:
        """Decode a sample in the worker process and return it. `request`: (sample id, bucket, flip).

        An exception of the decoder is raised here again. Raises _WorkerLostError if the process dies, stalls, has too
        little memory or exceeds the time limit.
        """
        try:
            self._pipe.send(request)
            self._wait()
            answer, sizes = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(5.0)
            raise self._exit_error() from error
        if isinstance(answer, MemoryError):
            self._process.kill()
            raise _WorkerLostError("there is not enough memory to decode the sample")
        if isinstance(answer, BaseException):
            raise answer
        buffers, first = [], 0
        for size in sizes:
            buffers.append(bytearray(self._shared.view[first : first + size]))
            first += size
        sample: DecodedSample = pickle.loads(answer, buffers=buffers)
        return sample

    def _wait(self) -> None:
        """Wait for an answer. Raises _WorkerLostError if decoding takes too long, or if the process stalls."""
        began = last_cpu_s = self._cpu_seconds()
        clock = RunningClock(2 * _POLL_S)
        last_progress = clock.now()
        while not self._pipe.poll(_POLL_S):
            cpu_s = self._cpu_seconds()
            if cpu_s > last_cpu_s:
                last_cpu_s, last_progress = cpu_s, clock.now()
            if cpu_s - began > LIMIT_S:
                self._process.kill()
                raise _WorkerLostError(f"decoding needs longer than {LIMIT_S:g} s of processor time", is_endless=True)
            if clock.now() - last_progress > LIMIT_S:
                self._process.kill()
                raise _WorkerLostError(f"the worker process made no progress for {LIMIT_S:g} s")

    def _cpu_seconds(self) -> float:
        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.Error:  # it has ended, which the pipe is about to report
            return 0.0
        return float(times.user + times.system)

    def _exit_error(self) -> _WorkerLostError:
        code = self._process.exitcode
        if code == -signal.SIGKILL:
            return _WorkerLostError("the worker process was killed, possibly by the system for lack of memory (see dmesg)")
        is_crash = code is not None and -code in _CRASHES
        return _WorkerLostError(f"decoding the sample ended the worker process (exit code {code})", is_crash=is_crash)

    def close(self) -> None:
        self._pipe.close()
        self._process.join(5.0)


class _SharedMemory:
    """Memory that two processes share. It is not a file in /dev/shm, so the size of /dev/shm does not limit it."""

    def __init__(self, size: int, descriptor: int | None = None) -> None:
        self._size, self._descriptor = size, os.memfd_create("decode") if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self._descriptor, size)
        util.Finalize(self, os.close, (self._descriptor,))
        self.view = memoryview(mmap.mmap(self._descriptor, size))

    def __reduce__(self) -> tuple[object, ...]:
        return _attach, (self._size, reduction.DupFd(self._descriptor))


def _attach(size: int, descriptor: Any) -> _SharedMemory:
    return _SharedMemory(size, descriptor.detach())


def _serve(pipe: Connection, dataset: ImageDataset, shared: _SharedMemory) -> None:
    """Answer requests in the worker process until the rank closes its end of the pipe."""
    ignore_signals()
    while True:
        try:
            request = pipe.recv()
        except (EOFError, OSError):
            return
        answer: bytes | Exception
        try:
            answer, sizes = _pack(dataset.load(*request), shared.view)
        except Exception as error:
            answer, sizes = _picklable(error), []
        try:
            pipe.send((answer, sizes))
        except OSError:
            return


def _pack(sample: DecodedSample, memory: memoryview) -> tuple[bytes, list[int]]:
    """Pickle a sample without its arrays, which are copied to `memory`; return (pickle, size of each array in bytes).

    If `memory` is too small, the pickle contains the arrays, and the list of sizes is [].
    """
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(sample, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    if sum(view.nbytes for view in views) > len(memory):
        return pickle.dumps(sample, protocol=5), []
    first = 0
    for view in views:
        memory[first : first + view.nbytes] = view
        first += view.nbytes
    return data, [view.nbytes for view in views]


def _picklable(error: Exception) -> Exception:
    """Return the exception if another process can unpickle it, otherwise a RuntimeError with its text."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
