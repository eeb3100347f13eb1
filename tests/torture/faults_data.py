"""Changed, damaged, missing or hostile data sets, encoders and cached features.

Runs use the real command line and a small data set on disk: three shards of eight images, a random CLIP.
"""

import bz2
import contextlib
import gzip
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from raphael_dist.text import counted
from tests.data.features.test_encoders import save_clip
from tests.data.shards.test_shards import png, png_header, write_raw, write_shard
from tests.lib.servers import Faults, http_files
from tests.torture.faults_process import alive
from tests.torture.kinds import fault
from tests.torture.trial import EVERY, STEPS, WORLD, Outcome, Trial, refused, survived
from tests.training.test_training import SMALL


@dataclass
class DataTrial:
    """A run on its own copy of the oracle's data set."""

    trial: Trial

    def __post_init__(self) -> None:
        t = self.trial
        if "data" not in t.shared:
            t.shared["data"] = make_world(t.oracle / "data")
            t.oracle = t.shared["data"] / "run"
            plain = DataTrial.__new__(DataTrial)
            plain.trial, plain.home = t, t.shared["data"]
            codes = plain.train(t.oracle)
            assert codes == [0] * WORLD, f"the oracle ended with {codes}:\n{t.output}"
        t.oracle = t.shared["data"] / "run"
        self.home = t.folder / "home"
        shutil.copytree(t.shared["data"], self.home, ignore=shutil.ignore_patterns("run"))

    def arguments(self, run: Path) -> list[str]:
        """Return the command line."""
        return [
            *SMALL,
            "--deepspeed_config=ds_configs/zero2.json",
            f"run.dir={run}",
            f"data.cache_dir={self.home}/cache",
            f"data.shards={self.home}/shards/*.tar*",
            "data.val_shards=[]",
            "sample.prompts=[]",
            f"text.encoder={self.home}/clip",
            "text.max_tokens=6",
            "model.text_width=32",
            f"train.max_steps={STEPS}",
            f"checkpoint.every={EVERY}",
            "checkpoint.keep=99",
            "run.hang_timeout_s=60",
        ]

    def train(
        self, run: Path, meanwhile: Callable[[list[int]], None] | None = None, *more: str, **spec: dict[int, dict[str, int]]
    ) -> list[int]:
        """Run the ranks until they end."""
        t = self.trial
        differ = {argument.partition("=")[0] for argument in more}
        arguments = [*(a for a in self.arguments(run) if a.partition("=")[0] not in differ), *more]
        return t.forks.run(t.outputs, WORLD, 300, meanwhile, worker="tortured", arguments=arguments, **spec)

    def begin(self, at: int | None = None) -> int:
        """As `Trial.begin`."""
        return self.trial.begin(at=at)

    def finish(self) -> None:
        """As `Trial.finish`."""
        codes = self.train(self.trial.run)
        assert codes == [0] * WORLD, f"exit codes {codes}:\n{self.trial.output}"
        self.trial.check_equals_oracle()

    @property
    def shards(self) -> list[Path]:
        """The files of the data set."""
        return sorted((self.home / "shards").iterdir())


def make_world(folder: Path) -> Path:
    """Write shards and an encoder."""
    (folder / "shards").mkdir(parents=True)
    for shard in range(3):
        rows = [sample(8 * shard + i) for i in range(8)]
        write_shard(folder / "shards" / f"s{shard}.tar", rows)
    save_clip(folder / "clip", "[pad]")
    return folder


