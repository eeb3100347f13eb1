"""A full disk ends a run only if it must: logs are lost with a warning, and a start without room is one line."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raphael_dist.config.schema import load_config
from raphael_dist.errors import EXIT_NOT_SAVED, NotSavedError
from raphael_dist.runtime.ranks import Ranks
from raphael_dist.runtime.watchdog import Watchdog
from raphael_dist.training import run_dir
from raphael_dist.training.metrics_files import MetricsWriter, read_metrics
from tests.lib.launch import ROOT, run_ranks
from tests.lib.small_disk import small_disk
from tests.training.test_training import SMALL


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    with small_disk(tmp_path / "disk", 256 << 10) as folder:
        yield folder


def fill(disk: Path) -> Path:
    path = disk / "filler"
    with open(path, "wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return path


def test_metrics_without_disk_space_are_lost_with_one_warning(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = MetricsWriter(disk)
    writer.write(1, 8, {"train/loss": 1.0})
    writer.flush()
    filler = fill(disk)
    caplog.set_level(logging.WARNING, "raphael_dist")
    logging.getLogger("raphael_dist").propagate = True
    for step in range(2, 200):
        writer.write(step, 8 * step, {f"a/metric{i}": 0.1234567 for i in range(20)} | {"train/loss": 1.0})
    writer.flush()
    assert len([record for record in caplog.records if "metrics are lost" in record.message]) == 1
    filler.unlink()
    writer.write(200, 1600, {"train/loss": 2.0})
    writer.close()
    losses = read_metrics(disk / "metrics.jsonl")["train/loss"]
    assert losses[0] == (1, 1.0)
    assert losses[-1] == (200, 2.0)
    assert len(losses) < 199


def test_unwritable_log_and_heartbeats_do_not_end_a_run(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = load_config("emoji-tiny", [f"run.dir={disk}"])
    run_dir.start_logging(config, 0)
    log = logging.getLogger("raphael_dist")
    with Watchdog(Ranks(), disk, 1.0) as dog:
        fill(disk)
        for step in range(300):
            dog.heartbeat(f"step {step}")
            log.info("%d %s", step, "x" * 200)
    error = capfd.readouterr().err
    assert error.count("No space left on device") == 1
    assert "training continues" in error
    assert "Traceback" not in error
    log.handlers, log.propagate = [], True


@pytest.mark.parametrize("what", ["claim", "log", "watchdog"])
def test_start_without_disk_space_is_one_line(disk: Path, what: str) -> None:
    run = disk / "run"
    config = load_config("emoji-tiny", [f"run.dir={run}"])
    subprocess.run(["mount", "-o", f"remount,nr_inodes={1 + sum(1 for _ in disk.rglob('*'))}", str(disk)], check=True)
    starts = {
        "claim": lambda: run_dir.acquire(config),
        "log": lambda: run_dir.start_logging(config, 0),
        "watchdog": Watchdog(Ranks(), run, 1.0).use_folder,
    }
    with pytest.raises(NotSavedError, match=r"No space left on device\)\. Free some space"):
        starts[what]()


@pytest.mark.parametrize("lossy", [True, False])
def test_output_to_a_full_disk_ends_nothing_and_keeps_the_exit_code(lossy: bool) -> None:
    code = "import sys; from raphael_dist.training.console import Console, ignore_output_errors\n"
    code += "ignore_output_errors()\n" * lossy
    code += "Console(True, 0, 9).line('step 1'); print('x', file=sys.stderr, flush=True); sys.exit(75)"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=full, cwd=ROOT)
    assert (done.returncode == 75) == lossy


@pytest.mark.slow
def test_train_on_a_full_disk_is_one_line_and_exit_code_4(disk: Path, tmp_path: Path) -> None:
    fill(disk)
    command = ["raphael_dist/train.py", *SMALL, f"run.dir={disk}/run", f"data.cache_dir={tmp_path}/cache"]
    for output in run_ranks(command, 2, exit_code=EXIT_NOT_SAVED):
        assert "Traceback" not in output
        assert output.count("error") <= 1
    assert not list((disk / "run" / "checkpoints").iterdir())


def test_metrics_continue_after_half_a_line(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        writer = MetricsWriter(tmp_path)
        writer.write(step, 10 * step, {"train/loss": 1.0 / step})
        writer.close()
        if step == 2:  # it was killed, or the disk was full
            os.truncate(tmp_path / "metrics.jsonl", (tmp_path / "metrics.jsonl").stat().st_size - 20)
    assert read_metrics(tmp_path / "metrics.jsonl")["train/loss"] == [(1, 1.0), (3, 1.0 / 3)]
