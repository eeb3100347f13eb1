"""The tool that tortures (tools/torture.py): what it draws can be drawn again, and it knows what was lost."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.launch import ROOT
from tests.test_guard import poison
from tests.torture.campaign import KINDS, Campaign, table
from tests.torture.kinds import Kind
from tests.torture.trial import STEPS, Outcome, Trial, one_line, refused, survived
from tools import torture


class Quick(Campaign):
    """Without ranks."""

    def __enter__(self) -> "Quick":
        self._forks: Any = type("NoRanks", (), {"close": lambda _: None})()
        return self

    def _place(self, kind: Kind, folder: Path, draw: random.Random, setting: Any) -> Any:
        folder.mkdir()
        return draw


DOCUMENT = (ROOT / "docs/reliability.md").read_text()


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


def test_a_seed_repeats_a_trial_and_another_draws_others(kinds: None, tmp_path: Path) -> None:
    with Quick(3, tmp_path, ["drawn"], lambda _: None) as trials:
        found = [trials.try_one(KINDS["drawn"], seed).line for seed in ("3.0", "3.1", "3.0", "4.0")]
    assert found[0] == found[2]
    assert len(set(found)) == 3


def test_what_is_lost_is_told_with_the_reason_and_kept(kinds: None, tmp_path: Path) -> None:
    said: list[str] = []
    with Quick(0, tmp_path, ["drawn", "lost", "broken", "refused"], said.append) as trials:
        for i, name in enumerate(("drawn", "lost", "broken", "refused")):
            trials.try_one(KINDS[name], f"0.{i}")
    written = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [row["outcome"] for row in written] == ["survived", "lost", "lost", "refused"]
    assert "other weights at the end" in written[1]["line"]
    assert "ZeroDivisionError" in written[2]["line"]
    kept = Path(written[1]["line"].split("all of it: ")[1].rstrip(")"))
    assert (kept / "why.txt").read_text() == "other weights at the end\nand more"
    shutil.rmtree(kept.parent)
    assert (tmp_path / "table.md").read_text() == table(trials.results)
    assert "| | all | 4 | 1 | 1 | 2 |" in table(trials.results)
    assert [line.split()[0] for line in said] == ["survived", "lost", "lost", "refused"]


def test_another_campaign_adds_to_what_an_earlier_one_found(kinds: None, tmp_path: Path) -> None:
    for seed in (5, 6):
        with Quick(seed, tmp_path, [], lambda _: None) as trials:
            trials.try_one(KINDS["drawn"], f"{seed}.0")
    assert [row["seed"] for row in json.loads((tmp_path / "results.json").read_text())["results"]] == ["5.0", "6.0"]


def test_the_table_of_the_document_is_of_kinds_that_there_are() -> None:
    """And nothing was lost."""
    rows = re.findall(r"^\| [\w ]+ \| (.+?) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", DOCUMENT, re.M)
    assert rows
    assert {kind for kind, *_ in rows} - {"all"} <= KINDS.keys()
    assert all(int(tried) == int(held) + int(said) for _, tried, held, said, _ in rows)


def test_every_kind_comes_before_any_comes_again(kinds: None, tmp_path: Path) -> None:
    names = ["drawn", "refused"]
    with Quick(1, tmp_path, names, lambda _: None) as trials:
        assert trials.run(0.5)
    tried = [result.kind for result in trials.results]
    assert len(tried) > 4
    assert all(sorted(tried[i : i + 2]) == names for i in range(0, len(tried) - 1, 2))


def test_one_line_is_one_line() -> None:
    assert one_line("x\nerror: a\nerror on rank 1: a\n") == "error: a"
    for output in ("", "error: a\nTraceback (most recent call last):\n", "error: a\nerror: b\n"):
        with pytest.raises(AssertionError):
            one_line(output)


def test_a_kind_that_is_not_known_is_refused_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert torture.main(["--only", "earthquake"]) == 2
    assert capsys.readouterr().err == "error: --only: no kind 'earthquake'; see --list\n"
    assert torture.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(KINDS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_real_ranks_survive_a_kill_and_weights_that_differ_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_weights(case: Trial) -> Outcome:
        case.begin(at=0)
        case.finish()
        poison(case.run, STEPS)  # other weights, and a manifest that vouches for them
        case.check_equals_oracle()
        return survived("in silence")

    monkeypatch.setitem(KINDS, "other weights", Kind("other weights", "kills", "ranks", other_weights))
    with Campaign(0, tmp_path, [], lambda _: None) as trials:
        assert trials.try_one(KINDS["kill -9 of all ranks at once"], "0.0").outcome == "survived"
        found = trials.try_one(KINDS["other weights"], "0.1")
    assert (found.outcome, "other weights at the end" in found.line) == ("lost", True)
