"""Reads a checkpoint: its manifest, and any range of any tensor.

A checkpoint is a folder `step-00000100/`. It contains one `rank-00000.safetensors` for each rank that wrote it, and a
`manifest.json`, which is written last. Nothing is pickled.

A tensor in these files has the key `<kind>/<parameter>`. It is one-dimensional. It holds a range (consecutive elements)
of a flattened parameter's fp32 weights (kind `master`), Adam moments (`exp_avg`, `exp_avg_sq`) or EMA (`ema`). The file's
header states for each tensor at which element of the parameter its range begins. The trainer also writes the ranges into the
manifest, so that a reader knows which file to open.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from raphael_dist.checkpoint.folders import newest, resolve_latest, step_of
from raphael_dist.checkpoint.manifest import MANIFEST, read_manifest
from raphael_dist.checkpoint.tensors import Key, coverage_error
from raphael_dist.config.schema import ARCHITECTURE_FIELDS, Config, config_from_tree
from raphael_dist.errors import UserError
from raphael_dist.storage.files import integrity_error
from raphael_dist.storage.tensorfile import FileReader, StoredTensor, read_header
from raphael_dist.text import parse_json, reason_unreadable

T = TypeVar("T")


class CheckpointReader:
    """An opened checkpoint folder of a run, from which tensors are read on request.

    Each stored value belongs to a parameter and to a kind: "master" (fp32 weights), "exp_avg", "exp_avg_sq" (Adam moments)
    or "ema" (moving average). The constructor reads the manifest only. It raises UserError if the manifest is missing or not
    valid, or if the step in the folder's name is not the step of the manifest.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._headers: dict[str, dict[str, StoredTensor]] = {}  # headers of the files opened so far
        self._files = FileReader()
        self.manifest = read_manifest(folder / MANIFEST)
        if step_of(folder) not in (None, self.step):
            raise UserError(
                f"{folder} must contain the checkpoint of the step in its name, but its {MANIFEST} states step {self.step}. "
                "Rename the folder to this step, or use another checkpoint."
            )

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter of the model, by name."""
        return {name: tuple(shape) for name, shape in self.manifest["tensors"].items()}

    def config(self) -> Config:
        """Return the configuration of the run that wrote the checkpoint."""
        return config_from_tree(self.manifest["config"])

    def integrity_error(self, files: list[str] | None = None, report: Callable[[str], None] = lambda _: None) -> str | None:
        """Compare the size and SHA-256 of the checkpoint's files with those in its manifest.json.

        Args:
            files: names of the files to compare. None: all files of the checkpoint.
            report: called with a line of progress before each file is read.

        Returns:
            A message about the first file that is missing or does not match; None if all match.
        """
        names = list(self.manifest["files"]) if files is None else files
        problem = integrity_error(((self.folder / name, self.manifest["files"][name]) for name in names), report)
        return None if problem is None else problem.removeprefix(f"{self.folder}/")

    def incomplete(self) -> str | None:
        """Check that the checkpoint's files have every element of every parameter exactly once, for each kind of values.

        Returns:
            A message about the first missing, duplicate or unexpected element; None if there is none.
        """
        spans = {key: [(start, numel) for start, numel, _ in ranges] for key, ranges in self._ranges.items()}
        return coverage_error(spans, sorted(self.kinds() | {"master"}), self.shapes)

    @cached_property
    def _ranges(self) -> dict[Key, list[tuple[int, int, str]]]:
        """For each (kind, parameter), its ranges in the files: (first element, number of elements, file name), sorted."""
        ranges = defaultdict(list)
        for name, entry in self.manifest["files"].items():
            listed = entry.get("ranges") or {key: (t.start, t.numel) for key, t in self._stored(name).items()}
            for key, (start, numel) in listed.items():
                kind, _, parameter = key.partition("/")
                ranges[kind, parameter].append((start, numel, name))
        return {key: sorted(spans) for key, spans in ranges.items()}

    def _stored(self, name: str) -> dict[str, StoredTensor]:
        """Return the location (file, offset, size, first element) of each tensor in the file `name`, by key.

        Raises UserError if the file's header is not valid, or its tensors are not those that the manifest lists.
        """
        if name not in self._headers:
            tensors, metadata = read_header(self.folder / name)
            listed = self.manifest["files"][name].get("ranges")
            try:
                starts = {key: start for key, (start, _) in listed.items()} if listed else parse_json(metadata["starts"])
                stored = {key: replace(tensor, start=int(starts[key])) for key, tensor in tensors.items()}
            except (LookupError, TypeError, ValueError) as error:
                raise UserError(
                    f"{self.folder / name}: the entry 'starts' of the header must state, for each tensor, the index of the "
                    f"tensor's first element in the flattened parameter, but {reason_unreadable(error)}. Replace the "
                    "checkpoint by a backup copy, or use another one."
                ) from None
            ranges = {key: [t.start, t.numel] for key, t in stored.items()}
            expected = {key: list(each) for key, each in listed.items()} if listed else ranges
            if ranges != expected:
                key = min(k for k in ranges.keys() | expected.keys() if ranges.get(k) != expected.get(k))
                raise UserError(
                    f"{self.folder / name} must contain the tensors that the manifest lists, but {key} is missing, not "
                    "listed, or of another size. Replace the checkpoint by a backup copy, or use another one."
                )
            self._headers[name] = stored
        return self._headers[name]

    def kinds(self) -> set[str]:
        """Return which kinds of values the checkpoint has.

        These are "master" (fp32 weights), and possibly "exp_avg", "exp_avg_sq" (Adam moments) and "ema" (moving average).
        """
        return {kind for kind, _ in self._ranges}

    def spans(self) -> dict[Key, list[StoredTensor]]:
        """Return where the values of each (kind, parameter) are in the files.

        A kind is "master" (fp32 weights), "exp_avg", "exp_avg_sq" (Adam moments) or "ema" (moving average). Each rank may
        have written a range of the flattened parameter, so one parameter can be in several files. Raises UserError if a
        file's header cannot be read.
        """
        return {
            (kind, name): [self._stored(file)[f"{kind}/{name}"] for _, _, file in ranges]
            for (kind, name), ranges in self._ranges.items()
        }

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Return elements [start, start + numel) of a flattened parameter's weights, Adam moments or EMA, float32 [numel].

        Only the files that hold these elements are opened. Raises UserError if an element is missing.

        Args:
            kind: which values: "master" (weights), "exp_avg", "exp_avg_sq" (Adam moments) or "ema" (moving average).
            name: name of the parameter.
            start: index of the first element.
            numel: number of elements.
        """
        ranges = self._ranges.get((kind, name), [])
        files = [file for first, size, file in ranges if first < start + numel and start < first + size]
        try:
            return self._files.read((self._stored(file)[f"{kind}/{name}"] for file in files), start, numel)
        except LookupError as error:
            raise UserError(
                f"{self.folder} must contain all values of {kind}/{name} (a parameter's weights, EMA or Adam moments), but "
                f"it has {error}. Use another checkpoint."
            ) from None

    def whole(self, kind: str, name: str) -> Tensor:
        """Return the weights, Adam moment or EMA of the whole parameter `name`, float32, in the parameter's shape.

        `kind`: which of these values: "master" (weights), "exp_avg", "exp_avg_sq" (Adam moments) or "ema". Raises UserError
        if an element is missing.
        """
        shape = self.shapes[name]
        return self.read(kind, name, 0, prod(shape)).view(shape)