def sample(n: int) -> tuple[str, dict[str, bytes]]:
    """Return a sample: a grey image, a caption of three letters, an edge map."""
    letters = " ".join("abc"[(n // 3**i) % 3] for i in range(3))
    return f"{n:04d}", {"png": png(8, 8, 10 * (n % 25)), "txt": letters.encode(), "edge.png": png(8, 8, 255 - 10 * (n % 25))}


def refuses(case: DataTrial, field: str) -> str:
    """Require that the run refuses other data by the field's name; return its line."""
    before = case.trial.snapshot()
    line = case.trial.check_refused(case.train(case.trial.run))
    assert field in line, line
    assert case.trial.snapshot() == before, "a refusal changed checkpoints"
    return line.replace(str(case.home), "").replace(str(case.trial.run), "")[:160]


@fault("captions replaced in shards of the same names and sizes", "data", "data")
def captions(trial: Trial) -> Outcome:
    case = DataTrial(trial)
    case.begin(at=trial.draw.choice([2, 4, 6]))
    shard = trial.draw.randrange(3)
    path = case.shards[shard]
    rows = [sample(8 * shard + i) for i in range(8)]
    size, i = path.stat().st_size, trial.draw.randrange(8)
    rows[i][1]["txt"] = b"c c c" if rows[i][1]["txt"] != b"c c c" else b"a a a"
    path.unlink()
    write_shard(path, rows)
    assert path.stat().st_size == size
    line = refuses(case, "data.shards")
    # With the original captions it continues.
    path.write_bytes((trial.shared["data"] / "shards" / path.name).read_bytes())
    case.finish()
    return refused(line)


@fault("a shard gone, cut off or with a bit flipped, before a restart", "data", "data")
def shard_changed(trial: Trial) -> Outcome:
    case = DataTrial(trial)
    at = case.begin(at=trial.draw.choice([2, 4, 6]))
    path, how = trial.draw.choice(case.shards), trial.draw.choice(["gone", "cut", "bit", "more", "unreadable"])
    data = bytearray(path.read_bytes())
    if how in ("gone", "unreadable"):
        path.unlink()
        if how == "unreadable":
            path.symlink_to(path.name)
    elif how == "cut":
        path.write_bytes(data[: trial.draw.randrange(len(data))])
    elif how == "bit":
        data[trial.draw.randrange(len(data))] ^= 1 << trial.draw.randrange(8)
        path.write_bytes(data)
    else:
        write_shard(path.with_name("s9.tar"), [sample(99)])
    before = trial.snapshot()
    codes = case.train(trial.run)
    if codes == [0] * WORLD:  # a bit between the members, or of a image that is cached
        trial.check_equals_oracle()
        return survived(f"{path.name} {how}: not a byte that counts")
    line = trial.check_refused(codes)
    assert trial.snapshot() == before
    (case.home / "shards" / "s9.tar").unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes((trial.shared["data"] / "shards" / path.name).read_bytes())
    case.finish()
    return refused(f"{how}: {line.replace(str(case.home), '')[:140]}; with it back, on from step {at}")


@fault("an encoder with other weights", "data", "data")
def encoder(trial: Trial) -> Outcome:
    case = DataTrial(trial)
    case.begin(at=trial.draw.choice([2, 4, 6]))
    path = next((case.home / "clip" / "text_encoder").glob("*.safetensors"))
    whole = path.read_bytes()
    data = bytearray(whole)
    data[-trial.draw.randrange(1, 2000)] ^= 1 << trial.draw.randrange(8)
    path.write_bytes(data)
    line = refuses(case, "text.encoder")
    path.write_bytes(whole)
    case.finish()
    return refused(line)


@fault("cached features damaged or gone, before a restart", "data", "data")
def cache_damaged(trial: Trial) -> Outcome:
    case = DataTrial(trial)
    at = case.begin()
    files = sorted(p for p in (case.home / "cache").rglob("*") if p.is_file())
    path, how = (
        trial.draw.choice(files),
        trial.draw.choice(["bit", "bit", "bit", "cut", "empty", "gone", "zeros", "all gone"]),
    )
    data = bytearray(path.read_bytes())
    if how == "all gone":
        shutil.rmtree(case.home / "cache")
    elif how == "gone" or not data:
        path.unlink()
    elif how == "bit":
        data[trial.draw.randrange(len(data))] ^= 1 << trial.draw.randrange(8)
        path.write_bytes(data)
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "zeros": bytes(len(data))}[how])
    codes = case.train(trial.run)
    what = f"{how}, {path.relative_to(case.home / 'cache')}, at step {at}"
    if codes != [0] * WORLD:
        line = trial.check_refused(codes)
        shutil.rmtree(case.home / "cache", ignore_errors=True)  # what the line says
        case.finish()
        return refused(f"{what}: {line.replace(str(case.home), '')[:140]}")
    if not list((case.home / "cache").rglob("damaged-*")):
        trial.check_equals_oracle()
        return survived(f"{what}: computed again")
    assert "was renamed to damaged-" in trial.log, "the damage was not logged"
    # Its samples are encoded when needed; the file held the same values rounded.
    trial.check_equals_oracle(rounded=1e-3)
    return survived(f"{what}: quarantined, its samples encoded when needed")


@fault("shards and cache removed during the run", "data", "data")
def vanish(trial: Trial) -> Outcome:
    case = DataTrial(trial)
    at, wait = case.begin(), trial.draw.uniform(0.2, 3.0)
    what = trial.draw.choice(["shards", "cache", "a shard", "cache cut off"])

    def meanwhile(pids: list[int]) -> None:
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline and alive(pids):
            time.sleep(0.01)
        if what == "a shard":
            trial.draw.choice(case.shards).unlink()
        elif what == "cache cut off":
            for path in (case.home / "cache").rglob("*.safetensors"):
                os.truncate(path, 10)
        else:
            shutil.rmtree(case.home / what, ignore_errors=True)

    codes = case.train(trial.run, meanwhile)
    assert all(codes) or not any(codes), f"one rank continued alone: {codes}"
    if what == "cache cut off" and "each step encodes the samples of this file" in trial.log:
        assert codes == [0] * WORLD, f"exit codes {codes}:\n{trial.output}"
        trial.check_equals_oracle(rounded=1e-3)  # encoded in the steps, without the cache's rounding
        return survived(f"{what} after {wait:.1f} s; exit codes {codes}, encoded in the steps")
    newest = trial.check_lost_at_most_an_interval(at)
    ended = trial.output
    for path in case.shards if (case.home / "shards").is_dir() else []:
        path.unlink()
    shutil.copytree(trial.shared["data"] / "shards", case.home / "shards", dirs_exist_ok=True)
    if what == "cache cut off" and newest < STEPS:
        codes = case.train(trial.run)
        if codes != [0] * WORLD:
            trial.check_refused(codes)
            shutil.rmtree(case.home / "cache", ignore_errors=True)
    case.finish()
    assert "Traceback" not in ended, f"{what} after {wait:.1f} s, exit codes {codes}:\n{ended[-3000:]}"
    return survived(f"{what} after {wait:.1f} s; exit codes {codes}, on from step {newest}")


@fault("a data worker that is killed", "data", "data")
def worker_killed(trial: Trial) -> Outcome:
    case = DataTrial(trial)
    case.begin(at=0)
    features, wait = trial.draw.choice(["online", "cached"]), trial.draw.uniform(0.0, 2.0)
    killed: list[int] = []

    def meanwhile(pids: list[int]) -> None:
        deadline = time.monotonic() + 60
        while alive(pids) and not killed and time.monotonic() < deadline:
            workers = [p for pid in pids for p in descendants(pid) if "interpreter_watchdog" not in " ".join(p.cmdline())]
            if workers:
                time.sleep(wait)
                victim = trial.draw.choice(workers)
                with contextlib.suppress(psutil.Error):
                    victim.kill()
                    killed.append(victim.pid)
            time.sleep(0.01)

    how = (f"data.features={features}", "data.workers=2")
    trial.oracle = trial.folder / "plain"  # cached features are rounded, those encoded as they are needed are not
    assert case.train(trial.oracle, None, *how) == [0] * WORLD, trial.output
    codes = case.train(trial.run, meanwhile, *how)
    assert codes == [0] * WORLD, f"exit codes {codes}:\n{trial.output}"
    trial.check_equals_oracle()
    assert "bad sample" not in trial.log, "a good sample was taken for a bad one"
    return survived(f"{features}: {len(killed)} killed")


@fault("/dev/shm that is too small", "disks", "data")
def small_shared_memory(trial: Trial) -> Outcome:
    case = DataTrial(trial)
    case.begin(at=0)
    size = trial.draw.choice([1 << 12, 1 << 16, 1 << 20])
    codes = case.train(trial.run, None, "data.workers=2", around={rank: {"shm": size} for rank in range(WORLD)})
    assert codes == [0] * WORLD, f"exit codes {codes}:\n{trial.output}"
    trial.check_equals_oracle()
    return survived(f"{size} bytes")


def descendants(pid: int) -> list[psutil.Process]:
    """Return the processes that a rank has started, [] if it has ended."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


@fault("a byte of a derived file flipped, before a restart", "data", "data")
def derived_flipped(trial: Trial) -> Outcome:
    case = DataTrial(trial)
    at = case.begin(at=trial.draw.choice([0, 2, 4, 6]))
    files = sorted(p for p in (case.home / "cache").rglob("*") if p.is_file() and p.stat().st_size)
    path = trial.draw.choice([p for p in files if p.suffix in (".npy", ".json")] or files)
    data = bytearray(path.read_bytes())
    data[trial.draw.randrange(len(data))] ^= 1 << trial.draw.randrange(8)
    path.write_bytes(data)
    codes = case.train(trial.run)
    what = f"{path.relative_to(case.home / 'cache')}, at step {at}"
    if codes == [0] * WORLD:
        trial.check_equals_oracle()
        return survived(f"{what}: made again, or not a byte that counts")
    line = trial.check_refused(codes)
    shutil.rmtree(case.home / "cache", ignore_errors=True)
    case.finish()
    return refused(f"{what}: {line.replace(str(case.home), '')[:140]}")


@fault("a server of shards that fails for a moment", "data", "data")
def server_fails(trial: Trial) -> Outcome:
    case = DataTrial(trial)
    case.begin(at=0)
    faults = Faults()
    how = trial.draw.choice(["503", "429", "cut"])
    for path in trial.draw.sample(case.shards, 2):
        faults.of[path.name] = [how] * trial.draw.randint(1, 2)
    with http_files(case.home / "shards", faults) as address:
        names = ",".join(f"{address}/{path.name}" for path in case.shards)
        codes = case.train(trial.run, None, f"data.shards=[{names}]", f"data.shard_cache={case.home}/fetched")
    assert codes == [0] * WORLD, f"exit codes {codes}:\n{trial.output}"
    taken = [json.loads(line) for line in trial.metrics_lines()]
    assert len(taken) >= STEPS
    assert "24 images" in trial.output, f"samples were lost:\n{trial.output}"
    return survived(f"{how} for {counted(len(faults.of), 'shard')}")


class Touch:
    """A pickle that would run a command."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self._canary}",)


