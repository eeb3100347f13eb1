"""Reads the files in a run directory: metrics, logs, configuration, versions, sample grids, routes, checkpoints."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import yaml

from raphael_dist.checkpoint.folders import step_of
from raphael_dist.config.load import UNREADABLE
from raphael_dist.errors import UserError
from raphael_dist.text import JsonObject, read_json, read_text
from raphael_dist.training.metrics_files import read_metrics

T = TypeVar("T")
Series = list[tuple[int, float]]  # (step, value)
_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ ([A-Z]+) [\w.]+: (.*)")
_START = re.compile(r"(from scratch|new, from|resumed at step (\d+)).*?(\d+) ranks on (\w+), ZeRO-(\d)")
MARKS = ("config.yaml", "metrics.jsonl", "train.log")  # a folder with one of them is a run directory


@dataclass(frozen=True)
class LogLine:
    """One line of a run's log.

    Attributes:
        time: when it was written.
        level: e.g. "WARNING".
        text: the message.
        rank: the rank that wrote it; 0 for the lines of train.log.
    """

    time: datetime
    level: str
    text: str
    rank: int = 0


@dataclass(frozen=True)
class Launch:
    """How a run was started, as its log states.

    Attributes:
        world: number of ranks.
        device: "cpu" or "cuda".
        stage: ZeRO stage of DeepSpeed.
    """

    world: int
    device: str
    stage: int


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run directory. Every field except `folder` may be empty.

    Attributes:
        folder: the run directory.
        series: (step, value) pairs by name (tag) of the metric, in order of steps.
        log: lines of the logs of all ranks, in order of time.
        config: the tree of config.yaml.
        versions: versions of Python and packages by name.
        samples: by step, the image file with the sample grid.
        routes: by step, the JSON file with the experts that process the words of the first sample.
        checkpoints: steps of the checkpoints.
        damaged: names of the folders of damaged checkpoints.
        missing: a sentence about each file that could not be read.
    """

    folder: Path
    series: dict[str, Series] = field(default_factory=dict)
    log: list[LogLine] = field(default_factory=list)
    config: JsonObject = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    samples: dict[int, Path] = field(default_factory=dict)
    routes: dict[int, Path] = field(default_factory=dict)
    checkpoints: list[int] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def option(self, key: str, default: Any = None) -> Any:
        """Return the value of a setting in config.yaml, such as "train.max_steps"; `default` if it is not in the file."""
        section, _, name = key.partition(".")
        values = self.config.get(section)
        return values.get(name, default) if isinstance(values, dict) else default

    def values(self, tag: str, share: float = 1.0) -> list[float]:
        """Return the last logged values of a metric, in order of steps. [] if it has no values.

        `tag`: name of the metric, such as "train/loss". `share`: which part of all its values is returned: 0.2 means the
        last fifth, but at least one value.
        """
        series = self.series.get(tag, [])
        return [value for _, value in series[-max(1, round(share * len(series))) :]] if series else []

    def last(self, tag: str, share: float = 0.2) -> float | None:
        """Return the mean of the last logged values of a metric; None if it has no values.

        `tag`: name of the metric, such as "train/loss". `share`: which part of its values is used: 0.2 means the last fifth.
        """
        values = self.values(tag, share)
        return fmean(values) if values else None

    @property
    def step(self) -> int:
        """The last step that was logged or saved."""
        return max([series[-1][0] for series in self.series.values()] + self.checkpoints, default=0)

    @property
    def launch(self) -> Launch | None:
        """How the run was started the last time; None if the log does not state it."""
        for line in reversed(self.log):
            if match := _START.match(line.text):
                return Launch(int(match[3]), match[4], int(match[5]))
        return None


