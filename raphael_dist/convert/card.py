"""The model card of an exported pipeline: what it is, what it was trained on and how far, what was measured, its licence."""

import json
from math import prod
from pathlib import Path

from raphael_dist.config import Config
from raphael_dist.convert.plan import Source
from raphael_dist.convert.source import is_dense
from raphael_dist.storage.versions import versions

_MEASURED = {
    "train/loss_denoise": "training loss",
    "val/loss": "held-out loss",
    "val/loss_denoise": "held-out denoising loss",
}


def model_card(source: Source, kind: str, licence: str) -> str:
    """Return the text of README.md, with the header that model hubs read. licence: as they name it, e.g. "apache-2.0"."""
    config, steps = source.config, source.progress
    m = config.model
    parameters = sum(prod(shape) for shape in source.shapes.values())
    experts = "dense" if is_dense(config) else f"{m.space_experts} space and {m.time_experts} time experts in each block"
    shards = [*config.data.shards, *(shard for one in config.data.sources for shard in one.shards)]
    rows = {
        "parameters": f"{parameters:,}; {experts}",
        "weights": {"ema": "averaged over the steps", "master": "of the last step"}[kind],
        "images": f"latents of {config.image.encoder}, sizes {', '.join(f'{h} x {w}' for h, w in config.image.buckets[:9])}",
        "captions": f"{config.text.encoder}, up to {config.text.max_tokens} tokens",
        **_enlarges(config),
        "predicts": config.diffusion.prediction,
        "data": ", ".join(map(str, shards)) or "not known",
        "training": f"{steps.step:,} steps, {steps.samples_seen:,} images; {config.optim.kind}, rate {config.optim.lr:g}",
        **_measured(source.path, steps.step),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items() if version),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    tags = ["text-to-image", "diffusers", *([] if is_dense(config) else ["mixture-of-experts", "raphael"])]
    header = (
        f"---\nlicense: {licence}\nlibrary_name: diffusers\npipeline_tag: text-to-image\ntags: [{', '.join(tags)}]\n---\n"
    )
    seen = ", image=small" if config.upscale.factor else ""
    return f"""{header}
# A text-to-image model after RAPHAEL (arXiv 2305.18295)

    from diffusers import DiffusionPipeline
    pipeline = DiffusionPipeline.from_pretrained("this folder", trust_remote_code=True)  # needs the package raphael_dist
    pipeline("a red heart"{seen}).images[0].save("heart.png")

| | |
|---|---|
{table}

Licence: {licence}. What it may be used for is for those to add who trained it.
"""


def _enlarges(config: Config) -> dict[str, str]:
    factor = config.upscale.factor
    sizes = ", ".join(f"{h // factor} x {w // factor}" for h, w in config.image.buckets[:9]) if factor else ""
    return {"enlarges": f"small pictures of {sizes}, {factor} times"} if factor else {}


def _measured(path: Path, step: int) -> dict[str, str]:
    """Return what the run's metrics say last before a step; nothing where they are not beside the checkpoint."""
    file = next((f for f in (folder / "metrics.jsonl" for folder in (path, *path.parents[:2])) if f.is_file()), None)
    found: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file else []:
        try:
            row = json.loads(line)
        except ValueError:  # cut off by a crash
            continue
        if row.get("step", step + 1) <= step:
            found |= {name: f"{row[tag]:.4g} at step {row['step']:,}" for tag, name in _MEASURED.items() if tag in row}
    return found
