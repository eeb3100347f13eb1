"""The code that an exported folder carries: it needs no other package of ours, and draws the same images."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raphael_dist.convert.conversion import convert
from raphael_dist.convert.exported_code import model_code, pipeline_code
from raphael_dist.convert.write_plan import Options
from raphael_dist.model.diffusers_model import RaphaelControlNet, RaphaelUNet2D
from raphael_dist.pipeline import RaphaelImg2ImgPipeline, RaphaelInpaintPipeline, RaphaelPipeline
from tests.sampling.test_pipeline import emoji, stacked, trained

MAY_IMPORT = {"torch", "diffusers", "transformers", "numpy", "PIL", "safetensors", *sys.stdlib_module_names}
PROMPTS = ["a red heart", 'the word "BIRD" in red']
# What a user runs, where neither the package nor what it alone requires can be imported.
FRESH = """
import sys
for name in ("raphael_dist", "pydantic", "deepspeed", "webdataset", "peft", "ftfy", "rich"):
    sys.modules[name] = None
import numpy as np
from diffusers import AutoModel, DiffusionPipeline
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module
from PIL import Image

folder, out, again, *prompts = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
drawn = {"text": pipeline(prompts, seed=11).images}
image, mask = (Image.open(f"{out}/{name}.png") for name in ("image", "mask"))
for name, arguments in (("Img2Img", {}), ("Inpaint", {"mask_image": mask})):
    where = {"module_file": "pipeline.py", "class_name": f"Raphael{name}Pipeline"}
    kind = get_class_from_dynamic_module(folder, **where, trust_remote_code=True)
    other = kind.from_pipe(pipeline)
    other.set_progress_bar_config(disable=True)
    drawn[name] = other("a lemon", image=image, strength=0.7, seed=3, **arguments).images
np.savez(f"{out}/drawn.npz", **{name: np.stack([np.asarray(image) for image in images]) for name, images in drawn.items()})
assert type(AutoModel.from_pretrained(f"{folder}/unet", trust_remote_code=True)).__name__ == "RaphaelUNet2D"
pipeline.save_pretrained(again)
loaded = DiffusionPipeline.from_pretrained(again, trust_remote_code=True)
assert loaded("a", seed=0, output_type="np").images.shape == (1, 64, 64, 3)
"""


def write_images(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    Image.fromarray(np.triu(np.full((64, 64), 255, np.uint8))).save(folder / "mask.png")


@pytest.mark.parametrize(("encoder", "width"), [("minilm", 384), ("characters", 256)])
def test_exported_folder_draws_the_same_images_without_the_package(tmp_path: Path, encoder: str, width: int) -> None:
    config = emoji(text_width=width)
    trained(config.model_copy(update={"text": config.text.model_copy(update={"encoder": encoder})}), tmp_path / "canonical")
    folder, again = tmp_path / "exported", tmp_path / "again"
    convert("canonical", tmp_path / "canonical", "diffusers", folder, Options(text_by_name=encoder == "characters"))
    write_images(tmp_path)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", FRESH, str(folder), str(tmp_path), str(again), *PROMPTS]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "not expected" not in done.stderr  # no warning about the files' fields
    assert "cannot be saved" not in done.stderr

    pipeline = RaphaelPipeline.from_pretrained(folder)
    image, mask = (Image.open(tmp_path / f"{name}.png") for name in ("image", "mask"))
    changed = RaphaelImg2ImgPipeline.from_pipe(pipeline)("a lemon", image=image, strength=0.7, seed=3).images
    inpaint = RaphaelInpaintPipeline.from_pipe(pipeline)
    filled = inpaint("a lemon", image=image, mask_image=mask, strength=0.7, seed=3).images
    expected = {"text": pipeline(PROMPTS, seed=11).images, "Img2Img": changed, "Inpaint": filled}
    with np.load(tmp_path / "drawn.npz") as drawn:
        for name, images in expected.items():
            assert np.array_equal(drawn[name], stacked(images)), name
    # A folder that the exported code saved has the same code, and loads here.
    for path in ("pipeline.py", "unet/modeling_raphael.py"):
        assert (again / path).read_text() == (folder / path).read_text()
    assert json.loads((again / "model_index.json").read_text())["_class_name"] == ["pipeline", "RaphaelPipeline"]
    loaded = RaphaelPipeline.from_pretrained(again)
    assert type(loaded.unet) is RaphaelUNet2D
    assert np.array_equal(stacked(loaded(PROMPTS, seed=11).images), stacked(expected["text"]))


@pytest.mark.parametrize("name", ["pipeline", "unet", "controlnet"])
def test_generated_module_imports_and_defines_all_it_names(name: str) -> None:
    kinds = {"unet": RaphaelUNet2D, "controlnet": RaphaelControlNet}
    text = pipeline_code() if name == "pipeline" else model_code(kinds[name])[1]
    assert "Apache License" in text.split('"""')[0]
    assert "raphael_dist import" not in text
    tree = ast.parse(text)
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {module.split(".")[0] for module in imported} <= MAY_IMPORT
    # Undefined names, unused imports, names that are defined twice.
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_generated_model_leaves_out_what_serves_training() -> None:
    text = model_code(RaphaelUNet2D)[1]
    for training in ("checkpoint(", "balance_loss", "add_lora", "grouped_gemm", "focal", "UserError", "pydantic"):
        assert training not in text, training
