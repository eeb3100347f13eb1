"""Several processes (mpirun, array jobs, after kills) prepare shards with the same bytes as one process."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raphael_dist.text import counted
from tests.convert.test_mpi_ranks import bytes_below
from tests.data_prep.test_data_prep import folder_of
from tests.lib.launch import ROOT

SHARDS = 5
WITH_FEATURES = [
    "--edges=canny", "--features", "--config=tests/fixtures/small.yaml", "text.max_tokens=16",
    f"image.vae={ROOT}/data/vae-emoji",
    "image.buckets=[[64,64]]", "model.latent_channels=4",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Return a folder of images, one of them broken, and the files that one process writes."""
    pytest.importorskip("skimage", reason="needs scikit-image (the extra `edges`)")
    folder = tmp_path_factory.mktemp("pictures")
    folder_of(folder / "in", 13)
    (folder / "in" / "my picture 005.jpg").write_bytes(b"broken")
    # In a process of its own: latents are rounded as the number of threads has it, which other tests may have set here.
    alone = [sys.executable, *command(folder / "in", folder / "one")]
    subprocess.run(alone, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, timeout=400)
    found = bytes_below(folder / "one")
    assert sorted(found) == [f"train-{n:05d}.{ext}" for n in range(SHARDS) for ext in ("json", "tar")]
    return folder / "in", found


def command(folder: Path, out: Path) -> list[str]:
    return ["tools/prepare_data.py", str(folder), "--out", str(out), "--per-shard", "3", *WITH_FEATURES]


@pytest.mark.parametrize("ranks", [2, 3])
def test_mpirun_ranks_write_same_shards_as_one_process(
    made: tuple[Path, dict[str, bytes]], tmp_path: Path, ranks: int
) -> None:
    program = shutil.which("mpirun")
    if program is None:
        pytest.skip("no mpirun")
    words = [program, "--allow-run-as-root", "--oversubscribe", "-n", str(ranks), sys.executable]
    done = subprocess.run(
        [*words, *command(made[0], tmp_path / "out")],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in range(ranks):
        num_shards = len(range(rank, SHARDS, ranks))
        assert f"samples in {counted(num_shards, 'shard')}" in done.stdout
        assert f"(part {rank} of {ranks})" in done.stdout
    assert bytes_below(tmp_path / "out") == made[1]


def task(number: int, numbers: range, folder: Path, out: Path) -> subprocess.Popen:
    """Start the batch script with the variables of a task of `sbatch --array=...`."""
    array = {"ID": number, "MIN": numbers[0], "MAX": numbers[-1], "STEP": numbers.step, "COUNT": len(numbers)}
    slurm = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()}
    slurm |= {"SLURM_ARRAY_JOB_ID": "70", "SLURM_JOB_ID": str(70 + number), "SLURM_SUBMIT_DIR": str(ROOT)}
    slurm |= {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
    words = ["bash", "slurm/prepare_data.sh", *command(folder, out)[1:]]
    return subprocess.Popen(
        words, cwd=ROOT, env={**ENVIRONMENT, **slurm, "PYTHON": sys.executable}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def test_array_tasks_write_same_shards_as_one_process(made: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    numbers = range(3, 8, 2)
    tasks = [task(number, numbers, made[0], tmp_path / "out") for number in numbers]
    outputs = [one.communicate(timeout=400)[0] for one in tasks]
    assert [one.returncode for one in tasks] == [0, 0, 0], outputs
    assert [f"(part {n} of 3)" in text for n, text in enumerate(outputs)] == [True, True, True]
    umask_free = {name: data for name, data in bytes_below(tmp_path / "out").items() if not name.startswith("slurm-")}
    assert umask_free == made[1]


def test_killed_task_continues_to_same_bytes_and_cleans_up(made: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    """Kill the task within each shard except the first, while the tar is half written."""
    out, kills = tmp_path / "out", 0
    for count in range(1, SHARDS):
        running, deadline = task(0, range(1), made[0], out), time.monotonic() + 200
        while running.poll() is None and time.monotonic() < deadline:
            half = [path for path in out.glob(f".train-{count:05d}.*.part/*") if path.stat().st_size]
            if half:
                os.killpg(running.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        running.communicate()
        assert len(list(out.glob("*.json"))) >= count
        assert not [path for path in out.glob("*.tar") if path.read_bytes() != made[1][path.name]]
    assert kills >= 2
    assert list(out.glob(".*.part")), "a kill leaves its folder"
    last = task(0, range(1), made[0], out)
    assert last.communicate(timeout=300)[0].count("samples in 5 shards") == 1
    assert bytes_below(out) == made[1]
