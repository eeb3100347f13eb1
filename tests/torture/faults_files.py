"""Checkpoints and manifests that are damaged, swapped, missing or replaced, and foreign files next to them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raphael_dist.checkpoint.manifest import MANIFEST, seal
from raphael_dist.text import counted
from tests.torture.kinds import fault
from tests.torture.trial import EVERY, STEPS, WORLD, Outcome, Trial, checkpoints, refused, survived


def victim(trial: Trial) -> tuple[int, Path]:
    """Give the run at least two checkpoints; return the newest one's step and one of its files."""
    at = trial.begin(at=trial.draw.choice(range(2 * EVERY, STEPS, EVERY)))
    folder = trial.run / "checkpoints" / f"step-{at:08d}"
    return at, trial.draw.choice(sorted(folder.iterdir()))


def falls_back(trial: Trial, at: int, what: str) -> Outcome:
    """Require that the run resumes from the checkpoint before, logs it and quarantines the damaged one."""
    trial.finish(damaged=True)
    quarantined = trial.run / "checkpoints" / f"damaged-step-{at:08d}"
    assert f"resumed at step {at - EVERY}" in trial.log, f"it did not fall back:\n{trial.log[-2000:]}"
    assert "skipping checkpoint" in trial.log, "the damage was not logged"
    assert quarantined.exists() or quarantined.is_symlink(), "the damaged checkpoint is gone"
    line = next(line for line in trial.log.splitlines() if "skipping checkpoint" in line)
    return survived(f"{what}: {line.split('skipping checkpoint ', 1)[1].replace(str(trial.run), '')[:160]}")


@fault("a file of a checkpoint cut off", "damage")
def truncate(trial: Trial) -> Outcome:
    at, path = victim(trial)
    size = trial.draw.choice([0, 1, trial.draw.randrange(path.stat().st_size)])
    os.truncate(path, size)
    return falls_back(trial, at, f"{path.name} to {size} bytes")


@fault("bits of a checkpoint flipped", "damage")
def flip(trial: Trial) -> Outcome:
    at, path = victim(trial)
    data = bytearray(path.read_bytes())
    for _ in range(trial.draw.choice([1, 1, 1, 5])):
        data[trial.draw.randrange(len(data))] ^= 1 << trial.draw.randrange(8)
    path.write_bytes(data)
    return falls_back(trial, at, f"in {path.name}")


@fault("a block of a checkpoint's file zeroed or repeated", "damage")
def blocks(trial: Trial) -> Outcome:
    at = trial.begin(at=4)
    path = trial.run / "checkpoints" / "step-00000004" / f"rank-{trial.draw.randrange(WORLD):05d}.safetensors"
    data, size = bytearray(path.read_bytes()), 4096
    start = trial.draw.randrange(8, len(data) - 2 * size)
    data[start : start + size] = trial.draw.choice([bytes(size), bytes(data[start - 8 : start - 8 + size])])
    path.write_bytes(data)
    return falls_back(trial, at, f"at {start} of {path.name}")


@fault("a file of a checkpoint missing", "damage")
def delete(trial: Trial) -> Outcome:
    at, path = victim(trial)
    path.unlink()
    return falls_back(trial, at, path.name)


@fault("files swapped, or of another step", "damage")
def swap(trial: Trial) -> Outcome:
    at, _ = victim(trial)
    here, before = (trial.run / "checkpoints" / f"step-{step:08d}" for step in (at, at - EVERY))
    names = [f"rank-{rank:05d}.safetensors" for rank in range(WORLD)]
    how = trial.draw.choice(["ranks", "step", "manifest"])
    if how == "ranks":
        contents = [(here / name).read_bytes() for name in names]
        for name, data in zip(names, reversed(contents), strict=True):
            (here / name).write_bytes(data)
        if contents[0] == contents[1]:
            return survived("both files are equal")
    else:
        name = trial.draw.choice(names) if how == "step" else MANIFEST
        shutil.copy(before / name, here / name)
    return falls_back(trial, at, how)


def something_else(path: Path, kind: str, trial: Trial) -> None:
    """Replace a file by something that is no file of a checkpoint."""
    path.unlink()
    makers: dict[str, Callable[[], Any]] = {
        "a FIFO": lambda: os.mkfifo(path),
        "a folder": path.mkdir,
        "a link to nothing": lambda: path.symlink_to("nowhere"),
        "a link to itself": lambda: path.symlink_to(path.name),
        "an endless device": lambda: path.symlink_to("/dev/zero"),
        "a terminal": lambda: path.symlink_to("/dev/tty"),
        "a socket": lambda: os.mknod(path, 0o140600),
        "noise": lambda: path.write_bytes(trial.draw.randbytes(trial.draw.randrange(100_000))),
        "deep brackets": lambda: path.write_text("[" * 200_000),
        "a page of HTML": lambda: path.write_text("<html>503</html>"),
        "null": lambda: path.write_text("null"),
        "a large sparse file": lambda: (path.touch(), os.truncate(path, 1 << 40)),
    }
    makers[kind]()


