"""Finds the images in a folder and their captions.

Captions come from a txt or json file next to each image, or from a table: metadata.jsonl, a CSV file, or the Arrow or
parquet files of a Hugging Face data set. File names in a table must be relative paths inside the folder.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from raphael_dist.data.captions import first_texts, texts_in
from raphael_dist.data.shards.columns import check_expansion
from raphael_dist.data.shards.skipped import HIDDEN, SkipCounts, is_hidden
from raphael_dist.data.shards.tar_scan import EDGE_EXT, MAX_MEMBER_BYTES
from raphael_dist.errors import UserError, did_you_mean
from raphael_dist.text import json_type, parse_json, read_json, read_text, split_lines

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
UNSUPPORTED_SUFFIXES = {".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".jxl"}
CAPTION_COLUMNS = ("captions", "caption", "text", "prompt", "description", "title")
FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_path", "path")
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "picture")
Row = dict[str, object]
_PLAIN = (str, int, float, bool)
_EXAMPLE_LINE = '{"file_name": "heart.png", "text": "a red heart"}'


@dataclass(frozen=True)
class SourceImage:
    """An image in the folder or table from which shards are made, with its captions.

    Attributes:
        name: File name of the image relative to the folder, or "TABLE, row N" for an image that lies in a table.
        read: Function that returns the bytes of the image file; it raises ValueError or OSError.
        captions: The captions of the image as they are stored, not cleaned; may be empty.
        problem: Why the image has no caption; "" if it has one or the reason is unknown.
        meta: The fields of the image's json file, or the numbers and strings in its table row, by name.
        edge: Path of the image's edge map NAME.edge.png, or None.
    """

    name: str
    read: Callable[[], bytes]
    captions: list[str]
    problem: str = ""
    meta: Row = field(default_factory=dict)
    edge: Path | None = None


def find_images(folder: Path, caption: str | None = None) -> tuple[list[SourceImage], SkipCounts]:
    """Return (images in a folder with their captions, in a fixed order; counts of the files that are not used).

    Args:
        folder: The folder. It may have a table of images and captions (metadata.jsonl, CSV, parquet or arrow).
        caption: Name of the column in this table, or of the field in each image's json, with the captions; text.en is the
            field en of a column text. None: the first of CAPTION_COLUMNS ("captions", "caption", "text", ...) with text.

    Raises:
        UserError: There are no images or no captions, or a table cannot be read.
    """
    table = _table_of(folder)
    paths, skipped = image_files(folder)
    if table is None:
        images = _with_caption_files(folder, paths, caption)
    else:
        table_path, rows = table
        images = _from_table(folder, table_path, rows, caption)
        named = {image.name for image in images}
        for name in (str(path.relative_to(folder)) for path in paths):
            if name not in named:
                skipped.add(f"image that is not in {table_path.name}", name)
    if not images:
        others = sorted({p.suffix.lower() for p in folder.rglob("*") if p.suffix.lower() in UNSUPPORTED_SUFFIXES})
        hint = f" Convert the images in {', '.join(others)}." if others else ""
        hint += "".join(f" Skipped: {line}." for line in skipped.lines())
        raise UserError(
            f"SOURCE={folder} must contain images in {', '.join(SUFFIXES)}, but it has none. Give the folder of the "
            f"images.{hint}"
        )
    if not any(image.captions for image in images):
        problem = next((f" ({image.problem})" for image in images if image.problem), "")
        raise UserError(
            f"SOURCE={folder} must have captions, but none of its images ({len(images)}) has one{problem}. Add a .txt with "
            "the name of each image, or a metadata.jsonl or CSV with the columns file_name and text. If the captions "
            "are in another column or a nested field, name it, for example --caption text.en."
        )
    return images, skipped


def image_files(folder: Path) -> tuple[list[Path], SkipCounts]:
    """Return (paths of the images in a folder and its subfolders, sorted; counts of the files that are not used).

    A symbolic link to a file is used; a symbolic link to a folder is not followed. Edge maps NAME.edge.png are not images.
    """
    paths, skipped = [], SkipCounts()
    for path in sorted(folder.rglob("*")):
        suffix, name = path.suffix.lower(), str(path.relative_to(folder))
        is_image = suffix in SUFFIXES or suffix in UNSUPPORTED_SUFFIXES
        if is_hidden(name):
            if is_image and path.is_file():
                skipped.add(HIDDEN, name)
        elif path.is_symlink() and path.is_dir():
            skipped.add("linked folder; copy its files, or prepare it separately", name)
        elif not is_image or name.lower().endswith(f".{EDGE_EXT}"):
            continue
        elif not path.is_file():
            if path.is_symlink():
                skipped.add("broken link", name)
        elif suffix in UNSUPPORTED_SUFFIXES:
            skipped.add(f"image in another format than {', '.join(SUFFIXES)}; convert it", name)
        else:
            paths.append(path)
    return paths, skipped


def _with_caption_files(folder: Path, paths: Iterable[Path], caption: str | None) -> list[SourceImage]:
    """Return the images at `paths`, each with the captions in the .txt or .json of the same name.

    The text file of a.png is a.txt, a.TXT or a.png.txt. `caption`: the json's field with the captions, or None.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    jsons = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".json"}
    images = []
    for path in paths:
        text_path, json_path = (files.get(path.with_suffix("")) or files.get(path) for files in (texts, jsons))
        images.append(_file_image(path, folder, *_read_captions(text_path, json_path, caption)))
    return images


