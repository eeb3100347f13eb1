"""Opens a file of the feature cache (cache.py) and reads the features of one sample from it."""

import errno
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from raphael_dist.data.features.cache_build import IMAGE_TENSORS, TABLES, TEXT_TENSORS
from raphael_dist.data.features.packing import Pick, SampleFeatures, checksum, unpack
from raphael_dist.errors import UserError


def layout_sum(layout: dict[str, tuple[str, list[int]]], bad: list[tuple[int, str]]) -> int:
    """Return the CRC-32 of the header of a cache file.

    `layout`: (dtype, shape) of each tensor in the file, by name. `bad`: (number in the shard, reason) of each sample that
    cannot be used.
    """
    return zlib.crc32(json.dumps([layout, bad], sort_keys=True).encode())


def _check_open(path: Path) -> None:
    """Raise FileNotFoundError if a file is missing, UserError if it exists but cannot be opened.

    The safetensors library raises FileNotFoundError in both cases. A file that cannot be opened would then count as missing,
    and each step would encode its samples again without a message.
    """
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except FileNotFoundError:
        raise
    except OSError as error:
        hint = "Make it readable for this user, or choose another data.cache_dir"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            hint = "Raise the limit of open files (ulimit -n)"
        raise UserError(f"data.cache_dir: {path} cannot be opened ({error.strerror}). {hint}.") from error


class CachedShard:
    """The opened cache file of one shard. Small tables are in memory; `get` reads one sample's rows of the large tensors.

    The table at the top of cache_build.py lists all tensors.
    """

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            FileNotFoundError: The file is missing.
            UserError: The file exists, but this process cannot open it.
            OSError, SafetensorError, KeyError, ValueError: The file is damaged.
        """
        _check_open(path)
        self._file = safe_open(path, framework="pt")
        # A single metadata entry, since safetensors writes several in no fixed order.
        about = json.loads(self._file.metadata()["shard"])
        self.bad: list[tuple[int, str]] = about["bad"]
        self._names = set(self._file.keys())
        self._bucket, self._row, self._offsets, self._caption_rows, self._weights = (
            self._file.get_tensor(name).numpy() for name in TABLES
        )
        if checksum(self._file.get_tensor(name) for name in TABLES) != about["tables_sum"]:
            raise ValueError("the file's tables (rows and captions of each sample) do not match their checksum")
        slices = {name: self._file.get_slice(name) for name in self._names}
        layout = {name: (entry.get_dtype(), entry.get_shape()) for name, entry in slices.items()}
        if about["layout_sum"] != layout_sum(layout, self.bad):
            raise ValueError("the file's header does not match its checksum")

    def get(self, number: int, pick: Pick, flip: bool) -> SampleFeatures | None:
        """Return the features of sample `number` of the shard (mirrored if `flip`); None if it is unusable.

        `pick`: draws the index of a caption, given the captions' weights. Raises ValueError if a checksum is wrong.
        """
        bucket, row = int(self._bucket[number]), int(self._row[number])
        if bucket < 0:
            return None
        captions = slice(self._offsets[number], self._offsets[number + 1])
        text_row = int(self._caption_rows[captions][pick(self._weights[captions].tolist())])
        names = [name for name in IMAGE_TENSORS if f"{name}.{bucket}" in self._names]
        tensors = self._read_row(names, f".{bucket}", row, "sum")
        tensors["weights"] = torch.ones(1)
        return unpack({**tensors, **self._read_text(text_row)}, lambda _: 0, flip)

    def _read_text(self, row: int) -> dict[str, Tensor]:
        if "tokens" in self._names:
            return {name: tensor[None] for name, tensor in self._read_row(TEXT_TENSORS, "", row, "text_sum").items()}
        ends = self._file.get_tensor("caption_ends")
        first, last = int(ends[row - 1]) if row else 0, int(ends[row])
        text = self._file.get_slice("captions")[first:last].clone()
        if checksum([text]) != int(self._read("text_sum", row)):
            raise ValueError(f"caption {row} of the file does not match its checksum")
        return {"captions": text, "caption_ends": ends[row : row + 1] - first}

    def _read_row(self, names: Sequence[str], suffix: str, row: int, sum_name: str) -> dict[str, Tensor]:
        tensors = {name: self._read(f"{name}{suffix}", row) for name in names}
        if checksum(tensors.values()) != int(self._read(f"{sum_name}{suffix}", row)):
            raise ValueError(f"the features in row {row} of the file do not match their checksum")
        return tensors

    def _read(self, name: str, row: int) -> Tensor:
        # A copy: a view would keep the whole map alive, and writing into it would change the cached values.
        return self._file.get_slice(name)[row : row + 1][0].clone()
