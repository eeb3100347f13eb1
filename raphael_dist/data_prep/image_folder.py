"""Finds the images in a folder and their captions.

Captions come from a txt or json file next to each image, or from a table: metadata.jsonl, a CSV file, or the Arrow or
parquet files of a Hugging Face data set. File names in a table must be relative paths inside the folder.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from json import JSONDecodeError
from pathlib import Path, PureWindowsPath

from raphael_dist.data.captions import first_texts, texts_in
from raphael_dist.data.folder_files import count_texts_without_image, files_below
from raphael_dist.data.image import IMAGE_SUFFIXES, reason_of
from raphael_dist.data.image_files import UNSUPPORTED_SUFFIXES, CaptionFiles, image_files
from raphael_dist.data.shards.skipped import SkipCounts
from raphael_dist.data.shards.tar_scan import EDGE_EXT, MAX_MEMBER_BYTES
from raphael_dist.data_prep.caption_tables import Row, find_table
from raphael_dist.errors import UserError, did_you_mean, is_machine_fault
from raphael_dist.text import read_json, read_text

CAPTION_COLUMNS = ("captions", "caption", "text", "prompt", "description", "title")
FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_path", "path")
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "picture")
_PLAIN = (str, int, float, bool)


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
        path: Path of the image file, or None for an image that lies in a table.
    """

    name: str
    read: Callable[[], bytes]
    captions: list[str]
    problem: str = ""
    meta: Row = field(default_factory=dict)
    edge: Path | None = None
    path: Path | None = None


def find_images(folder: Path, caption: str | None = None) -> tuple[list[SourceImage], SkipCounts]:
    """Return (images in a folder with their captions, in a fixed order; counts of the files that are not used).

    Args:
        folder: The folder. It may have a table of images and captions (metadata.jsonl, CSV, parquet or arrow).
        caption: Name of the column in this table, or of the field in each image's json, with the captions; text.en is the
            field en of a column text. None: the first of CAPTION_COLUMNS ("captions", "caption", "text", ...) with text.

    Raises:
        UserError: There are no images or no captions, or a table cannot be read.
    """
    files = files_below(folder)
    table = find_table(folder, files)
    paths, skipped = image_files(folder, files)
    if table is None:
        images = _with_caption_files(folder, files, paths, caption)
        skipped.merge(count_texts_without_image(folder, files))
    else:
        table_path, rows = table
        images = _from_table(folder, table_path, rows, caption)
        named = {image.name for image in images}
        for name in (str(path.relative_to(folder)) for path in paths):
            if name not in named:
                skipped.add(f"image that is not in {table_path.name}", name)
    if not images:
        others = sorted({p.suffix.lower() for p in files if p.suffix.lower() in UNSUPPORTED_SUFFIXES})
        hint = f" Convert the images in {', '.join(others)}." if others else ""
        hint += "".join(f" Skipped: {line}." for line in skipped.lines())
        raise UserError(
            f"SOURCE={folder} must contain images in {', '.join(IMAGE_SUFFIXES)}, but it has none. Give the folder of the "
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


def _with_caption_files(
    folder: Path, files: Sequence[Path], paths: Iterable[Path], caption: str | None
) -> list[SourceImage]:
    """Return the images at `paths`, each with the captions in its .txt or .json file.

    `files`: all files in `folder`, among them the caption files. `caption`: name of the json field with the captions; None:
    search the usual names.
    """
    texts, jsons = CaptionFiles(files, ".txt"), CaptionFiles(files, ".json")
    return [_file_image(path, folder, *_read_captions(texts.of(path), jsons.of(path), caption)) for path in paths]


def _read_captions(text_path: Path | None, json_path: Path | None, caption: str | None) -> tuple[list[str], str, Row]:
    """Return (captions of an image, why there are none or "", fields of its json). The txt has priority over the json.

    `text_path`, `json_path`: the image's caption files, if they exist. `caption`: name of the json field with the captions;
    None: search the usual names.
    """
    problem, captions, meta = "", list[str](), {}
    try:
        if text_path is not None:
            captions, problem = texts_in(read_text(text_path))
    except (OSError, ValueError) as error:
        check_machine(text_path, error)
        problem = _file_problem("txt", error)
    try:
        if json_path is not None:
            meta = read_json(json_path)
            if not isinstance(meta, dict):
                raise ValueError("not an object")
            if not captions:
                captions, problem = _captions(meta, caption, problem)
    except (OSError, ValueError) as error:
        check_machine(json_path, error)
        problem, meta = problem or _file_problem("json", error), {}
    return captions, problem, meta


def check_machine(path: object, error: Exception) -> None:
    """Raise UserError if `error`, raised by reading the file `path`, is a fault of the machine, not of the file."""
    if is_machine_fault(error):
        raise UserError(
            f"SOURCE: {path} cannot be read now ({reason_of(error)}). The cause is the machine, not the file. Start the "
            "same command again when the machine can read the file; finished shards are kept."
        ) from error


def _file_problem(kind: str, error: Exception) -> str:
    """Return a text about an error in reading an image's caption file. `kind`: "txt" or "json".

    The text has no details of the file, so that equal problems have equal texts and can be counted.
    """
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
    return SourceImage(name, read, captions, problem, meta, edge if edge.is_file() else None, path)


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
        path = _table_path(folder, str(name))
        if not name or path.is_absolute() or ".." in path.parts or path.suffix.lower() not in IMAGE_SUFFIXES:
            raise UserError(
                f"SOURCE: {table}, row {number + 1} must name an image ({', '.join(IMAGE_SUFFIXES)}) inside {folder}, but "
                f"it has {str(name)!r}. Write a path relative to this folder, such as images/0001.png."
            )
        images.append(_file_image(folder / path, folder, captions, problem, meta))
    return images


def _table_path(folder: Path, name: str) -> Path:
    """Convert the file name in a table's row to a path.

    Backslashes separate folders (Windows), unless the folder contains a file with exactly this name.
    """
    if "\\" not in name or (folder / name).is_file():
        return Path(name)
    path = PureWindowsPath(name)
    return Path("/" if path.anchor else "", path.as_posix())


def _check_columns(table: Path, row: Row, caption: str | None) -> None:
    """Raise UserError if a table has no column for captions or none for images.

    `table`: path of the table. `row`: its first row. `caption`: column with the captions (--caption); None: the usual names
    are searched.
    """
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
    """Return (captions in a table row or json, reason why there are no captions). The reason is "" if there are captions.

    `row`: the values of the row or json, by name. `caption`: name of the column or field with the captions; None: search the
    usual names. `problem`: why a source that was read before, such as the txt file, has no captions; it is returned as the
    reason instead of the one found here. "": no such problem is known.
    """
    if caption is None or caption in row:
        captions, row_problem = first_texts(row, CAPTION_COLUMNS if caption is None else (caption,))
    else:
        value: object = row
        for name in caption.split("."):  # "text.en" is the field en of the column text
            value = value.get(name) if isinstance(value, dict) else None
        captions, row_problem = texts_in(value)
    return captions, "" if captions else problem or row_problem