THINGS = (
    "a FIFO", "a folder", "a link to nothing", "a link to itself", "an endless device", "a terminal", "a socket", "noise",
    "deep brackets", "a page of HTML", "null", "a large sparse file",
)  # fmt: skip


@fault("a checkpoint file replaced by something else", "damage")
def replaced(trial: Trial) -> Outcome:
    at, path = victim(trial)
    kind = trial.draw.choice(THINGS)
    something_else(path, kind, trial)
    return falls_back(trial, at, f"{kind} as {path.name}")


def impossible(trial: Trial, manifest: dict[str, Any]) -> str:
    """Give a manifest an impossible value; return a description."""
    draw = trial.draw
    number = draw.choice([-1, 2**63, 2**70, 1.5, "4", None, True, [4], float("1e308")])
    key = draw.choice(["step", "samples_seen", "updates", "guard", "tensors", "files", "config", "format", "entry", "range"])
    file = draw.choice(sorted(manifest["files"]))
    if key == "guard":
        name = draw.choice(["skipped", "in_a_row", "window", "rollbacks"])
        manifest["guard"][name] = draw.choice([-1, "x", None, [None], {"a": 1}])
        return f"guard.{name} = {manifest['guard'][name]!r}"
    if key == "entry":
        name = draw.choice(["bytes", "sha256"])
        manifest["files"][file][name] = draw.choice([-5, None, "zz", 2**64, []])
        return f"{name} of {file} = {manifest['files'][file][name]!r}"
    if key == "range":
        ranges = manifest["files"][file]["ranges"]
        name = draw.choice(sorted(ranges))
        ranges[name] = draw.choice([[-1, 5], [0], None, [0, 2**62], ["a", 1], [5, 1], [0, -3], [0.5, 1]])
        return f"range of {name} = {ranges[name]!r}"
    if key in ("tensors", "files"):
        manifest[key] = draw.choice([{}, [], None, {"x": [2]}, {"x": {"bytes": 1, "sha256": "y"}}, {"../x": {"bytes": 1}}])
    elif key == "config":
        manifest[key] = draw.choice([{}, None, [], {"model": 3}, {"nonsense": {"a": 1}}])
    else:
        manifest[key] = number
    return f"{key} = {str(manifest[key])[:60]}"


@fault("a sealed manifest with impossible values", "manifests")
def lies(trial: Trial) -> Outcome:
    at, _ = victim(trial)
    path = trial.run / "checkpoints" / f"step-{at:08d}" / MANIFEST
    manifest = json.loads(path.read_text())
    what = impossible(trial, manifest)
    path.write_bytes(seal(manifest))
    if "config = " in what:  # another model or none: refused, which is not damage
        before = trial.snapshot()
        codes = trial.train()
        if codes != [0] * WORLD:
            line = trial.check_refused(codes)
            assert trial.snapshot() == before, "checkpoints were changed"
            return refused(line.replace(str(trial.run), ""))
        trial.check_equals_oracle()
        return survived(what)
    return falls_back(trial, at, what)


@fault("a manifest without its checksum", "manifests")
def unsealed(trial: Trial) -> Outcome:
    at, _ = victim(trial)
    path = trial.run / "checkpoints" / f"step-{at:08d}" / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["checksum"]
    path.write_text(json.dumps(manifest))
    return falls_back(trial, at, "no checksum")


@fault("a checkpoint under the name of another step", "manifests")
def renamed(trial: Trial) -> Outcome:
    at = trial.begin(at=6)
    root = trial.run / "checkpoints"
    if trial.draw.random() < 0.5:
        shutil.rmtree(root / "step-00000006")
        shutil.copytree(root / "step-00000002", root / "step-00000006")
        return falls_back(trial, at, "step 2 as step 6")
    (root / "step-00000006").rename(root / "step-00000012")
    trial.finish(damaged=True)
    assert "resumed at step 4" in trial.log, trial.log[-2000:]
    return survived("step 6 as step 12: skipped and quarantined")


@fault("every checkpoint damaged", "damage")
def all_damaged(trial: Trial) -> Outcome:
    trial.begin(at=trial.draw.choice([2, 4, 6]))
    for folder in checkpoints(trial.run):
        path = trial.draw.choice(sorted(folder.iterdir()))
        trial.draw.choice([path.unlink, lambda p=path: os.truncate(p, 7)])()
    before = trial.snapshot()
    line = trial.check_refused(trial.train())
    assert "run.ignore_damaged=true" in line
    assert trial.snapshot() == before, "a refusal changed files"
    trial.finish(damaged=True, sections={"run": {"ignore_damaged": True}})
    return refused(line.replace(str(trial.run), "")[:160])


