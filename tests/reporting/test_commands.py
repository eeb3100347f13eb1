"""The commands report and doctor: console scripts, runs in progress, and runs without metrics or configuration."""

import re
import shlex
import sys
import tomllib
from collections.abc import Callable
from datetime import datetime, timedelta
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from raphael_dist.cli import doctor, report
from tests.lib import planted_run
from tests.lib.planted_run import LINES, plant
from tests.reporting.test_page import text_of

ROOT = Path(__file__).parents[2]


def scripts() -> dict[str, str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.mark.parametrize("name", ["raphael-report", "raphael-doctor"])
def test_console_script_runs_its_command(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = EntryPoint(name, scripts()[name], "console_scripts").load()
    assert isinstance(script, Callable)  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/{name}", "--help"])
    with pytest.raises(SystemExit) as end:
        script()
    assert end.value.code == 0
    assert f"usage: raphael_dist {name.removeprefix('raphael-')}" in capsys.readouterr().out


def running(folder: Path, monkeypatch: pytest.MonkeyPatch, lines: int = LINES, **more: object) -> Path:
    """Write a healthy run whose last log line is of this minute, and which has half of its steps to go."""
    monkeypatch.setattr(planted_run, "LINES", lines)
    monkeypatch.setattr(planted_run, "BEGIN", datetime.now() - timedelta(minutes=lines + 0.5))
    options = {"train.max_steps": 2 * LINES * planted_run.EVERY}
    return plant(folder, options=options, complete=False, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("lines", [1, 7, LINES])
def test_healthy_run_in_progress_has_no_finding(
    lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = running(tmp_path / "run", monkeypatch, lines)
    assert doctor.main([str(run), "--no-data"]) == 0
    output = capsys.readouterr()
    first, second, *_ = output.out.splitlines()
    assert re.fullmatch(rf"{run}: at step 400, not complete; the last log line is \d minutes? old", first)
    assert second == "No problem was found."
    assert "Checked: whether the loss is finite" in output.out
    assert output.out.count("\n") == 4
    assert output.err == ""


def test_report_of_a_run_in_progress_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = running(tmp_path / "run", monkeypatch), tmp_path / "r.html"
    assert report.main([str(run), "--out", str(out), "--cluster", "none"]) == 0
    text = text_of(out.read_text())
    assert re.search(r"The run is at step 400, not complete; the last log line is \d minutes? old\.", text)
    assert "No problem was found." in text
    assert "killed or crashed" not in text


def test_run_that_has_just_started_has_no_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = running(tmp_path / "run", monkeypatch, 0, grids=0)
    (run / "metrics.jsonl").unlink()
    (run / "checkpoints" / "step-00000400").rmdir()
    assert doctor.main([str(run), "--no-data"]) == 0
    first, second, *_, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{run}: at step 0, not complete; the last log line is \d minutes? old", first)
    assert (second, last) == ("No problem was found.", "metrics.jsonl is not in the run directory.")
    assert report.main([str(run), "--out", str(tmp_path / "r.html"), "--cluster", "none"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: RUN={run}: a report requires metrics.jsonl with at least one line")
    assert f"`python -m raphael_dist doctor {shlex.quote(str(run))}`" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


def test_run_without_configuration_has_one_line_about_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = plant(tmp_path / "run"), tmp_path / "r.html"
    (run / "config.yaml").unlink()
    assert doctor.main([str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line for line in lines if "config" in line] == ["config.yaml is not in the run directory."]
    assert lines[0] == "No problem was found."
    assert report.main([str(run), "--out", str(out)]) == 0
    text = text_of(out.read_text())
    assert "There is no prediction: config.yaml is missing or cannot be read." in text
    assert "There is no config.yaml." in text
    assert capsys.readouterr().err == ""