def _read_captions(text_path: Path | None, json_path: Path | None, caption: str | None) -> tuple[list[str], str, Row]:
    """Return (captions, reason for having none, fields of the json) of an image. The txt has priority over the json."""
    problem, captions, meta = "", list[str](), {}
    try:
        if text_path is not None:
            captions, problem = texts_in(read_text(text_path))
    except (OSError, ValueError) as error:
        problem = _file_problem("txt", error)
    try:
        if json_path is not None:
            meta = read_json(json_path)
            if not isinstance(meta, dict):
                raise ValueError("not an object")
            if not captions:
                captions, problem = _captions(meta, caption, problem)
    except (OSError, ValueError) as error:
        problem, meta = problem or _file_problem("json", error), {}
    return captions, problem, meta


def _file_problem(kind: str, error: Exception) -> str:
    """Return a text about an error in an image's txt or json. Equal problems have equal texts, since they are counted."""
    if isinstance(error, OSError):
        return f"{kind} cannot be read ({error.strerror})"
    return f"{kind} cannot be parsed" if isinstance(error, JSONDecodeError) else f"{kind} is {str(error).partition(' (')[0]}"


def _file_image(path: Path, folder: Path, captions: list[str], problem: str, meta: Row) -> SourceImage:
    def read() -> bytes:
        if path.stat().st_size > MAX_MEMBER_BYTES:
            raise ValueError(f"file has {path.stat().st_size} bytes, but at most {MAX_MEMBER_BYTES} are allowed")
        return path.read_bytes()

    edge = path.with_suffix(f".{EDGE_EXT}")
    name = str(path.relative_to(folder))
    return SourceImage(name, read, captions, problem, meta, edge if edge.is_file() else None)


def _table_of(folder: Path) -> tuple[Path, Iterable[Row]] | None:
    """Return (path, rows) of the table with the captions of a folder's images; None if there is no table."""
    if (folder / "dataset_dict.json").is_file():
        raise UserError(
            f"SOURCE={folder} must be one split of a data set, but it contains several. Use one of them, for example "
            f"{folder}/train."
        )
    if arrows := sorted(folder.glob("*.arrow")):
        return arrows[0], _arrow_rows(arrows)
    for name, rows in (("metadata.jsonl", _json_rows), ("metadata.csv", _csv_rows)):
        if (folder / name).is_file():
            return folder / name, rows(folder / name)
    if parquets := sorted(folder.rglob("*.parquet")):
        return parquets[0], _parquet_rows(parquets)
    tables = sorted([*folder.glob("*.csv"), *folder.glob("*.jsonl")])
    if len(tables) > 1:
        raise UserError(
            f"SOURCE={folder} must contain one table of captions, but it has {len(tables)}, none of them with the name "
            "metadata.csv or metadata.jsonl. Rename the one to use to metadata.csv or metadata.jsonl."
        )
    if tables:
        return tables[0], (_csv_rows if tables[0].suffix == ".csv" else _json_rows)(tables[0])
    return None


