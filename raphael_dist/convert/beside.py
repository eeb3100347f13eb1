"""What adapters and controls have in common in files: exported whole or not at all, read from a run or from a folder."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from raphael_dist.checkpoint.reader import CheckpointReader, open_newest
from raphael_dist.errors import UserError
from raphael_dist.storage.tensorfile import FileReader, read_header


@contextmanager
def exported(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` at the end. UserError: it exists already, or cannot be written."""
    if folder.exists():
        raise UserError(f"--out {folder}: exists already; give a new path, nothing is overwritten")
    temporary = folder.parent / f".exporting-{folder.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot write there: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_run(path: Path, config_name: str, option: str) -> CheckpointReader:
    """Open a run's newest checkpoint that verifies. UserError: there is none, nor a folder with `config_name`."""
    try:
        return open_newest(path)
    except UserError as error:
        problem = str(error).removeprefix(f"--checkpoint {path}: ")
        raise UserError(f"{option} {path}: neither a folder with {config_name} nor a run: {problem}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file, checked as `read_header` checks it."""
    reader = FileReader()
    try:
        return {
            key: reader.read([stored], 0, stored.numel).view(stored.shape) for key, stored in read_header(path)[0].items()
        }
    finally:
        reader.close()
