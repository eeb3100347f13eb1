"""The code that an exported folder carries: it needs no other package of ours, and draws the same images."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raphael_dist.config.schema import Config
from raphael_dist.convert.controlnet_files import write_control
from raphael_dist.convert.conversion import convert
from raphael_dist.convert.exported_code import model_code, pipeline_code
from raphael_dist.convert.write_plan import Options
from raphael_dist.model.controlnet import ControlNet
from raphael_dist.model.diffusers_model import RaphaelControlNet, RaphaelUNet2D
from raphael_dist.pipeline import (
    RaphaelControlNetPipeline,
    RaphaelImg2ImgPipeline,
    RaphaelInpaintPipeline,
    RaphaelPipeline,
    RaphaelUpscalePipeline,
)
from tests.sampling.test_pipeline import emoji, stacked, trained

MAY_IMPORT = {"torch", "diffusers", "transformers", "numpy", "PIL", "safetensors", *sys.stdlib_module_names}
PROMPTS = ["a red heart", 'the word "BIRD" in red']
# What a user runs, where neither the package nor what it alone requires can be imported.
WITHOUT = """
import sys
for name in ("raphael_dist", "pydantic", "deepspeed", "webdataset", "peft", "ftfy", "rich"):
    sys.modules[name] = None
"""
FRESH = """
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
ADAPTED = """
import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module
from PIL import Image

folder, large, control, blue, out = sys.argv[1:]
image = Image.open(f"{out}/image.png")
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipeline.load_lora_weights(blue, adapter_name="blue")
latents = {"lora": pipeline("a", seed=0, output_type="latent").images}
pipeline.unload_lora_weights()
where = {"module_file": "pipeline.py", "class_name": "RaphaelControlNetPipeline"}
kind = get_class_from_dynamic_module(folder, **where, trust_remote_code=True)
network = AutoModel.from_pretrained(control, trust_remote_code=True)
controlled = kind.from_pipe(pipeline, controlnet=network)
latents["control"] = controlled("a", image=image, seed=0, output_type="latent").images
controlled.save_pretrained(f"{out}/controlled")
loaded = DiffusionPipeline.from_pretrained(f"{out}/controlled", trust_remote_code=True)
assert type(loaded).__name__ == "RaphaelControlNetPipeline"
assert torch.equal(loaded("a", image=image, seed=0, output_type="latent").images, latents["control"])
upscale = DiffusionPipeline.from_pretrained(large, trust_remote_code=True)
latents["upscale"] = upscale("a", image=image.resize((32, 32)), seed=0, output_type="latent").images
torch.save(latents, f"{out}/latents.pt")
"""


def run_without_package(script: str, *arguments: object, folder: Path) -> str:
    """Run a script in a process that cannot import the package; return its stderr."""
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", WITHOUT + script, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


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
    warnings = run_without_package(FRESH, folder, tmp_path, again, *PROMPTS, folder=tmp_path)
    assert "not expected" not in warnings  # no warning about the files' fields
    assert "cannot be saved" not in warnings

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


def test_adapters_and_upscaling_work_without_the_package(tmp_path: Path) -> None:
    config = emoji()
    large = emoji_large(config)
    for name, settings in (("folder", config), ("large", large)):
        trained(settings, tmp_path / f"{name}-canonical")
        convert("canonical", tmp_path / f"{name}-canonical", "diffusers", tmp_path / name, Options(text_by_name=True))
    torch.manual_seed(1)
    with torch.no_grad():
        values = {name: p + 0.1 * torch.randn_like(p) for name, p in ControlNet(config).named_parameters()}
    write_control(values, config, tmp_path / "control")
    pipeline = RaphaelPipeline.from_pretrained(tmp_path / "folder")
    layers = {}
    for name, p in pipeline.unet.named_parameters():
        if name.endswith("attn1.to_q.weight"):
            shapes = {"A": (2, p.shape[1]), "B": (p.shape[0], 2)}
            layers |= {name.replace("weight", f"lora_{matrix}.weight"): torch.randn(*s) for matrix, s in shapes.items()}
    RaphaelPipeline.save_lora_weights(tmp_path / "blue", layers)
    write_images(tmp_path)
    run_without_package(
        ADAPTED, *(tmp_path / name for name in ("folder", "large", "control", "blue")), tmp_path, folder=tmp_path
    )

    image, same = Image.open(tmp_path / "image.png"), {"seed": 0, "output_type": "latent"}
    expected = {"plain": pipeline("a", **same).images}
    controlnet = RaphaelControlNet.from_pretrained(tmp_path / "control")
    controlled = RaphaelControlNetPipeline.from_pipe(pipeline, controlnet=controlnet)
    expected["control"] = controlled("a", image=image, **same).images
    upscale = RaphaelUpscalePipeline.from_pretrained(tmp_path / "large")
    expected["upscale"] = upscale("a", image=image.resize((32, 32)), **same).images
    pipeline.load_lora_weights(tmp_path / "blue")
    expected["lora"] = pipeline("a", **same).images
    for name, latents in torch.load(tmp_path / "latents.pt").items():
        assert torch.equal(latents, expected[name]), name
        assert not torch.equal(latents, expected["plain"]), name


def emoji_large(config: Config) -> Config:
    """Return a model that enlarges images of 32 x 32 pixels."""
    sample = config.sample.model_copy(update={"prompts": []})
    return Config(**{**config.model_dump(), "sample": sample.model_dump(), "upscale": {"factor": 2, "patch": 2}})


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
