"""models/emoji and models/words, the models that ship: small, complete, and drawing the images of the documents."""

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

# The models that ship: largest size in bytes, and the height in pixels of the first row of their grid in the documents.
MODELS = {"emoji": (25_000_000, 130), "words": (20_000_000, 36)}
EACH = pytest.mark.parametrize("name", MODELS)


def update_code(model: str) -> str:
    return (
        f".venv/bin/raphael-convert --from diffusers {model} --to diffusers build/export --text-by-name && "
        f"cp build/export/pipeline.py {model}/ && cp build/export/unet/*.py {model}/unet/"
    )


def run(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr
    return done.stdout


@EACH
def test_shipped_model_is_a_small_complete_pipeline(name: str) -> None:
    model = ROOT / "models" / name
    files = [path for path in model.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MODELS[name][0]
    manifest = json.loads((model / "manifest.json").read_text())
    assert {path.relative_to(model).as_posix() for path in files} >= {*manifest["files"], "model_index.json", "README.md"}
    assert (model / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")


@EACH
def test_shipped_code_is_what_an_export_writes_now(name: str) -> None:
    module, code = model_code(RaphaelUNet2D)
    for path, text in ((f"{CODE}.py", pipeline_code()), (f"unet/{module}.py", code)):
        file = f"models/{name}/{path}"
        assert (ROOT / file).read_text() == text, f"{file} is out of date. Run: {update_code(f'models/{name}')}"


@EACH
def test_shipped_model_draws_the_images_of_the_documents(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (prompts,) = (ROOT / "data" / name).glob("prompts.*")
    (tmp_path / prompts.name).write_text("\n".join(prompts.read_text().splitlines()[:2]) + "\n")
    out = tmp_path / "grid.png"
    words = ["--checkpoint", f"models/{name}", "--prompts", str(tmp_path / prompts.name), "--out", str(out)]
    assert sample.main(words) == 0
    drawn, shown = (np.asarray(Image.open(path)).astype(float) for path in (out, ROOT / "docs" / f"{name}.png"))
    # The same first cells; another processor rounds otherwise in the last bits, which 25 steps may carry to a level or two.
    height = MODELS[name][1]
    assert np.abs(drawn[:height] - shown[:height, : drawn.shape[1]]).mean() < 3


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
