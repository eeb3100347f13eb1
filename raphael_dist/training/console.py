"""What a run shows: a progress bar on a terminal, plain lines elsewhere and in train.log."""

import contextlib
import logging
import sys
import time
from typing import Any, TextIO, cast

from raphael_dist.runtime.progress_bar import ProgressBar
from raphael_dist.text import escape_control

_log = logging.getLogger(__name__)
_SHOWN = (
    "train/loss", "train/loss_weighted", "train/loss_edge", "optim/lr", "optim/grad_norm", "throughput/samples_per_s",
)  # fmt: skip


class _Lossy:
    """A text stream that discards text that cannot be written, instead of raising OSError."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def ignore_output_errors() -> None:
    """Let no failed print end the run: the output may be a file on a full disk, or a closed terminal.

    This is permanent: text that is left in a buffer would fail again when Python ends, and change the exit code.
    """
    if not isinstance(sys.stdout, _Lossy):
        sys.stdout, sys.stderr = cast(TextIO, _Lossy(sys.stdout)), cast(TextIO, _Lossy(sys.stderr))


class Console:
    """A run's progress on rank 0. Other ranks show nothing."""

    def __init__(self, active: bool, start: int, total: int) -> None:
        """`start`: the step that this process begins after; `total`: the run's last step."""
        self._active, self._start, self._total = active, start, total
        self._began = time.monotonic()
        self._loss = ""
        self._bar = ProgressBar("train", enabled=active, transient=False)
        self.advance(start)

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        self._bar.report(self._loss, step, self._total)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Show the scalars of a logged step in one line."""
        shown = "  ".join(f"{tag.split('/')[1]} {values[tag]:.4g}" for tag in _SHOWN if tag in values)
        left = (time.monotonic() - self._began) / max(1, step - self._start) * (self._total - step)
        if "train/loss" in values:
            self._loss = f"loss {values['train/loss']:.4f}"  # a narrow terminal has no room for more
            self.advance(step)
        line = f"step {step}/{self._total}  {shown}  eta {int(left // 60)}:{int(left % 60):02d}"
        self.line(line, only_log=self._bar.active)

    def line(self, text: str, only_log: bool = False) -> None:
        """Print one line, and write it to train.log."""
        if not self._active:
            return
        text = escape_control(text)
        _log.info("%s", text)
        if not only_log:
            self._bar.print(text)

    def close(self) -> None:
        """Stop drawing the bar."""
        self._bar.close()
