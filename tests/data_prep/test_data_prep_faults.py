"""Data preparation: other inputs are not mixed into finished shards, and a fault of the machine costs no sample."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from raphael_dist.data_prep import build_shards, image_folder
from tests.data.shards.test_shards import write_shard
from tests.data_prep.test_data_prep import captions_in, draw, folder_of, prepare, read_shard

FIRST, CAPTION = "my picture 001.jpg", "my picture 001.txt"


def replace_image(folder: Path) -> None:
    draw(50)[0].save(folder / FIRST)


CHANGES: dict[str, tuple[list[object], Callable[[Path], object]]] = {
    "share for validation": (["--held-out", 0.25], lambda folder: None),
    "images per shard": (["--per-shard", 6], lambda folder: None),
    "caption field": (["--caption", "text"], lambda folder: None),
    "caption text": ([], lambda folder: (folder / CAPTION).write_text("another caption")),
    "image": ([], replace_image),
    "time of an image": ([], lambda folder: os.utime(folder / FIRST, ns=(0, 10**18))),
    "new image": ([], lambda folder: folder_of(folder, 13)),
    "removed last shard": ([], lambda folder: [path.unlink() for path in sorted(folder.iterdir())[-6:]]),
    "removed image": ([], lambda folder: (folder / FIRST).unlink()),
}


def test_shards_of_other_inputs_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, (options, change) in CHANGES.items():
        folder, out = folder_of(tmp_path / name / "in", 12), tmp_path / name / "out"
        assert prepare(folder, "--out", out, "--edges", "none", "--per-shard", 9) == 0
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        assert prepare(folder, "--out", out, "--edges", "none", "--per-shard", 9) == 0, name
        change(folder)
        for part in range(2):  # also the process that would write the validation shard refuses
            words = [folder, "--out", out, "--edges", "none", "--per-shard", 9, *options, "--part", part, "--parts", 2]
            assert prepare(*words) == 2, name
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert "train-00000.tar was made from other images or captions" in error
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before, name
        assert prepare(folder, "--out", tmp_path / name / "new", "--edges", "none", *options) == 0, "as the message says"


def test_table_images_and_shards_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = list(read_shard(prepared(tmp_path / "first")).items())
    source, out = write_shard(tmp_path / "train-a.tar", rows), tmp_path / "out"
    words = [source, "--out", out, "--edges", "none"]
    assert prepare(*words) == prepare(*words, "--per-shard", 7, "--caption", "x") == 0, "no options of shards"
    assert prepare(*words, "--held-out", 0.25) == 2
    write_shard(source, rows[:-1])
    assert prepare(*words) == 2
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow (the extra `parquet`)")
    from pyarrow import parquet

    table, out = tmp_path / "table", tmp_path / "of table"
    table.mkdir()
    for first, result in ((0, 0), (0, 0), (1, 2)):
        images = [{"bytes": next(v for k, v in members.items() if k != "json")} for _, members in rows[first : first + 3]]
        parquet.write_table(pyarrow.table({"image": images, "text": ["a", "b", "c"]}), table / "a.parquet")
        assert prepare(table, "--out", out, "--edges", "none") == result
    capsys.readouterr()


def test_shard_is_written_again_if_its_report_lacks_the_input(tmp_path: Path) -> None:
    report = prepared(tmp_path).with_suffix(".json")
    whole = json.loads(report.read_text())
    report.write_text(json.dumps({name: value for name, value in whole.items() if name != "input"}))
    prepared(tmp_path)
    assert json.loads(report.read_text()) == whole


def prepared(folder: Path) -> Path:
    if not (folder / "in").is_dir():
        folder_of(folder / "in", 12)
    assert prepare(folder / "in", "--out", folder / "out", "--edges", "none") == 0
    return folder / "out" / "train-00000.tar"


def fail_once(function: Callable, fails: Callable[..., bool], error: BaseException) -> Callable:
    """Return `function`, except that its first call for which `fails` is true raises `error`."""
    failures = [error]

    def call(*args: object) -> object:
        if failures and fails(*args):
            raise failures.pop()
        return function(*args)

    return call


IO_ERROR, NO_MEMORY = OSError(errno.EIO, "Input/output error"), MemoryError()
FAULTS = {
    "image": (Path, "read_bytes", lambda path: path.name == FIRST, IO_ERROR, f"{FIRST} cannot be read now"),
    "too many open files": (Path, "read_bytes", lambda path: path.name == FIRST, OSError(errno.EMFILE, "x"), FIRST),
    "caption": (image_folder, "read_text", lambda path: path.name == CAPTION, IO_ERROR, f"{CAPTION} cannot be read now"),
    "memory for the image": (build_shards, "decode_image", lambda data: True, NO_MEMORY, "not enough memory"),
    "memory for its file": (Path, "read_bytes", lambda path: path.name == FIRST, NO_MEMORY, "not enough memory"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_of_the_machine_costs_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, name: str
) -> None:
    owner, attribute, fails, error, message = FAULTS[name]
    folder, out = folder_of(tmp_path / "in", 3), tmp_path / "out"
    monkeypatch.setattr(owner, attribute, fail_once(getattr(owner, attribute), fails, error))
    assert prepare(folder, "--out", out, "--edges", "none") == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not list(out.glob("*")), "neither a shard nor a report"
    assert prepare(folder, "--out", out, "--edges", "none") == 0
    assert len(captions_in(out)) == 3


def test_unreadable_file_is_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder, out, denied = folder_of(tmp_path / "in", 3), tmp_path / "out", PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Path, "read_bytes", fail_once(Path.read_bytes, lambda path: path.name == FIRST, denied))
    assert prepare(folder, "--out", out, "--edges", "none") == 0
    assert f"1 left out: 1 x Permission denied (the first is '{FIRST}')" in capsys.readouterr().out
