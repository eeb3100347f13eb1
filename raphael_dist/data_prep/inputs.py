"""Divides the input of data preparation into parts. Each part becomes one shard (tar file).

The division does not depend on the number of processes.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from raphael_dist.data.captions import clean_caption
from raphael_dist.data.fetch.remote import is_remote
from raphael_dist.data.fetch.shard_cache import base_name
from raphael_dist.data.folder_files import count_unused_archives, files_below
from raphael_dist.data.image import image_ext, reason_of
from raphael_dist.data.image_files import image_files
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.shards.dataset_index import BadSample
from raphael_dist.data.shards.decode_sample import RAW_EXTS, ImageDataset
from raphael_dist.data.shards.shard_names import expand_shards, name_option
from raphael_dist.data.shards.skipped import SkipCounts, is_hidden
from raphael_dist.data.shards.tar_scan import EDGE_EXT
from raphael_dist.data_prep.image_folder import SourceImage, check_machine, find_images
from raphael_dist.errors import UserError

_TARS = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class RawSample:
    """A sample as the bytes of its files, not decoded.

    Attributes:
        key: Name of the sample in its shard (tar file).
        members: Content of each of its files by extension, such as "jpg", "json", "edge.png".
    """

    key: str
    members: dict[str, bytes]


@dataclass(frozen=True)
class Part:
    """The samples from which data preparation makes one shard (tar file).

    Attributes:
        name: File name of the shard to write, without .tar.
        read: Function that yields the samples, with a `BadSample` in place of a sample that cannot be used.
        held_out: Whether the shard is for validation.
        file_of: Name of the source file of each sample, by the sample's key (name in the shard), for messages. Empty for
            existing shards, whose samples have no source file.
        skipped: Number of input files that belong to no sample, by reason. It is complete when `read` has yielded all
            samples.
        fingerprint: Function that returns a hash of the options and input files which determine the samples.
    """

    name: str
    read: Callable[[], Iterator[RawSample | BadSample]]
    held_out: bool = False
    file_of: Mapping[str, str] = field(default_factory=dict)
    skipped: SkipCounts = field(default_factory=SkipCounts)
    fingerprint: Callable[[], str] = lambda: ""


def parts_of(
    sources: Sequence[str], per_shard: int, held_out: float, caption: str | None, out: Path | None = None
) -> list[Part]:
    """Divide existing shards (tar files), or a folder of images, into parts. A part is the input of one new shard.

    Args:
        sources: Paths, URLs or patterns of shards, a folder with tar files, or a folder with images. Each existing
            shard becomes one part, or two if `held_out` is above 0.
        per_shard: For a folder of images: number of images in a part.
        held_out: Fraction of the samples for validation; 0: none. Otherwise every n-th sample is selected, with n close to
            1 / `held_out`, and at least one sample. The selected samples become the shards val-*, the others train-*.
        caption: For a folder of images: name of the column or json field with the captions. None: search the usual names.
        out: The output folder, which must not be a source.

    Raises:
        UserError: There are no samples or no captions, two shards have the same name, or there are too few samples for
            validation.
    """
    folders = [Path(source).expanduser() for source in sources if Path(source).expanduser().is_dir()]
    if len(sources) > 1 and folders:
        raise UserError(
            f"SOURCE must be one folder or several shards, but the folder {folders[0]} is one of {len(sources)} sources. "
            "Prepare each folder separately."
        )
    with name_option("SOURCE"):
        tars = shards_in(folders[0]) if folders else expand_shards(sources)
    inputs = {*folders, *(Path(tar).parent for tar in tars if not is_remote(tar))}
    if out is not None and out.resolve() in {folder.resolve() for folder in inputs}:
        raise UserError(f"--out={out} must differ from SOURCE, so that output does not mix with input. Choose a new folder.")
    skipped = SkipCounts()
    if folders and tars:
        files = files_below(folders[0])
        for path in image_files(folders[0], files)[0]:
            skipped.add("image in a folder with tars; move it to another folder", str(path.relative_to(folders[0])))
        skipped.merge(count_unused_archives(folders[0], files, tars))
    return _shard_parts(tars, held_out, skipped) if tars else _folder_parts(folders[0], per_shard, held_out, caption)


def shards_in(folder: Path) -> list[str]:
    """Return the paths of the files .tar, .tar.gz and .tgz in a folder, sorted. Hidden files are left out."""
    return [str(path) for path in sorted(folder.iterdir()) if path.name.endswith(_TARS) and not is_hidden(path.name)]


def _folder_parts(folder: Path, per_shard: int, held_out: float, caption: str | None) -> list[Part]:
    images, skipped = find_images(folder, caption)
    is_held_out = _select_held_out(len(images), held_out)
    # The number of images too: otherwise a shard that no longer exists could stay in the output next to the others.
    options = [per_shard, held_out, caption, len(images)]
    if held_out and not any(is_held_out):
        raise UserError(
            f"--held-out={held_out} requires at least 2 images, but {folder} has {len(images)}. Leave out --held-out."
        )
    parts = []
    for split, validation in (("train", False), ("val", True)):
        numbered = [entry for entry, out in zip(enumerate(images), is_held_out, strict=True) if out == validation]
        for number, first in enumerate(range(0, len(numbered), per_shard)):
            parts.append(_part_of_folder(f"{split}-{number:05d}", numbered[first : first + per_shard], validation, options))
    parts[0].skipped.merge(skipped)
    return parts


def _select_held_out(count: int, share: float) -> list[bool]:
    """Return for each of `count` samples whether it is for validation.

    `share`: the fraction of samples for validation. If it is above 0 and `count` is at least 2, at least one is selected.
    """
    if not share or count < 2:
        return [False] * count
    every = min(round(1 / share), count)
    return [n % every == every - 1 for n in range(count)]


def _part_of_folder(name: str, images: list[tuple[int, SourceImage]], held_out: bool, options: Sequence[object]) -> Part:
    """Return the input of the new shard `name`, made from `images`: (number, image) of each sample.

    The number identifies the image in the folder; the sample's key is made from it.
    `held_out`: whether the shard is for validation. `options`: values of the command's options, for the fingerprint.
    """

    def read() -> Iterator[RawSample | BadSample]:
        for number, image in images:
            try:
                yield _sample_of(_key(number), image)
            except (OSError, ValueError) as error:
                check_machine(image.name, error)
                yield BadSample(name, image.name, reason_of(error))

    def fingerprint() -> str:
        return _hash([options, [(number, _identity(image)) for number, image in images]])

    file_of = {_key(number): image.name for number, image in images}
    return Part(name, read, held_out, file_of, fingerprint=fingerprint)


def _identity(image: SourceImage) -> list[object]:
    """Return values that change if an image, its captions or its edge map change, without reading image files.

    An image file or edge map is represented by its size and modification time. An image in a parquet or Arrow table has
    no file of its own and is represented by a checksum of its bytes.
    """
    content = zlib.crc32(image.read()) if image.path is None else _stamp(image.path)
    return [image.name, content, image.captions, image.meta, None if image.edge is None else _stamp(image.edge)]


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return (size in bytes, modification time in ns) of a file; None if it cannot be opened."""
    try:
        status = path.stat()
    except OSError as error:
        check_machine(path, error)
        return None
    return status.st_size, status.st_mtime_ns


