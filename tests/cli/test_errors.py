"""What a tool says when it ends otherwise than well: one line, and an exit code."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raphael_dist import train
from raphael_dist.errors import UserError, run_command
from tests.lib.launch import ROOT


def raising(error: BaseException) -> object:
    raise error


def test_mistake_and_ctrl_c_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: raising(UserError("x: given 1"))) == 2
    assert capsys.readouterr().err == "error: x: given 1\n"
    assert run_command(lambda: raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert run_command(lambda: None) == 0


def test_ctrl_c_in_conversion_leaves_no_files(tmp_path: Path) -> None:
    code = "import time, convert_checkpoint as c; from raphael_dist.convert import conversion as r\n"
    code += "write = r.write_bytes\n"
    code += "def slow(*a):\n    print('writing', flush=True); time.sleep(30); write(*a)\n"
    code += "r.write_bytes = slow\nimport sys; sys.exit(c.main(sys.argv[1:]))"
    arguments = [
        "--from",
        "auto",
        str(ROOT / "tests/fixtures/small-run"),
        "--to",
        "canonical",
        str(tmp_path / "a" / "out"),
    ]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    tool = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT / "tools", text=True, **pipe)
    try:
        assert tool.stdout is not None
        assert tool.stdout.readline() == "writing\n"
        time.sleep(0.5)
        tool.send_signal(signal.SIGINT)
        assert tool.communicate(timeout=30)[1].splitlines()[-1] == "interrupted"
        assert tool.returncode == 130
        assert not list(tmp_path.iterdir())
    finally:
        tool.kill()


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553]\nConnection closed by peer [10.0.0.7]:40123"


@pytest.mark.parametrize("error", [RuntimeError(GLOO), MemoryError(), ZeroDivisionError("a bug")])
def test_helpful_line_comes_last(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(train, "run", lambda *_: raising(error))
    assert train.main(["--config=emoji-tiny", f"run.dir={tmp_path}"]) == 1
    *before, last = capsys.readouterr().err.splitlines()
    says = {
        RuntimeError: "the connection to another rank was lost",
        MemoryError: "not enough memory",
        ZeroDivisionError: "a bug",
    }
    assert last.startswith("error on rank 0: ")
    assert says[type(error)] in last
    assert ("Traceback (most recent call last):" in before) == (type(error) is not RuntimeError)
