"""The examples of the documentation run as they stand, at a size for tests."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.launch import ROOT

SMALL = ["train.max_steps=2", "train.global_batch=4", "train.micro_batch=4", "sample.steps=2"]

pytestmark = pytest.mark.slow


def run(example: str, *arguments: str, **env: str) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", f"docs/examples/{example}", *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_from_a_folder_of_pictures_to_a_sampled_picture(tmp_path: Path) -> None:
    run("own_folder.sh", str(tmp_path), "", *SMALL)
    assert len(list((tmp_path / "pictures").glob("*.txt"))) == 87
    assert (tmp_path / "look.png").is_file()
    assert picture(tmp_path / "heart.png").std() > 1


def test_a_dense_model_becomes_one_with_experts_that_draws_the_same(tmp_path: Path) -> None:
    run("upcycle.sh", str(tmp_path), *SMALL, STEPS="3")
    before, after = (picture(tmp_path / f"drawn-{which}" / "000000.png") for which in ("sd", "start"))
    assert abs(before - after).max() <= 1
    assert picture(tmp_path / "heart.png").std() > 1
