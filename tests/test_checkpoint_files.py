"""What lies on disk: our files are safetensors, a reader maps no more than it is asked for, and hostile files do no harm."""

import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from raphael_dist.checkpoint import folders
from raphael_dist.checkpoint.manifest import FORMAT, MANIFEST, seal
from raphael_dist.checkpoint.reader import CheckpointReader, newest, open_newest
from raphael_dist.checkpoint.snapshot import write_snapshot
from raphael_dist.config import config_from_tree
from raphael_dist.errors import UserError
from raphael_dist.storage import tensorfile
from raphael_dist.storage.files import sha256
from raphael_dist.training import rundir
from tests.launch import ROOT

LAYOUT = [("master/a.w", 6), ("exp_avg/a.w", 6), ("master/b", 3)]


def write_checkpoint(folder: Path, step: int = 1, layout: list[tuple[str, int]] = LAYOUT, values: Any = None) -> Path:
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    values = torch.arange(sum(n for _, n in layout), dtype=torch.float32) if values is None else values
    starts = {key: 0 for key, _ in layout}
    entry = write_snapshot(path / "rank-00000.safetensors", layout, values, {"starts": json.dumps(starts)})
    manifest = {
        "format": FORMAT, "step": step, "samples_seen": 0, "dataset": "", "config": {},
        "tensors": {key.partition("/")[2]: [n] for key, n in layout},
        "files": {"rank-00000.safetensors": entry},
    }  # fmt: skip
    (path / MANIFEST).write_bytes(seal(manifest))
    return path


def test_the_files_are_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    values = torch.randn(15)
    entry = write_snapshot(path, LAYOUT, values, {"starts": "{}", "step": "7"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"starts": "{}", "step": "7"}
        for (key, _), part in zip(LAYOUT, values.split([n for _, n in LAYOUT]), strict=True):
            assert torch.equal(file.get_tensor(key), part)
    assert entry == {"bytes": path.stat().st_size, "sha256": sha256(path)}


def test_a_file_is_written_in_chunks_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(15)
    whole = write_snapshot(tmp_path / "whole", LAYOUT, values, {})
    monkeypatch.setattr(tensorfile, "CHUNK", 4)
    assert write_snapshot(tmp_path / "chunks", LAYOUT, values, {}) == whole


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_named_and_refused(tmp_path: Path, bad: float) -> None:
    values = torch.zeros(15)
    values[7] = bad
    with pytest.raises(OSError, match=r"exp_avg/a\.w is not finite"):
        write_snapshot(tmp_path / "x", LAYOUT, values, {})


def test_a_device_that_returns_other_bytes_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data).replace(b"\x80?", b"\x81?")))
    with pytest.raises(OSError, match="other bytes than were written"):
        write_snapshot(tmp_path / "x", LAYOUT, torch.ones(15), {})


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError):
        write_snapshot(tmp_path / "x", LAYOUT, torch.ones(15), {})
    assert (tmp_path / "x").read_text() == "mine"


# ---- folders --------------------------------------------------------------------------------------------------------


def test_retention_keeps_the_last_and_every_nth(tmp_path: Path) -> None:
    all_of_them = [tmp_path / f"step-{n:08d}" for n in (70, 60, 50, 40, 30, 20, 10)]
    assert [int(f.name[5:]) for f in folders.surplus(all_of_them, 2, 0)] == [50, 40, 30, 20, 10]
    assert [int(f.name[5:]) for f in folders.surplus(all_of_them, 2, 20)] == [50, 30, 10]
    assert folders.surplus(all_of_them, 9, 0) == []


def test_a_users_own_copies_are_neither_resumed_from_nor_removed(tmp_path: Path) -> None:
    names = ["step-00000200", "step-100000000", "step-00000100", "step-00000100-good", "step-best", "step-00000050.bak", "x"]
    for name in names:
        (tmp_path / name).mkdir()
    found = folders.step_folders(tmp_path)
    assert [f.name for f in found] == ["step-100000000", "step-00000200", "step-00000100"]
    assert [f.name for f in folders.surplus(found, 1, 200)] == ["step-00000100"]


def test_publishing_clears_what_an_earlier_replacement_left_and_a_failure_brings_the_old_one_back(tmp_path: Path) -> None:
    final, temporary = tmp_path / "step-00000001", tmp_path / ".writing-step-00000001"
    for folder, text in ((final, "old"), (tmp_path / (folders.REPLACED + final.name), "older"), (temporary, "new")):
        folder.mkdir()
        (folder / "x").write_text(text)
    folders.publish(temporary, final)
    assert (final / "x").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == [final.name]
    temporary.mkdir()
    (temporary / "x").write_text("newest")
    renamed = []

    def failing(self: Path, to: Path) -> Path:
        renamed.append(to)
        if len(renamed) == 2:
            raise OSError("no")
        return rename(self, to)

    rename = Path.rename
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="no"):
            folders.publish(temporary, final)
    assert (final / "x").read_text() == "new"


