"""Columns, which data.filters use: for each sample a number or a short word, such as a score or a language.

They come from the samples' json files, and from the parquet file NAME.parquet that img2dataset writes next to a shard
NAME.tar.
"""

import io
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from raphael_dist.data.shards.tar_scan import expanded_limit
from raphael_dist.errors import UserError

Arrow = Any  # an object of pyarrow, which is optional
MAX_COLUMNS = 64
MAX_WORDS = 64  # a column with more distinct strings is not a category
MAX_WORD_CHARS = 64
MAX_KEY_CHARS = 4096
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. -]{0,63}")
# A parquet file may list samples that were not downloaded; a hostile one may have any number of rows.
_MIN_ROWS, _MAX_ROWS_PER_KEY = 1_000_000, 10
_BATCH_ROWS = 1024
_KEY = "key"  # the column of img2dataset's parquet file with the sample's key


class ColumnCollector:
    """Collects the values that data.filters can test, numbers and short strings, from the json files of a shard's samples.

    Each json field is a column, with one row per sample.
    """

    def __init__(self) -> None:
        self._rows = 0
        self._values: dict[str, dict[int, float]] = defaultdict(dict)
        self._words: dict[str, set[str]] = defaultdict(set)

    def add(self, meta: Mapping[str, object]) -> None:
        """Add a row for the next sample. `meta`: the fields of its json file, by name.

        Only numbers and strings of up to 64 characters are stored, and only for the first 64 fields that have such values.
        """
        for name, value in meta.items():
            number = self._number(name, value)
            if number is not None and (name in self._values or len(self._values) < MAX_COLUMNS):
                self._values[name][self._rows] = number
        self._rows += 1

    def _number(self, name: str, value: object) -> float | None:
        if isinstance(value, (int, float)):
            return float(value) if _NAME.fullmatch(name) and abs(value) < 1e38 else None
        words = self._words[name]
        if not isinstance(value, str) or len(value) > MAX_WORD_CHARS or len(words) > MAX_WORDS or not _NAME.fullmatch(name):
            return None
        words.add(value)
        return word_code(value)

    def columns(self) -> dict[str, np.ndarray]:
        """Return the values of each column by name, float32 [rows]; NaN for a sample without a value.

        A string is represented by its `word_code`. Columns with more than 64 distinct strings are left out.
        """
        columns = {}
        for name, values in self._values.items():
            if len(self._words.get(name, ())) <= MAX_WORDS:
                column = np.full(self._rows, np.nan, np.float32)
                column[list(values)] = list(values.values())
                columns[name] = column
        return columns


def word_code(word: str) -> float:
    """Return the number that represents the string `word` in a column, which is a float32 array.

    It is an integer of -2 or less that contains a 23-bit hash of the string, so it is exact in float32.
    """
    return -2.0 - (zlib.crc32(word.encode("utf-8", "surrogatepass")) & 0x7FFFFF)


