"""models/words, the model that ships for words in images: its words can be read as documented."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raphael_dist.evaluation.distances import wilson
from tests.lib.launch import ROOT

NUMBERS = ROOT / "docs" / "words.json"


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
