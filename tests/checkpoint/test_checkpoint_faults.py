"""Real ranks that die, run out of space or find damage while saving and resuming. No published checkpoint is lost.

The reference is an undisturbed run of 5 steps. Experts differ by initialisation. Weights, moments and average are compared
by their checksums.
"""

import json
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raphael_dist.checkpoint.manifest import MANIFEST, seal
from raphael_dist.checkpoint.reader import CheckpointReader, open_newest
from raphael_dist.errors import EXIT_NOT_SAVED, EXIT_USER_ERROR
from raphael_dist.training.metrics_files import read_metrics
from tests.lib.forks import Forks, output_of
from tests.lib.launch import LONG

WORLD, STEPS, EVERY = 2, 5, 2


def sections(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    base: dict[str, dict[str, Any]] = {
        "train": {"global_batch_size": 12, "micro_batch_size": 3, "max_steps": STEPS, "log_every": 1},
        "optim": {"lr": 1e-3, "max_grad_norm": 0.5},
        "checkpoint": {"every": EVERY, "keep": 9},
        "parallel": {"space_ep": 2, "time_ep": 2},
    }
    return {name: {**base.get(name, {}), **changes.get(name, {})} for name in base.keys() | changes.keys()}


def spec(**fields: Any) -> dict[str, Any]:
    return {"stage": 2, "sections": sections(), **fields}


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def sums(run: Path, step: int) -> dict[str, str]:
    return {name: e["sha256"] for name, e in CheckpointReader(step_folder(run, step)).manifest["files"].items()}


def found_steps(run: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step-*"))


def log(run: Path) -> str:
    return (run / "train.log").read_text()


@pytest.fixture(scope="module")
def whole(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference: checkpoints of steps 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("oracle") / "run"
    forks.must(folder, WORLD, **spec())
    assert found_steps(folder) == [2, 4, 5]
    return folder


def started(whole: Path, folder: Path, *steps: int) -> Path:
    """Return a copy of the reference with these checkpoints only."""
    shutil.copytree(whole, folder)
    for step in {2, 4, 5} - set(steps):
        shutil.rmtree(step_folder(folder, step))
    (folder / "checkpoints" / "latest").write_text(f"step-{max(steps):08d}")
    return folder


def assert_undamaged(run: Path, whole: Path) -> int:
    """Check that every checkpoint is complete and equals the reference; return the newest step."""
    steps = found_steps(run)
    for step in steps:
        reader = CheckpointReader(step_folder(run, step))
        assert reader.integrity_error() is None
        assert reader.incomplete() is None
        assert sums(run, step) == sums(whole, step)
    return steps[-1]


def assert_completes_as_if_nothing_had_happened(forks: Forks, run: Path, whole: Path) -> None:
    forks.must(run, WORLD, **spec())
    assert sums(run, STEPS) == sums(whole, STEPS)
    metrics, expected = (read_metrics(folder / "metrics.jsonl") for folder in (run, whole))
    for tag in ("train/loss", "optim/grad_norm"):
        assert metrics[tag] == expected[tag], tag
    assert not list((run / "checkpoints").glob(".*")), "something temporary was left"


# ---- killed at every point ------------------------------------------------------------------------------------------


def saving(rank: int, step: int = 4, **fault: Any) -> dict[str, Any]:
    return {"chunk": 1 << 20, "saving": [{"ranks": [rank], "step": step, **fault}]}


def kill_spec(**faults: Any) -> dict[str, Any]:
    # One checkpoint is kept: the removal of the one of step 2 is among the calls.
    return spec(sections=sections(checkpoint={"keep": 1}), faults=faults)


@pytest.fixture(scope="module")
def calls(forks: Forks, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    """The file system calls of each rank during the save of step 4, in order."""
    calls_of, folder = {}, started(whole, tmp_path_factory.mktemp("calls") / "run", 2)
    faults = [{"ranks": [rank], "step": 4, "count": str(folder / f"calls-{rank}.txt")} for rank in range(WORLD)]
    forks.must(folder, WORLD, **kill_spec(chunk=1 << 20, saving=faults))
    for rank in range(WORLD):
        lines = (folder / f"calls-{rank}.txt").read_text().splitlines()
        end = next(i for i, line in enumerate(lines) if "step-00000005" in line)  # the next save
        calls_of[rank] = lines[:end]
    return calls_of


def kill_at(forks: Forks, whole: Path, folder: Path, rank: int, call: int) -> Path:
    run = started(whole, folder, 2)
    faults = saving(rank, count=str(folder / "calls.txt"), kill_at=call)
    codes = forks.run(run, WORLD, **kill_spec(**faults))
    assert codes[rank] == -9, (codes, output_of(run, WORLD))
    assert codes[1 - rank] != 0, "the other rank continued"
    return run


def test_save_syncs_before_rename_and_removes_last(calls: dict[int, list[str]]) -> None:
    verbs = [line.split()[0] for line in calls[0]]
    assert len(verbs) > 15, calls[0]
    rename = next(i for i, line in enumerate(calls[0]) if line.startswith("rename") and ".writing-step-00000004" in line)
    assert verbs[:rename].count("fsync") >= 3, "file, manifest and folder"
    assert not {"unlink", "rmdir"} & set(verbs[:rename])
    assert set(verbs[rename:]) >= {"unlink", "rmdir", "replace"}
    assert [line.split()[0] for line in calls[1]] == ["open", "write", "write", "write", "fsync"], calls[1]


@pytest.mark.parametrize(("rank", "where"), [(0, "rename"), pytest.param(1, "fsync", marks=pytest.mark.slow)])
def test_kill_during_save_loses_at_most_that_save(
    forks: Forks, whole: Path, calls: dict[int, list[str]], tmp_path: Path, rank: int, where: str
) -> None:
    call = next(i for i, line in enumerate(calls[rank]) if line.startswith(where))
    run = kill_at(forks, whole, tmp_path / "run", rank, call)
    assert assert_undamaged(run, whole) in (2, 4)
    assert_completes_as_if_nothing_had_happened(forks, run, whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rank", [0, 1])
def test_kill_at_every_call_of_a_save_loses_at_most_that_save(
    forks: Forks, whole: Path, calls: dict[int, list[str]], tmp_path: Path, rank: int
) -> None:
    newest = []
    for call in range(0, len(calls[rank]), 1 if LONG else 3):
        run = kill_at(forks, whole, tmp_path / f"run-{call}", rank, call)
        newest.append(assert_undamaged(run, whole))
        if len(newest) % 6 == 5:
            assert_completes_as_if_nothing_had_happened(forks, run, whole)
        shutil.rmtree(run)
    assert newest == sorted(newest), "once published, always there"
    assert set(newest) == ({2, 4} if rank == 0 else {2})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_at_random_moments_lose_at_most_one_interval_each(forks: Forks, tmp_path: Path) -> None:
    draw, run, at = random.Random(0), tmp_path / "run", 0
    often = sections(train={"max_steps": 1000}, checkpoint={"every": 1, "keep": 2})
    for i in range(20 if LONG else 8):
        target = at + 2  # the second save of this life
        ranks = [0, 1] if i % 3 == 0 else [i % 2]
        fault = {"ranks": ranks, "step": target, "kill_after": draw.uniform(0, 0.06)}
        codes = forks.run(run, WORLD, stage=2, sections=often, faults={"chunk": 1 << 16, "saving": [fault]})
        assert all(code != 0 for code in codes)
        reader = open_newest(run)
        assert reader.incomplete() is None
        assert reader.step >= target - 1, "more than one interval was lost"
        at = reader.step
    alone = tmp_path / "alone"
    forks.must(alone, WORLD, stage=2, sections=sections(train={"max_steps": at}, checkpoint={"every": 0}))
    assert sums(run, at) == sums(alone, at)


# ---- a slow disk ----------------------------------------------------------------------------------------------------


def test_training_continues_until_slowest_rank_has_written(forks: Forks, whole: Path, tmp_path: Path) -> None:
    run, seen, done = started(whole, tmp_path / "run", 2), [], threading.Event()
    (run / "metrics.jsonl").unlink()

    def watch() -> None:
        while not done.is_set():
            if step_folder(run, 4).exists() and "torn" not in seen:
                seen.append("there")
                entries = json.loads((step_folder(run, 4) / MANIFEST).read_text())["files"]
                sizes = {p.name: p.stat().st_size for p in step_folder(run, 4).glob("rank-*")}
                if sizes != {name: e["bytes"] for name, e in entries.items()}:
                    seen.append("torn")
            elif (run / "metrics.jsonl").is_file() and '{"step": 5' in (run / "metrics.jsonl").read_text():
                seen.append("step 5 without it")
            latest = (run / "checkpoints" / "latest").read_text()
            if not (run / "checkpoints" / latest).is_dir():
                seen.append("torn")
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        forks.must(run, WORLD, **spec(faults=saving(1, sleep_in_fsync=5)))
    finally:
        done.set()
        watcher.join()
    assert "torn" not in seen
    assert "there" in seen
    assert "step 5 without it" in seen, "training waited for the disk"
    metrics = read_metrics(run / "metrics.jsonl")
    assert dict(metrics["checkpoint/write_s"])[4] > 1.4
    assert sums(run, 4) == sums(whole, 4), "training changed what was being written"


# ---- damage ---------------------------------------------------------------------------------------------------------


def rank_file(run: Path, step: int = 4, rank: int = 1) -> Path:
    return step_folder(run, step) / f"rank-{rank:05d}.safetensors"


def change(path: Path, how: Callable[[bytearray], bytes | bytearray]) -> None:
    path.write_bytes(how(bytearray(path.read_bytes())))


def flip(at: int) -> Callable[[bytearray], bytearray]:
    def flipped(data: bytearray) -> bytearray:
        data[at] ^= 4
        return data

    return flipped


def swap(run: Path) -> None:
    a, b = rank_file(run, rank=0), rank_file(run)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def edit_manifest(run: Path, edit: Callable[[dict], None]) -> None:
    path = step_folder(run, 4) / MANIFEST
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_bytes(seal(manifest))


def drop_first_range(manifest: dict) -> None:
    ranges = manifest["files"]["rank-00001.safetensors"]["ranges"]
    del ranges[next(key for key in ranges if ".w1" in key)]


def double_range(manifest: dict) -> None:
    files = manifest["files"]
    key = next(key for key in files["rank-00001.safetensors"]["ranges"] if ".w1" in key)
    start, numel = files["rank-00001.safetensors"]["ranges"][key]
    files["rank-00000.safetensors"]["ranges"][key] = [0, start + numel]


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated file": (lambda run: change(rank_file(run), lambda d: d[:-10]), "rank-00001.safetensors has"),
    "empty file": (lambda run: change(rank_file(run), lambda d: b""), "rank-00001.safetensors has 0 bytes"),
    "missing file": (lambda run: rank_file(run).unlink(), "rank-00001.safetensors is missing"),
    "bit in a header": (lambda run: change(rank_file(run), flip(20)), "rank-00001.safetensors does not match"),
    "bit in a weight": (lambda run: change(rank_file(run), flip(-9)), "rank-00001.safetensors does not match"),
    "swapped files": (swap, "rank-00000.safetensors "),
    "file of another step": (lambda run: shutil.copy(rank_file(run, 2), rank_file(run)) and None, "rank-00001.safetensors "),
    "missing manifest": (lambda run: (step_folder(run, 4) / MANIFEST).unlink(), "saving it was interrupted"),
    "truncated manifest": (lambda run: change(step_folder(run, 4) / MANIFEST, lambda d: d[:500]), "cannot be read"),
    "empty manifest": (lambda run: change(step_folder(run, 4) / MANIFEST, lambda d: b""), "cannot be read"),
    "bit in the manifest": (
        lambda run: change(
            step_folder(run, 4) / MANIFEST, lambda d: d.replace(b'"samples_seen": 48', b'"samples_seen": 49')
        ),
        "does not match its own checksum",
    ),
    "missing expert": (lambda run: edit_manifest(run, drop_first_range), "is missing"),
    "expert twice": (lambda run: edit_manifest(run, double_range), "twice"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_reported_by_file_name(whole: Path, tmp_path: Path, kind: str) -> None:
    """The checks of `resume`, in this process."""
    run = started(whole, tmp_path / "run", 2, 4)
    damage, message = DAMAGE[kind]
    damage(run)
    try:
        reader = CheckpointReader(step_folder(run, 4))
        problem = reader.integrity_error() or reader.incomplete()
    except ValueError as error:
        problem = str(error)
    assert message in str(problem)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["truncated file", "bit in a weight", "swapped files", "missing manifest", "expert twice"])
def test_ranks_fall_back_together_and_report_the_damage(forks: Forks, whole: Path, tmp_path: Path, kind: str) -> None:
    run = started(whole, tmp_path / "run", 2, 4)
    damage, message = DAMAGE[kind]
    damage(run)
    assert_completes_as_if_nothing_had_happened(forks, run, whole)
    assert "resumed at step 2" in log(run)
    assert message in log(run)
    assert (run / "checkpoints" / "damaged-step-00000004").is_dir(), "damaged checkpoints are kept"


def test_run_without_valid_checkpoint_ends_unless_damage_is_ignored(forks: Forks, whole: Path, tmp_path: Path) -> None:
    run = started(whole, tmp_path / "run", 2, 4)
    (step_folder(run, 2) / MANIFEST).unlink()
    change(rank_file(run), flip(-9))
    before = {p: p.stat().st_mtime_ns for p in (run / "checkpoints").rglob("*") if p.is_file()}
    codes = forks.run(run, WORLD, **spec())
    assert codes == [EXIT_USER_ERROR] * WORLD
    output = output_of(run, WORLD)
    for part in (
        "step-00000004: rank-00001.safetensors does not match",
        "step-00000002: has no manifest.json",
        "run.ignore_damaged=true",
    ):
        assert output.count(part) == (1 if part == "run.ignore_damaged=true" else 2), output  # once as a warning
    assert {p: p.stat().st_mtime_ns for p in (run / "checkpoints").rglob("*") if p.is_file()} == before
    forks.must(run, WORLD, **spec(sections=sections(run={"ignore_damaged": True})))
    assert "from scratch" in log(run)
    assert sums(run, STEPS) == sums(whole, STEPS)
    quarantined = sorted(p.name for p in (run / "checkpoints").glob("damaged-*"))
    assert quarantined == ["damaged-step-00000002", "damaged-step-00000004"]


@pytest.mark.parametrize("latest", [pytest.param(None, marks=pytest.mark.slow), "step-00000077"])
def test_resume_does_not_depend_on_file_latest(forks: Forks, whole: Path, tmp_path: Path, latest: str | None) -> None:
    run = started(whole, tmp_path / "run", 2, 4)
    (run / "checkpoints" / "latest").unlink()
    if latest:
        (run / "checkpoints" / "latest").write_text(latest)
    forks.must(run, 1, **spec(stage=1, sections=sections(parallel={"space_ep": 1, "time_ep": 1})))
    assert "resumed at step 4" in log(run)
    assert (run / "checkpoints" / "latest").read_text() == "step-00000005"


def test_unwritable_checkpoint_folder_is_reported_before_training(forks: Forks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / ".probe-00001").mkdir()  # rank 1 cannot write there, whoever runs this
    codes = forks.run(run, WORLD, **spec())
    assert codes == [EXIT_USER_ERROR] * WORLD
    assert f"run.dir: {run / 'checkpoints'} cannot be written" in output_of(run, WORLD)
    assert not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text()


# ---- no space -------------------------------------------------------------------------------------------------------


def test_one_rank_without_space_fails_one_save(forks: Forks, whole: Path, tmp_path: Path) -> None:
    run = started(whole, tmp_path / "run", 2)
    faults = saving(1, file_size=300_000, for_one_save=True)
    forks.must(run, WORLD, **spec(sections=sections(checkpoint={"keep": 1}), faults=faults))
    assert "the checkpoint of step 4 was not written, and the previous one remains: rank 1: no space: " in log(run)
    assert found_steps(run) == [5]
    assert sums(run, STEPS) == sums(whole, STEPS)
    assert dict(read_metrics(run / "metrics.jsonl")["checkpoint/failed"])[5] == 1


@pytest.mark.slow
def test_no_space_at_the_end_of_a_run_has_its_own_exit_code(forks: Forks, whole: Path, tmp_path: Path) -> None:
    run = started(whole, tmp_path / "run", 2)
    faults = {"saving": [{"ranks": [0, 1], "step": 4, "file_size": 300_000}]}
    codes = forks.run(run, WORLD, **spec(sections=sections(checkpoint={"keep": 1}), faults=faults))
    assert codes == [EXIT_NOT_SAVED] * WORLD, output_of(run, WORLD)
    assert "error: the checkpoint of step 5 was not written" in output_of(run, WORLD)
    assert assert_undamaged(run, whole) == 2
    assert not list((run / "checkpoints").glob(".*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system that holds one checkpoint but not two."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4500k", "none", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_reported_before_anything_is_written(forks: Forks, whole: Path, small_disk: Path) -> None:
    run = small_disk.parent
    codes = forks.run(run, WORLD, **spec())
    assert codes == [EXIT_NOT_SAVED] * WORLD, output_of(run, WORLD)
    assert f"free in {small_disk}" in log(run)
    assert "step 4 was not written, and the previous one remains: no space: " in log(run)
    assert assert_undamaged(run, whole) == 2
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert_completes_as_if_nothing_had_happened(forks, run, whole)


def test_weights_that_are_not_finite_are_not_published(forks: Forks, whole: Path, tmp_path: Path) -> None:
    run = started(whole, tmp_path / "run", 2)
    codes = forks.run(run, WORLD, **spec(faults=saving(1, step=5, nan_weight=True)))
    assert codes == [EXIT_NOT_SAVED] * WORLD
    assert "is not finite" in log(run)
    assert assert_undamaged(run, whole) == 4
