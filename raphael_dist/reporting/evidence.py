"""Input (`RunEvidence`) and result (`Finding`) of the rules by which `raphael_dist doctor` detects problems of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from raphael_dist.reporting.run_events import History
from raphael_dist.reporting.run_files import RunFiles

if TYPE_CHECKING:
    from raphael_dist.reporting.data_sample import DataSample

MIN_LINES = 8  # log lines with metrics; fewer show no trend


@dataclass(frozen=True)
class RunEvidence:
    """What is known about a run, for the rules that look for problems.

    Attributes:
        run: contents of the run directory.
        history: events from its logs.
        now: the current time.
        free_bytes: free disk space for the run directory, in bytes; None: unknown.
        checkpoint_bytes: size of the newest checkpoint in bytes; 0: there is none.
        data: result of checking some samples of the training data; None: they were not read.
    """

    run: RunFiles
    history: History
    now: datetime
    free_bytes: int | None = None
    checkpoint_bytes: int = 0
    data: "DataSample | None" = None


@dataclass(frozen=True)
class Finding:
    """A problem of a run, with numbers from the run, and its remedy: what to do about it."""

    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.problem[:1].upper()}{self.problem[1:]}. What to do: {self.remedy}."


Rule = Callable[[RunEvidence], Finding | None]
