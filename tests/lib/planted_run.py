"""Write run directories without training, for tests of the report and of the doctor.

Such a directory looks like that of a healthy run, except for problems that the test chooses.
"""

import base64
import io
import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from raphael_dist.config.schema import load_config

LINES, EVERY = 40, 10
BEGIN = datetime(2026, 1, 1, 12)
BLOCKS = 4
Tag = Callable[[int], float]  # a value by the number of its line


def healthy() -> dict[str, Tag]:
    """Return the metrics of a run without problems: by name, a function from the number of a log line to the value."""
    tags: dict[str, Tag] = {
        "train/loss": lambda i: 0.3 + 0.7 * 0.8**i,
        "train/loss_edge": lambda i: 0.02,
        "optim/lr": lambda i: 1e-3 * (1 - i / (LINES + 1)),
        "optim/grad_norm": lambda i: 0.5,
        "train/skipped": lambda i: 0.0,
        "checkpoint/failed": lambda i: 0.0,
        "data/replaced": lambda i: 0.0,
        "throughput/samples_per_s": lambda i: 40.0,
        "time/data_wait_frac": lambda i: 0.01,
        "time/data_wait_reading": lambda i: 0.002,
        "time/data_wait_decoding": lambda i: 0.008,
        "time/slowest_rank_ratio": lambda i: 1.05,
        "memory/peak_gib": lambda i: 1.5,
        "val/loss": lambda i: 0.4 + 0.5 * 0.8**i,
    }
    for kind in ("space", "time"):
        tags |= {f"moe/{kind}/{name}": lambda i: 0.9 for name in ("load_entropy", "load_min", "load_max")}
        for block in range(BLOCKS):
            tags |= {f"moe/{kind}/L{block:02d}/load_{end}": lambda i: 0.9 for end in ("min", "max")}
    return tags


def plant(
    folder: Path,
    tags: dict[str, Tag] | None = None,
    log: list[tuple[float, str, str]] | None = None,
    options: dict[str, Any] | None = None,
    *,
    grids: int = 2,
    complete: bool = True,
) -> Path:
    """Write a run directory without training; return `folder`.

    Args:
        folder: the run directory.
        tags: metrics that replace those of `healthy`, or are added to them.
        log: further log lines, each as (minutes after the start, level, text).
        options: values of the configuration that differ from `emoji-tiny`, by `section.key`.
        grids: number of sample grids to write, each with the routes of its words through the experts.
        complete: whether the last log line states that the run is complete.
    """
    (folder / "samples").mkdir(parents=True)
    (folder / "logs").mkdir()
    (folder / "checkpoints" / "step-00000400").mkdir(parents=True)
    config = load_config("emoji-tiny").model_dump(mode="json")
    for key, value in {"train.max_steps": LINES * EVERY, "model.gate_noise_steps": 100, **(options or {})}.items():
        section, name = key.split(".")
        config[section][name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "versions.json").write_text(json.dumps({"python": "3.11", "torch": "2.13"}))
    rows = [
        {"step": EVERY * (i + 1), "samples_seen": 0, **{tag: value(i) for tag, value in (healthy() | (tags or {})).items()}}
        for i in range(LINES)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [(0.0, "INFO", "from scratch: runs/x, 87 images, 2 ranks on cpu, ZeRO-2, global batch 16, micro-batch 8")]
    lines += [(i + 1.0, "INFO", f"step {EVERY * (i + 1)}/{LINES * EVERY}  loss 0.5  eta 0:10") for i in range(LINES)]
    lines += [(LINES + 1.0, "INFO", f"complete: {LINES * EVERY} steps, 6,400 images")] if complete else []
    (folder / "train.log").write_text("".join(log_line(*line) for line in sorted([*lines, *(log or [])])))
    for number in range(grids):
        step = LINES * EVERY * (number + 1) // grids
        Image.new("RGB", (200, 120), "red").save(folder / "samples" / f"step-{step:08d}.png")
        (folder / "samples" / f"step-{step:08d}.routes.json").write_text(json.dumps(routes()))
    return folder


def log_line(minute: float, level: str, text: str) -> str:
    time = BEGIN + timedelta(minutes=minute)
    return f"{time:%Y-%m-%d %H:%M:%S},000 {level} raphael_dist.training.logged_metrics: {text}\n"


def routes() -> dict[str, Any]:
    """Return the space experts of two words in four blocks, in the format of `analysis.route_report.trace_values`."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "JPEG")
    return {
        "prompt": "a red <heart>",
        "image": base64.b64encode(file.getvalue()).decode(),
        "words": ["red", "heart"],
        "space": [[0, 1, 2, 3], [3, 2, 1, 0]],
        "regions": [[[2, 2, "1000"]] * BLOCKS, [[2, 2, "0111"]] * BLOCKS],
        "at": 400.0,
        "time": [[0, 1, 2]] * BLOCKS,
        "timesteps": [900.0, 500.0, 100.0],
    }
