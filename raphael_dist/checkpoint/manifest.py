"""The manifest of a checkpoint: a JSON file with progress, configuration, and the size and SHA-256 of every other file.

The manifest is written last, so a folder with a manifest is complete. A layout is a file format of checkpoints, such as that
of diffusers (convert/layouts/). The manifest of a converted checkpoint states its layout.
"""

import hashlib
import json
from math import isfinite
from pathlib import Path

from raphael_dist.errors import UserError
from raphael_dist.text import JsonObject, json_type, read_json

FORMAT = 1
MANIFEST = "manifest.json"
Manifest = JsonObject
_KEYS = {"step", "samples_seen", "updates", "guard", "dataset", "config", "files"}


def read_manifest(path: Path, layout: str | None = None) -> Manifest:
    """Read and check the manifest of a checkpoint (its settings, progress, and list of files); return it as a dict.

    Args:
        path: the file manifest.json.
        layout: name of the layout (file format of checkpoints) that the manifest must state. None: the manifest must state
            no layout, as in the checkpoints of a run.

    Raises:
        UserError: the manifest is missing or cannot be read, has another layout or format, lacks a key, does not match its
            own checksum, or names files outside its folder.
    """
    try:
        manifest = read_json(path)
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} has no {path.name}: it is not a checkpoint, or saving it was interrupted. Use another folder."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: {error}. Replace the checkpoint by a backup copy, or use another one."
        ) from None
    problem = _problem(manifest, layout)
    if problem:
        raise UserError(f"{path} is not valid: {problem}. Replace the checkpoint by a backup copy, or use another one.")
    return dict(manifest)


def _problem(manifest: object, layout: str | None) -> str | None:
    """Return what is wrong with the content of a manifest, or None if it is valid.

    `layout` is the name of the layout that the manifest must state. None: it must state no layout.
    """
    if not isinstance(manifest, dict):
        return f"it must be a JSON object, but it is {json_type(manifest)}"
    if manifest.get("format") != FORMAT or manifest.get("layout") != layout:
        actual = f"{manifest.get('layout', 'raphael')} and the format {manifest.get('format')}"
        return f"it must have the layout {layout or 'raphael'} and the format {FORMAT}, but it has the layout {actual}"
    missing = (_KEYS if layout else _KEYS | {"tensors"}) - manifest.keys()
    if missing:
        return f"it lacks {', '.join(sorted(missing))}"
    if manifest.get("checksum") != checksum(manifest):
        return "it does not match its own checksum"
    step, samples, updates = manifest["step"], manifest["samples_seen"], manifest["updates"]
    if not all(type(n) is int and 0 <= n < 2**63 for n in (step, samples, updates)) or updates > step:
        return (
            f"step={step!r}, samples_seen={samples!r} and updates={updates!r} must be integers from 0 to 2**63 - 1, and "
            "updates must not exceed step"
        )
    if not _is_guard(manifest["guard"]):
        return f"guard={str(manifest['guard'])[:80]} must contain finite losses, and counts that are not negative"
    tensors, files = manifest.get("tensors", {}), manifest["files"]
    if not isinstance(tensors, dict) or not all(_is_shape(shape) for shape in tensors.values()):
        return "each entry of tensors must be a shape, a list of integers that are not negative"
    if not isinstance(files, dict) or not all(_is_entry(entry) for entry in files.values()):
        return "each entry of files must have a size (bytes), a checksum (sha256) and valid ranges"
    outside = next((name for name in files if Path(name).is_absolute() or ".." in Path(name).parts), None)
    return None if outside is None else f"the file {outside!r} lies outside the folder"


def _is_shape(shape: object) -> bool:
    return isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)


def _is_guard(guard: object) -> bool:
    if not isinstance(guard, dict):
        return False
    counts, window = [n for name, n in guard.items() if name != "window"], guard.get("window", [])
    losses = isinstance(window, list) and all(type(x) in (int, float) and isfinite(x) for x in window)
    return losses and all(type(n) is int and n >= 0 for n in counts)


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or type(entry.get("sha256")) is not str:
        return False
    ranges = entry.get("ranges", {})  # (start, numel) of each tensor, in checkpoints of the trainer
    return isinstance(ranges, dict) and all(_is_shape(span) and len(span) == 2 for span in ranges.values())


def checksum(manifest: Manifest) -> str:
    """Return the SHA-256 (hex) of `manifest`, the content of a checkpoint's manifest.json.

    Its key `checksum` is left out of the computation, because its value is this checksum.
    """
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def seal(manifest: Manifest) -> bytes:
    """Return `manifest` as the bytes of a manifest.json, with its own SHA-256 added as the key `checksum`.

    The bytes are JSON with one key per line. `manifest` is not changed.
    """
    sealed = {key: value for key, value in manifest.items() if key != "checksum"} | {"checksum": checksum(manifest)}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sealed.items()]
    return ("{\n " + ",\n ".join(lines) + "\n}\n").encode()
