"""A campaign: every variant with every seed as a run of the trainer, some at a time, in one folder.

OUT/protocol.json says what all runs have in common, OUT/runs/VARIANT/seed-S is a run directory of the trainer, and the
`finished.json` in it says that nothing is left to do there. What was ended goes on by the same command: a run by its
checkpoint, the campaign with the first run that is not finished.
"""

import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ablations.size import size_of
from ablations.variants import Base, Variant
from raphael_dist.errors import EXIT_INTERRUPTED, EXIT_NON_FINITE, UserError
from raphael_dist.evaluation.drawn import claim
from raphael_dist.parallel.ranks import free_port
from raphael_dist.storage.files import read_text, replace_bytes

ROOT = Path(__file__).resolve().parent.parent.parent
FINISHED = "finished.json"
BENCHMARK = "benchmark"
PATIENCE_S = 86_400  # with a run that a killed campaign left behind: it ends, and this one finds it complete
# Not part of the protocol: what each run has of its own, and how runs are watched; but for what decides the numbers there.
FREE, DECIDES = ("run.", "train.max_steps"), {"run.init_from", "run.init_missing"}
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Campaign:
    """What is run. images: of each run, rounded up to whole steps. benchmark: the emoji benchmark after each run. jobs: runs
    at a time.
    """

    out: Path
    base: Base
    variants: list[Variant]
    seeds: int
    images: int | None
    ranks: int
    benchmark: bool
    jobs: int

    @property
    def steps(self) -> int:
        """Optimizer steps of each run."""
        train = self.base.config().train
        return train.max_steps if self.images is None else -(-self.images // train.global_batch)

    def folder(self, variant: Variant, seed: int) -> Path:
        return self.out / "runs" / variant.name / f"seed-{seed}"

    def runs(self) -> Iterator[tuple[Variant, int]]:
        """Yield all runs in order: every variant with one seed before any with the next."""
        for seed in range(self.seeds):
            for variant in self.variants:
                yield variant, seed

    def protocol(self) -> dict[str, Any]:
        """Return what decides the numbers of all runs; what has its default is left out, so that fields may be added."""
        tree = self.base.config().model_dump(mode="json", exclude_defaults=True)
        flat = {f"{section}.{key}": value for section, fields in tree.items() for key, value in fields.items()}
        fields = {key: value for key, value in flat.items() if not key.startswith(FREE) or key in DECIDES}
        return {"images": self.steps * self.base.config().train.global_batch, "ranks": self.ranks, **fields}


@contextmanager
def claimed(campaign: Campaign) -> Iterator[None]:
    """Make the folder this campaign's. UserError: another is at work in it, or its runs were made otherwise."""
    claim(campaign.out, campaign.protocol())
    with open(campaign.out / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {campaign.out}: another campaign is at work there; wait, or use --table") from None
        yield


def carry_out(campaign: Campaign, tell: Tell, after_each: Callable[[], object]) -> None:
    """Run what is not finished. UserError: a run that cannot go on; KeyboardInterrupt: one was told to stop.

    Whatever ends it, runs at work save and end first.
    """
    runs, programs = list(campaign.runs()), Programs(campaign)
    errors: list[BaseException] = []  # as they came: the others end because of the first

    def one(number: int, variant: Variant, seed: int) -> None:
        try:
            _carry_out_one(campaign, programs, variant, seed, f"[{number}/{len(runs)}] ", tell)
        except BaseException as error:
            errors.append(error)
            programs.stop()  # at once: this thread would take up the next run
            raise

    with ThreadPoolExecutor(campaign.jobs) as pool:
        futures = [pool.submit(one, number, *run) for number, run in enumerate(runs, start=1)]
        try:
            for future in as_completed(futures):
                future.result()
                after_each()
        except BaseException as error:
            errors.append(error)
            programs.stop()
            raise errors[0] from None


def _carry_out_one(campaign: Campaign, programs: "Programs", variant: Variant, seed: int, which: str, tell: Tell) -> None:
    programs.go_on()
    folder, name = campaign.folder(variant, seed), f"{variant.name}, seed {seed}"
    found = finished(folder)
    if found is None:
        tell(f"{which}{name}: {folder}")
        _train(campaign, programs, variant, seed)
    elif found["overrides"] != variant.overrides:
        raise UserError(
            f"{folder}: made with {found['overrides']}, and {variant.name} means {variant.overrides} now; "
            "remove it, or choose another --out"
        )
    if campaign.benchmark and not (folder / BENCHMARK / "results.json").is_file() and not diverged(folder):
        tell(f"{which}{name}: the emoji benchmark")
        arguments = ["-m", "raphael_dist.evaluate", "emoji", "--checkpoint", str(folder)]
        code = programs.run([*arguments, "--out", str(folder / BENCHMARK)], folder)
        _check(code, f"{name}, benchmark", folder)


def finished(folder: Path) -> dict[str, Any] | None:
    """Return what `finished.json` of a run says, None without one. UserError: it cannot be read."""
    path = folder / FINISHED
    if not path.is_file():
        return None
    try:
        found = json.loads(read_text(path))
        assert isinstance(found["overrides"], dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it, and the run goes on") from None
    return dict(found)


def diverged(folder: Path) -> bool:
    """Return whether a finished run had no finite loss any more."""
    return (finished(folder) or {}).get("outcome") == "diverged"


def _train(campaign: Campaign, programs: "Programs", variant: Variant, seed: int) -> None:
    folder = campaign.folder(variant, seed)
    folder.mkdir(parents=True, exist_ok=True)
    own = {"run.dir": str(folder), "run.seed": str(seed), "train.max_steps": str(campaign.steps)}
    more = {"run.lock_wait_s": str(PATIENCE_S), "checkpoint.keep": "1"}
    fields = {**more, **campaign.base.overrides, **variant.overrides, **own}
    arguments = ["--config", campaign.base.name, *(f"{key}={text}" for key, text in fields.items())]
    code = programs.run([str(ROOT / "raphael_dist" / "train.py"), *arguments], folder)
    if code != EXIT_NON_FINITE:
        _check(code, f"{variant.name}, seed {seed}", folder)
    size = size_of(campaign.base.config(variant.overrides))
    result = {
        "variant": variant.name,
        "seed": seed,
        "what": variant.what,
        "overrides": variant.overrides,
        "match": variant.match,
        "outcome": "diverged" if code == EXIT_NON_FINITE else "complete",
        "steps": campaign.steps,
        "parameters": size.parameters,
        "flops_per_image": size.flops,
    }
    replace_bytes(folder / FINISHED, json.dumps(result, indent=1).encode())


class Programs:
    """Starts programs on the ranks, from several threads, and ends them all."""

    def __init__(self, campaign: Campaign) -> None:
        self._ranks = campaign.ranks
        self._threads = max(1, len(os.sched_getaffinity(0)) // (campaign.jobs * campaign.ranks))
        self._lock, self._at_work, self._stopped = threading.Lock(), set[subprocess.Popen[bytes]](), False

    def run(self, arguments: list[str], folder: Path) -> int:
        """Run a Python program at the lowest priority; return its exit code. What it says goes to output.txt."""
        launcher = [sys.executable]
        if self._ranks > 1:
            port = ["--master_port", str(free_port())]
            launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(self._ranks), *port]
        told = folder / "exit-code"  # torchrun turns every code into 1
        told.unlink(missing_ok=True)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {"OMP_NUM_THREADS": str(self._threads), **os.environ, "RAPHAEL_EXIT_FILE": str(told), "PYTHONPATH": path}
        with open(folder / "output.txt", "ab") as output:
            process = self._start(["nice", "-n", "19", *launcher, *arguments], env, output)
            code = process.wait()
        with self._lock:
            self._at_work.remove(process)
        with suppress(OSError, ValueError):
            return int(told.read_text())
        return code

    def _start(self, command: list[str], env: dict[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
        with self._lock:
            self.go_on()
            # A session of its own: Ctrl-C in a terminal reaches this process alone, which passes it on once.
            process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            with suppress(OSError):  # Linux's scheduler shares out time among sessions first, by this
                Path(f"/proc/{process.pid}/autogroup").write_text("19")
            self._at_work.add(process)
        return process

    def go_on(self) -> None:
        """Raise KeyboardInterrupt after `stop`."""
        if self._stopped:
            raise KeyboardInterrupt

    def stop(self) -> None:
        """Start no more programs, and tell those at work to end: the trainer saves first. `run` returns then."""
        with self._lock:
            self._stopped = True
            for process in self._at_work:
                process.terminate()


def _check(code: int, name: str, folder: Path) -> None:
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        lines = (folder / "output.txt").read_text(errors="replace").splitlines()
        said = next((line for line in reversed(lines) if line.startswith("error")), f"exit code {code}")
        raise UserError(f"{name}: {said.removeprefix('error: ')} ({folder / 'output.txt'}); the same command goes on")
