"""Progress reports of long work, and a progress bar for the terminal.

The package rich is imported only if there is a terminal. This module does not import torch.
"""

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from raphael_dist.text import escape_control, hide_secrets_in_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


class Reporter(Protocol):
    """The type of functions that long work calls to report progress.

    `text` describes the current work. `done` of `total` parts are complete; None if parts are not counted.
    """

    def __call__(self, text: str, done: int | None = None, total: int | None = None) -> None: ...


def no_report(text: str, done: int | None = None, total: int | None = None) -> None:
    """Do nothing. Pass this function to work that reports its progress, if the progress is not to be shown."""


class ProgressBar:
    """A progress bar on a terminal. It appears with the first report; nothing appears if the stream is not a terminal."""

    def __init__(self, title: str, *, enabled: bool, file: TextIO | None = None, transient: bool = True) -> None:
        """Create the bar.

        Args:
            title: text in front of the bar.
            enabled: False on ranks that show nothing.
            file: stream to which the bar is written; None: standard output.
            transient: whether to remove the bar at the end.
        """
        stream = file or sys.stdout
        self._console = _open_console(stream) if enabled and stream.isatty() else None
        self._title, self._transient = title, transient
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    @property
    def active(self) -> bool:
        """Whether the bar can be shown: it is enabled, and the stream is a terminal."""
        return self._console is not None

    def report(self, text: str, done: int | None = None, total: int | None = None) -> None:
        """Move the bar to `done` of `total` parts (None: unknown), and show `text` after it."""
        if self._console is None:
            return
        if self._progress is None or self._task is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            time_left, description = TimeRemainingColumn(), TextColumn("{task.description}", markup=False)
            columns = (TextColumn(self._title), BarColumn(), MofNCompleteColumn(), time_left, description)
            self._progress = Progress(*columns, console=self._console, transient=self._transient)
            self._task = self._progress.add_task("", total=None)
            self._progress.start()
        text = escape_control(hide_secrets_in_text(text))  # it may have names of shards
        self._progress.update(self._task, completed=done, total=total, description=text)

    def print(self, line: str) -> None:
        """Print a line above the bar. Without a bar, print it to standard output."""
        if self._console is None:
            print(line, flush=True)
        else:
            self._console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        """Stop drawing the bar."""
        if self._progress is not None:
            self._progress.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _open_console(stream: TextIO) -> "Console":
    from rich.console import Console

    return Console(file=stream)