def _json_rows(path: Path) -> Iterator[Row]:
    """Yield the objects in a file with one JSON object per line.

    The first one also gets the keys of all others, with None, since `_check_columns` looks only at the first row.
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
    pyarrow = _pyarrow()
    for path in paths:
        try:
            with pyarrow.memory_map(str(path)) as source:
                for batch in pyarrow.ipc.open_stream(source):
                    yield from batch.to_pylist()
        except pyarrow.ArrowException as error:
            raise UserError(f"SOURCE: {path} cannot be read as an Arrow stream ({error}). Write or copy it again.") from None


def _parquet_rows(paths: list[Path]) -> Iterator[Row]:
    pyarrow = _pyarrow()
    from pyarrow import parquet

    for path in paths:
        try:
            file = parquet.ParquetFile(path)
            check_expansion(file, path.stat().st_size)
            for batch in file.iter_batches(batch_size=8):  # small: a long string in each row may be stored only once
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise UserError(f"SOURCE: {path} cannot be read as parquet ({error}). Write or copy it again.") from None


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise UserError(
            "SOURCE: Arrow and parquet files require the package pyarrow, which is not installed. Run: pip install "
            "'raphael_dist[parquet]'"
        ) from None
    return pyarrow


def _from_table(folder: Path, table: Path, rows: Iterable[Row], caption: str | None) -> list[SourceImage]:
    images = []
    for number, row in enumerate(rows):
        if number == 0:
            _check_columns(table, row, caption)
        meta: Row = {key: value for key, value in row.items() if isinstance(value, _PLAIN)}
        captions, problem = _captions(row, caption)
        embedded = next((value for c in IMAGE_COLUMNS if isinstance(value := row.get(c), dict)), {})
        if data := embedded.get("bytes"):
            images.append(SourceImage(f"{table.name}, row {number}", partial(bytes, data), captions, problem, meta))
            continue
        name = embedded.get("path") or next((value for c in FILE_COLUMNS if isinstance(value := row.get(c), str)), "")
        path = Path(str(name))
        if not name or path.is_absolute() or ".." in path.parts or path.suffix.lower() not in SUFFIXES:
            raise UserError(
                f"SOURCE: {table}, row {number + 1} must name an image ({', '.join(SUFFIXES)}) inside {folder}, but it has "
                f"{str(name)!r}. Write a path relative to this folder, such as images/0001.png."
            )
        images.append(_file_image(folder / path, folder, captions, problem, meta))
    return images


def _check_columns(table: Path, row: Row, caption: str | None) -> None:
    """Raise UserError if a table has no column for captions or none for images. `row`: its first row."""
    if caption is not None and caption not in row and caption.partition(".")[0] not in row:
        raise UserError(
            f"--caption={caption} must be a column of {table}{did_you_mean(caption, map(str, row))}. "
            f"Use one of {', '.join(map(str, row))}."
        )
    required = [("captions", CAPTION_COLUMNS)] if caption is None else []
    for what, names in [*required, ("images", (*FILE_COLUMNS, *IMAGE_COLUMNS))]:
        if not any(name in row for name in names):
            raise UserError(
                f"SOURCE: {table} must have a column for the {what} ({', '.join(dict.fromkeys(names))}), but it has only "
                f"{', '.join(map(str, row))}. "
                + ("Select a column with --caption COLUMN." if what == "captions" else f"Rename one to {names[0]}.")
            )


def _captions(row: Row, caption: str | None, problem: str = "") -> tuple[list[str], str]:
    """Return the captions in a table row or json, and the reason for having none.

    `problem`: why an earlier source, such as the txt file, had no captions. It is returned as the reason if it is not "".
    """
    if caption is None or caption in row:
        captions, row_problem = first_texts(row, CAPTION_COLUMNS if caption is None else (caption,))
    else:
        value: object = row
        for name in caption.split("."):  # "text.en" is the field en of the column text
            value = value.get(name) if isinstance(value, dict) else None
        captions, row_problem = texts_in(value)
    return captions, "" if captions else problem or row_problem
