"""The processes of mpirun write the same bytes as one, and fail together."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from raphael_dist.convert.conversion import convert
from tests.lib.checkpoints import (
    options,
    tool,
)


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def mpirun(processes: int) -> tuple[str, ...]:
    pytest.importorskip("mpi4py")
    program = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
    if program is None:
        pytest.skip("no mpirun")
    return (program, "--allow-run-as-root", "--oversubscribe", "-n", str(processes))


def test_two_processes_write_the_same_bytes_as_one(tmp_path, sources):
    launcher = mpirun(2)
    convert("auto", sources["moe"][1], "canonical", tmp_path / "one", options("canonical"))
    two = tool("--from", "auto", sources["moe"][1], "--to", "canonical", tmp_path / "two", launcher=launcher)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("exp_avg_sq") == 1
    assert bytes_below(tmp_path / "one") == bytes_below(tmp_path / "two")


@pytest.mark.slow
def test_four_processes_write_the_same_bytes_as_one_and_fail_together(tmp_path, sources):
    launcher = mpirun(4)
    convert("auto", sources["moe"][1], "raphael", tmp_path / "run", options("raphael", (6, 2, 1, 1)))
    convert("auto", tmp_path / "run", "deepspeed", tmp_path / "a/ds", options("deepspeed", (3, 1, 1, 2)))
    four = tool("--from", "auto", tmp_path / "run", "--to", "deepspeed", tmp_path / "b/ds", "--world", 3, "--zero", 2,
                launcher=launcher)  # fmt: skip
    assert four.returncode == 0, four.stderr
    assert bytes_below(tmp_path / "a") == bytes_below(tmp_path / "b")
    step = tmp_path / "run/checkpoints/step-00000007"
    with open(step / "rank-00004.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    failed = tool("--from", "auto", tmp_path / "run", "--to", "canonical", tmp_path / "c", launcher=launcher)
    assert failed.returncode != 0
    assert failed.stderr.count("rank-00004.safetensors does not match its checksum") == 1
    assert not (tmp_path / "c").exists()
