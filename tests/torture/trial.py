"""The run that a fault is injected into, a small one of real ranks, and its oracle, the same run without faults.

A fault is a function of a `Trial` that returns an outcome:
- survived: the run ended with the oracle's losses, weights, moments and average, bit for bit; at most an interval repeated
- refused: the run ended with one line and changed nothing
An AssertionError or any other exception means that something was lost.
"""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raphael_dist.checkpoint.folders import step_of
from raphael_dist.checkpoint.reader import CheckpointReader
from raphael_dist.errors import UserError
from raphael_dist.training.metrics_files import read_metrics
from tests.lib.forks import Forks, output_of

WORLD, STEPS, EVERY = 2, 8, 2
SLOW_MACHINE = 300.0  # seconds that a run of a few steps may take on a busy machine


@dataclass(frozen=True)
class Setting:
    """ZeRO stage, sizes of the expert-parallel groups (space, time), and dtype of a run."""

    stage: int
    ep: tuple[int, int]
    dtype: str = "float32"
    accumulation: int = 2

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """The sections of the configuration that differ from the tiny model's."""
        return {
            "train": {
                "global_batch_size": 12,
                "micro_batch_size": 6 // self.accumulation,
                "max_steps": STEPS,
                "log_every": 1,
                "dtype": self.dtype,
            },
            "optim": {"lr": 1e-3, "max_grad_norm": 0.5},
            "checkpoint": {"every": EVERY, "keep": 99},
            "parallel": {"space_ep": self.ep[0], "time_ep": self.ep[1]},
        }

    def __str__(self) -> str:
        return f"ZeRO-{self.stage}, experts over {self.ep[0]} and {self.ep[1]} ranks, {self.dtype}"


SETTINGS = (
    Setting(2, (2, 2)),
    Setting(1, (1, 2), accumulation=1),
    Setting(2, (2, 1), "bfloat16"),
    Setting(0, (1, 1)),
    Setting(3, (1, 1)),
)


@dataclass(frozen=True)
class Outcome:
    """Outcome of a fault. line: the run's error, or a description of the fault."""

    kind: str  # survived, refused or lost
    line: str


def survived(what: str) -> Outcome:
    """Return the outcome of a run that ended like the oracle."""
    return Outcome("survived", what)


def refused(line: str) -> Outcome:
    """Return the outcome of a run that ended with one line and changed nothing."""
    return Outcome("refused", line)


