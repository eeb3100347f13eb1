"""The registry of layouts: a new file is a layout for the docs, the command line and inspection."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import convert_checkpoint
import inspect_checkpoint
from raphael_dist.convert import layouts
from raphael_dist.errors import UserError
from tests.lib.checkpoints import assert_same, handmade_canonical, random_state, read_state
from tests.lib.documents import blocks_of
from tests.lib.launch import ROOT
from tests.lib.synthetic import tiny_config


def test_layout_of_contributing_md_works(tmp_path: Path, monkeypatch, capsys) -> None:
    """The recipe, followed literally: its file is added to the layouts, and nothing else changes."""
    (recipe,) = [block for block in blocks_of("CONTRIBUTING.md") if block.lines[-1].startswith("LAYOUT = ")]
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "onefile.py").write_text("\n".join([*recipe.lines, ""]))
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
def test_layout_has_its_modules_name_and_states_what_it_holds(name: str) -> None:
    layout = layouts.layout_of("--to", name)
    assert layout.holds in ("everything", "weights")
    assert (layout.holds == "everything") != (layout.options >= layouts.WEIGHTS)


def test_layouts_are_listed_without_importing_torch() -> None:
    code = "import sys, convert_checkpoint as c; c.parse(['--from', 'auto', 'a', '--to', 'b', 'c']); "
    command = [sys.executable, "-c", f"{code}print('torch' in sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tools")
    assert done.stdout == "False\n", done.stderr


def test_unknown_folder_is_refused_with_all_layout_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"in one of the layouts {', '.join(layouts.names())}, but"):
        layouts.detect(tmp_path)


def test_bug_of_a_layout_is_not_reported_as_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_with_bug(path: Path, config: object) -> None:
        raise KeyError("a bug")

    layout = dataclasses.replace(layouts.layout_of("--from", "canonical"), open=open_with_bug)
    monkeypatch.setattr("raphael_dist.convert.layouts.canonical.LAYOUT", layout)
    with pytest.raises(KeyError, match="a bug"):
        layouts.open_checkpoint("canonical", tmp_path)