@fault("foreign files in the checkpoint folder", "damage")
def strays(trial: Trial) -> Outcome:
    at = trial.begin()
    root, draw = trial.run / "checkpoints", trial.draw
    root.mkdir(exist_ok=True)
    names = draw.sample(
        ["step-9", "step-00000006-good", ".writing-step-00000008", ".removing-step-00000002", "latest.bak", "notes.txt",
         "step-99999999999999999999", "step-zzz", ".probe-00001", "lost+found"], 4,
    )  # fmt: skip
    for name in names:
        if not (root / name).exists() and draw.random() < 0.5 and not name.startswith("."):
            (root / name).write_text("foreign")
        elif not (root / name).exists():
            (root / name).mkdir()
            (root / name / "file").write_text("foreign")
    if ".probe-00001" in names:
        line = trial.check_refused(trial.train())
        assert trial.newest() == at
        return refused(line.replace(str(trial.run), ""))
    latest = root / "latest"
    latest.write_text(draw.choice(["", "step-00000077", "/etc", "x" * 10_000]))
    trial.finish()
    for name in names:
        assert (root / name).exists() != name.startswith("."), f"{name} was removed, or left"
    return survived(f"{', '.join(names)}; continued from step {at}")


@fault("config.yaml lost, emptied or cut off", "manifests")
def config_lost(trial: Trial) -> Outcome:
    at = trial.begin(at=trial.draw.choice([2, 4, 6]))
    path, how = trial.run / "config.yaml", trial.draw.choice(["missing", "empty", "cut", "noise", "list"])
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": path.read_bytes()[:90], "noise": b"\xff\0:", "list": b"[1, 2]"}[how])
    before = trial.snapshot()
    line = trial.check_refused(trial.train(sections={"run": {"seed": 7}}))
    assert "run.seed was 0 and is now 7" in line
    assert trial.snapshot() == before
    trial.finish()
    return refused(
        f"{how}, and another seed: {line.replace(str(trial.run), '')[:120]}; continued from step {at} with its own"
    )


@fault("another value of a setting that affects results", "identity")
def another_run(trial: Trial) -> Outcome:
    from tests.config.test_resume_check import OTHER

    at = trial.begin(at=trial.draw.choice([2, 4, 6]))
    name = trial.draw.choice(sorted(OTHER.keys() - {"image.buckets", "text.max_tokens", "train.dtype"}))
    section, key = name.split(".")
    if trial.draw.random() < 0.5:
        (trial.run / "config.yaml").unlink()
    before = trial.snapshot()
    line = trial.check_refused(trial.train(sections={section: {key: OTHER[name]}}))
    # A value may also be refused by itself: lora.rank requires the checkpoint of a base model.
    assert f"{name} was " in line or f"{name}=" in line, line
    assert trial.snapshot() == before
    trial.finish()
    return refused(f"{line.replace(str(trial.run), '')[:140]}; continued from step {at}")


@fault("other ranks, another stage, other expert parallelism", "identity")
def another_topology(trial: Trial) -> Outcome:
    """What was restored is saved again at once and must have the same values."""
    import torch

    from raphael_dist.checkpoint.reader import CheckpointReader

    at = trial.begin(at=trial.draw.choice([2, 4, 6]))
    world = trial.draw.choice([1, 2])
    ep = trial.draw.choice([(1, 1), (2, 2), (2, 1), (1, 2)]) if world == 2 else (1, 1)
    stage = trial.draw.choice([1, 2] if max(ep) > 1 else [0, 1, 2, 3])
    sections = {**trial.sections, "parallel": {"space_ep": ep[0], "time_ep": ep[1]}}
    sections["train"] = {**sections["train"], "max_steps": at}  # nothing is left to train
    spec = {"worker": "tortured", "run_dir": str(trial.run), "stage": stage, "sections": sections, "save_again": True}
    codes = trial.forks.run(trial.outputs, world, 300, **spec)
    assert codes == [0] * world, f"exit codes {codes}:\n{(trial.outputs / 'out-0.txt').read_text()[-3000:]}"
    root = trial.run / "checkpoints"
    was, now = (CheckpointReader(root / f"step-{step:08d}") for step in (at, 99))
    assert was.kinds() == now.kinds()
    for kind in was.kinds():
        for name in was.shapes:
            assert torch.equal(was.whole(kind, name), now.whole(kind, name)), f"{kind} of {name} differs"
    ranks = counted(world, "rank")
    return survived(f"{ranks}, ZeRO-{stage}, experts over {ep[0]} and {ep[1]}: all values of step {at} are there")
