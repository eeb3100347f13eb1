"""models/words, the model that ships for words in images: it is small, complete, and its words can be read."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raphael_dist import sample
from raphael_dist.evaluation.distances import wilson
from tests.lib.launch import ROOT

MODEL, NUMBERS = ROOT / "models" / "words", ROOT / "docs" / "words.json"


def test_shipped_model_is_a_pipeline_of_at_most_20_mb() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20_000_000
    manifest = json.loads((MODEL / "manifest.json").read_text())
    assert {path.relative_to(MODEL).as_posix() for path in files} >= {*manifest["files"], "model_index.json", "README.md"}


def test_shipped_model_draws_the_images_of_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    some = (ROOT / "data" / "words" / "prompts.txt").read_text().splitlines()[:2]
    (tmp_path / "prompts.txt").write_text("\n".join(some) + "\n")
    words = ["--checkpoint", "models/words", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "grid.png")]
    assert sample.main(words) == 0
    drawn, shown = (np.asarray(Image.open(path)).astype(float) for path in (tmp_path / "grid.png", ROOT / "docs/words.png"))
    # The first cells without their captions; another processor rounds otherwise in the last bits.
    assert np.abs(drawn[:36] - shown[:36, : drawn.shape[1]]).mean() < 3


def test_documented_shares_have_the_intervals_of_their_counts() -> None:
    for row in json.loads(NUMBERS.read_text()).values():
        assert row["images"] >= 300
        assert (row["low"], row["high"]) == pytest.approx(
            wilson(round(row["exact"] * row["images"]), row["images"]), abs=1e-3
        )


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 300 images for each set
@pytest.mark.parametrize("name", ["trained-words", "held-out-words"])
def test_words_can_be_read_as_documented(name: str, tmp_path: Path) -> None:
    command = ["-m", "raphael_dist", "evaluate", "text", "--checkpoint", "models/words", "--steps", "10"]
    command += ["--captions", f"prompts=data/words/prompts-{name}.txt", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr
    (measured,) = json.loads((tmp_path / "results.json").read_text())
    documented = json.loads(NUMBERS.read_text())[name]
    assert documented["low"] <= measured["text_exact"] <= documented["high"]
