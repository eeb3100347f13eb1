"""Rank: runs raphael_dist/train.py with the tiny model and synthetic batches, with faults on request (tests/lib/forks.py).

Only the data is replaced; command line, trainer, engine and checkpoints are real. The keys of the argument `spec` are
    folder: files of the test; also the run directory, unless "run_dir" names another one
    sections: changes of the tiny configuration
    stage: ZeRO stage (default 1)
    faults: faults by kind; see `Builder`, `inject` and `arm`
    save_again: if true, save the restored state as step 99 instead of training
"""

import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from raphael_dist import train
from raphael_dist.checkpoint.reader import CheckpointReader
from raphael_dist.config.schema import Config
from raphael_dist.data.features.batch_encoder import Encoders
from raphael_dist.data.run_data import DataSource
from raphael_dist.model.batch import Batch
from raphael_dist.model.unet_interface import GateNoise
from raphael_dist.runtime.ranks import Ranks
from raphael_dist.storage import files, tensorfile
from raphael_dist.training import recovery, trainer
from raphael_dist.training.run_state import Run
from tests.lib.synthetic import TREE, synthetic_batch

real_build = trainer.build  # before main replaces it
COUNTED = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


class Builder:
    """Builds synthetic batches. Samples at the positions faults["nan"] are NaN, those at faults["spike"] are very large."""

    def __init__(self, config: Config, num_blocks: int, faults: dict[str, Any]) -> None:
        self._config, self._num_blocks, self._faults = config, num_blocks, faults

    def build(self, slots: Sequence[tuple[int, float]]) -> Batch:
        batch = synthetic_batch(self._config, slots, self._num_blocks)
        if "gate_noise" in self._faults and batch.gate_noise is not None:
            batch.gate_noise = GateNoise(*map(torch.ones_like, batch.gate_noise))
        for kind, factor in (("nan", float("nan")), ("spike", 1e4)):
            for i, (position, _) in enumerate(slots):
                if position in self._faults.get(kind, []):
                    batch.x0[i] *= factor
                    batch.noise[i] *= factor
        return batch


class Synthetic(DataSource):
    """The trainer's source of data, which builds synthetic batches and reads no files."""

    replaced = 0

    def __init__(self, faults: dict[str, Any]) -> None:
        nothing: Any = None
        super().__init__(Encoders(nothing, nothing, None, torch.device("cpu")), nothing, None)
        self._faults = faults

    def fingerprints(self) -> dict[str, str]:
        return {"data.shards": "synthetic"}

    def describe(self) -> str:
        return "0 images"

    def key(self, position: int) -> str:
        return f"sample {position}"

    def builder(self, config: Config, num_blocks: int, device: torch.device) -> Any:
        return Builder(config, num_blocks, self._faults)


def build(
    spec: dict[str, Any], config: Config, tree: dict[str, Any], ranks: Ranks, device: Any, stop: Any, **options: Any
) -> Run:
    """Replace `trainer.build`: build the run with synthetic data, and with the faults of `spec`."""
    torch.set_num_threads(1)
    faults = spec.get("faults", {})
    with counted_reads(Path(spec["folder"]) / f"read-{ranks.rank}.json"):
        run = real_build(config, tree, ranks, device, stop, lambda *_: Synthetic(faults), **options)
    inject(run, faults, ranks.rank)
    return run


@contextmanager
def counted_reads(report: Path) -> Iterator[None]:
    """Return a context manager that counts what this rank reads of checkpoints, and writes it to the JSON file `report`.

    The file has the number of elements that were read, and the names of files that were opened and of those hashed.
    """
    elements, hashed, opened = [0], [], set()
    read, sha256, open_file = CheckpointReader.read, files.sha256, CheckpointReader._stored

    def counting_read(self: Any, kind: str, name: str, start: int, numel: int) -> Any:
        elements[0] += numel
        return read(self, kind, name, start, numel)

    def counting_open(self: Any, name: str) -> Any:
        opened.add(name)
        return open_file(self, name)

    CheckpointReader.read, CheckpointReader._stored = counting_read, counting_open  # type: ignore[method-assign]
    files.sha256 = lambda path: (hashed.append(path.name), sha256(path))[1]
    try:
        yield
    finally:
        CheckpointReader.read, CheckpointReader._stored = read, open_file  # type: ignore[method-assign]
        files.sha256 = sha256
        report.write_text(json.dumps({"elements": elements[0], "hashed": hashed, "opened": sorted(opened)}))