def read_run(folder: Path) -> RunFiles:
    """Read the files in a run directory. Files that cannot be read are listed in the result's `missing`.

    Raises UserError if the folder does not exist, or is not a run directory.
    """
    if not folder.is_dir():
        raise UserError(f"RUN={folder} must be a run directory, but there is no such folder. Give the run.dir of a run.")
    if not any((folder / name).is_file() for name in MARKS):
        raise UserError(
            f"RUN={folder} must be a run directory, but it has none of {', '.join(MARKS)}. "
            "Pass the folder that was run.dir of a training run."
        )
    missing: list[str] = []
    checkpoints = folder / "checkpoints"
    steps = [step_of(path) for path in checkpoints.glob("step-*")]
    return RunFiles(
        folder,
        _read(missing, folder / "metrics.jsonl", _metrics, {}),
        _read_logs(folder, missing),
        _read(missing, folder / "config.yaml", _config, {}),
        _read(missing, folder / "versions.json", _versions, {}),
        _by_step(folder / "samples", ".png"),
        _by_step(folder / "samples", ".routes.json"),
        sorted(step for step in steps if step is not None),
        sorted(path.name for path in checkpoints.glob("damaged-*")),
        missing,
    )


def _read(missing: list[str], path: Path, read: Callable[[Path], T], default: T) -> T:
    try:
        return read(path)
    except FileNotFoundError:
        missing.append(f"{path.name} is not in the run directory.")
    except (OSError, ValueError, AttributeError, KeyError, TypeError, yaml.YAMLError) as error:
        known = isinstance(error, OSError | ValueError | yaml.YAMLError)
        why = " ".join(str(error).split())[:200] if known else "it does not have the form in which the trainer writes it"
        missing.append(f"{path.name} cannot be read: {why}.")
    return default


def _metrics(path: Path) -> dict[str, Series]:
    series = {tag: [(s, float(v)) for s, v in pairs if v is not None] for tag, pairs in read_metrics(path).items()}
    series = {tag: values for tag, values in series.items() if values}
    if not series:
        raise ValueError("it contains no metrics")
    return series


def _config(path: Path) -> JsonObject:
    try:
        tree = yaml.safe_load(read_text(path))
    except UNREADABLE as error:
        raise ValueError(error) from None
    if not isinstance(tree, dict):
        raise ValueError("it is not a mapping of sections")
    return tree


def _versions(path: Path) -> dict[str, str]:
    return {str(name): str(version) for name, version in read_json(path).items()}


def _read_logs(folder: Path, missing: list[str]) -> list[LogLine]:
    lines: list[LogLine] = _read(missing, folder / "train.log", lambda path: _parse(path, 0), [])
    for path in sorted(folder.glob("logs/rank-*.log")):
        lines += _read(missing, path, lambda path: _parse(path, int(path.stem.rpartition("-")[2])), [])
    return sorted(lines, key=lambda line: line.time)


def _parse(path: Path, rank: int) -> list[LogLine]:
    with open(path, encoding="utf-8", errors="replace") as file:
        matches = (_LINE.match(line) for line in file)
        return [LogLine(datetime.fromisoformat(m[1]), m[2], m[3].rstrip(), rank) for m in matches if m]


def _by_step(folder: Path, suffix: str) -> dict[int, Path]:
    paths = {re.fullmatch(rf"step-(\d+){re.escape(suffix)}", path.name): path for path in folder.glob("step-*")}
    return {int(match[1]): path for match, path in sorted(paths.items(), key=lambda item: item[1].name) if match}


def read_routes(path: Path) -> JsonObject:
    """Read a file with routes: the experts that process each word and timestep of the first image of a sample grid.

    The result has the keys "words", "timesteps", "space" (experts of words), "time" (experts of timesteps), "regions" etc.,
    as `analysis.route_report.trace_values` describes.

    Raises OSError if the file cannot be read, ValueError if it contains no routes.
    """
    routes = json.loads(read_text(path))
    if not isinstance(routes, dict) or not {"words", "space", "regions", "time", "timesteps"} <= set(routes):
        raise ValueError(f"{path.name} contains no routes")
    return routes
