"""Writes the model card (README.md) of an exported pipeline: usage, model, training data, losses, licence and limits."""

import json
import re
from math import prod
from pathlib import Path

from raphael_dist.config.schema import Config
from raphael_dist.convert.source_checkpoint import is_dense
from raphael_dist.convert.write_plan import Options, Source
from raphael_dist.data.features.encoder_files import PACKAGED
from raphael_dist.storage.versions import versions
from raphael_dist.text import hide_secrets, read_json

IMAGE = "samples.png"
_MEASURED = {"train/loss": "training loss", "val/loss": "held-out loss"}
# Values in results.json of `raphael_dist evaluate`.
_EVALUATED = {"fid": "FID", "kid": "KID", "precision": "precision", "recall": "recall", "clip": "CLIP score",
              "text_exact": "texts read exactly", "text_cer": "character error rate"}  # fmt: skip


def model_card(source: Source, kind: str, options: Options, pipeline: str, has_image: bool) -> str:
    """Return the text of the model card (README.md) of an exported pipeline.

    Args:
        source: the exported checkpoint.
        kind: which weights are exported: "ema" (moving average) or "master" (fp32 weights).
        options: options of the conversion; `licence` is an identifier that model hubs use, e.g. "apache-2.0".
        pipeline: name of the pipeline's class, such as "StableDiffusionPipeline".
        has_image: whether the folder contains samples.png (see `samples_image`), which the card shows.
    """
    config, steps, licence = source.config, source.progress, options.licence
    shards = [*config.data.shards, *(shard for source_ in config.data.sources for shard in source_.shards)]
    training = {
        "training data": ", ".join(map(hide_secrets, shards)) or "unknown",
        "training": f"{steps.step:,} steps, {steps.samples_seen:,} images",
        "optimizer": f"{config.optim.kind}, learning rate {config.optim.lr:g}",
        **_measured(source.path, steps.step),
        **_evaluated(source.path, steps.step, kind),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items() if version),
    }
    tags = ["text-to-image", "diffusers", *([] if is_dense(config) else ["mixture-of-experts", "raphael"])]
    header = (
        f"---\nlicense: {licence}\nlibrary_name: diffusers\npipeline_tag: text-to-image\ntags: [{', '.join(tags)}]\n---\n"
    )
    image = f"![images that the model drew during training]({IMAGE})\n\n" if has_image else ""
    return f"""{header}
# A RAPHAEL text-to-image model (arXiv 2305.18295)

{image}{_usage(config, pipeline, options.text_by_name)}
## Model

{_table(_model_rows(source, kind))}

## Training and measurements

{_table(training)}

## Licence and limits

Licence: {licence}.

- The model was trained for the subjects of its training data, at the sizes above. Other subjects and sizes are untested.
- Longer captions are truncated. There is no safety filter.
- A loss says little about the quality of images. Sample images of your own captions first.
- The author of the model should add its intended use here.
"""


