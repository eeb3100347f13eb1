"""Pictures in a plain folder, and what is said of them: txt or json beside, metadata.jsonl, CSV, a Hugging Face data set.

Nothing is followed out of the folder: a table's file names are relative and stay within it.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raphael_dist.data.tar_scan import MAX_MEMBER_BYTES
from raphael_dist.errors import UserError, did_you_mean

SUFFIXES = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
OTHER_PICTURES = {".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".jxl"}
CAPTION_COLUMNS = ("captions", "caption", "text", "prompt", "description", "title")
FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_path", "path")
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "picture")
_PLAIN = (str, int, float, bool)


@dataclass(frozen=True)
class Picture:
    """A picture of the source: its name there; `read` returns its bytes.

    `read` raises ValueError or OSError where there are none.
    ext: its kind, or "" where the bytes tell; captions: as they were given; meta: what else was said of it.
    """

    name: str
    ext: str
    read: Callable[[], bytes]
    captions: list[str]
    meta: dict[str, Any] = field(default_factory=dict)


def pictures_of(folder: Path, caption: str | None = None) -> list[Picture]:
    """Return the pictures of a folder with their captions, in a fixed order.

    caption: the column or field that holds captions, where it has no usual name. UserError: no pictures, no captions, a
    table that cannot be read.
    """
    table = _table_of(folder)
    if table is None:
        found = _beside(folder, caption)
    else:
        path, rows = table
        found = _of_table(folder, path, rows, caption)
    if not found:
        others = sorted({p.suffix.lower() for p in folder.rglob("*") if p.suffix.lower() in OTHER_PICTURES})
        hint = f" (of {', '.join(others)} there are some: convert them)" if others else ""
        raise UserError(f"SOURCE: {folder} holds no pictures in {', '.join(SUFFIXES)}{hint}")
    if not any(picture.captions for picture in found):
        raise UserError(
            f"SOURCE: none of the {len(found)} pictures in {folder} has a caption; put a .txt of that name beside each, or "
            "a metadata.jsonl or CSV with the columns file_name and text"
        )
    return found


def _beside(folder: Path, caption: str | None) -> list[Picture]:
    """Return the pictures that lie in a folder, with the captions of the .txt or .json of the same name."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()):
        if path.name.lower().endswith(".edge.png"):
            continue
        meta: dict[str, Any] = {}
        try:
            text = path.with_suffix(".txt")
            captions = [text.read_text(encoding="utf-8")] if text.is_file() else []
            if path.with_suffix(".json").is_file():
                meta = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
                captions = captions or _captions(meta, caption)
        except (OSError, ValueError):
            captions = []  # reported as a picture without a caption
        found.append(_picture(path, folder, captions, meta if isinstance(meta, dict) else {}))
    return found


def _picture(path: Path, folder: Path, captions: list[str], meta: dict[str, Any]) -> Picture:
    def read() -> bytes:
        if path.stat().st_size > MAX_MEMBER_BYTES:
            raise ValueError(f"file of {path.stat().st_size} bytes, at most {MAX_MEMBER_BYTES} allowed")
        return path.read_bytes()

    return Picture(str(path.relative_to(folder)), SUFFIXES[path.suffix.lower()], read, captions, meta)


def _table_of(folder: Path) -> tuple[Path, Iterable[dict[str, Any]]] | None:
    """Return the table that describes a folder's pictures and its rows, or None where they stand for themselves."""
    if (folder / "dataset_dict.json").is_file():
        raise UserError(f"SOURCE: {folder} holds several splits of a data set; give one of its folders, as {folder}/train")
    if arrows := sorted(folder.glob("*.arrow")):
        return arrows[0], _arrow_rows(arrows)
    for name, rows in (("metadata.jsonl", _json_lines), ("metadata.csv", _csv_rows)):
        if (folder / name).is_file():
            return folder / name, rows(folder / name)
    if parquets := sorted(folder.rglob("*.parquet")):
        return parquets[0], _parquet_rows(parquets)
    tables = sorted([*folder.glob("*.csv"), *folder.glob("*.jsonl")])
    if len(tables) > 1:
        raise UserError(f"SOURCE: {folder} holds {len(tables)} tables; name the right one metadata.csv or metadata.jsonl")
    if tables:
        return tables[0], (_csv_rows if tables[0].suffix == ".csv" else _json_lines)(tables[0])
    return None


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(f"SOURCE: {path}, line {number}: not JSON ({error})") from None
                if not isinstance(row, dict):
                    raise UserError(f"SOURCE: {path}, line {number}: not an object")
                yield row


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            yield from csv.DictReader(file)
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"SOURCE: {path} cannot be read as CSV ({error}); save it as UTF-8 with commas") from None


