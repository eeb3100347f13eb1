"""The progress display of a training run: a progress bar on a terminal, otherwise plain lines. All lines also go to
train.log.
"""

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
    """Wraps a text stream. Text that the stream cannot write is discarded, and no OSError is raised."""

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
    """Replace stdout and stderr so that a failed print never ends the run, e.g. on a full disk or a closed terminal.

    The replacement is permanent. Otherwise Python would try to write buffered text again when it exits, fail, and change the
    exit code.
    """
    if not isinstance(sys.stdout, _Lossy):
        sys.stdout, sys.stderr = cast(TextIO, _Lossy(sys.stdout)), cast(TextIO, _Lossy(sys.stderr))


class Console:
    """Shows the progress of a run on rank 0; does nothing on other ranks."""

    def __init__(self, active: bool, start: int, total: int) -> None:
        """Create the display.

        Args:
            active: whether to show and log anything: true on rank 0, false on all other ranks.
            start: number of optimizer steps that were complete before this process started.
            total: number of optimizer steps of the whole run.
        """
        self._active, self._start, self._total = active, start, total
        self._began = time.monotonic()
        self._loss = ""
        self._bar = ProgressBar("train", enabled=active, transient=False)

    def advance(self, step: int) -> None:
        """Show on the progress bar that optimizer step `step` of the run is complete."""
        self._bar.report(self._loss, step, self._total)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Show one line with the loss, learning rate, gradient norm, speed and estimated remaining time.

        If there is a progress bar, the bar shows the loss, and the line is written to train.log only.

        Args:
            step: the last complete optimizer step.
            values: all logged scalars by tag, e.g. "train/loss".
        """
        shown = "  ".join(f"{tag.split('/')[1]} {values[tag]:.4g}" for tag in _SHOWN if tag in values)
        left = (time.monotonic() - self._began) / max(1, step - self._start) * (self._total - step)
        if "train/loss" in values:
            self._loss = f"loss {values['train/loss']:.4f}"  # a narrow terminal has no room for more
            self.advance(step)
        line = f"step {step}/{self._total}  {shown}  eta {int(left // 60)}:{int(left % 60):02d}"
        self.line(line, only_log=self._bar.active)

    def line(self, text: str, only_log: bool = False) -> None:
        """On rank 0, print one line (above the progress bar) and write it to train.log. `only_log`: do not print it."""
        if not self._active:
            return
        text = escape_control(text)
        _log.info("%s", text)
        if not only_log:
            self._bar.print(text)

    def close(self) -> None:
        """Stop drawing the progress bar."""
        self._bar.close()
