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
from raphael_dist.text import hide_secrets

IMAGE = "samples.png"
_MEASURED = {
    "train/loss": "training loss",
    "val/loss": "held-out loss",
    "val/loss_denoise": "held-out denoising loss",
}


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
    lines = [
        "from diffusers import DiffusionPipeline",
        *(["from PIL import Image"] if small else []),
        "",
        f'pipeline = DiffusionPipeline.from_pretrained("this folder"{load})',
        *(['small = Image.open("small.png")'] if small else []),
        f'pipeline({json.dumps(prompt)}{", image=small" if small else ""}{seed}).images[0].save("image.png")',
    ]
    packages = ["torch", "diffusers", "transformers"]
    if text_by_name and config.text.encoder in PACKAGED:
        packages.append(PACKAGED[config.text.encoder].replace("_", "-"))
    code = "\n".join(lines)
    return f"```python\n{code}\n```\n\nIt requires the packages {', '.join(packages)}.\n"


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
    """Return the newest PNG file (its bytes) of images that the run of `source` sampled, up to the step of `source`.

    The trainer writes such files into the folder `samples` of the run. None if there is none.
    """
    images: list[tuple[int, Path]] = []
    for folder in (source.path, *source.path.parents[:2]):
        for path in sorted((folder / "samples").glob("*.png")):
            number = re.search(r"\d+", path.stem)
            if number and int(number[0]) <= source.progress.step:
                images.append((int(number[0]), path))
    return max(images)[1].read_bytes() if images else None


def _measured(path: Path, step: int) -> dict[str, str]:
    """Return the run's last losses up to a step as {name: text}; {} if no folder above the checkpoint has metrics.jsonl."""
    file = next((f for f in (folder / "metrics.jsonl" for folder in (path, *path.parents[:2])) if f.is_file()), None)
    losses: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file else []:
        try:
            row = json.loads(line)
        except ValueError:  # an incomplete line after a crash
            continue
        if row.get("step", step + 1) <= step:
            losses |= {name: f"{row[tag]:.4g} at step {row['step']:,}" for tag, name in _MEASURED.items() if tag in row}
    return losses
