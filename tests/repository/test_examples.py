"""The examples of the documentation run as they stand, at a size for tests."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.lib.launch import ROOT

SMALL = ["train.max_steps=2", "train.global_batch_size=4", "train.micro_batch_size=4", "sample.steps=2"]

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


def test_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient (the extra `dev`)")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient (the extra `dev`)")
    pytest.importorskip("skimage", reason="needs scikit-image (the extra `edges`)")
    for name, value in {"QUICKSTART_OUT": str(tmp_path), "QUICKSTART_STEPS": "4", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    path = ROOT / "docs" / "examples" / "quickstart.ipynb"
    notebook = nbformat.read(path, 4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert (tmp_path / "report.html").stat().st_size > 50_000
    assert len(list((tmp_path / "my-images").glob("*.txt"))) > 10
    assert path.stat().st_size < 200_000


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_own_folder_trains_and_samples(tmp_path: Path) -> None:
    run("own_folder.sh", str(tmp_path), "", *SMALL)
    assert len(list((tmp_path / "images").glob("*.txt"))) == 87
    assert (tmp_path / "look.png").is_file()
    assert pixels(tmp_path / "sample.png").std() > 1


def test_upcycled_model_samples_the_same_images(tmp_path: Path) -> None:
    run("upcycle.sh", str(tmp_path), *SMALL, STEPS="3")
    before, after = (pixels(tmp_path / f"images-{which}" / "000000.png") for which in ("sd", "start"))
    assert abs(before - after).max() <= 1
    assert pixels(tmp_path / "heart.png").std() > 1
