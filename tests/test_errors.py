"""What a tool says when it ends otherwise than well: one line, and an exit code."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raphael_dist.errors import UserError, exit_code_of
from tests.launch import ROOT


def raising(error: BaseException) -> object:
    raise error


def test_a_mistake_and_ctrl_c_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(lambda: raising(UserError("x: given 1"))) == 2
    assert capsys.readouterr().err == "error: x: given 1\n"
    assert exit_code_of(lambda: raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert exit_code_of(lambda: None) == 0


def test_ctrl_c_in_a_conversion_leaves_one_line_and_nothing_behind(tmp_path: Path) -> None:
    code = "import time, convert_checkpoint as c; from raphael_dist.convert import run as r\n"
    code += "write = r.write_bytes\n"
    code += "def slow(*a):\n    print('writing', flush=True); time.sleep(30); write(*a)\n"
    code += "r.write_bytes = slow\nimport sys; sys.exit(c.main(sys.argv[1:]))"
    arguments = ["--from", "auto", str(ROOT / "tests/data/run-6865f08"), "--to", "canonical", str(tmp_path / "a" / "out")]
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