def check_architecture(stored: Config, config: Config, where: str) -> None:
    """Raise UserError if the model of a checkpoint has other shapes of weights than the model of `config`.

    The message names the first setting that differs.

    Args:
        stored: configuration in the checkpoint.
        config: configuration of the run or command that reads the checkpoint.
        where: path of the checkpoint, for the message.
    """
    for name in ARCHITECTURE_FIELDS:
        values = [attrgetter(name)(each) for each in (stored, config)]
        of_checkpoint, of_run = (list(value) if isinstance(value, tuple) else value for value in values)
        if of_checkpoint != of_run:
            raise UserError(
                f"{name}={of_run} must be {of_checkpoint}, the value in the configuration of the checkpoint {where}. "
                f"Set {name}={of_checkpoint}, or use another checkpoint or run.dir."
            )
    ours, theirs = config.edge, stored.edge
    if (ours.weight > 0) != (theirs.weight > 0) or ours.channels != theirs.channels:
        raise UserError(
            f"edge.weight={ours.weight} and edge.channels={ours.channels} must give the same edge modules as in the "
            f"checkpoint in {where}, which has edge.weight={theirs.weight} and edge.channels={theirs.channels}. Set "
            "both to these values."
        )


def open_newest(path: Path, option: str = "--checkpoint") -> CheckpointReader:
    """Open a checkpoint folder, or the newest undamaged checkpoint of a run directory.

    Args:
        path: a step-* folder, a run directory, or the file `latest` in its checkpoints folder.
        option: name of the command line option that gave `path`, for messages.

    Raises:
        UserError: `path` contains no checkpoint, or all of them are damaged.
    """

    def verified(folder: Path) -> CheckpointReader:
        reader = CheckpointReader(folder)
        if problem := reader.integrity_error():
            raise UserError(problem)
        return reader

    path = resolve_latest(path)
    return first_good(path, verified, f"{option} {path}")[0]


def first_good(path: Path, open_step: Callable[[Path], T], prefix: str) -> tuple[T, list[str]]:
    """Call `open_step` on a checkpoint folder, or on the checkpoints of a run directory, newest first, until one succeeds.

    Args:
        path: the checkpoint folder or run directory.
        open_step: a function that opens a checkpoint folder, or raises UserError if the folder is damaged.
        prefix: beginning of the error message, such as "--checkpoint PATH".

    Returns:
        The result of `open_step` for the first checkpoint that it could open, and the error messages for newer ones.

    Raises:
        UserError: no checkpoint could be opened.
    """
    folders = [path] if (path / MANIFEST).is_file() else newest(path / "checkpoints") or newest(path)
    problems: list[str] = []
    for folder in folders:
        try:
            return open_step(folder), problems
        except UserError as error:
            problems.append(f"{folder.name}: {error}")
    damaged = f" that can be used ({'; '.join(problems)})" if problems else ""
    raise UserError(f"{prefix} contains no checkpoint{damaged}. Use a run directory or one of its step-* folders.")
