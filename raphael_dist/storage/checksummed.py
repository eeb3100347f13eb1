"""Derived files that affect results, each with its SHA-256. A file that does not match must be written again."""

import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from raphael_dist.storage.files import atomic_folder, atomic_path, integrity_error, sha256
from raphael_dist.text import open_regular

SUMS = "sums.json"
_DIGEST_BYTES = hashlib.sha256().digest_size


def write_sealed(path: Path, data: bytes) -> None:
    """Write `data` and its SHA-256, atomically. Raises OSError."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.write(hashlib.sha256(data).digest())


def read_sealed(path: Path) -> bytes:
    """Read the data of `write_sealed`. Raises OSError, and ValueError for a file that does not match its checksum."""
    with open(open_regular(path), "rb") as file:
        data = file.read()
    data, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != digest:
        raise ValueError(f"{path} does not match its checksum")
    return data


def write_array(path: Path, values: np.ndarray) -> None:
    """Write an array as a sealed file. Raises OSError."""
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    write_sealed(path, buffer.getvalue())


def read_array(path: Path) -> np.ndarray:
    """Read the array of `write_array`. Raises the errors of `read_sealed`."""
    values: np.ndarray = np.load(io.BytesIO(read_sealed(path)), allow_pickle=False)
    return values


@contextmanager
def sealed_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; at the end of the block it gets checksums of its files and is renamed to `folder`.

    Several processes may write the same folder: the first one wins. Raises OSError if no process has written it.
    """
    try:
        with atomic_folder(folder) as temporary:
            yield temporary
            paths = sorted(temporary.iterdir())
            files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}
            write_sealed(temporary / SUMS, json.dumps(files).encode())
            if not (folder / SUMS).is_file():
                shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        if not (folder / SUMS).is_file():
            raise


def folder_damage(folder: Path) -> str | None:
    """Return what is wrong with a sealed folder, or None."""
    try:
        files = json.loads(read_sealed(folder / SUMS))
        return integrity_error((folder / name, entry) for name, entry in files.items())
    except FileNotFoundError:
        return f"{folder / SUMS} is missing"
    except (OSError, ValueError) as error:
        return str(error)
