"""A progress bar for long work: on a terminal, from the words that the work tells anyway."""

import re
import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_COUNT = re.compile(r"(\d+) of (\d+)")


class Bar:
    """Shows how far a piece of work is; nothing at all where nobody watches, or when it never tells anything."""

    def __init__(self, doing: str, shown: bool, console: Console | None = None) -> None:
        """`console`: where, instead of standard output if that is a terminal."""
        self._doing, self._console = doing, console or Console()
        self._shown = shown and (console is not None or sys.stdout.isatty())
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def tell(self, words: str) -> None:
        """Take words such as "shard 12 of 5000, image 48 of 1000"; the first pair of numbers moves the bar."""
        if not self._shown:
            return
        if self._progress is None:
            columns = (TextColumn(self._doing), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, TextColumn("{task.description}"), console=self._console, transient=True)
            self._task = self._progress.add_task("", total=None)
            self._progress.start()
        count = _COUNT.search(words)
        done, total = (int(count[1]), int(count[2])) if count else (None, None)
        self._progress.update(self._task, completed=done, total=total, description=words)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Take it off the screen."""
        if self._progress is not None:
            self._progress.stop()
