"""The order of trials, and the table they leave: every kind in a random order, again and again, until the time is over."""

import json
import os
import random
import shutil
import tempfile
import time
import traceback
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raphael_dist.storage.files import replace_bytes
from tests import slurm_cluster
from tests.forks import Forks
from tests.torture import (  # noqa: F401  the kinds enter themselves
    faults_commands,
    faults_data,
    faults_disk,
    faults_files,
    faults_numbers,
    faults_process,
    faults_slurm,
)
from tests.torture.kinds import KINDS, Kind
from tests.torture.trial import SETTINGS, Outcome, Setting, Trial, make_oracle

GROUPS = sorted({kind.group for kind in KINDS.values()})


@dataclass(frozen=True)
class Result:
    """What became of one trial."""

    number: int
    seed: str
    kind: str
    setting: str
    outcome: str
    line: str
    seconds: float


class Campaign:
    """Context: trials on this machine, in a folder that is removed with what survived.

    The results in `out` of an earlier campaign are added to.
    """

    def __init__(self, seed: int, out: Path, kinds: list[str], say: Any = print) -> None:
        self.seed, self.out, self.say = seed, out, say
        self._kinds = [KINDS[name] for name in kinds]
        self._folder = Path(tempfile.mkdtemp(prefix="torture-"))
        self._oracles: dict[Setting, Path] = {}
        self._shared: dict[str, Any] = {"folder": self._folder}
        self.results, self._before_s = _earlier(out / "results.json")
        self._began = time.monotonic()

    def __enter__(self) -> "Campaign":
        self._forks = Forks()
        return self

    def __exit__(self, *error: object) -> None:
        for close in reversed(self._shared.get("close", [])):
            close()
        self._forks.close()
        if not any(result.outcome == "lost" for result in self.results):
            shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, seconds: float) -> bool:
        """Try kinds in a random order, each once before any comes again, until the time is over; return whether all held."""
        order, number = random.Random(self.seed), 0
        while True:
            for kind in order.sample(self._kinds, len(self._kinds)):
                if time.monotonic() - self._began > seconds:
                    return all(result.outcome != "lost" for result in self.results)
                self.try_one(kind, f"{self.seed}.{number}")
                number += 1

    def try_one(self, kind: Kind, seed: str) -> Result:
        """Try one kind; a seed as an earlier run printed it repeats that trial, as far as time allows."""
        draw, began = random.Random(f"{seed} {kind.name}"), time.monotonic()
        setting = draw.choice(SETTINGS)
        folder = self._folder / f"trial-{seed}"
        try:
            outcome = kind.inject(self._place(kind, folder, draw, setting))
        except Exception as error:
            why = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
            folder.mkdir(exist_ok=True)
            (folder / "why.txt").write_text(why)
            lines = why.strip().splitlines() or [repr(error)]
            outcome = Outcome("lost", f"{lines[0 if isinstance(error, AssertionError) else -1]} (all of it: {folder})")
        name = str(setting) if kind.where == "ranks" else ""
        result = Result(len(self.results), seed, kind.name, name, outcome.kind, outcome.line, time.monotonic() - began)
        self._tell(result)
        if outcome.kind != "lost":
            shutil.rmtree(folder, ignore_errors=True)
        return result

    def _place(self, kind: Kind, folder: Path, draw: random.Random, setting: Setting) -> Trial:
        folder.mkdir()
        oracle = self._folder
        if kind.where == "ranks":
            if setting not in self._oracles:
                self._oracles[setting] = make_oracle(self._forks, self._folder / f"oracle-{len(self._oracles)}", setting)
            oracle = self._oracles[setting]
        return Trial(self._forks, folder, draw, setting, oracle, self._shared)

    def _tell(self, result: Result) -> None:
        self.results.append(result)
        counts = f"{sum(r.outcome != 'lost' for r in self.results)} of {len(self.results)}"
        self.say(f"{result.outcome:8} {result.kind} [{result.seed}]: {result.line} ({result.seconds:.0f} s; {counts})")
        self.write()

    def write(self) -> None:
        """Leave results.json and table.md."""
        self.out.mkdir(parents=True, exist_ok=True)
        minutes = (self._before_s + time.monotonic() - self._began) / 60
        facts = {"seed": self.seed, "minutes": round(minutes, 1), "cores": os.cpu_count()}
        found = {**facts, "results": [asdict(result) for result in self.results]}
        replace_bytes(self.out / "results.json", json.dumps(found, indent=1).encode())
        replace_bytes(self.out / "table.md", table(self.results).encode())


def _earlier(path: Path) -> tuple[list[Result], float]:
    """Return the results in a file and the seconds they took; none where there is no file."""
    if not path.is_file():
        return [], 0.0
    found = json.loads(path.read_text())
    return [Result(**result) for result in found["results"]], 60 * float(found["minutes"])


def table(results: list[Result]) -> str:
    """Return a table in Markdown: how often each kind was tried and what became of it, and what was lost and why."""
    rows = defaultdict(list)
    for result in results:
        rows[result.kind].append(result)
    lines = ["| faults | kind | tried | survived | refused in one line | lost |", "|---|---|---|---|---|---|"]
    for name, kind in sorted(KINDS.items(), key=lambda item: (GROUPS.index(item[1].group), item[0])):
        if rows[name]:
            lines.append(f"| {kind.group} | {name} | {len(rows[name])} | {_counts(rows[name])} |")
    lines.append(f"| | all | {len(results)} | {_counts(results)} |")
    lost = [f"- {r.kind} [{r.seed}]: {r.line}" for r in results if r.outcome == "lost"]
    return "\n".join([*lines, *(["", "Lost:", *lost] if lost else []), ""])


def _counts(results: list[Result]) -> str:
    return " | ".join(str(sum(r.outcome == outcome for r in results)) for outcome in ("survived", "refused", "lost"))


def available(names: list[str]) -> tuple[list[str], list[str]]:
    """Return which of these kinds or groups (all, without any) can be tried here, and a line for what cannot."""
    wanted = [name for name, kind in KINDS.items() if not names or {name, kind.group, kind.where} & set(names)]
    notes = []
    if slurm_cluster.missing() and any(KINDS[name].where == "slurm" for name in wanted):
        notes.append(f"no Slurm: {slurm_cluster.missing()}")
        wanted = [name for name in wanted if KINDS[name].where != "slurm"]
    if os.geteuid() != 0 and any(KINDS[name].group == "disks" for name in wanted):
        notes.append("no faults of disks: only root may mount file systems")
        wanted = [name for name in wanted if KINDS[name].group != "disks"]
    return wanted, notes
