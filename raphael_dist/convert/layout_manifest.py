"""Makes and reads the manifests (manifest.json) of converted checkpoints, which list settings, progress and files."""

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
    """Return the content of manifest.json for a converted checkpoint, without the list of its files.

    `layout`: name of the layout (format on disk) of the converted checkpoint. `source`: the checkpoint
    from which it is made.
    """
    return {
        "layout": layout,
        "format": FORMAT,
        **source.progress.as_manifest(),
        "dataset": source.dataset,
        "versions": versions(),
        "config": stored_tree(source.config),
    }


def read_optional_manifest(folder: Path, layout: str) -> Manifest | None:
    """Return the content of a folder's manifest.json; None if there is no such file, as in folders of other programs.

    `layout`: name of the layout (format on disk) that the manifest must state. Raises UserError if the manifest states
    another layout, or is damaged.
    """
    return read_manifest(folder / MANIFEST, layout) if (folder / MANIFEST).is_file() else None


def checkpoint_of(folder: Path, manifest: Manifest, spans: dict[Key, list[StoredTensor]]) -> Checkpoint:
    """Make a `Checkpoint` object from the manifest of a checkpoint and the locations of all values in its files.

    Args:
        folder: the checkpoint's folder.
        manifest: content of its manifest.json: configuration, progress, and size and SHA-256 of each file.
        spans: for each (kind, parameter), the parts of files that hold the values. A kind is "master" (fp32 weights),
            "exp_avg", "exp_avg_sq" (Adam moments) or "ema" (moving average).

    Raises:
        UserError: `spans` do not hold every element of every parameter exactly once.
    """
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
    """Return the size and SHA-256 of each file that the manifest of a checkpoint `folder` lists, by the file's path."""
    return {folder / name: entry for name, entry in manifest["files"].items()}