def inject(run: Run, faults: dict[str, Any], rank: int) -> None:
    """Make the faults of this rank happen later in the run.

    `faults`: "inf_grad" makes gradients infinite in some steps, "gate_noise" writes the noise of the gates to a file, and
    "chunk" sets the size of written pieces. A fault of "saving" starts when its step is saved (`arm`).
    """
    tensorfile.CHUNK = faults.get("chunk", 4 * tensorfile.CHUNK) // 4
    if rank in faults.get("inf_grad", {}).get("ranks", []):
        spec = faults["inf_grad"]
        p = dict(run.engine.module.named_parameters())[spec["name"]]
        p.register_hook(lambda g: g * float("inf") if run.progress.step + 1 in spec["steps"] else g)
    if "gate_noise" in faults:  # the noise that the model gets, by step
        run.engine.module.register_forward_pre_hook(
            lambda _, args: _note(faults["gate_noise"], run.progress.step + 1, args[5])
        )
    begin = run.store.begin

    def armed_begin(progress: Any) -> None:
        due = [f for f in faults.get("saving", []) if f["step"] == progress.step]
        if due:
            run.store.finish()  # what fails is this save, not the one before it
        for fault in due:
            if rank in fault["ranks"]:
                arm(fault, run)
        begin(progress)
        if any(fault.get("for_one_save") for fault in due):
            run.store.finish()
            disarm()

    run.store.begin = armed_begin  # type: ignore[method-assign]


def _note(log: str, step: int, noise: GateNoise) -> None:
    with open(log, "a") as file:
        file.write(f"{json.dumps([step, float(noise.time_BLK.min()), float(noise.space_BLYK.max())])}\n")


def arm(fault: dict[str, Any], run: Run) -> None:
    """Start a fault of "saving" on this rank: NaN in a weight, a limit of file size, slow fsync, or death of the process."""
    if "nan_weight" in fault:
        run.engine.fragments.masters()[0][0] = float("nan")
    if "file_size" in fault:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["file_size"], resource.RLIM_INFINITY))
    if "kill_after" in fault:
        threading.Timer(fault["kill_after"], lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    if "sleep_in_fsync" in fault:
        real = os.fsync
        os.fsync = lambda fd: (time.sleep(fault["sleep_in_fsync"]), real(fd))[1]  # type: ignore[assignment]
    if "count" in fault:
        count_calls(fault["count"], fault.get("kill_at"), run.store.root)  # other threads write, too


def disarm() -> None:
    """Remove the limit of file size that `arm` has set."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def count_calls(log: str, kill_at: int | None, folder: Path = Path("/")) -> None:
    """From now on, write the name and path of each call that changes the file system below `folder` to the file `log`.

    `kill_at`: the process is killed by SIGKILL in the call with this number, from 0. None: it is not killed.
    """
    lock, calls = threading.Lock(), [0]
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    write, folder = os.write, folder.resolve()

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            path = _path_of(args[0], kwargs.get("dir_fd"))
            if (name == "open" and not args[1] & os.O_CREAT) or not path.is_relative_to(folder):
                return real(*args, **kwargs)
            with lock:
                if calls[0] == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls[0] += 1
                write(descriptor, f"{name} {path}\n".encode())
            return real(*args, **kwargs)

        return call

    for name in COUNTED:
        setattr(os, name, counted(name, getattr(os, name)))


def _path_of(target: Any, dir_fd: int | None) -> Path:
    """Return the path that a call of `os` refers to.

    `target`: the first argument of the call: a path or a file descriptor. `dir_fd`: descriptor of the folder to which a
    relative path refers; None: the current folder.
    """
    if isinstance(target, int):
        return Path(f"/proc/self/fd/{target}").readlink()
    parent = Path.cwd() if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink()
    return parent / os.fsdecode(target)


def save_again(run: Run) -> bool:
    """Replace `trainer.train`: save the restored state unchanged as step 99, so that a test can compare it.

    The number of updates in the checkpoint is that of the restored optimizer state. Returns True, as after a complete run.
    """
    state = next(iter(run.engine.fragments._optimizer.state.values()))
    with run.store:
        run.store.save(recovery.progress_record(run)._replace(step=99, updates=int(state["step"])))
    return True


def main(spec: dict[str, Any]) -> int:
    """Train as the command line does, with the configuration and faults of `spec`; return the exit code."""
    folder = Path(spec["folder"])
    names = TREE.keys() | spec.get("sections", {}).keys() | {"run", "data"}
    base = {"run": {"dir": spec.get("run_dir", str(folder))}, "data": {"shards": ["synthetic"]}}
    tree = {n: {**TREE.get(n, {}), **base.get(n, {}), **spec.get("sections", {}).get(n, {})} for n in names}
    rank = os.environ["RANK"]
    (folder / f"given-{rank}.yaml").write_text(yaml.safe_dump(tree))
    (folder / f"given-{rank}.json").write_text(json.dumps({"zero_optimization": {"stage": spec.get("stage", 1)}}))
    trainer.build = lambda *args, **options: build(spec, *args, **options)  # type: ignore[assignment]
    if spec.get("save_again"):
        trainer.train = save_again  # type: ignore[assignment]
    arguments = ["--config", str(folder / f"given-{rank}.yaml"), "--deepspeed_config", str(folder / f"given-{rank}.json")]
    return train.main(arguments)
