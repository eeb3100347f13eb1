"""Files on disk: they are safetensors, a reader loads only what it is asked for, and malicious files do no harm."""

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
from raphael_dist.checkpoint.folders import newest
from raphael_dist.checkpoint.manifest import FORMAT, MANIFEST, seal
from raphael_dist.checkpoint.reader import CheckpointReader, open_newest
from raphael_dist.checkpoint.snapshot import write_snapshot
from raphael_dist.config.schema import config_from_tree
from raphael_dist.errors import UserError
from raphael_dist.storage import tensorfile
from raphael_dist.storage.files import sha256
from raphael_dist.training import run_dir
from tests.lib.launch import ROOT

LAYOUT = [("master/a.w", 6), ("exp_avg/a.w", 6), ("master/b", 3)]


def write_checkpoint(folder: Path, step: int = 1, layout: list[tuple[str, int]] = LAYOUT, values: Any = None) -> Path:
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    values = torch.arange(sum(n for _, n in layout), dtype=torch.float32) if values is None else values
    starts = {key: 0 for key, _ in layout}
    entry = write_snapshot(path / "rank-00000.safetensors", layout, values, {"starts": json.dumps(starts)})
    manifest = {
        "format": FORMAT, "step": step, "samples_seen": 0, "updates": step, "guard": {}, "dataset": "", "config": {},
        "tensors": {key.partition("/")[2]: [n] for key, n in layout},
        "files": {"rank-00000.safetensors": entry},
    }  # fmt: skip
    (path / MANIFEST).write_bytes(seal(manifest))
    return path


def test_checkpoint_files_are_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    values = torch.randn(15)
    entry = write_snapshot(path, LAYOUT, values, {"starts": "{}", "step": "7"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"starts": "{}", "step": "7"}
        for (key, _), part in zip(LAYOUT, values.split([n for _, n in LAYOUT]), strict=True):
            assert torch.equal(file.get_tensor(key), part)
    assert entry == {"bytes": path.stat().st_size, "sha256": sha256(path)}


def test_file_written_in_chunks_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(15)
    whole = write_snapshot(tmp_path / "whole", LAYOUT, values, {})
    monkeypatch.setattr(tensorfile, "CHUNK", 4)
    assert write_snapshot(tmp_path / "chunks", LAYOUT, values, {}) == whole


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_value_that_is_not_finite_is_refused_by_name(tmp_path: Path, bad: float) -> None:
    values = torch.zeros(15)
    values[7] = bad
    with pytest.raises(OSError, match=r"exp_avg/a\.w is not finite"):
        write_snapshot(tmp_path / "x", LAYOUT, values, {})


def test_device_that_returns_other_bytes_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data).replace(b"\x80?", b"\x81?")))
    with pytest.raises(OSError, match="does not return the bytes that were written"):
        write_snapshot(tmp_path / "x", LAYOUT, torch.ones(15), {})


def test_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError):
        write_snapshot(tmp_path / "x", LAYOUT, torch.ones(15), {})
    assert (tmp_path / "x").read_text() == "mine"


# ---- folders --------------------------------------------------------------------------------------------------------


def test_retention_keeps_the_last_and_every_nth(tmp_path: Path) -> None:
    all_of_them = [tmp_path / f"step-{n:08d}" for n in (70, 60, 50, 40, 30, 20, 10)]
    assert [int(f.name[5:]) for f in folders.expired(all_of_them, 2, 0)] == [50, 40, 30, 20, 10]
    assert [int(f.name[5:]) for f in folders.expired(all_of_them, 2, 20)] == [50, 30, 10]
    assert folders.expired(all_of_them, 9, 0) == []


def test_copies_of_the_user_are_neither_resumed_from_nor_removed(tmp_path: Path) -> None:
    names = ["step-00000200", "step-100000000", "step-00000100", "step-00000100-good", "step-best", "step-00000050.bak", "x"]
    for name in names:
        (tmp_path / name).mkdir()
    listed = newest(tmp_path)
    assert [f.name for f in listed] == ["step-100000000", "step-00000200", "step-00000100"]
    assert [f.name for f in folders.expired(listed, 1, 200)] == ["step-00000100"]


def test_publish_removes_leftovers_and_restores_old_folder_on_failure(tmp_path: Path) -> None:
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


