"""The manifests of converted checkpoints."""

from pathlib import Path

from raphael_dist.checkpoint.manifest import FORMAT, MANIFEST, Manifest, read_manifest
from raphael_dist.checkpoint.progress import progress_of
from raphael_dist.checkpoint.tensors import Key
from raphael_dist.config.schema import config_from_tree, stored_tree
from raphael_dist.convert.source_checkpoint import Checkpoint
from raphael_dist.convert.write_plan import Source
from raphael_dist.storage.files import FileEntry
from raphael_dist.storage.tensorfile import StoredTensor
from raphael_dist.storage.versions import versions


def base_manifest(layout: str, source: Source) -> Manifest:
    """Return the keys of every layout's manifest, except its files."""
    return {
        "layout": layout,
        "format": FORMAT,
        **source.progress.as_manifest(),
        "dataset": source.dataset,
        "versions": versions(),
        "config": stored_tree(source.config),
    }


def read_optional_manifest(folder: Path, layout: str) -> Manifest | None:
    """Return the manifest of a layout that other programs write too; None if there is none."""
    return read_manifest(folder / MANIFEST, layout) if (folder / MANIFEST).is_file() else None


def checkpoint_of(folder: Path, manifest: Manifest, spans: dict[Key, list[StoredTensor]]) -> Checkpoint:
    """Return the checkpoint that a manifest describes. Raises UserError unless `spans` hold every parameter exactly once."""
    checkpoint = Checkpoint(
        folder,
        config_from_tree(manifest["config"]),
        spans,
        progress_of(manifest),
        manifest["dataset"],
        checksummed_files(folder, manifest),
    )
    checkpoint.check()
    return checkpoint


def checksummed_files(folder: Path, manifest: Manifest) -> dict[Path, FileEntry]:
    """Return the manifest's entries by path of the file."""
    return {folder / name: entry for name, entry in manifest["files"].items()}