@dataclass
class Trial:
    """Setup of one fault: an empty folder, a random generator, ranks to fork, and the oracle of a setting."""

    forks: Forks
    folder: Path
    draw: random.Random
    setting: Setting
    oracle: Path
    shared: dict[str, Any] = field(default_factory=dict)  # by all trials of a campaign
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run, self.outputs = self.folder / "run", self.folder / "outputs"
        self.sections = self.setting.sections
        self.sections["checkpoint"]["background"] = self.draw.random() < 0.5

    # ---- running ------------------------------------------------------------------------------------------

    def begin(self, *, at: int | None = None) -> int:
        """Put the run into the state after the save of step `at` (0: a new run, None: a random one); return that step."""
        at = self.draw.choice(range(0, STEPS, EVERY)) if at is None else at
        if at == 0:
            self.run.mkdir(parents=True)
            return 0
        shutil.copytree(self.oracle, self.run)
        for path in checkpoints(self.run):
            if (step_of(path) or 0) > at:
                shutil.rmtree(path)
        (self.run / "checkpoints" / "latest").write_text(f"step-{at:08d}")
        cut = [line for line in self.metrics_lines() if json.loads(line)["step"] <= at]
        (self.run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in cut))
        (self.run / "train.log").unlink()
        return at

    def train(
        self, meanwhile: Callable[[list[int]], None] | None = None, sections: dict[str, Any] | None = None, **spec: Any
    ) -> list[int]:
        """Run the ranks until they end; return their exit codes. sections: overrides of the configuration."""
        names = self.sections.keys() | (sections or {}).keys()
        merged = {n: {**self.sections.get(n, {}), **(sections or {}).get(n, {})} for n in names}
        spec = {"worker": "tortured", "run_dir": str(self.run), "stage": self.setting.stage, "sections": merged, **spec}
        return self.forks.run(self.outputs, WORLD, SLOW_MACHINE, meanwhile, **spec)

    @property
    def output(self) -> str:
        """What the ranks printed in the last run."""
        return output_of(self.outputs, WORLD)

    @property
    def log(self) -> str:
        """Text of the run's log and of those of the other ranks, "" without one."""
        paths = [self.run / "train.log", *self.run.glob("logs/rank-*.log")]
        return "".join(path.read_text() for path in paths if path.is_file())

    def metrics_lines(self) -> list[str]:
        """The complete lines of metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        return [line for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []

    # ---- checks ---------------------------------------------------------------------------------------------

    def newest(self) -> int:
        """Return the step of the newest checkpoint, 0 without any. Every published one must be valid and equal the oracle's.

        The oracle has no checkpoint of a step at which a signal stopped the run.
        """
        steps = [0]
        for folder in checkpoints(self.run):
            reader = CheckpointReader(folder)
            assert reader.integrity_error() is None, f"{folder.name}: {reader.integrity_error()}"
            assert reader.incomplete() is None, f"{folder.name}: {reader.incomplete()}"
            peer = self.oracle / "checkpoints" / folder.name
            assert not peer.exists() or sums(folder) == sums(peer), f"{folder.name} is not the oracle's"
            steps.append(reader.step)
        return max(steps)

    def check_lost_at_most_an_interval(self, before: int) -> int:
        """Require that at most an interval was lost and `before` still exists; return the newest checkpoint's step."""
        newest = self.newest()
        assert newest >= before, f"the checkpoint of step {before} is gone, the newest is {newest}"
        taken = max((json.loads(line)["step"] for line in self.metrics_lines()), default=0)
        # A background save may take until the next one is due.
        limit = EVERY * (2 if self.sections["checkpoint"]["background"] else 1)
        assert taken - newest <= limit, f"{taken - newest} steps are lost, of {taken}"
        return newest

    def finish(self, *, damaged: bool = False, **spec: Any) -> None:
        """Run the same command to the end and compare with the oracle. damaged: published checkpoints may be damaged."""
        codes = self.train(**spec)
        assert codes == [0] * WORLD, f"exit codes {codes}:\n{self.output}"
        self.check_equals_oracle()
        assert damaged or not list((self.run / "checkpoints").glob(".*")), "temporary files are left"

    def check_equals_oracle(self, rounded: float = 0.0) -> None:
        """Compare the last checkpoint and the losses and gradient norms of all steps, bit for bit.

        rounded: instead, by how much of themselves losses, norms and rates may differ.
        """
        last = f"step-{STEPS:08d}"
        actual, expected_folder = self.run / "checkpoints" / last, self.oracle / "checkpoints" / last
        assert rounded or sums(actual) == sums(expected_folder), "other weights at the end"
        metrics, expected = (read_metrics(folder / "metrics.jsonl") for folder in (self.run, self.oracle))
        for tag in ("train/loss", "optim/grad_norm", "optim/lr"):
            steps = dict(metrics[tag])
            # Compared as text, so that NaN equals NaN.
            differ = [(n, v) for n, v in expected[tag] if n in steps and repr(steps[n]) != repr(v)]
            wrong = [step for step, value in differ if not abs(steps[step] - value) <= rounded * abs(value)]
            assert not wrong, f"{tag} differs at steps {wrong}"

    def check_refused(self, codes: list[int], allowed: tuple[int, ...] = (2,)) -> str:
        """Require one of these exit codes of all ranks and one error line without a traceback; return the line."""
        assert set(codes) <= set(allowed), f"exit codes {codes}:\n{self.output}"
        return one_line(self.output)

    def snapshot(self) -> dict[str, int]:
        """Return the files of checkpoints with their times of modification, which a refusal must not change."""
        root = self.run / "checkpoints"
        return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in sorted(root.rglob("*")) if p.is_file()}


def one_line(output: str) -> str:
    """Return the error line of an output. AssertionError: a traceback, no error, or several different ones."""
    assert "Traceback" not in output, output[-3000:]
    errors = [line for line in output.splitlines() if line.startswith("error")]
    assert len({line.split(": ", 1)[-1] for line in errors}) == 1, f"{len(errors)} error lines:\n{output[-3000:]}"
    return errors[0]


def checkpoints(run: Path) -> list[Path]:
    """Return the folders of a run's published checkpoints, oldest first."""
    folder = run / "checkpoints"
    return sorted(p for p in folder.iterdir() if step_of(p) is not None) if folder.is_dir() else []


def sums(folder: Path) -> dict[str, str]:
    """Return the checksums of a checkpoint's files. AssertionError: its manifest is missing or damaged."""
    try:
        return {name: entry["sha256"] for name, entry in CheckpointReader(folder).manifest["files"].items()}
    except UserError as error:
        raise AssertionError(str(error)) from None


def make_oracle(forks: Forks, folder: Path, setting: Setting) -> Path:
    """Train without faults; return the run directory."""
    forks.must(folder, WORLD, timeout=SLOW_MACHINE, worker="tortured", stage=setting.stage, sections=setting.sections)
    assert [step_of(p) for p in checkpoints(folder)] == list(range(EVERY, STEPS + 1, EVERY))
    return folder