def parquet_columns(data: bytes, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Read the columns (values that data.filters test) from a parquet file next to a shard, as img2dataset writes it.

    Args:
        data: The content of the file. Its column `key` states the sample to which a row belongs.
        keys: The keys (names) of the shard's samples.

    Returns:
        The values of each column by name, float32 [len(keys)]; NaN for a sample without a value. {} if the file has no
        column `key`.

    Raises:
        ValueError: The file is not a parquet file, is too large when unpacked, or its column `key` has another type than
            string or integer.
        UserError: The package pyarrow is not installed.
    """
    pyarrow = import_pyarrow("data.filters: a parquet file next to a shard")
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        if _KEY not in file.schema_arrow.names:
            return {}
        check_expansion(file, len(data))
        if file.metadata.num_rows > (limit := _MIN_ROWS + _MAX_ROWS_PER_KEY * len(keys)):
            raise ValueError(
                f"the file has {file.metadata.num_rows} rows for {len(keys)} samples, but at most {limit} are allowed"
            )
        kinds = {field.name: _value_type(pyarrow.types, field.type) for field in file.schema_arrow}
        if not (_is_string(pyarrow.types, kinds[_KEY]) or pyarrow.types.is_integer(kinds[_KEY])):
            raise ValueError(f"the column '{_KEY}' must have the type string or integer, but it has {kinds[_KEY]}")
        used = [name for name, kind in kinds.items() if _is_scalar(pyarrow.types, kind)]
        # Read as dictionaries, each distinct string is in memory once.
        strings = [name for name in used if _is_string(pyarrow.types, kinds[name])]
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data), read_dictionary=strings)
        row_of = _rows_of(file.iter_batches(batch_size=_BATCH_ROWS, columns=used), keys)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"the file is not a parquet file ({type(error).__name__})") from error
    collector = ColumnCollector()
    for key in keys:
        collector.add(row_of.get(key, row_of.get(_base(key), {})))
    return collector.columns()


def import_pyarrow(user: str) -> Arrow:
    """Return the module pyarrow, with its modules parquet and ipc imported. UserError: it is not installed.

    `user`: what requires pyarrow, with which the message begins.
    """
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{user} requires the package pyarrow, which is not installed. Run: pip install 'raphael_dist[parquet]'"
        ) from None
    return pyarrow


def check_expansion(file: Arrow, num_bytes: int) -> None:
    """Raise ValueError if the metadata of a parquet file state that its content is too large when unpacked.

    Reading such a file, which may be malicious, could fill the memory. `file`: the opened pyarrow.parquet.ParquetFile.
    `num_bytes`: size of the file in bytes. The limit is `expanded_limit(num_bytes)`.
    """
    expanded = sum(file.metadata.row_group(n).total_byte_size for n in range(file.metadata.num_row_groups))
    if expanded > expanded_limit(num_bytes):
        limit = expanded_limit(num_bytes)
        raise ValueError(f"the file's {num_bytes} bytes expand to {expanded} bytes, but at most {limit} are allowed")


def _rows_of(batches: Iterable[Arrow], keys: Sequence[str]) -> dict[str, dict[str, object]]:
    """Return those rows of a parquet file that belong to samples of a shard: from a row's key to its values by column name.

    A row belongs to a sample if the row's key equals the sample's key, with or without the folders in the sample's key.
    `batches`: the content of the file. `keys`: the keys (names) of the shard's samples.
    """
    known = {*keys, *map(_base, keys)}
    rows: dict[str, dict[str, object]] = {}
    for batch in batches:
        limits = {name: MAX_KEY_CHARS if name == _KEY else MAX_WORD_CHARS for name in batch.schema.names}
        table = {name: _values(batch.column(name), limit) for name, limit in limits.items()}
        for number, key in enumerate(table.pop(_KEY)):
            if str(key) in known:
                rows[str(key)] = {name: values[number] for name, values in table.items()}
    return rows


def _base(key: str) -> str:
    """Return a sample's key without the folders in the tar: keys in a parquet file have no folders."""
    return key.rpartition("/")[2]


def _values(column: Arrow, max_chars: int) -> list[object]:
    """Return a column's values as a list, with None in place of strings of more than `max_chars` characters."""
    if not hasattr(column, "dictionary"):
        return [float(value) if isinstance(value, Decimal) else value for value in column.to_pylist()]
    words = _values(column.dictionary, max_chars)
    words = [None if isinstance(word, str) and len(word) > max_chars else word for word in words]
    return [None if number is None else words[number] for number in column.indices.to_pylist()]


def _value_type(types: Arrow, kind: Arrow) -> Arrow:
    return kind.value_type if types.is_dictionary(kind) else kind


def _is_string(types: Arrow, kind: Arrow) -> bool:
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_scalar(types: Arrow, kind: Arrow) -> bool:
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind) or types.is_boolean(kind)
    return bool(is_number or _is_string(types, kind))
