"""The folder of an export: model card and config.json."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from PIL import Image

from raphael_dist.checkpoint.progress import Progress
from raphael_dist.config.schema import Config
from raphael_dist.convert.conversion import convert
from raphael_dist.convert.layouts import open_checkpoint
from raphael_dist.convert.model_card import model_card
from raphael_dist.convert.write_plan import Options
from raphael_dist.model.diffusers_model import EXPERT_FIELDS
from tests.convert.test_exported_code import emoji_large
from tests.sampling.test_pipeline import dense_emoji, emoji, trained


@pytest.mark.parametrize("kind", ["experts", "dense"])
def test_config_json_has_the_flat_fields_of_a_diffusers_unet(tmp_path: Path, kind: str) -> None:
    config = emoji() if kind == "experts" else dense_emoji()
    trained(config, tmp_path / "canonical")
    convert("canonical", tmp_path / "canonical", "diffusers", tmp_path / "exported", Options(unet_only=True))
    fields = json.loads((tmp_path / "exported" / "unet" / "config.json").read_text())
    standard = inspect.signature(UNet2DConditionModel.__init__).parameters
    own = {*EXPERT_FIELDS, "edge_channels", "num_train_timesteps", "auto_map"} if kind == "experts" else set()
    assert {name for name in fields if not name.startswith("_")} - set(standard) == own
    model = config.model
    assert {name: fields[name] for name in standard if name in fields} == {
        "act_fn": "silu",
        "attention_head_dim": [width // model.head_dim for width in model.channels],
        "block_out_channels": list(model.channels),
        "cross_attention_dim": model.text_width,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in model.attention],
        "in_channels": 4,
        "layers_per_block": model.layers_per_block,
        "norm_num_groups": model.norm_groups,
        "out_channels": 4,
        "sample_size": 16,
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(model.attention)],
        "use_linear_projection": True,
    }
    assert not [name for name, value in fields.items() if isinstance(value, dict) and name != "auto_map"]


def card_of(config: Config, run: Path, progress: Progress) -> str:
    """Return the card of a checkpoint in the folder of a run."""
    trained(config, run / "checkpoints" / "step")
    checkpoint = open_checkpoint("canonical", run / "checkpoints" / "step")
    return model_card(replace(checkpoint, progress=progress), "ema", Options(licence="mit"), "RaphaelPipeline", False)


def rows_of(card: str) -> dict[str, str]:
    return dict(line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ") and line != "| | |")


def test_model_card_has_a_row_for_each_fact(tmp_path: Path) -> None:
    (tmp_path / "run" / "scores").mkdir(parents=True)
    losses = [
        {"step": 10, "train/loss": 0.5, "val/loss": 0.25},
        {"step": 20, "train/loss": 0.125},
        {"step": 30, "train/loss": 9},
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, losses)) + '\n{"ste')
    evaluation = {"checkpoint": "step 20 of runs/x", "weights": "ema", "features": "hed"}
    results = [{"guidance": 1.5, "images": 2000, "fid": 12.34567, "kid": 0.5, "kid_deviation": 0.1, "precision": 0.75}]
    other = {"checkpoint": "step 30 of runs/x", "weights": "ema"}
    for name, protocol in (
        ("scores", evaluation),
        ("later", other),
        ("adapted", {**other, "checkpoint": "step 20 of x + y 1.0"}),
    ):
        (tmp_path / "run" / name).mkdir(exist_ok=True)
        (tmp_path / "run" / name / "protocol.json").write_text(json.dumps(protocol))
        (tmp_path / "run" / name / "results.json").write_text(json.dumps(results))
    (tmp_path / "run" / "broken").mkdir()
    (tmp_path / "run" / "broken" / "results.json").write_text("{}")
    config = emoji()
    card = card_of(config, tmp_path / "run", Progress(20, 1280, 20, {}))
    assert card.startswith("---\nlicense: mit\nlibrary_name: diffusers\npipeline_tag: text-to-image\n")
    rows = rows_of(card)
    versions = rows.pop("versions")
    assert "diffusers " in versions
    parameters = rows.pop("parameters")
    assert parameters.endswith("; 6 space and 4 time experts in each block")
    assert rows == {
        "weights": "moving average (EMA)",
        "image encoder": config.image.vae,
        "image sizes": "64 x 64",
        "text encoder": f"{config.text.encoder}, up to 16 tokens",
        "prediction type": config.diffusion.prediction,
        "training data": ", ".join(config.data.shards),
        "training": "20 steps, 1,280 images",
        "optimizer": f"{config.optim.kind}, learning rate {config.optim.lr:g}",
        "training loss": "0.125 at step 20",
        "held-out loss": "0.25 at step 10",
        "2,000 images at guidance 1.5, features hed": "FID 12.35, KID 0.5, precision 0.75",
    }
    rows = rows_of(card_of(emoji_large(config), tmp_path / "large", Progress(20, 1280, 20, {})))
    assert rows["super-resolution"] == "2 times, from images of 32 x 32"
    assert not {"training loss", "held-out loss"} & rows.keys()


def test_model_card_shows_the_newest_samples_up_to_its_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(emoji(), run / "checkpoints" / "step")
    (run / "samples").mkdir()
    step = open_checkpoint("canonical", run / "checkpoints" / "step").progress.step
    for number, colour in ((max(step - 1, 0), "red"), (step, "green"), (step + 1, "blue")):
        Image.new("RGB", (8, 8), colour).save(run / "samples" / f"step-{number:08d}.png")
    (run / "samples" / "other.png").write_bytes(b"")
    convert("canonical", run / "checkpoints" / "step", "diffusers", tmp_path / "exported", Options(text_by_name=True))
    link = re.search(r"!\[[^]]*\]\(([^)]+)\)", (tmp_path / "exported" / "README.md").read_text())
    assert link is not None
    assert (tmp_path / "exported" / link[1]).read_bytes() == (run / "samples" / f"step-{step:08d}.png").read_bytes()
    shutil.rmtree(run / "samples")
    convert("canonical", run / "checkpoints" / "step", "diffusers", tmp_path / "plain", Options(text_by_name=True))
    assert "![" not in (tmp_path / "plain" / "README.md").read_text()
    assert not (tmp_path / "plain" / "samples.png").exists()


@pytest.mark.parametrize("kind", ["text", "upscale"])
def test_snippet_of_the_card_runs_in_its_folder_as_it_is_printed(tmp_path: Path, kind: str) -> None:
    config = emoji() if kind == "text" else emoji_large(emoji())
    trained(config, tmp_path / "canonical")
    convert("canonical", tmp_path / "canonical", "diffusers", tmp_path / "exported", Options(text_by_name=True))
    code = (tmp_path / "exported" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "exported", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert Image.open(tmp_path / "exported" / "image.png").size == (64, 64)