def _usage(config: Config, pipeline: str, text_by_name: bool) -> str:
    own, small = pipeline != "StableDiffusionPipeline", bool(config.upscale.factor)
    prompt = config.sample.prompts[0] if config.sample.prompts else "a red heart"
    load, seed = (", trust_remote_code=True", ", seed=0") if own else ("", "")
    height, width = (side // (config.upscale.factor or 1) for side in config.image.buckets[0])
    lines = [
        "from diffusers import DiffusionPipeline",
        *(["from PIL import Image"] if small else []),
        "",
        f'pipeline = DiffusionPipeline.from_pretrained("."{load})  # this folder',
        *([f'small = Image.new("RGB", ({width}, {height}), "red")  # your image of this size'] if small else []),
        f'pipeline({json.dumps(prompt)}{", image=small" if small else ""}{seed}).images[0].save("image.png")',
    ]
    packages = ["torch", "diffusers", "transformers"]
    if text_by_name and config.text.encoder in PACKAGED:
        packages.append(PACKAGED[config.text.encoder].replace("_", "-"))
    code = "\n".join(lines)
    return f"In the folder of this file:\n\n```python\n{code}\n```\n\nIt requires the packages {', '.join(packages)}.\n"


def _model_rows(source: Source, kind: str) -> dict[str, str]:
    config, m = source.config, source.config.model
    parameters = sum(prod(shape) for shape in source.shapes.values())
    experts = "dense" if is_dense(config) else f"{m.space_experts} space and {m.time_experts} time experts in each block"
    return {
        "parameters": f"{parameters:,}; {experts}",
        "weights": {"ema": "moving average (EMA)", "master": "last step"}[kind],
        "image encoder": config.image.vae,
        "image sizes": ", ".join(f"{h} x {w}" for h, w in config.image.buckets[:9]),
        "text encoder": f"{config.text.encoder}, up to {config.text.max_tokens} tokens",
        **_super_resolution(config),
        "prediction type": config.diffusion.prediction,
    }


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _super_resolution(config: Config) -> dict[str, str]:
    factor = config.upscale.factor
    sizes = ", ".join(f"{h // factor} x {w // factor}" for h, w in config.image.buckets[:9]) if factor else ""
    return {"super-resolution": f"{factor} times, from images of {sizes}"} if factor else {}


def samples_image(source: Source) -> bytes | None:
    """Return the bytes of the newest PNG file with sample images from the run of `source`, up to the step of `source`.

    The trainer writes such files into the folder `samples` of the run directory. Returns None if there is no such file.
    """
    images: list[tuple[int, Path]] = []
    for folder in (source.path, *source.path.parents[:2]):
        for path in sorted((folder / "samples").glob("*.png")):
            number = re.search(r"\d+", path.stem)
            if number and int(number[0]) <= source.progress.step:
                images.append((int(number[0]), path))
    return max(images)[1].read_bytes() if images else None


def _measured(path: Path, step: int) -> dict[str, str]:
    """Return the last training and held-out loss of a run, up to the step `step`, as {name: text for the model card}.

    `path`: a checkpoint of the run. Returns {} if no folder above the checkpoint has a file metrics.jsonl.
    """
    run, losses = _run_folder(path), dict[str, str]()
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if run else []:
        try:
            row = json.loads(line)
        except ValueError:  # an incomplete line after a crash
            continue
        if row.get("step", step + 1) <= step:
            losses |= {name: f"{row[tag]:.4g} at step {row['step']:,}" for tag, name in _MEASURED.items() if tag in row}
    return losses


def _evaluated(path: Path, step: int, kind: str) -> dict[str, str]:
    """Return the results of `raphael_dist evaluate` for a checkpoint, as {name: text for the model card}.

    Only results in subfolders of the run directory are found.

    Args:
        path: the checkpoint.
        step: step of the checkpoint.
        kind: which weights: "ema" (moving average) or "master" (fp32 weights).
    """
    run, rows = _run_folder(path), dict[str, str]()
    for file in sorted(run.glob("*/results.json")) if run else []:
        try:
            protocol, results = read_json(file.with_name("protocol.json")), read_json(file)
            # A model with adapters has the path of each after " + ".
            checkpoint, weights = protocol["checkpoint"], protocol["weights"]
            if not checkpoint.startswith(f"step {step} of ") or " + " in checkpoint or weights != kind:
                continue
            features = f", features {protocol['features']}" if "features" in protocol else ""
            for row in results:
                values = [f"{name} {row[key]:.4g}" for key, name in _EVALUATED.items() if key in row]
                rows[f"{row['images']:,} images at guidance {row['guidance']:g}{features}"] = ", ".join(values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not written by `evaluate`, or not complete
            continue
    return rows


def _run_folder(path: Path) -> Path | None:
    """Return the directory of the run that wrote the checkpoint `path`: the folder with metrics.jsonl. None: not found."""
    return next((folder for folder in (path, *path.parents[:2]) if (folder / "metrics.jsonl").is_file()), None)