def _arrow_rows(paths: list[Path]) -> Iterator[dict[str, Any]]:
    pyarrow = _pyarrow()
    for path in paths:
        try:
            with pyarrow.memory_map(str(path)) as source:
                for batch in pyarrow.ipc.open_stream(source):
                    yield from batch.to_pylist()
        except pyarrow.ArrowException as error:
            raise UserError(f"SOURCE: {path} cannot be read as an Arrow stream ({error})") from None


def _parquet_rows(paths: list[Path]) -> Iterator[dict[str, Any]]:
    pyarrow = _pyarrow()
    from pyarrow import parquet

    for path in paths:
        try:
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=64):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"SOURCE: {path} cannot be read as parquet ({error})") from None


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise UserError(
            'SOURCE: reading Arrow and parquet files needs pyarrow: pip install "raphael_dist[parquet]"'
        ) from None
    return pyarrow


def _of_table(folder: Path, table: Path, rows: Iterable[dict[str, Any]], caption: str | None) -> list[Picture]:
    found = []
    for number, row in enumerate(rows):
        if number == 0:
            _check_columns(table, row, caption)
        meta = {key: value for key, value in row.items() if isinstance(value, _PLAIN)}
        captions = _captions(row, caption)
        inside = next((row[c] for c in IMAGE_COLUMNS if isinstance(row.get(c), dict)), None)
        if inside is not None and inside.get("bytes"):
            data = bytes(inside["bytes"])
            found.append(Picture(f"{table.name}, row {number}", "", lambda data=data: data, captions, meta))  # type: ignore[misc]
            continue
        name = (inside or {}).get("path") or next((row[c] for c in FILE_COLUMNS if isinstance(row.get(c), str)), "")
        path = Path(str(name))
        if not name or path.is_absolute() or ".." in path.parts or path.suffix.lower() not in SUFFIXES:
            raise UserError(
                f"SOURCE: {table}, row {number + 1}: {str(name)!r} is no picture ({', '.join(SUFFIXES)}) below {folder}"
            )
        found.append(_picture(folder / path, folder, captions, meta))
    return found


def _check_columns(table: Path, row: dict[str, Any], caption: str | None) -> None:
    """Raise UserError when a table lacks the columns that are needed, naming those that it has."""
    if caption is not None and caption not in row:
        raise UserError(
            f"--caption: {table} has no column {caption!r}{did_you_mean(caption, map(str, row))}; it has "
            f"{', '.join(map(str, row))}"
        )
    wanted = [("captions", CAPTION_COLUMNS)] if caption is None else []
    for what, names in [*wanted, ("pictures", (*FILE_COLUMNS, *IMAGE_COLUMNS))]:
        if not any(name in row for name in names):
            raise UserError(
                f"SOURCE: {table} has no column for the {what} ({', '.join(dict.fromkeys(names))}); it has "
                f"{', '.join(map(str, row))}" + ("; name the one to use with --caption" if what == "captions" else "")
            )


def _captions(row: Any, caption: str | None) -> list[str]:
    if not isinstance(row, dict):
        return []
    names = CAPTION_COLUMNS if caption is None else (caption,)
    given: Any = next((row[name] for name in names if row.get(name)), [])
    return [given] if isinstance(given, str) else [text for text in given if isinstance(text, str)]
