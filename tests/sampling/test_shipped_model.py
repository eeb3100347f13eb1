"""models/emoji, the model that ships: it is small and complete, and draws the images of the README."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raphael_dist import sample
from raphael_dist.convert.exported_code import CODE, model_code, pipeline_code
from raphael_dist.model.diffusers_model import RaphaelUNet2D
from tests.lib.launch import ROOT

UPDATE_CODE = (
    ".venv/bin/raphael-convert --from diffusers models/emoji --to diffusers build/emoji --text-by-name && "
    "cp build/emoji/pipeline.py models/emoji/ && cp build/emoji/unet/*.py models/emoji/unet/"
)
MODEL, PROMPTS = ROOT / "models" / "emoji", ROOT / "data" / "emoji" / "prompts.txt"


def run(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_shipped_model_is_a_pipeline_of_at_most_25_mb() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25_000_000
    manifest = json.loads((MODEL / "manifest.json").read_text())
    assert {path.relative_to(MODEL).as_posix() for path in files} >= {*manifest["files"], "model_index.json", "README.md"}
    assert (MODEL / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")


def test_shipped_code_is_what_an_export_writes_now() -> None:
    name, code = model_code(RaphaelUNet2D)
    for path, text in ((f"{CODE}.py", pipeline_code()), (f"unet/{name}.py", code)):
        assert (MODEL / path).read_text() == text, f"models/emoji/{path} is out of date. Run: {UPDATE_CODE}"


def test_shipped_model_draws_the_images_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    some = PROMPTS.read_text().splitlines()[:2]
    (tmp_path / "prompts.txt").write_text("\n".join(some) + "\n")
    words = ["--checkpoint", "models/emoji", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "grid.png")]
    assert sample.main(words) == 0
    drawn, shown = (np.asarray(Image.open(path)).astype(float) for path in (tmp_path / "grid.png", ROOT / "docs/emoji.png"))
    # The same first cells; another processor rounds otherwise in the last bits, which 25 steps may carry to a level or two.
    assert np.abs(drawn[:130] - shown[:130, : drawn.shape[1]]).mean() < 3


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 216 images of 25 steps on whatever cores other tests leave
def test_benchmark_gives_the_numbers_of_the_documents(tmp_path: Path) -> None:
    run("tools/emoji_benchmark.py", "--checkpoint", "models/emoji", "--out", str(tmp_path))
    measured, documented = (
        json.loads(path.read_text()) for path in (tmp_path / "results.json", ROOT / "docs/emoji_benchmark.json")
    )
    measured, documented = (
        {row["what"]: row["value"] for row in numbers["this model"]} for numbers in (measured, documented)
    )
    assert measured.keys() == documented.keys()
    for what, value in documented.items():  # shares of 108 images, distances and losses
        assert measured[what] == pytest.approx(value, abs=0.03, rel=0.03), what
