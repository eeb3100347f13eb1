"""An ablation campaign: every variant of a model with every seed is a run of the trainer, all in one folder.

OUT/protocol.json holds the settings that all runs share. OUT/runs/VARIANT/seed-S is a run directory of the trainer, which
has a `finished.json` when the run is complete. The same command continues a stopped campaign with its first
unfinished run, from the newest checkpoint of that run.
"""

import fcntl
import json
import os
import signal
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
from ablations.variants import Base, Variant, steps_of
from raphael_dist.errors import EXIT_INTERRUPTED, EXIT_NON_FINITE, UserError
from raphael_dist.evaluation.draw import record_protocol
from raphael_dist.runtime.ranks import free_port
from raphael_dist.storage.files import no_links, replace_bytes
from raphael_dist.text import read_text

ROOT = Path(__file__).resolve().parent.parent.parent
FINISHED = "finished.json"
BENCHMARK, TEXT = "benchmark", "text"
VALIDATIONS = 20  # points of the curves over images seen, unless train.val_every is set
LOCK_WAIT_S = 86_400  # seconds to wait for the end of a run that a killed campaign has left running
# Fields that begin with one of FREE may change when a campaign is continued, except those in AFFECTS_RESULTS.
FREE, AFFECTS_RESULTS = ("run.", "train.max_steps"), {"run.init_from", "run.reinit"}
Reporter = Callable[[str], None]


@dataclass(frozen=True)
class Campaign:
    """The settings of an ablation campaign.

    Attributes:
        out: folder of the campaign.
        base: the configuration that all variants change.
        variants: the models to train.
        images: number of images on which each run trains, rounded up to whole steps; None: as configured.
        ranks: number of processes of each run.
        benchmark: whether to run the emoji benchmark after each run.
        read: file of captions with quoted text. After each run, its images of these captions are sampled, and the text in
            them is read by OCR and scored (`evaluate text --captions`). None: no such test.
        jobs: number of runs at the same time.
    """

    out: Path
    base: Base
    variants: list[Variant]
    images: int | None
    ranks: int
    benchmark: bool
    read: str | None
    jobs: int

    @property
    def steps(self) -> int:
        """Number of optimizer steps of each run."""
        return steps_of(self.base, self.images)

    def folder(self, variant: Variant, seed: int) -> Path:
        return self.out / "runs" / variant.name / f"seed-{seed}"

    def runs(self) -> Iterator[tuple[Variant, int]]:
        """Yield all runs as (variant, seed) in order: every variant with one seed before any variant with the next seed."""
        for seed in range(max(variant.seeds for variant in self.variants)):
            for variant in self.variants:
                if seed < variant.seeds:
                    yield variant, seed

    def protocol(self) -> dict[str, Any]:
        """Return the settings that affect results, by field. They must not change when a campaign is continued.

        Fields with default values are omitted, so that fields can be added to the configuration later.
        """
        tree = self.base.config().model_dump(mode="json", exclude_defaults=True)
        flat = {f"{section}.{key}": value for section, fields in tree.items() for key, value in fields.items()}
        fields = {key: value for key, value in flat.items() if not key.startswith(FREE) or key in AFFECTS_RESULTS}
        return {"images": self.steps * self.base.config().train.global_batch_size, "ranks": self.ranks, **fields}


