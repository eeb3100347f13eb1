"""Files of fixed names are never written through a symbolic link that somebody else put into a shared folder."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import MagicMock, patch

import numpy as np
import pytest

from raphael_dist.checkpoint.resume import Restorer
from raphael_dist.cluster import prove_worker
from raphael_dist.config.schema import Config
from raphael_dist.data.fetch import shard_cache
from raphael_dist.errors import UserError, write_exit_code
from raphael_dist.evaluation.curve import draw_curve
from raphael_dist.runtime.ranks import Ranks
from raphael_dist.runtime.watchdog import Watchdog
from raphael_dist.storage.files import replace_bytes
from raphael_dist.training import run_dir, trainer
from raphael_dist.training.metrics_files import MetricsWriter

WORDS = "the words of another file"


def config_of(folder: Path) -> Config:
    return Config.model_validate({"run": {"dir": str(folder)}})


def start_watchdog(folder: Path) -> None:
    watchdog = Watchdog(Ranks(), folder, 60.0).start()
    try:
        watchdog.use_folder()
    finally:
        watchdog.stop()


def probe(folder: Path) -> None:
    restorer = Restorer.__new__(Restorer)
    restorer.root, restorer._ranks = folder / "checkpoints", Ranks()
    restorer._check_folder()


def write_metrics(folder: Path) -> None:
    writer = MetricsWriter(folder)
    writer.write(1, 1, {"train/loss": 1.0})
    writer.close()


def write_samples(folder: Path) -> None:
    run, images = MagicMock(), np.zeros((1, 8, 8, 3), np.uint8)
    run.config.run.dir, run.progress.step, run.requests = folder, 1, [MagicMock(prompt="a heart")]
    drawn = {"draw_samples": lambda *_: (images, None), "trace_values": lambda *_: {}, "figures_of": lambda *_: {}}
    with patch.multiple(trainer, **drawn):
        trainer.sample(run)
    run.telemetry.warn.assert_not_called()


def write_curve(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_curve([MagicMock(guidance=g, clip=g, fid=g) for g in (1.0, 2.0)], folder / "curve.png", "a title")


WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "lock": (".lock", lambda folder: run_dir.acquire(config_of(folder))),
    "log": ("train.log", lambda folder: run_dir.start_logging(config_of(folder), 0)),
    "log of a rank": ("logs/rank-00001.log", lambda folder: run_dir.start_logging(config_of(folder), 1)),
    "stacks": ("logs/stacks-rank-0.txt", start_watchdog),
    "heartbeat": ("logs/heartbeats/.rank-00000.new", start_watchdog),
    "probe": ("checkpoints/.probe-00000", probe),
    "metrics": ("metrics.jsonl", write_metrics),
    "lock of a cache": (".room.lock", lambda folder: shard_cache._locked(folder / "room").__enter__()),
    "replaced file": (".latest.new", lambda folder: replace_bytes(folder / "latest", b"step-1")),
    "exit code": ("code", lambda folder: write_exit_code(2, "no such shard")),
    "sample grid": ("samples/step-00000001.png", write_samples),
    "routes of samples": ("samples/step-00000001.routes.json", write_samples),
    "log of a check": ("log.txt", lambda folder: os.close(prove_worker.open_log(folder / "log.txt"))),
    "curve": ("curve.png", write_curve),
    "reason": ("code.why", lambda folder: write_exit_code(2, "no such shard")),
}


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger("raphael_dist")
    handlers, propagate, level = root.handlers, root.propagate, root.level
    yield
    root.handlers, root.propagate = handlers, propagate
    root.setLevel(level)


@pytest.mark.parametrize("name", WRITERS)
def test_symbolic_link_in_a_shared_folder_is_not_followed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logging_as_before: None
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    link, write = run / WRITERS[name][0], WRITERS[name][1]
    link.parent.mkdir(parents=True)
    other.write_text(WORDS)
    link.symlink_to(other)
    monkeypatch.setenv("RAPHAEL_EXIT_FILE", str(run / "code"))
    try:
        write(run)
    except UserError as error:
        assert f"{link.name} is a symbolic link; remove it" in str(error)  # noqa: PT017  where it has to be refused
    except OSError as error:
        assert "is a symbolic link" in str(error)  # noqa: PT017
    assert other.read_text() == WORDS


def test_fifo_in_place_of_the_lock_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(UserError, match=r"run\.dir: .* cannot be written"):
        run_dir.acquire(config_of(tmp_path))
