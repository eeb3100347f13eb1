"""Fault injection (tools/torture.py): a seed repeats a trial, outcomes are recorded, and lost trials are reported."""

import csv
import itertools
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.lib.forks import Forks
from tests.lib.launch import ROOT
from tests.torture import campaign
from tests.torture.campaign import KINDS, Campaign, table
from tests.torture.kinds import Kind
from tests.torture.trial import STEPS, Outcome, Trial, one_line, refused, survived
from tests.training.test_step_guard import poison
from tools import torture


class Quick(Campaign):
    """A campaign without ranks."""

    def __enter__(self) -> "Quick":
        self._forks: Any = type("NoRanks", (), {"close": lambda _: None})()
        return self

    def _new_trial(self, kind: Kind, folder: Path, draw: random.Random, setting: Any) -> Any:
        folder.mkdir()
        return draw


TRIALS = (ROOT / "docs/reliability_trials.csv").read_text()


def drawn(draw: random.Random) -> Outcome:
    return survived(f"{draw.random()}")


def lost(_: Any) -> Outcome:
    raise AssertionError("other weights at the end\nand more")


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, inject in {
        "drawn": drawn,
        "lost": lost,
        "broken": lambda _: 1 / 0,
        "refused": lambda _: refused("no"),
    }.items():
        monkeypatch.setitem(KINDS, name, Kind(name, "kills", "data", inject))


def test_seed_repeats_a_trial(kinds: None, tmp_path: Path) -> None:
    with Quick(3, tmp_path, ["drawn"], lambda _: None) as trials:
        lines = [trials.run_trial(KINDS["drawn"], seed).line for seed in ("3.0", "3.1", "3.0", "4.0")]
    assert lines[0] == lines[2]
    assert len(set(lines)) == 3


def test_lost_trial_is_reported_and_its_folder_stays(kinds: None, tmp_path: Path) -> None:
    reports: list[str] = []
    with Quick(0, tmp_path, ["drawn", "lost", "broken", "refused"], reports.append) as trials:
        for i, name in enumerate(("drawn", "lost", "broken", "refused")):
            trials.run_trial(KINDS[name], f"0.{i}")
    written = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [row["outcome"] for row in written] == ["survived", "lost", "lost", "refused"]
    assert "other weights at the end" in written[1]["line"]
    assert "ZeroDivisionError" in written[2]["line"]
    folder = Path(written[1]["line"].split("details: ")[1].rstrip(")"))
    assert (folder / "why.txt").read_text() == "other weights at the end\nand more"
    shutil.rmtree(folder.parent)
    assert (tmp_path / "table.md").read_text() == table(trials.results)
    assert "| | all | 4 | 1 | 1 | 2 |" in table(trials.results)
    assert [line.split()[0] for line in reports] == ["survived", "lost", "lost", "refused"]


def test_campaign_adds_to_earlier_results(kinds: None, tmp_path: Path) -> None:
    for seed in (5, 6):
        with Quick(seed, tmp_path, [], lambda _: None) as trials:
            trials.run_trial(KINDS["drawn"], f"{seed}.0")
    assert [row["seed"] for row in json.loads((tmp_path / "results.json").read_text())["results"]] == ["5.0", "6.0"]


def test_published_trials_are_of_existing_kinds() -> None:
    rows = list(csv.DictReader(TRIALS.splitlines()))
    assert {row["kind"] for row in rows} == KINDS.keys()
    for row in rows:
        assert int(row["tried"]) == sum(int(row[outcome]) for outcome in ("survived", "refused", "lost")), row["kind"]


def test_every_kind_is_tried_before_any_is_repeated(kinds: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, clock = ["drawn", "refused"], itertools.count()
    monkeypatch.setattr(campaign, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with Quick(1, tmp_path, names, lambda _: None) as trials:
        assert trials.run(30)
    tried = [result.kind for result in trials.results]
    assert len(tried) > 4
    assert all(sorted(tried[i : i + 2]) == names for i in range(0, len(tried) - 1, 2))


def test_one_line_requires_one_error() -> None:
    assert one_line("x\nerror: a\nerror on rank 1: a\n") == "error: a"
    for output in ("", "error: a\nTraceback (most recent call last):\n", "error: a\nerror: b\n"):
        with pytest.raises(AssertionError):
            one_line(output)


def test_unknown_kind_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert torture.main(["--only", "earthquake"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --only=earthquake ")
    assert error.count("\n") == 1
    assert torture.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(KINDS)


class DeadServer(Forks):
    """A fork server that ends at once."""

    def __init__(self) -> None:
        super().__init__()
        self._process.kill()


def test_dead_fork_server_ends_the_campaign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(campaign, "Forks", DeadServer)
    assert torture.main(["--only", "kills", "--out", str(tmp_path), "--minutes", "1"]) == 2
    error = capsys.readouterr().err
    assert "exit code -9" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "results.json").exists(), "a trial without ranks has a result"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_real_ranks_survive_a_kill_and_other_weights_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_weights(case: Trial) -> Outcome:
        case.begin(at=0)
        case.finish()
        poison(case.run, STEPS)  # other weights, with valid checksums
        case.check_equals_oracle()
        return survived("not detected")

    monkeypatch.setitem(KINDS, "other weights", Kind("other weights", "kills", "ranks", other_weights))
    with Campaign(0, tmp_path, [], lambda _: None) as trials:
        assert trials.run_trial(KINDS["kill -9 of all ranks at once"], "0.0").outcome == "survived"
        result = trials.run_trial(KINDS["other weights"], "0.1")
    assert (result.outcome, "other weights at the end" in result.line) == ("lost", True)
