"""Files that survive a crash: written, synced and read back before anything refers to them; folders are renamed.

Nothing is buffered here: a test can stop a process between any two calls of the operating system.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_log = logging.getLogger(__name__)

CHUNK_BYTES = 8 << 20
WRITING, REMOVING, REPLACED, DAMAGED = ".writing-", ".removing-", ".replaced-", "damaged-"


def write_bytes(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the device. Raises OSError, FileExistsError among them."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _write_all(descriptor, memoryview(data))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_bytes(path: Path, data: bytes) -> None:
    """Give `path` other contents in one step: a reader sees the old or the new ones."""
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    write_bytes(beside, data)
    beside.replace(path)
    sync_folder(path.parent)


def write_tensors(
    path: Path, layout: Iterable[tuple[str, int]], values: Tensor, metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Write consecutive parts of `values`, float32 [n] on the host, as one safetensors file, and read it back.

    layout: (key, number of elements) of each part. Returns the manifest's entry: bytes and sha256. Raises OSError when it
    cannot be written, when a value is not finite, or when the device returns something else than was written.
    """
    header = safetensors_header(((key, "F32", (numel,), 4 * numel) for key, numel in layout), metadata)
    data = values.numpy().view(np.uint8).data
    digest, each = hashlib.sha256(header), CHUNK_BYTES // 4
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _write_all(descriptor, memoryview(header))
        for first in range(0, values.numel(), each):
            part = slice(4 * first, 4 * min(first + each, values.numel()))
            # One pass without a mask: NaN and infinities are the extremes of what holds any.
            if not all(x.isfinite() for x in values[first : first + each].aminmax()):
                raise OSError(f"{_first_not_finite(layout, values)} is not finite; this state is not worth keeping")
            digest.update(data[part])
            _write_all(descriptor, data[part])
        os.fsync(descriptor)
        # From the device, not from memory: a file that was read back is one that an older checkpoint may be removed for.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(descriptor, 0, os.SEEK_SET)
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            found = hashlib.file_digest(file, "sha256")
    finally:
        os.close(descriptor)
    if found.digest() != digest.digest():
        raise OSError(f"{path}: the file system returned other bytes than were written")
    return {"bytes": len(header) + data.nbytes, "sha256": digest.hexdigest()}


def safetensors_header(tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """Return the head of a safetensors file of tensors (key, dtype, shape, bytes) that lie one after the other."""
    head: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for key, dtype, shape, size in tensors:
        head[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries are on the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Return the bytes that this process may still write to the file system of `folder`."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def step_folders(root: Path) -> list[Path]:
    """Return every folder step-00000100, the newest first, whole or not. Raises OSError when `root` cannot be read.

    Others, as a user's copy step-00000100-good, are none of ours: neither resumed from nor removed.
    """
    try:
        found = [path for path in root.iterdir() if re.fullmatch(r"step-\d{8,}", path.name)]
    except FileNotFoundError:
        return []
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def publish(temporary: Path, final: Path) -> None:
    """Rename a whole folder into place; one of that name steps aside first and comes back if this is not completed."""
    sync_folder(temporary)
    aside = final.with_name(REPLACED + final.name)
    if aside.exists():
        remove(aside)
    if final.exists():
        final.rename(aside)
    try:
        temporary.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    sync_folder(final.parent)
    if aside.exists():
        remove(aside)


def remove(folder: Path) -> None:
    """Delete a checkpoint: out of sight first, so that half of one never looks whole. Only warns when it cannot."""
    hidden = folder if folder.name.startswith(".") else folder.with_name(REMOVING + folder.name)
    try:
        if hidden != folder:
            folder.rename(hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        _log.warning("cannot remove the old checkpoint %s: %s; remove it by hand", folder, error)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint out of the way, keeping it; return its new path."""
    for i in range(1000):
        target = folder.with_name(DAMAGED + folder.name + (f".{i}" if i else ""))
        if not target.exists():
            folder.rename(target)
            return target
    raise OSError(f"{folder}: a thousand damaged checkpoints of this step already")


def tidy(root: Path) -> None:
    """Clear away what a killed process left: unfinished folders go, one that was about to be replaced comes back."""
    for path in sorted(root.iterdir()):
        if path.name.startswith(REPLACED):
            final = root / path.name.removeprefix(REPLACED)
            if final.exists():
                remove(path)
            else:
                path.rename(final)
        elif path.name.startswith((WRITING, REMOVING)):
            remove(path)


def surplus(folders: list[Path], keep: int, keep_every: int) -> list[Path]:
    """Return which of `folders`, newest first, retention lets go: all but the last `keep` and every `keep_every`th step."""
    return [f for f in folders[keep:] if not (keep_every and step_of(f) % keep_every == 0)]


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _first_not_finite(layout: Iterable[tuple[str, int]], values: Tensor) -> str:
    parts = values.split([numel for _, numel in layout])
    return next(key for (key, _), part in zip(layout, parts, strict=True) if not torch.isfinite(part).all())
