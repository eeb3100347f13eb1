"""Writes metrics to metrics.jsonl and to TensorBoard under the same names, and reads metrics.jsonl."""

import json
import logging
import os
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Concatenate, ParamSpec

import numpy as np
from PIL import Image

from raphael_dist.storage.files import no_links, replace_bytes, write_all
from raphael_dist.text import json_type, open_regular, parse_json, shorten

_P = ParamSpec("_P")
Series = list[tuple[int, float]]  # (step, value)
LARGEST = 1e30  # larger values count as infinite: float64 can hold the variance of all values up to this
LAST_STEP = 10**15  # larger integers are not exact in the JavaScript of a report

_log = logging.getLogger(__name__)

# TensorBoard's page of custom scalars opens with these curves.
LAYOUT = {
    "first": {
        "loss": ["Multiline", ["^train/loss"]],
        "validation loss by timestep (t0: least noisy)": ["Multiline", ["^val/loss"]],
        "images per second": ["Multiline", ["^throughput/samples_per_s$"]],
        "gradient norm": ["Multiline", ["^optim/grad_norm$"]],
        "busiest and least busy expert (1: an even share)": ["Multiline", ["^moe/(space|time)/load_"]],
        "dead experts": ["Multiline", ["^moe/(space/|time/)?dead_experts$"]],
    }
}
_OF_A_BLOCK = re.compile(r"moe/\w+/L\d+/")
_BOARD = "TensorBoard's file"


def _in_thread(
    method: Callable[Concatenate["MetricsWriter", _P], None],
) -> Callable[Concatenate["MetricsWriter", _P], None]:
    """Let the writer's thread run the method. Its calls return at once."""

    @wraps(method)
    def submit(writer: "MetricsWriter", *args: _P.args, **kwargs: _P.kwargs) -> None:
        writer._submit(partial(method, writer, *args, **kwargs))

    return submit


class MetricsWriter:
    """Writes scalars to `metrics.jsonl` and to TensorBoard's files in the run directory. Used on rank 0.

    Scalars of single blocks (moe/space/L00/...) go to TensorBoard only if `every_scalar`, an argument of the constructor, is
    true, since heat maps show them already. If a file cannot be written, e.g. on a full disk, one warning is logged, the
    values are lost, and the run continues. A thread writes, so that no step waits for a slow file system.
    """

    def __init__(self, run_dir: Path, every_scalar: bool = False) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        threading.excepthook = _without_tensorboard_errors(threading.excepthook)
        self._warned = False
        self._path = run_dir / "metrics.jsonl"
        self._mid_line = _ends_within_line(self._path)  # a kill or a full disk ended an earlier process
        self._every_scalar = every_scalar
        self._board: SummaryWriter | None = None
        with self._tolerating(_BOARD):
            self._board = SummaryWriter(str(run_dir / "tensorboard"))
            self._board.add_custom_scalars(LAYOUT)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._last: Future[None] | None = None

    @_in_thread
    def describe(self, yaml: str, values: Mapping[str, bool | int | float | str]) -> None:
        """Write a run's configuration to TensorBoard, as YAML text and as hyperparameters for comparing runs.

        `values`: the settings by key `section.key`.
        """
        from torch.utils.tensorboard.summary import hparams

        if self._board is not None:
            with self._tolerating(_BOARD):
                self._board.add_text("configuration", f"```yaml\n{yaml}\n```")
                # add_hparams would put them into a run of their own, apart from the curves.
                for summary in hparams(dict(values), {"train/loss": 0.0, "val/loss": 0.0}):
                    self._board._get_file_writer().add_summary(summary)

    @_in_thread
    def write(self, step: int, samples_seen: int, values: dict[str, float]) -> None:
        """Write metrics of optimizer step `step`: one line in metrics.jsonl, and one TensorBoard scalar per metric.

        `samples_seen`: number of training samples that the run has used up to this step. `values`: the metrics by name.
        """
        line = json.dumps({"step": step, "samples_seen": samples_seen, **values}) + "\n"
        with self._tolerating(str(self._path)):
            self._append(line)
        if self._board is not None:
            with self._tolerating(_BOARD):
                for tag, value in values.items():
                    if self._every_scalar or not _OF_A_BLOCK.match(tag):
                        self._board.add_scalar(tag, value, step)

    @_in_thread
    def return_to(self, step: int) -> None:
        """Remove all values of steps after `step` from the files, because the run will log those steps again."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        with self._tolerating(str(self._path)):
            _drop_after(self._path, step)
        if self._board is not None:
            with self._tolerating(_BOARD):  # as SummaryWriter(purge_step=...) does, but for an open writer
                start = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
                self._board._get_file_writer().add_event(start, step + 1)

    @_in_thread
    def image(self, tag: str, step: int, image: Image.Image) -> None:
        """Write an image of optimizer step `step` to TensorBoard, where it is shown under the name `tag`."""
        if self._board is not None:
            with self._tolerating(_BOARD):
                self._board.add_image(tag, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def flush(self) -> None:
        """Wait until metrics.jsonl has all values of earlier calls."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Write everything, and close TensorBoard's file."""
        self._close_board()
        self.flush()
        self._thread.shutdown()

    @_in_thread
    def _close_board(self) -> None:
        if self._board is not None:
            with self._tolerating(_BOARD):
                self._board.close()

    def _submit(self, job: Callable[[], None]) -> None:
        """Let the thread call `job` after all earlier jobs. Raises the error of an earlier job, if it has failed."""
        if self._last is not None and self._last.done():
            self._last.result()
        self._last = self._thread.submit(_run_after, self._last, job)

    def _append(self, line: str) -> None:
        with open(self._path, "ab", buffering=0, opener=no_links) as file:
            text = ("\n" * self._mid_line + line).encode()  # after an incomplete line, start a new one
            self._mid_line = True
            write_all(file.fileno(), memoryview(text))
            self._mid_line = False

    @contextmanager
    def _tolerating(self, what: str) -> Iterator[None]:
        """Return a context manager that ignores OSError in its body, and logs the first one. `what`: name of the file."""
        try:
            yield
        except OSError as error:
            if what == _BOARD:
                self._board = None  # its thread has ended, and a flush would wait for it
            if not self._warned:
                _log.warning(
                    "%s cannot be written (%s): training continues, but metrics are lost", what, error.strerror or error
                )
            self._warned = True


