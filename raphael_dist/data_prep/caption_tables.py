"""Reads tables of images and captions: metadata.jsonl, CSV, and the Arrow or parquet files of Hugging Face data sets."""

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from raphael_dist.data.shards.columns import check_expansion, import_pyarrow
from raphael_dist.data.shards.skipped import is_hidden
from raphael_dist.data.shards.tar_scan import expanded_limit
from raphael_dist.data_prep.arrow_size import expanded_bytes
from raphael_dist.errors import UserError
from raphael_dist.text import json_type, parse_json, read_text, split_lines

Row = dict[str, object]
_FEW_ROWS = 8  # that are in memory at a time: a long string in each row may be stored only once
_TABLES = "SOURCE: an Arrow or parquet file"  # for import_pyarrow
_EXAMPLE_LINE = '{"file_name": "heart.png", "text": "a red heart"}'


def find_table(folder: Path, files: Iterable[Path]) -> tuple[Path, Iterable[Row]] | None:
    """Return (path, rows) of the table with the captions of a folder's images; None if there is no table.

    If the table has several files, the path is that of the first one. `files`: all files in the folder and its subfolders.
    Raises UserError if the folder contains several splits of a data set, or several tables.
    """
    if (folder / "dataset_dict.json").is_file():
        raise UserError(
            f"SOURCE={folder} must be one split of a data set, but it contains several. Use one of them, for example "
            f"{folder}/train."
        )
    if arrows := _visible(folder, folder.glob("*.arrow")):
        return arrows[0], _arrow_rows(arrows)
    for name, rows in (("metadata.jsonl", _json_rows), ("metadata.csv", _csv_rows)):
        if (folder / name).is_file():
            return folder / name, rows(folder / name)
    if parquets := _visible(folder, (path for path in files if path.suffix == ".parquet")):
        return parquets[0], _parquet_rows(parquets)
    tables = _visible(folder, [*folder.glob("*.csv"), *folder.glob("*.jsonl")])
    if len(tables) > 1:
        raise UserError(
            f"SOURCE={folder} must contain one table of captions, but it has {len(tables)}, none of them with the name "
            "metadata.csv or metadata.jsonl. Rename the one to use to metadata.csv or metadata.jsonl."
        )
    if tables:
        return tables[0], (_csv_rows if tables[0].suffix == ".csv" else _json_rows)(tables[0])
    return None


def _visible(folder: Path, paths: Iterable[Path]) -> list[Path]:
    """Return those of `paths`, files in `folder`, that are not hidden, sorted.

    Hidden tables may be copies that an editor or the operating system has made.
    """
    return sorted(path for path in paths if not is_hidden(str(path.relative_to(folder))))


def _json_rows(path: Path) -> Iterator[Row]:
    """Yield the objects in a file with one JSON object per line.

    The first object also gets the keys that only later objects have, with the value None: callers take the names of the
    table's columns from the first row.
    """
    rows = list(_json_lines(path))
    for number, row in enumerate(rows):
        yield dict.fromkeys(key for other in rows for key in other) | row if number == 0 else row


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(split_lines(_table_text(path)), start=1):
        if line.strip():
            try:
                row = parse_json(line)
            except ValueError as error:
                raise UserError(
                    f"SOURCE: {path}, line {number} must be JSON, but it cannot be parsed ({error}). Write, for example, "
                    f"{_EXAMPLE_LINE}."
                ) from None
            if not isinstance(row, dict):
                raise UserError(
                    f"SOURCE: {path}, line {number} must be a JSON object, but it is {json_type(row)}. Write, for example, "
                    f"{_EXAMPLE_LINE}."
                )
            yield row


def _csv_rows(path: Path) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(_table_text(path), newline=""))
    try:
        for number, row in enumerate(reader, start=1):
            if surplus := row.get(None):  # DictReader stores surplus fields under the key None
                columns = len(reader.fieldnames or ())
                raise UserError(
                    f"SOURCE: {path}, row {number} (line {reader.line_num}) must have as many fields as the header "
                    f"({columns}), but it has {columns + len(surplus)}. Put captions with commas in double quotes."
                )
            if any(row.values()):  # spreadsheets leave rows of commas at the end
                yield row
    except csv.Error as error:
        raise UserError(f"SOURCE: {path} cannot be read as CSV ({error}). Save it as UTF-8 with commas.") from None


def _table_text(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise UserError(f"SOURCE: {path} cannot be read: {error}. Make it a readable UTF-8 file.") from None


def _arrow_rows(paths: list[Path]) -> Iterator[Row]:
    pyarrow = import_pyarrow(_TABLES)
    for path in paths:
        try:
            with pyarrow.memory_map(str(path)) as source:
                num_bytes = path.stat().st_size
                limit = max(expanded_limit(num_bytes), 2 * num_bytes)  # without compression, a file may have any size
                if expanded_bytes(pyarrow, source) > limit:
                    raise ValueError(f"the file's {num_bytes} bytes expand to more than the allowed {limit} bytes")
                source.seek(0)
                for row in _arrow_batch_rows(pyarrow.ipc.open_stream(source)):
                    limit -= _size(row)
                    if limit < 0:
                        raise ValueError(f"the file's {num_bytes} bytes expand to too many rows or too long strings")
                    yield row
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise UserError(f"SOURCE: {path} cannot be read as an Arrow stream ({error}). Write or copy it again.") from None


def _arrow_batch_rows(batches: Iterable[Any]) -> Iterator[Row]:
    for batch in batches:
        for first in range(0, batch.num_rows, _FEW_ROWS):
            yield from batch.slice(first, _FEW_ROWS).to_pylist()


def _size(value: object) -> int:
    """Return roughly how many bytes a value of an Arrow row has in memory."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return 1 + sum(map(_size, value.values()))
    return 1 + sum(map(_size, value)) if isinstance(value, list) else 1


def _parquet_rows(paths: list[Path]) -> Iterator[Row]:
    pyarrow = import_pyarrow(_TABLES)
    for path in paths:
        try:
            file = pyarrow.parquet.ParquetFile(path)
            check_expansion(file, path.stat().st_size)
            for batch in file.iter_batches(batch_size=_FEW_ROWS):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise UserError(f"SOURCE: {path} cannot be read as parquet ({error}). Write or copy it again.") from None
