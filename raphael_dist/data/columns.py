"""What filters judge samples by: numbers and short words of their json, and of a parquet file beside the shard."""

import io
import re
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raphael_dist.errors import UserError

MAX_COLUMNS = 64
MAX_WORDS = 64  # a column of strings with more distinct ones is no category
MAX_WORD_CHARS = 64
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. -]{0,63}")
_KEY = "key"  # the column of img2dataset's parquet that names a sample


class ColumnCollector:
    """Gathers the columns of a shard's samples, a row for each, from what their json holds."""

    def __init__(self) -> None:
        self._rows = 0
        self._values: dict[str, dict[int, float]] = defaultdict(dict)
        self._words: dict[str, set[str]] = defaultdict(set)

    def add(self, meta: Mapping[str, Any]) -> None:
        """Add the row of one sample."""
        for name, value in meta.items():
            number = self._number(name, value)
            if number is not None and (name in self._values or len(self._values) < MAX_COLUMNS):
                self._values[name][self._rows] = number
        self._rows += 1

    def _number(self, name: str, value: Any) -> float | None:
        if isinstance(value, (int, float)):
            return float(value) if _NAME.fullmatch(name) and abs(value) < 1e38 else None
        words = self._words[name]
        if not isinstance(value, str) or len(value) > MAX_WORD_CHARS or len(words) > MAX_WORDS or not _NAME.fullmatch(name):
            return None
        words.add(value)
        return word_code(value)

    def columns(self) -> dict[str, np.ndarray]:
        """Return float32 [rows] of each column, NaN where a sample has no value."""
        found = {}
        for name, values in self._values.items():
            if len(self._words.get(name, ())) <= MAX_WORDS:
                column = np.full(self._rows, np.nan, np.float32)
                column[list(values)] = list(values.values())
                found[name] = column
        return found


def word_code(word: str) -> float:
    """Return the number that stands for a word in a column: a hash of 23 bits, below -1; float32 holds it exactly."""
    return -2.0 - (zlib.crc32(word.encode("utf-8", "surrogateescape")) & 0x7FFFFF)


def parquet_columns(data: bytes, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the columns of a parquet file beside a shard, its rows matched with `keys` by the column `key`.

    {} where it has no such column. ValueError: it is no parquet file.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError('data.filters: a parquet file lies beside a shard; pip install "raphael_dist[parquet]"') from None
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        if _KEY not in file.schema_arrow.names:
            return {}
        kinds = {field.name: field.type for field in file.schema_arrow}
        used = [name for name, kind in kinds.items() if _is_scalar(pyarrow.types, kind)]
        table = file.read(columns=used).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"it is no parquet file ({type(error).__name__})") from error
    row_of = {str(key): row for row, key in enumerate(table.pop(_KEY))}
    collector = ColumnCollector()
    for key in keys:
        # The key of a sample may lie in a folder of the tar.
        row = row_of.get(key, row_of.get(key.rpartition("/")[2]))
        collector.add({} if row is None else {name: values[row] for name, values in table.items()})
    return collector.columns()


def _is_scalar(types: Any, kind: Any) -> bool:
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_string(kind))
