"""Reads the events of a run from its logs (starts, saves, faults and ends), and which step it had reached at which time."""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from statistics import median

from raphael_dist.reporting.run_files import LogLine, RunFiles
from raphael_dist.text import counted

# For each kind of event, a regular expression of its log line. If several match a line, the first counts.
KINDS = {
    "start": r"from scratch|new, from",
    "restart": r"resumed at step",
    "complete": r"complete: ",
    "stopped": r"stopped by a signal",
    "saved": r"saved .*step-\d+",
    "hang": r"there was no progress for|rank \d+ .*(was killed at|no sign of life)",
    "save failed": r"the checkpoint of step \d+ was not written",
    "damaged checkpoint": r"the damaged checkpoint was moved|skipping checkpoint",
    "rollback": r"the run is back at step \d+",
    "skipped step": r"step \d+ was skipped",
    "spike": r"step \d+: the loss .* is a spike",
    "bad data": r"sample .* cannot be used|a data worker process was lost",
    "slow rank": r"step \d+: slow (ranks )?for",
}
FAULTS = tuple(KINDS)[5:]
UNCLEAN = "killed or crashed"  # a process whose log does not state how it ended
STARTS, ENDS = ("start", "restart"), ("complete", "stopped")
CLOSE = timedelta(minutes=5)  # lines of several ranks within this time are about the same hang or damaged checkpoint
# Seconds without a new log line after which a run has stalled: if it has logged two lines of progress, and if not yet.
SILENT_S, SILENT_START_S = 600, 3600
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}
_PROGRESS = re.compile(r"step (\d{1,15})/\d+ ")
_STEP = re.compile(r"step[ -]0*(\d{1,15})(?!\d)")


@dataclass(frozen=True)
class Event:
    """Something that happened in a run, from one line of its log.

    Attributes:
        time: time of the line.
        kind: a name in KINDS, such as "restart"; or "killed or crashed" (UNCLEAN), if a process ended and its log does not
            state how.
        step: the step that the line states, otherwise the last step in the lines before it.
        text: the line.
    """

    time: datetime
    kind: str
    step: int
    text: str

    @property
    def is_fault(self) -> bool:
        return self.kind in FAULTS or self.kind == UNCLEAN


@dataclass(frozen=True)
class History:
    """What happened in a run.

    Attributes:
        events: its starts, saves, faults and ends, in order of time.
        progress: (time, step) pairs: at this time the run had reached this step.
    """

    events: list[Event]
    progress: list[tuple[datetime, int]]

    def of(self, *kinds: str) -> list[Event]:
        """Return the events of some kinds, in order of time. `kinds`: e.g. "restart" or "save failed" (names in KINDS)."""
        return [event for event in self.events if event.kind in kinds]

    @property
    def faults(self) -> list[Event]:
        return [event for event in self.events if event.is_fault]


def read_history(run: RunFiles, now: datetime) -> History:
    """Read the events and the progress of a run from the lines of its logs.

    A hang or a damaged checkpoint that several ranks log is one event. If the log does not state how the run ended, and has
    no new lines up to `now`, the current time, the last process counts as killed or crashed.
    """
    events: list[Event] = []
    progress: list[tuple[datetime, int]] = []
    step, is_open = 0, False
    previous: LogLine | None = None
    for line in run.log:
        kind = next((kind for kind, pattern in _PATTERNS.items() if pattern.match(line.text)), None)
        if match := _PROGRESS.match(line.text):
            step = int(match[1])
            progress.append((line.time, step))
        if kind in STARTS:
            if is_open and previous is not None:
                events.append(_unclean(previous.time, step))
            is_open = True
        if kind in (*ENDS, "hang") or line.text.endswith("(train.stages)"):
            is_open = False
        if kind is not None:
            number = _STEP.search(line.text)
            step = int(number[1]) if number and kind in ("restart", "rollback") else step
            event = Event(line.time, kind, int(number[1]) if number else step, line.text)
            if not _is_repetition(event, events):
                events.append(event)
            if kind in ("restart", "rollback"):
                progress.append((line.time, step))
        previous = line
    history = History(events, progress)
    if is_open and silent_seconds(run, history, now) is not None:
        events.append(_unclean(run.log[-1].time, step))
    return history


def _unclean(time: datetime, step: int) -> Event:
    return Event(time, UNCLEAN, step, "the log does not state how the run ended")


def _is_repetition(event: Event, events: list[Event]) -> bool:
    """Return whether one of the earlier `events` since the last start is the same event, from another log line.

    All ranks log a hang. Rank 0 logs two lines about a damaged checkpoint: that it is skipped, and that it was moved.
    """
    if event.kind not in ("hang", "damaged checkpoint"):
        return False
    for earlier in reversed(events):
        if earlier.kind in STARTS or event.time - earlier.time > CLOSE:
            break
        if earlier.kind == event.kind and (event.kind == "hang" or earlier.step == event.step):
            return True
    return False


def silent_seconds(run: RunFiles, history: History, now: datetime) -> float | None:
    """Return the seconds since a run's last log line if they are unusually many; None otherwise, or if the run has ended.

    The time is unusually long if it is at least 10 minutes and at least 20 times the median time between two lines of
    progress ("step 10/1000 ..."). If the log has fewer than two lines of progress, an hour is unusually long.
    """
    if not run.log or _last_end(history) in ENDS:
        return None
    times = [time for time, _ in history.progress]
    gaps = [(b - a).total_seconds() for a, b in pairwise(times)]
    limit = max(SILENT_S, 20 * median(gaps)) if gaps else SILENT_START_S
    silent = (now - run.log[-1].time).total_seconds()
    return silent if silent >= limit else None


def _last_end(history: History) -> str:
    """Return the kind of the last event that is a start or an end of a process; "" if there is none."""
    kinds = [event.kind for event in history.of(*STARTS, *ENDS)]
    return kinds[-1] if kinds else ""


def ending(run: RunFiles, history: History, now: datetime) -> str:
    """Return a phrase that states how a run ended, or how long ago it wrote its last log line.

    An example is "complete at step 1,000". `history`: events from the run's logs. `now`: the current time.
    """
    last = _last_end(history)
    if last == "complete":
        return f"complete at step {run.step:,}"
    if last == "stopped":
        return f"stopped at step {run.step:,} by a signal or the time limit; the same command continues"
    if not run.log:
        return f"at step {run.step:,}; no log says whether it is complete"
    minutes = max(0.0, (now - run.log[-1].time).total_seconds() / 60)
    return f"at step {run.step:,}, not complete; the last log line is {counted(minutes, 'minute', ',.0f')} old"
