"""models/words, the model that ships for words in images: its words can be read as documented."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raphael_dist.evaluation.distances import wilson
from tests.lib.launch import ROOT
from words_data.drawing import COLOURS
from words_data.vocabulary import ALPHABET

NUMBERS = ROOT / "docs" / "words.json"


def nearest_colour(rgb: np.ndarray) -> str:
    """Return the name of the colour of the data set that is nearest to `rgb` (0..255, [3])."""
    return min(COLOURS, key=lambda name: float(np.linalg.norm(np.subtract(COLOURS[name], rgb))))


def colours_of(path: Path) -> tuple[str, str]:
    """Return the colours of text and background: of the pixels that differ most from the edge of the image, and of this."""
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=float)
    background = np.median(np.concatenate([pixels[0], pixels[-1]]), axis=0)
    distance = np.linalg.norm(pixels - background, axis=2)
    return nearest_colour(pixels[distance >= np.quantile(distance, 0.97)].mean(axis=0)), nearest_colour(background)


def test_documented_shares_have_the_intervals_of_their_counts() -> None:
    for row in json.loads(NUMBERS.read_text()).values():
        assert row["images"] >= 300
        assert (row["low"], row["high"]) == pytest.approx(
            wilson(round(row["exact"] * row["images"]), row["images"]), abs=1e-3
        )


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 300 images for each set
@pytest.mark.parametrize("name", ["trained-words", "held-out-words", "held-out-strings"])
def test_words_can_be_read_as_documented(name: str, tmp_path: Path) -> None:
    command = ["-m", "raphael_dist", "evaluate", "text", "--checkpoint", "models/words", "--steps", "10"]
    command += ["--captions", f"prompts=data/words/prompts-{name}.txt", "--out", str(tmp_path), "--alphabet", ALPHABET]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr
    (measured,) = json.loads((tmp_path / "results.json").read_text())
    documented = json.loads(NUMBERS.read_text())[name]
    assert documented["low"] <= measured["text_exact"] <= documented["high"]
    prompts = (ROOT / f"data/words/prompts-{name}.txt").read_text().splitlines()
    asked = [re.search(r"in (\w+) on (\w+)", prompt).groups() for prompt in prompts]
    drawn = [colours_of(path) for path in sorted((tmp_path / "guidance-3").glob("*.png"))]
    for part, share in enumerate(("text_colour", "background_colour")):
        same = sum(a[part] == d[part] for a, d in zip(asked, drawn, strict=True))
        assert same / len(asked) == pytest.approx(documented[share], abs=0.03), share
