"""The manifest of a converted checkpoint: what it is, and the size and SHA-256 of every file."""

import json
from pathlib import Path
from typing import Any

from raphael_dist.config import config_from_tree
from raphael_dist.convert.plan import Source
from raphael_dist.errors import UserError
from raphael_dist.training.rundir import versions

FORMAT = 1


def base_manifest(layout: str, source: Source) -> dict[str, Any]:
    """Return what every layout's manifest says, but for its files."""
    return {
        "layout": layout,
        "format": FORMAT,
        "step": source.step,
        "samples_seen": source.samples_seen,
        "updates": source.updates,
        "guard": source.guard,
        "dataset": source.dataset,
        "versions": versions(),
        "config": source.config.model_dump(mode="json"),
    }


def read_manifest(path: Path, layout: str) -> dict[str, Any]:
    """Return a manifest. UserError when it is missing, unreadable, of another layout, or names files outside its folder."""
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path.parent}: no {path.name}, so this is no {layout} checkpoint, or it was never finished"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is unreadable: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("layout") != layout or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not of layout {layout}, format {FORMAT}")
    lacking = {"step", "samples_seen", "dataset", "config", "files"} - manifest.keys()
    if lacking:
        raise UserError(f"{path} lacks {', '.join(sorted(lacking))}")
    files = manifest["files"]
    if not isinstance(files, dict) or not all(_inside(name) for name in files):
        raise UserError(f"{path} names a file outside its folder")
    if not all(isinstance(e, dict) and type(e.get("bytes")) is int and type(e.get("sha256")) is str for e in files.values()):
        raise UserError(f"{path} gives a file no size and checksum")
    if type(manifest["step"]) is not int or type(manifest["samples_seen"]) is not int:
        raise UserError(f"{path}: step and samples_seen must be numbers")
    config_from_tree(manifest["config"])
    return manifest


def _inside(name: str) -> bool:
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def vouched(folder: Path, manifest: dict[str, Any]) -> dict[Path, dict[str, Any]]:
    """Return the manifest's entries by path."""
    return {folder / name: entry for name, entry in manifest["files"].items()}
