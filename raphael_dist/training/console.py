"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere and in train.log."""

import contextlib
import logging
import sys
import time
from typing import Any, TextIO, cast

_log = logging.getLogger(__name__)


class _Lossy:
    """A text stream that loses what cannot be written, where it would raise OSError."""

    def __init__(self, stream: Any) -> None:
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


def let_output_fail() -> None:
    """Let no print end the run: its output may go to a file on a full disk, or to a terminal that is gone.

    For good: what is left in a buffer would fail once more when Python ends, and take the exit code with it.
    """
    if not isinstance(sys.stdout, _Lossy):
        sys.stdout, sys.stderr = cast(TextIO, _Lossy(sys.stdout)), cast(TextIO, _Lossy(sys.stderr))


class Reporter:
    """Progress of one run on rank 0; silent on the others."""

    def __init__(self, active: bool, start: int, total: int) -> None:
        self._active, self._start, self._total = active, start, total
        self._began = time.monotonic()
        self._bar = None
        if active and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._task = self._bar.add_task("", total=total, completed=start)
            self._bar.start()

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Show the scalars of a logged step in one line."""
        if not self._active:
            return
        keys = ("train/loss", "train/loss_edge", "optim/lr", "optim/grad_norm", "throughput/samples_per_s")
        shown = "  ".join(f"{k.split('/')[1]} {values[k]:.4g}" for k in keys if k in values)
        left = (time.monotonic() - self._began) / max(1, step - self._start) * (self._total - step)
        if self._bar is not None:
            self._bar.update(self._task, description=f"loss {values['train/loss']:.4f}")  # a narrow terminal holds no more
        self.line(
            f"step {step}/{self._total}  {shown}  eta {int(left // 60)}:{int(left % 60):02d}", only_log=self._bar is not None
        )

    def line(self, text: str, only_log: bool = False) -> None:
        """Print one line, and write it to train.log."""
        if not self._active:
            return
        _log.info("%s", text)
        if only_log:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.stop()
