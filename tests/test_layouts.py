"""The registry of layouts: a file is a layout, and the docs, the command line and inspection know it by that alone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import convert_checkpoint
import inspect_checkpoint
from raphael_dist.convert import layouts
from raphael_dist.errors import UserError
from tests.checkpoints import assert_same, handmade_canonical, random_state, read_state
from tests.launch import ROOT
from tests.synthetic import tiny_config


def test_the_layout_of_contributing_md_is_a_layout(tmp_path: Path, monkeypatch, capsys) -> None:
    """The recipe, followed to the letter: its file is put beside the others, nothing else is touched."""
    recipe = (ROOT / "CONTRIBUTING.md").read_text().partition("**A checkpoint layout.**")[2]
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "onefile.py").write_text(re.search(r"```python\n(.*?)```", recipe, re.S)[1])
    monkeypatch.setattr(layouts, "__path__", [*layouts.__path__, str(tmp_path / "code")])
    monkeypatch.setenv("COLUMNS", "300")  # paths are long
    config = tiny_config()
    state = random_state(config, ("master",))
    canonical = handmade_canonical(tmp_path / "canonical", config, state)
    for args in (["canonical", str(canonical), "--to", "onefile", str(tmp_path / "one"), "--dtype", "float32"],
                 ["auto", str(tmp_path / "one"), "--to", "raphael", str(tmp_path / "run")]):  # fmt: skip
        assert convert_checkpoint.main(["--from", *args]) == 0, capsys.readouterr().err
    assert_same({k: v for k, v in read_state("auto", tmp_path / "run").items() if k[0] == "master"}, state)
    assert inspect_checkpoint.main([str(tmp_path / "one")]) == 0
    assert "layout onefile" in capsys.readouterr().out
    assert convert_checkpoint.main(["--from", "auto", str(tmp_path / "one"), "--to", "onefil", str(tmp_path / "x")]) == 2
    assert "did you mean 'onefile'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert_checkpoint.parse(["--help"])
    assert "onefile" in capsys.readouterr().out


@pytest.mark.parametrize("name", layouts.names())
def test_a_layout_has_its_modules_name_and_says_what_it_holds(name: str) -> None:
    layout = layouts.layout_of("--to", name)
    assert layout.holds in ("everything", "weights")
    assert (layout.holds == "everything") != (layout.options >= layouts.WEIGHTS)


def test_the_layouts_are_listed_without_importing_torch() -> None:
    code = "import sys, convert_checkpoint as c; c.parse(['--from', 'auto', 'a', '--to', 'b', 'c']); "
    command = [sys.executable, "-c", f"{code}print('torch' in sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tools")
    assert done.stdout == "False\n", done.stderr


def test_what_no_layout_claims_names_all_of_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no layout is recognised there; known: {', '.join(layouts.names())}"):
        layouts.detect(tmp_path)