@contextmanager
def lock(campaign: Campaign) -> Iterator[None]:
    """Return a context manager that locks the campaign's folder, so that no other process can run the campaign.

    Raises UserError if another process runs the campaign, or if the folder has runs with other settings.
    """
    record_protocol(campaign.out, campaign.protocol())
    with open(campaign.out / ".lock", "a", opener=no_links) as lock_file:
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out={campaign.out} is in use by another campaign. Wait for it, or use --table to see its results."
            ) from None
        yield


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Return a context manager whose body is interrupted after `seconds`, as by Ctrl-C. None: it is not interrupted."""
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, seconds or 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def run_all(campaign: Campaign, report: Reporter, after_each: Callable[[], object]) -> None:
    """Run all unfinished runs of the campaign. After an error, the other runs save and end before the error is raised.

    Args:
        campaign: the campaign.
        report: called with a line of progress.
        after_each: called after each run.

    Raises:
        UserError: a run cannot continue.
        KeyboardInterrupt: a run was interrupted.
    """
    runs, processes = list(campaign.runs()), Processes(campaign)
    errors: list[BaseException] = []  # in order; later ones are consequences of the first

    def run_one(number: int, variant: Variant, seed: int) -> None:
        try:
            _run(campaign, processes, variant, seed, f"[{number}/{len(runs)}] ", report)
        except BaseException as error:
            errors.append(error)
            processes.stop()  # before this thread starts the next run
            raise

    with ThreadPoolExecutor(campaign.jobs) as pool:
        futures = [pool.submit(run_one, number, *run) for number, run in enumerate(runs, start=1)]
        try:
            for future in as_completed(futures):
                future.result()
                after_each()
        except BaseException as error:
            errors.append(error)
            processes.stop()
            raise errors[0] from None


def _run(campaign: Campaign, processes: "Processes", variant: Variant, seed: int, prefix: str, report: Reporter) -> None:
    processes.raise_if_stopped()
    folder, name = campaign.folder(variant, seed), f"{variant.name}, seed {seed}"
    result = read_finished(folder)
    if result is None:
        report(f"{prefix}{name}: {folder}")
        _train(campaign, processes, variant, seed)
    elif result["overrides"] != variant.overrides:
        before, now = result["overrides"], variant.overrides
        key = next(key for key in {**before, **now} if before.get(key) != now.get(key))
        raise UserError(
            f"{folder} was created with {key}={before.get(key)}, but the variant {variant.name} has {key}={now.get(key)} "
            "now. Remove the folder, or choose another --out."
        )
    if diverged(folder):
        return
    for what, out, arguments in measurements(campaign, folder):
        if not (out / "results.json").is_file():
            report(f"{prefix}{name}: {what}")
            code = processes.run([*arguments, "--checkpoint", str(folder), "--out", str(out)], folder)
            _check(code, f"{name}, {what}", folder)


def measurements(campaign: Campaign, folder: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """Yield the measurements to take of the finished run in `folder`: (name, folder for results, program and arguments)."""
    if campaign.benchmark:
        yield "the emoji benchmark", folder / BENCHMARK, [str(ROOT / "tools" / "emoji_benchmark.py")]
    if campaign.read:
        command = ["-m", "raphael_dist", "evaluate", "text", "--captions", campaign.read]
        guidance = str(campaign.base.config().sample.guidance)
        yield "reading text", folder / TEXT, [*command, "--guidance", guidance]


def read_finished(folder: Path) -> dict[str, Any] | None:
    """Return the content of `finished.json` in a run directory; None if there is none. UserError: it cannot be read."""
    path = folder / FINISHED
    if not path.is_file():
        return None
    try:
        result = json.loads(read_text(path))
        assert isinstance(result["overrides"], dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        why = error if isinstance(error, OSError | ValueError) else "it has no object `overrides`"
        raise UserError(f"{path} cannot be read ({why}). Remove the file; the next start continues the run.") from None
    return dict(result)


def diverged(folder: Path) -> bool:
    """Return whether the run in this directory is finished and ended with an infinite or NaN loss."""
    return (read_finished(folder) or {}).get("outcome") == "diverged"


def _train(campaign: Campaign, processes: "Processes", variant: Variant, seed: int) -> None:
    folder = campaign.folder(variant, seed)
    folder.mkdir(parents=True, exist_ok=True)
    own = {"run.dir": str(folder), "run.seed": str(seed), "train.max_steps": str(campaign.steps)}
    defaults = {"run.lock_wait_s": str(LOCK_WAIT_S), "checkpoint.keep": "1"}
    if not campaign.base.config().train.val_every:
        defaults["train.val_every"] = str(max(1, campaign.steps // VALIDATIONS))
    fields = {**defaults, **campaign.base.overrides, **variant.overrides, **own}
    arguments = ["--config", campaign.base.name, *(f"{key}={text}" for key, text in fields.items())]
    code = processes.run([str(ROOT / "raphael_dist" / "train.py"), *arguments], folder)
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


class Processes:
    """Runs Python programs, such as the trainer, in processes that are started by several threads and ended together."""

    def __init__(self, campaign: Campaign) -> None:
        self._ranks = campaign.ranks
        self._threads = max(1, len(os.sched_getaffinity(0)) // (campaign.jobs * campaign.ranks))
        self._lock, self._active, self._stopped = threading.Lock(), set[subprocess.Popen[bytes]](), False

    def run(self, arguments: list[str], folder: Path) -> int:
        """Run a Python program on the campaign's number of ranks; wait for it and return its exit code.

        `arguments`: path and arguments of the program. Its output is appended to output.txt in `folder`.
        """
        launcher = [sys.executable]
        if self._ranks > 1:
            port = ["--master_port", str(free_port())]
            launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(self._ranks), *port]
        code_file = folder / "exit-code"  # torchrun turns every code into 1
        code_file.unlink(missing_ok=True)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {"OMP_NUM_THREADS": str(self._threads), **os.environ, "RAPHAEL_EXIT_FILE": str(code_file), "PYTHONPATH": path}
        with open(folder / "output.txt", "ab", opener=no_links) as output:
            process = self._start([*launcher, *arguments], env, output)
            code = process.wait()
        with self._lock:
            self._active.remove(process)
        with suppress(OSError, ValueError):
            return int(code_file.read_text())
        return code

    def _start(self, command: list[str], env: dict[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
        with self._lock:
            self.raise_if_stopped()
            # In a session of its own, since Ctrl-C reaches the whole session of a terminal.
            process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            with suppress(OSError):  # Linux's scheduler divides time among sessions first, by this priority
                Path(f"/proc/{process.pid}/autogroup").write_text("19")
            self._active.add(process)
        return process

    def raise_if_stopped(self) -> None:
        """Raise KeyboardInterrupt if `stop` has been called."""
        if self._stopped:
            raise KeyboardInterrupt

    def stop(self) -> None:
        """Terminate active processes and let no more start. The trainer saves a checkpoint first; then `run` returns."""
        with self._lock:
            self._stopped = True
            for process in self._active:
                process.terminate()


def _check(code: int, name: str, folder: Path) -> None:
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        lines = (folder / "output.txt").read_text(errors="replace").splitlines()
        error = next((line for line in reversed(lines) if line.startswith("error")), f"exit code {code}")
        raise UserError(
            f"{name} failed: {error.removeprefix('error: ')} (its output is in {folder / 'output.txt'}). Remove "
            "the cause, and start the same command again to continue the campaign."
        )