def test_failed_removal_warns_and_hides_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_checkpoint(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(os, "unlink", fail)
    folders.remove(path)
    assert "cannot be removed" in caplog.text
    assert newest(tmp_path) == []
    monkeypatch.undo()
    folders.remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_publish_over_same_step_survives_a_kill_at_any_call(tmp_path: Path) -> None:
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
        folders.remove_partial(root)
        reader = open_newest(root)
        assert reader.read("master", "b", 0, 3).tolist() in ([0.0] * 3, [1.0] * 3)
        assert {p.name for p in root.iterdir()} == {"new", "step-00000001"}


def test_quarantine_keeps_earlier_damaged_folders(tmp_path: Path) -> None:
    for _ in range(3):
        folders.quarantine(write_checkpoint(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {f"damaged-step-00000001{end}" for end in ("", ".1", ".2")}


def test_run_directory_is_locked_until_its_process_ends(tmp_path: Path) -> None:
    code = f"""
import time
from raphael_dist.training import run_dir
from raphael_dist.config.schema import config_from_tree
lock = run_dir.acquire(config_from_tree({{"run": {{"dir": {str(tmp_path)!r}}}}}))
print("claimed", flush=True)
time.sleep(60)
"""
    config = config_from_tree({"run": {"dir": str(tmp_path)}})
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "claimed\n"
        with pytest.raises(UserError, match="in use by another process"):
            run_dir.acquire(config)
    finally:
        owner.kill()
        owner.wait()
    run_dir.acquire(config).close()


def test_unreadable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder belongs")  # root may read what chmod 000 forbids
    with pytest.raises(UserError, match="cannot be read: Not a directory"):
        newest(tmp_path / "checkpoints")
    assert newest(tmp_path / "nowhere") == []


# ---- reading --------------------------------------------------------------------------------------------------------


def test_read_loads_only_the_requested_part_of_a_file(tmp_path: Path) -> None:
    """Measured by the bytes that the kernel reports for this process."""

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


def test_every_flipped_bit_of_a_manifest_is_detected(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / MANIFEST
    good, survived = path.read_bytes(), []
    body = json.loads(good)
    for at in range(len(good)):
        data = bytearray(good)
        data[at] ^= 1
        path.write_bytes(data)
        try:
            manifest = CheckpointReader(path.parent).manifest
        except UserError:
            continue
        survived.append(at)
        # Only white space, or the name "checksum" itself: what it says is what was written.
        assert {k: manifest[k] for k in body if k != "checksum"} == {k: v for k, v in body.items() if k != "checksum"}
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
def test_malicious_file_is_refused_without_running_or_filling_memory(tmp_path: Path, kind: str, listed: bool) -> None:
    """Its checksum is right: an attacker who can write the file can write the manifest too."""
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
        ({"files": {"../secret": {"bytes": 1, "sha256": ""}}}, "lies outside the folder"),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}, "lies outside the folder"),
        ({"files": {"..": {"bytes": 1, "sha256": ""}}}, "lies outside the folder"),
        ({"files": {"a": 3}}, "each entry of files must have a size"),
        ({"files": ["rank-00000.safetensors"]}, "each entry of files must have a size"),
        ({"tensors": {"w": [float("nan")]}}, "each entry of tensors must be a shape"),
        ({"tensors": {"w": [-1]}}, "each entry of tensors must be a shape"),
        ({"format": 2}, "it must have the layout raphael and the format 1"),
    ],
)
def test_malicious_manifest_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_checkpoint(tmp_path)
    (path / MANIFEST).write_bytes(seal({**json.loads((path / MANIFEST).read_text()), **change}))
    with pytest.raises(UserError, match=message):
        CheckpointReader(path)


def test_manifest_with_a_huge_tensor_uses_no_memory(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["tensors"]["b"] = [1 << 45]
    (path / MANIFEST).write_bytes(seal(manifest))
    reader = CheckpointReader(path)
    assert reader.incomplete() is not None
    with pytest.raises(UserError, match="it has no element 3"):
        reader.whole("master", "b")


def manifest_of(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "another step": ({"step": 7}, "its manifest.json states step 7"),
        "a negative step": ({"step": -1}, "step=-1,.*must be"),
        "negative samples": ({"samples_seen": -5}, "samples_seen=-5.*must be"),
        "more updates than steps": ({"updates": 2}, "updates=2.*must not exceed step"),
        "a step too large": ({"step": 2**64}, f"step={2**64}.*must be"),
        "a step that is true": ({"step": True}, "step=True.*must be"),
        "a list of guards": ({"guard": [1]}, "guard=.*must contain"),
        "an endless loss": ({"guard": {"window": [float("inf")]}}, "guard=.*must contain"),
        "a negative count": ({"guard": {"skipped": -1}}, "guard=.*must contain"),
    }.values(),
)
def test_manifest_with_impossible_numbers_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_checkpoint(tmp_path)
    (path / MANIFEST).write_bytes(seal(manifest_of(path) | change))
    with pytest.raises(UserError, match=message):
        CheckpointReader(path)


def test_manifest_without_checksum_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    manifest = manifest_of(path)
    del manifest["checksum"]
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="does not match its own checksum"):
        CheckpointReader(path)


@pytest.mark.parametrize("name", [MANIFEST, "rank-00000.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.timeout(20)
def test_file_that_is_not_regular_is_refused_at_once(tmp_path: Path, name: str, make: Any) -> None:
    """Opening a FIFO waits for a writer, and /dev/zero never ends."""
    good, bad = write_checkpoint(tmp_path / "checkpoints"), write_checkpoint(tmp_path / "checkpoints", step=2)
    (bad / name).unlink()
    make(bad / name)
    with pytest.raises(UserError):
        open_newest(bad)
    assert open_newest(tmp_path).folder == good
    with pytest.raises(UserError):
        CheckpointReader(bad).whole("master", "b")