def hostile(trial: Trial, path: Path, canary: Path) -> str:
    """Write a hostile shard; return its kind."""
    good = [sample(70 + i) for i in range(6)]
    evil = pickle.dumps(Touch(canary))
    kind = trial.draw.choice(
        ["pickles", "no utf-8", "huge image", "names", "double keys", "empty", "cut", "gzip bomb", "bz2", "no tar", "json",
         "zip of death", "long caption", "endless name"]
    )  # fmt: skip
    if kind == "pickles":
        write_shard(path, [*good, ("0090", {"pyd": evil, "pkl": evil, "pickle": evil, "png": evil, "txt": b"a"})])
    elif kind == "no utf-8":
        write_shard(path, [*good, ("0090", {"png": png(8, 8), "txt": b"\xff\xfe\x00", "edge.png": png(8, 8)})])
    elif kind == "huge image":
        write_shard(path, [*good, ("0090", {"png": png_header(30_000, 30_000), "txt": b"a", "edge.png": png(8, 8)})])
    elif kind == "names":
        members = [("../../evil.png", png(8, 8)), ("/etc/evil.txt", b"a"), ("$(touch x).png", png()), ("a\nb.txt", b"a")]
        write_raw(path, [(f"{key}.{name}", data) for key, of in good for name, data in of.items()] + members)
    elif kind == "double keys":
        write_shard(path, [*good, good[0]])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        write_shard(path, good)
        os.truncate(path, trial.draw.randrange(512, path.stat().st_size))
    elif kind == "gzip bomb":
        path.with_suffix(".tar.gz").write_bytes(gzip.compress(bytes(1 << 28), 9))
    elif kind == "bz2":
        path.write_bytes(bz2.compress(bytes(1 << 20)))
    elif kind == "no tar":
        path.write_bytes(trial.draw.randbytes(30_000))
    elif kind == "json":
        bad = json.dumps({"captions": [{"a": []}] * 50, "caption": ["x" * 10]}).encode()
        write_shard(
            path, [*good, ("0090", {"png": png(8, 8), "json": b"[" * 50_000}), ("0091", {"png": png(), "json": bad})]
        )
    elif kind == "zip of death":
        write_shard(path, [*good, ("0090", {"png": b"PK\x03\x04" + bytes(999), "txt": b"a"})])
    elif kind == "long caption":
        write_shard(path, [*good, ("0090", {"png": png(8, 8), "txt": b"a " * 2_000_000, "edge.png": png(8, 8)})])
    else:
        write_raw(path, [("x" * 5000 + ".png", png(8, 8))])
    return kind


@fault("a hostile shard", "data", "data")
def hostile_shard(trial: Trial) -> Outcome:
    case = DataTrial(trial)
    canary = trial.folder / "canary"
    kind = hostile(trial, case.home / "shards" / "s5.tar", canary)
    trial.run.mkdir()
    codes = case.train(trial.run, None, "data.max_bad_fraction=0.3")
    assert not canary.exists(), "code in a shard was run"
    assert not list(Path("/etc").glob("evil*"))
    if codes != [0] * WORLD:
        return refused(f"{kind}: {trial.check_refused(codes).replace(str(case.home), '')[:160]}")
    assert "Traceback" not in trial.output
    assert len(trial.metrics_lines()) >= STEPS
    reports = [line for line in trial.log.splitlines() if "cannot be used" in line or "left out" in line]
    return survived(f"{kind}: {reports[0].split(': ', 1)[-1][:120] if reports else 'trained'}")