def test_a_removal_that_fails_only_warns_and_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_checkpoint(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(os, "unlink", fail)
    folders.remove(path)
    assert "cannot remove the old checkpoint" in caplog.text
    assert newest(tmp_path) == []
    monkeypatch.undo()
    folders.tidy(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_publishing_over_a_checkpoint_of_the_same_step_can_be_cut_anywhere(tmp_path: Path) -> None:
    for cut in range(6):
        root = tmp_path / str(cut)
        write_checkpoint(root, 1, values=torch.zeros(15))
        new = write_checkpoint(root / "new", 1, values=torch.ones(15)).rename(root / ".writing-step-00000001")
        calls, real = [0], (os.rename, os.rmdir)

        def stop_at(limit: int, work: Any, calls: list[int] = calls) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls[0] += 1
                if calls[0] > limit:
                    raise KeyboardInterrupt
                return work(*args, **kwargs)

            return call

        os.rename, os.rmdir = (stop_at(cut, work) for work in real)  # type: ignore[assignment]
        try:
            folders.publish(new, root / "step-00000001")
        except KeyboardInterrupt:
            pass
        finally:
            os.rename, os.rmdir = real  # type: ignore[assignment]
        folders.tidy(root)
        reader = open_newest(root)
        assert reader.read("master", "b", 0, 3).tolist() in ([0.0] * 3, [1.0] * 3)
        assert {p.name for p in root.iterdir()} == {"new", "step-00000001"}


def test_set_aside_keeps_what_is_there(tmp_path: Path) -> None:
    for _ in range(3):
        folders.set_aside(write_checkpoint(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {f"damaged-step-00000001{end}" for end in ("", ".1", ".2")}


def test_a_run_directory_has_one_owner_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    code = f"""
import time
from raphael_dist.training import rundir
from raphael_dist.config import config_from_tree
lock = rundir.claim(config_from_tree({{"run": {{"dir": {str(tmp_path)!r}}}}}))
print("claimed", flush=True)
time.sleep(60)
"""
    config = config_from_tree({"run": {"dir": str(tmp_path)}})
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "claimed\n"
        with pytest.raises(UserError, match="another process is training in"):
            rundir.claim(config)
    finally:
        owner.kill()
        owner.wait()
    rundir.claim(config).close()


def test_an_unreadable_folder_is_a_clear_error_and_not_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder belongs")  # root may read what chmod 000 forbids
    with pytest.raises(UserError, match="cannot be read: Not a directory"):
        newest(tmp_path / "checkpoints")
    assert newest(tmp_path / "nowhere") == []


# ---- reading --------------------------------------------------------------------------------------------------------


def test_a_read_takes_no_more_of_a_file_than_it_needs(tmp_path: Path) -> None:
    """By the bytes that the kernel hands to this process."""

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

    numel = 4 << 20
    path = write_checkpoint(tmp_path, layout=[("master/w", numel)])
    reader, before = CheckpointReader(path), bytes_read()
    part = reader.read("master", "w", numel // 2, 1 << 10)
    assert (part[0], len(part)) == (numel // 2, 1 << 10)
    assert bytes_read() - before < 64 << 10
    reader.whole("master", "w")
    assert bytes_read() - before > 4 * numel, "the measure itself"


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / MANIFEST
    good, survived = path.read_bytes(), []
    body = json.loads(good)
    for at in range(len(good)):
        data = bytearray(good)
        data[at] ^= 1
        path.write_bytes(data)
        try:
            found = CheckpointReader(path.parent).manifest
        except UserError:
            continue
        survived.append(at)
        # Only white space, or the name "checksum" itself: what it says is what was written.
        assert {k: found[k] for k in body if k != "checksum"} == {k: v for k, v in body.items() if k != "checksum"}
    assert len(survived) < 60


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self._canary}",))


def header(text: bytes, size: int | None = None) -> bytes:
    return (len(text) if size is None else size).to_bytes(8, "little") + text


HOSTILE = {
    "header beyond the file": header(b"{}", 1 << 62),
    "header of 2 GiB": header(b"{}", 2 << 30),
    "overlapping offsets": header(
        b'{"master/w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"master/v":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
    ) + bytes(12),
    "NaN shape": header(b'{"master/w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}') + bytes(8),
    "negative shape": header(b'{"master/w":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}') + bytes(8),
    "too large": header(b'{"master/w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,8]}}') + bytes(8),
    "no metadata": header(b'{"master/w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}') + bytes(8),
    "shorter than listed": header(b'{"master/w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}') + bytes(4),
    "scalar": header(b'{"__metadata__":{"a":""},"master/w":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}') + bytes(4),
    "empty": b"",
}  # fmt: skip


# Whether the manifest lists the ranges matters only to a file that can be opened.
OPENED = ("no metadata", "shorter than listed", "scalar")


@pytest.mark.parametrize(
    ("kind", "listed"), [*((kind, True) for kind in (*HOSTILE, "pickle")), *((kind, False) for kind in OPENED)]
)
def test_a_hostile_file_is_refused_without_running_it_or_filling_the_memory(tmp_path: Path, kind: str, listed: bool) -> None:
    """The manifest vouches for it: an attacker who writes the one writes the other."""
    path = write_checkpoint(tmp_path, layout=[("master/w", 2)])
    weights, canary = path / "rank-00000.safetensors", tmp_path / "canary"
    weights.write_bytes(pickle.dumps(Bomb(canary)) if kind == "pickle" else HOSTILE[kind])
    manifest = json.loads((path / MANIFEST).read_text())
    entry = {"bytes": weights.stat().st_size, "sha256": sha256(weights)}
    manifest["files"] = {weights.name: {**entry, **({"ranges": {"master/w": [0, 2]}} if listed else {})}}
    (path / MANIFEST).write_bytes(seal(manifest))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reader = open_newest(tmp_path)
    if kind == "no metadata" and listed:
        assert reader.whole("master", "w").tolist() == [0, 0]  # nothing wrong with it
        return
    with pytest.raises(UserError, match=r"rank-00000\.safetensors|master"):
        reader.whole("master", "w")
    assert not canary.exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10, "kiB"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": {"../secret": {"bytes": 1, "sha256": ""}}}, "names a file outside the folder"),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}, "names a file outside the folder"),
        ({"files": {"..": {"bytes": 1, "sha256": ""}}}, "names a file outside the folder"),
        ({"files": {"a": 3}}, "gives a file no size"),
        ({"files": ["rank-00000.safetensors"]}, "gives a file no size"),
        ({"tensors": {"w": [float("nan")]}}, "gives a tensor no proper shape"),
        ({"tensors": {"w": [-1]}}, "gives a tensor no proper shape"),
        ({"format": 2}, "is not of format 1"),
    ],
)
def test_a_hostile_manifest_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_checkpoint(tmp_path)
    (path / MANIFEST).write_bytes(seal({**json.loads((path / MANIFEST).read_text()), **change}))
    with pytest.raises(UserError, match=message):
        CheckpointReader(path)


def test_a_manifest_that_claims_a_huge_tensor_costs_no_memory(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["tensors"]["b"] = [1 << 45]
    (path / MANIFEST).write_bytes(seal(manifest))
    reader = CheckpointReader(path)
    assert reader.incomplete() is not None
    with pytest.raises(UserError, match="has no element 3"):
        reader.whole("master", "b")


def manifest_of(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text())


@pytest.mark.parametrize(
    ("change", "said"),
    {
        "another step": ({"step": 7}, "its manifest is that of step 7"),
        "a negative step": ({"step": -1}, "no progress that can be: step -1"),
        "negative samples": ({"samples_seen": -5}, "samples_seen -5"),
        "more updates than steps": ({"updates": 2}, "updates 2"),
        "a step too large": ({"step": 2**64}, "no progress"),
        "a step that is true": ({"step": True}, "no progress"),
        "a list of guards": ({"guard": [1]}, "rules against bad steps"),
        "an endless loss": ({"guard": {"window": [float("inf")]}}, "rules against bad steps"),
        "a negative count": ({"guard": {"skipped": -1}}, "rules against bad steps"),
    }.values(),
)
def test_a_manifest_with_impossible_numbers_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = write_checkpoint(tmp_path)
    (path / MANIFEST).write_bytes(seal(manifest_of(path) | change))
    with pytest.raises(UserError, match=said):
        CheckpointReader(path)


def test_a_manifest_without_its_checksum_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    manifest = manifest_of(path)
    del manifest["checksum"]
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="does not match its own checksum"):
        CheckpointReader(path)


@pytest.mark.parametrize("name", [MANIFEST, "rank-00000.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, name: str, make: Any) -> None:
    """Opening a FIFO waits for a writer, and /dev/zero never ends."""
    good, bad = write_checkpoint(tmp_path / "checkpoints"), write_checkpoint(tmp_path / "checkpoints", step=2)
    (bad / name).unlink()
    make(bad / name)
    with pytest.raises(UserError):
        open_newest(bad)
    assert open_newest(tmp_path).folder == good
    with pytest.raises(UserError):
        CheckpointReader(bad).whole("master", "b")
