"""Rank: `raphael_dist/train.py` on the tiny model and synthetic batches, with faults on request (see tests/forks.py).

spec: {"folder": run directory, "sections": configuration, "stage": ZeRO stage, "faults": {...}, "save_again": bool}. All but
the data is the real thing: command line, trainer, engine, store. With "save_again", what was restored is saved as step 99.
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
from types import SimpleNamespace
from typing import Any

import torch
import yaml

from raphael_dist import train
from raphael_dist.checkpoint import folders as files
from raphael_dist.checkpoint import reader as reader_module
from raphael_dist.checkpoint.reader import CheckpointReader
from raphael_dist.checkpoint.store import CheckpointStore
from raphael_dist.config import Config
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.engine import Engine
from raphael_dist.model.batch import Batch
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.parallel import ranks as parallel
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.training import recovery, rundir, trainer
from raphael_dist.training.guard import Guard
from raphael_dist.training.metrics import LoadWatch, Metrics, MetricsWriter
from raphael_dist.training.straggler import Stopwatch, Stragglers
from raphael_dist.training.watchdog import Watchdog
from tests.synthetic import TREE, synthetic_batch

COUNTED = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


class Builder:
    """Synthetic batches; the samples at some positions are NaN or scaled."""

    def __init__(self, config: Config, num_blocks: int, faults: dict[str, Any]) -> None:
        self._config, self._num_blocks, self._faults = config, num_blocks, faults

    def build(self, slots: Sequence[tuple[int, float]]) -> Batch:
        batch = synthetic_batch(self._config, slots, self._num_blocks)
        for kind, factor in (("nan", float("nan")), ("spike", 1e4)):
            for i, (position, _) in enumerate(slots):
                if position in self._faults.get(kind, []):
                    batch.x0[i] *= factor
                    batch.noise[i] *= factor
        return batch


def build(
    faults: dict[str, Any], config: Config, tree: dict[str, Any], ranks: parallel.Ranks, device: Any, stop: Any
) -> trainer.Run:
    """What trainer.build does, without a data set."""
    torch.set_num_threads(1)
    plan = BatchPlan.of(config, ranks.world_size)
    lock = parallel.all_or_none(lambda: rundir.claim(config) if ranks.is_main else None)
    parallel.all_or_none(lambda: rundir.start_logging(config, ranks.rank))
    hosts = parallel.rank_table(ranks, device)
    engine = Engine(config, tree, plan, device)
    ema = Ema(engine.fragments, config.ema) if config.ema.enabled else None
    empty = SimpleNamespace(num_samples=0, bad=[])
    stream = SimpleNamespace(
        replaced=0,
        order=SimpleNamespace(index=empty),
        cache=empty,
        sample=lambda position: SimpleNamespace(key=f"sample {position}"),
    )
    anything: dict[str, Any] = {"text": None, "image": None, "stream": stream}
    run = trainer.Run(
        config=config, ranks=ranks, device=device, plan=plan, builder=Builder(config, engine.module.num_blocks, faults),
        validator=None, engine=engine, ema=ema, store=CheckpointStore(config, ranks, engine.fragments, ema, "synthetic"),
        guard=Guard(config.train), schedule=NoiseSchedule.create(config.diffusion), metrics=Metrics(device),
        watch=LoadWatch(), writer=MetricsWriter(config.run.dir) if ranks.is_main else None, lock=lock, flops=1.0,
        stop_wish=stop, watchdog=Watchdog(ranks, config.run.dir, config.run.hang_timeout_s), stopwatch=Stopwatch(device),
        stragglers=Stragglers(hosts), **anything,
    )  # fmt: skip
    with counted_reads(config.run.dir / f"read-{ranks.rank}.json"):
        recovery.restore(run, run.store.resume())
    run.first_step = run.logged_step = run.step
    inject(run, faults, ranks.rank)
    return run


@contextmanager
def counted_reads(report: Path) -> Iterator[None]:
    """Write how many elements this rank read of a checkpoint, and which files it summed up."""
    elements, hashed, opened = [0], [], set()
    read, sha256, open_file = CheckpointReader.read, reader_module.sha256, CheckpointReader._file

    def counting_read(self: Any, kind: str, name: str, start: int, numel: int) -> Any:
        elements[0] += numel
        return read(self, kind, name, start, numel)

    def counting_open(self: Any, name: str) -> Any:
        opened.add(name)
        return open_file(self, name)

    CheckpointReader.read, CheckpointReader._file = counting_read, counting_open  # type: ignore[method-assign]
    reader_module.sha256 = lambda path: (hashed.append(path.name), sha256(path))[1]
    try:
        yield
    finally:
        CheckpointReader.read, CheckpointReader._file = read, open_file  # type: ignore[method-assign]
        reader_module.sha256 = sha256
        report.write_text(json.dumps({"elements": elements[0], "hashed": hashed, "opened": sorted(opened)}))


def inject(run: trainer.Run, faults: dict[str, Any], rank: int) -> None:
    """Arrange for this rank's faults; those of the file system come to life when the save of `step` begins."""
    files.CHUNK_BYTES = faults.get("chunk", files.CHUNK_BYTES)
    if rank in faults.get("inf_grad", {}).get("ranks", []):
        spec = faults["inf_grad"]
        p = dict(run.engine.module.named_parameters())[spec["name"]]
        p.register_hook(lambda g: g * float("inf") if run.step + 1 in spec["steps"] else g)
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


def arm(fault: dict[str, Any], run: trainer.Run) -> None:
    """Let the file system, or the process, fail from now on."""
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
        count_calls(fault["count"], fault.get("kill_at"))


def disarm() -> None:
    """Let the file system grow again."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def count_calls(log: str, kill_at: int | None) -> None:
    """Append the name of every call that changes the file system to `log`; die instead of the one numbered `kill_at`."""
    lock, calls = threading.Lock(), [0]
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    write = os.write

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)
            with lock:
                if calls[0] == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls[0] += 1
                write(descriptor, f"{name} {args[0]}\n".encode())
            return real(*args, **kwargs)

        return call

    for name in COUNTED:
        setattr(os, name, counted(name, getattr(os, name)))


def save_again(run: trainer.Run) -> bool:
    """Save what was restored, as step 99, without a step in between; the optimizer says how many updates it took."""
    state = next(iter(run.engine.fragments._torch_optimizer.state.values()))
    with run.store:
        run.store.save(recovery.progress(run)._replace(step=99, updates=int(state["step"])))
    return True


def main(spec: dict[str, Any]) -> int:
    """Return the exit code of the command line."""
    folder = Path(spec["folder"])
    names = TREE.keys() | spec.get("sections", {}).keys() | {"run", "data"}
    given = {"run": {"dir": str(folder)}, "data": {"shards": ["synthetic"]}}
    tree = {n: {**TREE.get(n, {}), **given.get(n, {}), **spec.get("sections", {}).get(n, {})} for n in names}
    rank = os.environ["RANK"]
    (folder / f"given-{rank}.yaml").write_text(yaml.safe_dump(tree))
    (folder / f"given-{rank}.json").write_text(json.dumps({"zero_optimization": {"stage": spec.get("stage", 1)}}))
    faults = spec.get("faults", {})
    trainer.build = lambda *args: build(faults, *args)  # type: ignore[assignment]
    if spec.get("save_again"):
        trainer.train = save_again  # type: ignore[assignment]
    arguments = ["--config", str(folder / f"given-{rank}.yaml"), "--deepspeed_config", str(folder / f"given-{rank}.json")]
    return train.main(arguments)
