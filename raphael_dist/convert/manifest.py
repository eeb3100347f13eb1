"""What the layouts of conversions say in their manifests, and the checkpoint that a manifest describes."""

from pathlib import Path
from typing import Any

from raphael_dist.checkpoint.manifest import FORMAT, MANIFEST, read_manifest
from raphael_dist.checkpoint.progress import progress_of
from raphael_dist.checkpoint.tensors import Key
from raphael_dist.config import config_from_tree
from raphael_dist.convert.plan import Source
from raphael_dist.convert.source import Checkpoint
from raphael_dist.storage.tensorfile import Stored
from raphael_dist.storage.versions import versions


def base_manifest(layout: str, source: Source) -> dict[str, Any]:
    """Return what every layout's manifest says, but for its files."""
    return {
        "layout": layout,
        "format": FORMAT,
        **source.progress.as_manifest(),
        "dataset": source.dataset,
        "versions": versions(),
        "config": source.config.model_dump(mode="json"),
    }


def manifest_beside(folder: Path, layout: str) -> dict[str, Any] | None:
    """Return the manifest of a layout whose files others write too, without one; None where it is not there."""
    return read_manifest(folder / MANIFEST, layout) if (folder / MANIFEST).is_file() else None


def checkpoint_of(folder: Path, manifest: dict[str, Any], spans: dict[Key, list[Stored]]) -> Checkpoint:
    """Return the checkpoint that a manifest describes. UserError unless `spans` hold every parameter exactly once."""
    checkpoint = Checkpoint(
        folder,
        config_from_tree(manifest["config"]),
        spans,
        progress_of(manifest),
        manifest["dataset"],
        vouched(folder, manifest),
    )
    checkpoint.check()
    return checkpoint


def vouched(folder: Path, manifest: dict[str, Any]) -> dict[Path, dict[str, Any]]:
    """Return the manifest's entries by path."""
    return {folder / name: entry for name, entry in manifest["files"].items()}
