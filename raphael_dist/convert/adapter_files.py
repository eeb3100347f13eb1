"""Reads and writes the files of adapters: functions that lora_files.py and controlnet_files.py share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from raphael_dist.checkpoint.reader import CheckpointReader, open_newest
from raphael_dist.checkpoint.tensors import default_weights
from raphael_dist.errors import UserError
from raphael_dist.storage.files import atomic_folder


@contextmanager
def export_folder(folder: Path) -> Iterator[Path]:
    """Return a context that yields a temporary folder to write into. When its block ends, the folder is renamed to `folder`.

    If the block raises, the temporary folder is removed. Raises UserError if `folder` exists already or cannot be written.
    """
    if folder.exists():
        raise UserError(f"--to {folder} exists already, and nothing is overwritten. Choose a new path.")
    try:
        with atomic_folder(folder) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"--to {folder} cannot be written: {error.strerror or error}. Choose another path.") from None


def open_run(path: Path, config_name: str, option: str) -> CheckpointReader:
    """Open the newest undamaged checkpoint of a run directory.

    Args:
        path: the run directory, or one of its step-* folders.
        config_name: name of the configuration file in an exported folder, such as "config.json". The error message
            suggests such a folder as an alternative to a run.
        option: name of the command line option that gave `path`, for messages.

    Raises:
        UserError: `path` contains no undamaged checkpoint.
    """
    try:
        return open_newest(path, option)
    except UserError as error:
        raise UserError(f"{error} Alternatively, give {option} an exported folder that contains {config_name}.") from None


def trained_weights(reader: CheckpointReader, weights: str | None) -> dict[str, Tensor]:
    """Return the parameters in the checkpoint of a run that trained adapters or a ControlNet, by name, float32.

    `reader`: the opened checkpoint. `weights`: "ema" (moving average) or "master" (fp32 weights). None: the EMA if the
    checkpoint has one.
    """
    kind = "master" if weights == "master" else default_weights(reader.kinds())
    return {name: reader.whole(kind, name) for name in reader.shapes}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file by name, converted to float32. Raises UserError if it cannot be read."""
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read as a safetensors file: {error}. Copy it again from its source, or export it again."
        ) from None
