"""The progress bar: shown on a terminal by the rank that shows it, moved by counted parts."""

import io

import pytest

from raphael_dist.runtime.progress_bar import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_moves_to_the_reported_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    screen = Terminal()
    with ProgressBar("indexing", enabled=True, file=screen) as bar:
        bar.report("shard 12 of 50, image 3 of 9", 12, 50)
    assert "indexing" in screen.getvalue()
    assert "12/50" in screen.getvalue()
    assert "shard 12 of 50, image 3 of 9" in screen.getvalue()


@pytest.mark.parametrize(("enabled", "file"), [(False, Terminal()), (True, io.StringIO())], ids=["another rank", "a file"])
def test_progress_bar_shows_nothing_without_a_terminal(enabled: bool, file: io.StringIO) -> None:
    with ProgressBar("indexing", enabled=enabled, file=file) as bar:
        bar.report("shard 1 of 2", 1, 2)
    assert file.getvalue() == ""


def test_progress_bar_shows_foreign_names_safely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    screen = Terminal()
    with ProgressBar("indexing", enabled=True, file=screen) as bar:
        bar.report("checking a\x1b[31mb\nc.tar, https://user:hunter2@h/x.tar", 1, 2)
    assert r"checking a\x1b[31mb\nc.tar, https://(hidden)@h/x.tar" in screen.getvalue()
