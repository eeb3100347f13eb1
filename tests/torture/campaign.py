"""Order of trials and table of results: every kind in a random order, repeated until the time is over."""

import json
import os
import random
import shutil
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raphael_dist.storage.files import replace_bytes
from tests.lib import netns, slurm_cluster
from tests.lib.forks import Forks, ServerDiedError
from tests.torture import (  # noqa: F401  importing registers the kinds
    faults_commands,
    faults_data,
    faults_disk,
    faults_files,
    faults_machines,
    faults_network,
    faults_numbers,
    faults_process,
    faults_slurm,
)
from tests.torture.kinds import KINDS, Kind
from tests.torture.trial import SETTINGS, Outcome, Setting, Trial, make_oracle

GROUPS = sorted({kind.group for kind in KINDS.values()})


@dataclass(frozen=True)
class Result:
    """Outcome of one trial."""

    number: int
    seed: str
    kind: str
    setting: str
    outcome: str
    line: str
    seconds: float


class Campaign:
    """Context manager for trials on this machine; their folder is removed when none was lost.

    New results are added to those of an earlier campaign in `out`.
    """

    def __init__(self, seed: int, out: Path, kinds: list[str], report: Callable[[str], None] = print) -> None:
        self.seed, self.out, self.report = seed, out, report
        self._kinds = [KINDS[name] for name in kinds]
        self._folder = Path(tempfile.mkdtemp(prefix="torture-"))
        self._oracles: dict[Setting, Path] = {}
        self._shared: dict[str, Any] = {"folder": self._folder}
        self.results, self._earlier_s = _read_results(out / "results.json")
        self._started = time.monotonic()

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
        """Try all kinds in a random order, then again, until the time is over; return whether none was lost."""
        order, number = random.Random(self.seed), 0
        while True:
            for kind in order.sample(self._kinds, len(self._kinds)):
                if time.monotonic() - self._started > seconds:
                    return all(result.outcome != "lost" for result in self.results)
                self.run_trial(kind, f"{self.seed}.{number}")
                number += 1

    def run_trial(self, kind: Kind, seed: str) -> Result:
        """Try one kind of fault. A seed that was printed earlier repeats that trial, except for timing.

        Raises:
            ServerDiedError: no ranks can start any more; the trial has no result.
        """
        draw, started = random.Random(f"{seed} {kind.name}"), time.monotonic()
        setting = draw.choice(SETTINGS)
        folder = self._folder / f"trial-{seed}"
        try:
            outcome = kind.inject(self._new_trial(kind, folder, draw, setting))
        except ServerDiedError:
            raise
        except Exception as error:
            why = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
            folder.mkdir(exist_ok=True)
            (folder / "why.txt").write_text(why)
            lines = why.strip().splitlines() or [repr(error)]
            outcome = Outcome("lost", f"{lines[0 if isinstance(error, AssertionError) else -1]} (details: {folder})")
        name = str(setting) if kind.where == "ranks" else ""
        result = Result(len(self.results), seed, kind.name, name, outcome.kind, outcome.line, time.monotonic() - started)
        self._record(result)
        if outcome.kind != "lost":
            shutil.rmtree(folder, ignore_errors=True)
        return result

    def _new_trial(self, kind: Kind, folder: Path, draw: random.Random, setting: Setting) -> Trial:
        folder.mkdir()
        oracle = self._folder
        if kind.where == "ranks":
            if setting not in self._oracles:
                self._oracles[setting] = make_oracle(self._forks, self._folder / f"oracle-{len(self._oracles)}", setting)
            oracle = self._oracles[setting]
        return Trial(self._forks, folder, draw, setting, oracle, self._shared)

    def _record(self, result: Result) -> None:
        self.results.append(result)
        counts = f"{sum(r.outcome != 'lost' for r in self.results)} of {len(self.results)}"
        self.report(f"{result.outcome:8} {result.kind} [{result.seed}]: {result.line} ({result.seconds:.0f} s; {counts})")
        self.write()

    def write(self) -> None:
        """Write results.json and table.md."""
        self.out.mkdir(parents=True, exist_ok=True)
        minutes = (self._earlier_s + time.monotonic() - self._started) / 60
        facts = {"seed": self.seed, "minutes": round(minutes, 1), "cores": os.cpu_count()}
        content = {**facts, "results": [asdict(result) for result in self.results]}
        replace_bytes(self.out / "results.json", json.dumps(content, indent=1).encode())
        replace_bytes(self.out / "table.md", table(self.results).encode())


def _read_results(path: Path) -> tuple[list[Result], float]:
    """Return the results of an earlier campaign and the seconds they took; none if there is no file."""
    if not path.is_file():
        return [], 0.0
    content = json.loads(path.read_text())
    return [Result(**result) for result in content["results"]], 60 * float(content["minutes"])


def table(results: list[Result]) -> str:
    """Return a Markdown table of the outcomes of each kind, and a list of the lost trials with reasons."""
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
    """Return the kinds of these names or groups (default: all) that can run here, and a reason for each that cannot."""
    chosen = [name for name, kind in KINDS.items() if not names or {name, kind.group, kind.where} & set(names)]
    notes = []
    if slurm_cluster.missing() and any(KINDS[name].where == "slurm" for name in chosen):
        notes.append(f"no Slurm: {slurm_cluster.missing()}")
        chosen = [name for name in chosen if KINDS[name].where != "slurm"]
    if os.geteuid() != 0 and any(KINDS[name].group == "disks" for name in chosen):
        notes.append("no disk faults: only root may mount file systems")
        chosen = [name for name in chosen if KINDS[name].group != "disks"]
    if (reason := netns.missing()) and any(KINDS[name].group == "links" for name in chosen):
        notes.append(f"no faults of links: {reason}")
        chosen = [name for name in chosen if KINDS[name].group != "links"]
    return chosen, notes