def _hash(values: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _key(number: int) -> str:
    return f"{number:09d}"


def _sample_of(key: str, image: SourceImage) -> RawSample:
    captions = [caption for caption in image.captions if clean_caption(caption)]
    if not captions:
        raise ValueError(image.problem or "no caption")
    data = image.read()
    ext = image_ext(data)
    # Width and height are omitted: the index uses those of the image's header.
    meta = {k: v for k, v in image.meta.items() if k not in ("width", "height", "captions")}
    if meta.get("caption") in (captions, captions[0]):
        del meta["caption"]
    meta["captions"] = captions
    meta.setdefault("source", image.name)
    if meta["source"] != image.name:  # a column of the user's table
        meta.setdefault("source_file", image.name)
    members = {ext: data, "json": json.dumps(meta, ensure_ascii=False).encode("utf-8", "replace")}
    if image.edge is not None:
        members[EDGE_EXT] = image.edge.read_bytes()
    return RawSample(key, members)


def _shard_parts(paths: Sequence[str], held_out: float, skipped: SkipCounts) -> list[Part]:
    parts: dict[str, Part] = {}
    for path in paths:
        name = base_name(path)
        for suffix in _TARS:
            name = name.removesuffix(suffix)
        if name in parts or f"val-{name}" in parts:
            raise UserError(
                f"SOURCE must have shards with different names, but two are named {name}.tar. Rename one of them, or run "
                "the command twice, each time with only one of these two shards and with another --out folder."
            )
        if held_out:
            parts[f"val-{name}"] = _part_of_shard(f"val-{name}", path, held_out, validation=True)
            name = f"train-{name.removeprefix('train-')}"
        parts[name] = _part_of_shard(name, path, held_out)
    next(iter(parts.values())).skipped.merge(skipped)
    return list(parts.values())


def _part_of_shard(name: str, path: str, held_out: float, validation: bool = False) -> Part:
    """Return the input of one new shard: the validation samples of the existing shard `path`, or its training samples.

    `name`: name of the new shard. `held_out`: fraction of the samples for validation. `validation`: True for the validation
    samples, False for the training samples. Unusable samples (`BadSample`) belong to the training samples, so that each is
    reported once.
    """
    skipped = SkipCounts()

    def read() -> Iterator[RawSample | BadSample]:
        with TemporaryDirectory() as folder:  # a gzipped shard is expanded in it
            with name_option("SOURCE"):
                index = build_index([path], Path(folder))
            if not validation:
                skipped.merge(index.skipped)
                yield from index.bad
                for damage in index.damaged.values():
                    yield BadSample(name, base_name(path), f"{damage}; its other samples are left out")
            dataset = ImageDataset(index, [(8, 8)], "none")
            for sample_id, is_held_out in enumerate(_select_held_out(index.num_samples, held_out)):
                if is_held_out == validation:
                    yield RawSample(index.key(sample_id), dataset.read(sample_id, RAW_EXTS))

    def fingerprint() -> str:
        return _hash([held_out, base_name(path), None if is_remote(path) else _stamp(Path(path))])

    return Part(name, read, validation, skipped=skipped, fingerprint=fingerprint)
