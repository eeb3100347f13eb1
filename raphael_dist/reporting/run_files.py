"""Reads the files in a run directory: metrics, logs, configuration, versions, sample grids, routes, checkpoints."""

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import yaml

from raphael_dist.checkpoint.folders import step_of
from raphael_dist.config.load import UNREADABLE, check_tree
from raphael_dist.config.validation_errors import value_text
from raphael_dist.errors import UserError
from raphael_dist.reporting.route_values import checked_routes
from raphael_dist.text import JsonObject, hide_secrets_in_text, open_regular, read_json, read_text
from raphael_dist.training.metrics_files import LARGEST, Series, read_series

T = TypeVar("T")
_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ ([A-Z]+) [\w.]+: (.*)")
_START = re.compile(r"(from scratch|new, from|resumed at step (\d+)).*?\b([1-9]\d{0,8}) ranks? on (\w+), ZeRO-([0-3])")
MARKS = ("config.yaml", "metrics.jsonl", "train.log")  # a folder with one of them is a run directory
MAX_LINE = 1000  # characters of a log line
MAX_KEYS, MAX_DEPTH = 1000, 20  # of a configuration, which has about 150 keys
# Numeric settings of config.yaml that the report and the rules of `doctor` use.
NUMBERS = (
    "edge.weight", "model.gate_noise", "model.gate_noise_steps", "model.space_experts", "model.time_experts",
    "optim.max_grad_norm", "optim.warmup_steps", "text.max_tokens", "train.global_batch_size", "train.log_every",
    "train.max_steps",
)  # fmt: skip


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
        missing: a sentence about each file, or part of a file, that could not be read.
        label: name of the run in reports; "": the name of its folder.
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
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or self.folder.resolve().name

    def option(self, key: str, default: Any = None) -> Any:
        """Return the value of a setting in config.yaml, such as "train.max_steps"; `default` if it is not in the file."""
        section, _, name = key.partition(".")
        values = self.config.get(section)
        return values.get(name, default) if isinstance(values, dict) else default

    def number(self, key: str) -> float:
        """Return the number that config.yaml has at `key`, one of NUMBERS; 0 if it is missing or not a number."""
        assert key in NUMBERS, key
        value = self.option(key)
        return value if _is_number(value) else 0

    def values(self, tag: str, share: float = 1.0) -> list[float]:
        """Return the last part of a metric's logged values, in order of steps, without values that are inf or NaN.

        `tag`: name of the metric, such as "train/loss". `share`: how much of all logged values this part is, such as 0.2 for
        the last fifth; it has at least one value. The result is [] if none of them is finite.
        """
        series = self.series.get(tag, [])
        return [value for _, value in series[-max(1, round(share * len(series))) :] if math.isfinite(value)]

    def last(self, tag: str, share: float = 0.2) -> float | None:
        """Return the mean of the finite values in the last part of a metric's logged values; None if there are none.

        The last part is taken first, from all logged values. Then inf and NaN in it are dropped, as in `values`.

        `tag`: name of the metric, such as "train/loss". `share`: how much of all logged values this part is, such as 0.2 for
        the last fifth.
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
    steps = [step_of(path) for path in paths_in(checkpoints, "step-*")]
    run = RunFiles(
        folder,
        _read(missing, folder / "metrics.jsonl", lambda path: _metrics(path, missing), {}),
        _read_logs(folder, missing),
        _read(missing, folder / "config.yaml", _config, {}),
        _read(missing, folder / "versions.json", _versions, {}),
        _by_step(folder / "samples", ".png"),
        _by_step(folder / "samples", ".routes.json"),
        sorted(step for step in steps if step is not None),
        [path.name for path in paths_in(checkpoints, "damaged-*")],
        missing,
    )
    for key in NUMBERS:
        if not _is_number(value := run.option(key, 0)) and value is not None:
            missing.append(f"config.yaml: {key}={value_text(value)} is not a number; checks that need it are left out.")
    return run


def paths_in(folder: Path, pattern: str) -> list[Path]:
    """Return the paths in a folder, sorted by name; [] if the folder is missing, cannot be read, or vanishes meanwhile.

    `pattern`: pattern of their names, such as "rank-*.log".
    """
    try:
        return sorted(path for path in folder.iterdir() if fnmatchcase(path.name, pattern))
    except OSError:
        return []


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _read(missing: list[str], path: Path, read: Callable[[Path], T], default: T) -> T:
    try:
        return read(path)
    except FileNotFoundError:
        missing.append(f"{path.name} is not in the run directory.")
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
        known = isinstance(error, OSError | ValueError | yaml.YAMLError)
        why = " ".join(str(error).split())[:200] if known else "it does not have the form in which the trainer writes it"
        missing.append(f"{path.name} cannot be read: {why}.")
    return default


def _metrics(path: Path, missing: list[str]) -> dict[str, Series]:
    series, left_out = read_series(path)
    missing += left_out
    if not series:
        raise ValueError("it contains no metrics")
    return series


def _config(path: Path) -> JsonObject:
    try:
        tree = yaml.safe_load(read_text(path))
        check_tree(tree)
        json.dumps(tree, default=str, ensure_ascii=False).encode()  # raises if the report could not show it
    except UNREADABLE as error:
        raise ValueError(error) from None
    if not isinstance(tree, dict):
        raise ValueError("the file is not a mapping of sections")
    count = sum(len(section) if isinstance(section, dict) else 1 for section in tree.values())
    if count > MAX_KEYS or _depth(tree) > MAX_DEPTH:
        raise ValueError(f"the file has over {MAX_KEYS:,} keys, or values that are nested more than {MAX_DEPTH} levels deep")
    return tree


def _depth(tree: JsonObject) -> int:
    """Return how deeply the dicts and lists of a tree are nested. A dict of numbers has depth 2."""
    depth, level = 0, list[object]([tree])
    while level:
        depth += 1
        dicts = [value.values() for value in level if isinstance(value, dict)]
        level = [inner for values in (*dicts, *(value for value in level if isinstance(value, list))) for inner in values]
    return depth


def _versions(path: Path) -> dict[str, str]:
    return {str(name): str(version)[:MAX_LINE] for name, version in read_json(path).items()}


def _read_logs(folder: Path, missing: list[str]) -> list[LogLine]:
    lines: list[LogLine] = _read(missing, folder / "train.log", lambda path: _parse(path, 0), [])
    for path in paths_in(folder / "logs", "rank-*.log"):
        lines += _read(missing, path, lambda path: _parse(path, int(path.stem.rpartition("-")[2])), [])
    return sorted(lines, key=lambda line: line.time)


def _parse(path: Path, rank: int) -> list[LogLine]:
    lines = []
    with os.fdopen(open_regular(path), encoding="utf-8", errors="replace") as file:
        for match in filter(None, map(_LINE.match, file)):
            try:
                time = datetime.fromisoformat(match[1])
            except ValueError:  # such as the 99th of a month
                continue
            lines.append(LogLine(time, match[2], hide_secrets_in_text(match[3].rstrip())[:MAX_LINE], rank))
    return lines


def _by_step(folder: Path, suffix: str) -> dict[int, Path]:
    paths = {re.fullmatch(rf"step-(\d{{1,18}}){re.escape(suffix)}", path.name): path for path in paths_in(folder, "step-*")}
    return {int(match[1]): path for match, path in paths.items() if match}


def read_routes(path: Path) -> JsonObject:
    """Read a file with routes: the experts that process each word and timestep of the first image of a sample grid.

    Args:
        path: the file.

    Returns:
        A dict with the keys "words", "timesteps", "space" (experts of words), "time" (experts of timesteps), "regions" etc.,
            as `analysis.route_report.trace_values` describes.

    Raises:
        OSError: the file cannot be read.
        ValueError: it contains no routes.
    """
    return checked_routes(read_json(path))