def _run_after(earlier: Future[None] | None, job: Callable[[], None]) -> None:
    if earlier is not None:
        earlier.result()  # complete: raises its error
    job()


def _drop_after(path: Path, step: int) -> None:
    """Remove the lines of steps after `step` from a metrics.jsonl. The file is replaced by one rename."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    remaining = [line for line in lines if _step_of(line) <= step]
    if len(remaining) < len(lines):
        replace_bytes(path, b"".join(remaining))


def _step_of(line: bytes) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # an incomplete line, which readers skip
        return -1


def _ends_within_line(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() != b"\n"
    except OSError:  # there is none, or it is empty
        return False


_Hook = Callable[[threading.ExceptHookArgs], object]


def _without_tensorboard_errors(hook: _Hook) -> _Hook:
    """Return a threading.excepthook that ignores OSErrors of TensorBoard's writer thread and calls `hook` for all others.

    No error is lost: the next call to TensorBoard raises it again.
    """

    def filtered(args: threading.ExceptHookArgs) -> None:
        if not (type(args.thread).__name__ == "_AsyncWriterThread" and isinstance(args.exc_value, OSError)):
            hook(args)

    return filtered


def read_metrics(path: Path) -> dict[str, Series]:
    """Read a metrics.jsonl file.

    Lines without a step and values that are not numbers are left out without a message. `read_series` reports them.

    Args:
        path: the file.

    Returns:
        The (step, value) pairs of each metric by its name, in order of steps.
    """
    return read_series(path)[0]


def read_series(path: Path) -> tuple[dict[str, Series], list[str]]:
    """Read a metrics.jsonl file.

    If a metric has two values for one step, the later line counts. Lines that are incomplete because of a kill or a full
    disk are skipped, and so are values that are null.

    Args:
        path: the file.

    Returns:
        The (step, value) pairs of each metric by its name, in order of steps; and sentences that state how many lines have
        no step or have a value that is not a number. These lines or values are left out.

    Raises:
        OSError: the file cannot be read, or it is not a regular file.
    """
    series: dict[str, dict[int, float]] = defaultdict(dict)
    odd: Counter[str] = Counter()
    with os.fdopen(open_regular(path), encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = parse_json(line)
            except ValueError:  # incomplete
                continue
            step = row.get("step") if isinstance(row, dict) else None
            if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= LAST_STEP:
                odd["without a step"] += 1
                continue
            for tag, value in row.items():
                if tag in ("step", "samples_seen") or value is None:
                    continue
                if isinstance(value, bool) or not isinstance(value, int | float):
                    odd[f"where {shorten(tag)} is {json_type(value)}"] += 1
                else:
                    series[tag][step] = _bounded(value)
    left_out = [f"{path.name} has lines {kind}, which are left out (number: {count})." for kind, count in odd.most_common(5)]
    return {tag: sorted(values.items()) for tag, values in series.items()}, left_out


def _bounded(value: float) -> float:
    """Return a value as a float; plus or minus infinity if its absolute value is above 1e30 (LARGEST)."""
    if abs(value) > LARGEST:  # also integers that have no float
        return float("inf") if value > 0 else -float("inf")
    return float(value)
