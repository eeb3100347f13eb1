"""The manifest of a checkpoint, in any layout: what it is, and the size and SHA-256 of every file. It is written last."""

import hashlib
import json
from math import isfinite
from pathlib import Path
from typing import Any

from raphael_dist.errors import UserError
from raphael_dist.storage.files import read_text

FORMAT = 1
MANIFEST = "manifest.json"
_KEYS = {"step", "samples_seen", "dataset", "config", "files"}


def read_manifest(path: Path, layout: str | None = None) -> dict[str, Any]:
    """Return a manifest whose parts have the types that readers count on. layout: what it must be of; None for a run's.

    UserError when it is missing, unreadable, of another layout or format, not the one that was sealed, lacks a part, or
    names files outside its folder.
    """
    try:
        manifest = json.loads(read_text(path))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no {path.name}, so this is no checkpoint, or it was never finished") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is unreadable: {error}") from None
    problem = _malformed(manifest, layout)
    if problem:
        raise UserError(f"{path} {problem}")
    return dict(manifest)


def _malformed(manifest: Any, layout: str | None) -> str | None:
    """Return what is wrong with a manifest as such, or None."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("layout") != layout:
        return f"is not of {f'layout {layout}, ' if layout else ''}format {FORMAT}"
    lacking = (_KEYS if layout else _KEYS | {"tensors"}) - manifest.keys()
    if lacking:
        return f"lacks {', '.join(sorted(lacking))}"
    if manifest.get("checksum") != checksum(manifest):
        return "does not match its own checksum"
    step, seen, updates = manifest["step"], manifest["samples_seen"], manifest.get("updates", 0)
    if not all(type(n) is int and 0 <= n < 2**63 for n in (step, seen, updates)) or updates > step:
        return f"tells of no progress that can be: step {step!r}, samples_seen {seen!r}, updates {updates!r}"
    if not _is_guard(manifest.get("guard")):
        return "holds no state of the rules against bad steps"
    tensors, files = manifest.get("tensors", {}), manifest["files"]
    if not isinstance(tensors, dict) or not all(_is_shape(shape) for shape in tensors.values()):
        return "gives a tensor no proper shape"
    if not isinstance(files, dict) or not all(_is_entry(entry) for entry in files.values()):
        return "gives a file no size and checksum"
    outside = next((name for name in files if Path(name).is_absolute() or ".." in Path(name).parts), None)
    return None if outside is None else f"names a file outside the folder: {outside!r}"


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)


def _is_guard(guard: Any) -> bool:
    if guard is None or not isinstance(guard, dict):
        return guard is None
    counts, window = [n for name, n in guard.items() if name != "window"], guard.get("window", [])
    losses = isinstance(window, list) and all(type(x) in (int, float) and isfinite(x) for x in window)
    return losses and all(type(n) is int and n >= 0 for n in counts)


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("bytes")) is int and type(entry.get("sha256")) is str


def checksum(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of all in a manifest but its own checksum."""
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def seal(manifest: dict[str, Any]) -> bytes:
    """Return the text of a manifest, one key a line, with a checksum of all else in it."""
    sealed = {key: value for key, value in manifest.items() if key != "checksum"} | {"checksum": checksum(manifest)}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sealed.items()]
    return ("{\n " + ",\n ".join(lines) + "\n}\n").encode()
