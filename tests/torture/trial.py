"""What a fault is tried on: a small run of real ranks, and the same run that nothing happens to, its oracle.

A fault is a function of a `Trial`. It returns what became of it: survived (the run ended with the oracle's losses, weights,
moments and average, bit for bit, no more than an interval repeated) or refused (in one line, with everything as it was). An
AssertionError, or anything else it raises, means that something was lost.
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
from raphael_dist.training.metrics import read_metrics
from tests.forks import Forks, output_of

WORLD, STEPS, EVERY = 2, 8, 2
SLOW_MACHINE = 300.0  # seconds that a run of a few steps may take where other work goes on


@dataclass(frozen=True)
class Setting:
    """How a run is carried out: a ZeRO stage, how many ranks share space and time experts, and a type."""

    stage: int
    ep: tuple[int, int]
    dtype: str = "float32"
    accumulation: int = 2

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """The configuration, beside the tiny model's."""
        return {
            "train": {
                "global_batch": 12,
                "micro_batch": 6 // self.accumulation,
                "max_steps": STEPS,
                "log_every": 1,
                "dtype": self.dtype,
            },
            "optim": {"lr": 1e-3, "clip": 0.5},
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
    """What became of a fault. `line`: what the run said of it, or what was done to it."""

    kind: str  # survived, refused or lost
    line: str


def survived(what: str) -> Outcome:
    """Return that the run came to the oracle's end."""
    return Outcome("survived", what)


def refused(line: str) -> Outcome:
    """Return that the run said so, and that nothing was changed by it."""
    return Outcome("refused", line)


@dataclass
class Trial:
    """A place for one fault: an empty folder, a random generator, ranks to fork, and the oracle of a setting."""

    forks: Forks
    folder: Path
    draw: random.Random
    setting: Setting
    oracle: Path
    shared: dict[str, Any] = field(default_factory=dict)  # what a campaign keeps from trial to trial
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run, self.said = self.folder / "run", self.folder / "said"
        self.sections = self.setting.sections
        self.sections["checkpoint"]["background"] = self.draw.random() < 0.5

    # ---- the life of a run ------------------------------------------------------------------------------------------

    def begin(self, *, at: int | None = None) -> int:
        """Let the run be as it was when it had saved step `at`, 0 for a new one, by default any; return that step."""
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
        """Run the ranks until they end; return their exit codes. `sections`: fields that differ."""
        names = self.sections.keys() | (sections or {}).keys()
        merged = {n: {**self.sections.get(n, {}), **(sections or {}).get(n, {})} for n in names}
        spec = {"worker": "tortured", "run_dir": str(self.run), "stage": self.setting.stage, "sections": merged, **spec}
        return self.forks.run(self.said, WORLD, SLOW_MACHINE, meanwhile, **spec)

    @property
    def output(self) -> str:
        """What the ranks printed last."""
        return output_of(self.said, WORLD)

    @property
    def log(self) -> str:
        """The run's log."""
        path = self.run / "train.log"
        return path.read_text() if path.is_file() else ""

    def metrics_lines(self) -> list[str]:
        """The whole lines of metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        return [line for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []

    # ---- what must hold ---------------------------------------------------------------------------------------------

    def newest(self) -> int:
        """Return the step of the newest checkpoint, 0 without any; every one in sight must be whole and the oracle's.

        The oracle has none of a step at which a signal stopped the run.
        """
        steps = [0]
        for folder in checkpoints(self.run):
            reader = CheckpointReader(folder)
            assert reader.damage() is None, f"{folder.name}: {reader.damage()}"
            assert reader.incomplete() is None, f"{folder.name}: {reader.incomplete()}"
            peer = self.oracle / "checkpoints" / folder.name
            assert not peer.exists() or sums(folder) == sums(peer), f"{folder.name} is not the oracle's"
            steps.append(reader.step)
        return max(steps)

    def check_lost_at_most_an_interval(self, before: int) -> int:
        """Compare the steps that were taken with the newest checkpoint, which is at least `before`; return its step."""
        newest = self.newest()
        assert newest >= before, f"the checkpoint of step {before} is gone, the newest is {newest}"
        taken = max((json.loads(line)["step"] for line in self.metrics_lines()), default=0)
        # A write in the background may take as long as the next interval.
        limit = EVERY * (2 if self.sections["checkpoint"]["background"] else 1)
        assert taken - newest <= limit, f"{taken - newest} steps are lost, of {taken}"
        return newest

    def finish(self, *, damaged: bool = False, **spec: Any) -> None:
        """Run the same command to the end, which must be the oracle's. damaged: checkpoints in sight may be."""
        codes = self.train(**spec)
        assert codes == [0] * WORLD, f"exit codes {codes}:\n{self.output}"
        self.check_equals_oracle()
        assert damaged or not list((self.run / "checkpoints").glob(".*")), "something temporary was left"

    def check_equals_oracle(self, rounded: float = 0.0) -> None:
        """Compare the last checkpoint and the losses and gradient norms of all steps, bit for bit.

        rounded: instead, by how much of themselves losses, norms and rates may differ.
        """
        last = f"step-{STEPS:08d}"
        mine, others = self.run / "checkpoints" / last, self.oracle / "checkpoints" / last
        assert rounded or sums(mine) == sums(others), "other weights at the end"
        found, expected = (read_metrics(folder / "metrics.jsonl") for folder in (self.run, self.oracle))
        for tag in ("train/loss", "optim/grad_norm", "optim/lr"):
            steps = dict(found[tag])
            # As text: a loss that is not a number is what the oracle's is.
            differ = [(n, v) for n, v in expected[tag] if n in steps and repr(steps[n]) != repr(v)]
            wrong = [step for step, value in differ if not abs(steps[step] - value) <= rounded * abs(value)]
            assert not wrong, f"{tag} differs at steps {wrong}"

    def check_refused(self, codes: list[int], allowed: tuple[int, ...] = (2,)) -> str:
        """Require one of these exit codes of all ranks and a line that says why, without a traceback; return the line."""
        assert set(codes) <= set(allowed), f"exit codes {codes}:\n{self.output}"
        return one_line(self.output)

    def snapshot(self) -> dict[str, int]:
        """Return what must not change while a run refuses to go on: files of checkpoints and when they were written."""
        root = self.run / "checkpoints"
        return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in sorted(root.rglob("*")) if p.is_file()}


def one_line(output: str) -> str:
    """Return the one error of an output. AssertionError for a traceback, no error or several different ones."""
    assert "Traceback" not in output, output[-3000:]
    errors = [line for line in output.splitlines() if line.startswith("error")]
    assert len({line.split(": ", 1)[-1] for line in errors}) == 1, f"{len(errors)} lines of error:\n{output[-3000:]}"
    return errors[0]


def checkpoints(run: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, oldest first, by the names that the trainer gives."""
    folder = run / "checkpoints"
    return sorted(p for p in folder.iterdir() if step_of(p) is not None) if folder.is_dir() else []


def sums(folder: Path) -> dict[str, str]:
    """Return the checksums of a checkpoint's files. AssertionError where it has no manifest to believe."""
    try:
        return {name: entry["sha256"] for name, entry in CheckpointReader(folder).manifest["files"].items()}
    except UserError as error:
        raise AssertionError(str(error)) from None


def make_oracle(forks: Forks, folder: Path, setting: Setting) -> Path:
    """Train in peace; return the run directory."""
    forks.must(folder, WORLD, worker="tortured", stage=setting.stage, sections=setting.sections)
    assert [step_of(p) for p in checkpoints(folder)] == list(range(EVERY, STEPS + 1, EVERY))
    return folder
