"""What is to be prepared, in parts: each becomes one shard, whoever makes it and however often it is tried."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from raphael_dist.data.captions import clean_caption
from raphael_dist.data.dataset import ImageDataset
from raphael_dist.data.index import BadSample
from raphael_dist.data.shard_store import base_name
from raphael_dist.data.shards import build_index, expand_shards
from raphael_dist.data.tar_scan import EXTS, FEATURES_EXT, IMAGE_FORMATS
from raphael_dist.errors import UserError
from raphael_dist.prepare.folder import Picture, pictures_of

_TARS = (".tar", ".tar.gz", ".tgz")
_KEPT = [ext for ext in EXTS if ext != FEATURES_EXT]
_EXT_OF = dict(zip(IMAGE_FORMATS, ("webp", "png", "jpg"), strict=True))


@dataclass(frozen=True)
class RawSample:
    """A sample as it goes into a shard: its key there, and its members' bytes by extension."""

    key: str
    members: dict[str, bytes]


@dataclass(frozen=True)
class Part:
    """A shard to be: its name without .tar; `read` yields samples, and what cannot be one; held_out: for validation."""

    name: str
    read: Callable[[], Iterator[RawSample | BadSample]]
    held_out: bool = False


def parts_of(sources: Sequence[str], per_shard: int, held_out: float, caption: str | None) -> list[Part]:
    """Return the parts of shards (paths, globs, ranges, a folder of tars), or of one plain folder of pictures.

    Shards keep their names. Of a folder's pictures `per_shard` go into a shard, and every 1 / `held_out`-th into one of
    validation. UserError: nothing there, no captions, two shards of one name, shards of which some were to be held out.
    """
    folders = [Path(source).expanduser() for source in sources if Path(source).expanduser().is_dir()]
    if not folders:
        return _of_shards(list(sources), held_out)
    if len(sources) > 1:
        raise UserError(f"SOURCE: {len(sources)} given, {folders[0]} is a folder; give one folder, or shards")
    tars = sorted(path for path in folders[0].iterdir() if path.name.endswith(_TARS))
    if tars:
        return _of_shards([str(path) for path in tars], held_out)
    pictures = pictures_of(folders[0], caption)
    every = round(1 / held_out) if held_out else 0
    is_held_out = [bool(every) and n % every == every - 1 for n in range(len(pictures))]
    parts = []
    for name, wanted in (("train", False), ("val", True)):
        mine = [(n, p) for n, (p, out) in enumerate(zip(pictures, is_held_out, strict=True)) if out == wanted]
        for number, first in enumerate(range(0, len(mine), per_shard)):
            parts.append(_part_of_folder(f"{name}-{number:05d}", mine[first : first + per_shard], held_out=wanted))
    return parts


def _part_of_folder(name: str, pictures: list[tuple[int, Picture]], held_out: bool) -> Part:
    def read() -> Iterator[RawSample | BadSample]:
        for number, picture in pictures:
            try:
                yield _sample_of(f"{number:09d}", picture)
            except (OSError, ValueError) as error:
                yield BadSample(name, picture.name, str(error))

    return Part(name, read, held_out)


def _sample_of(key: str, picture: Picture) -> RawSample:
    captions = [caption for caption in picture.captions if clean_caption(caption)]
    if not captions:
        raise ValueError("no caption")
    data = picture.read()
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            ext = _EXT_OF[str(image.format)]
    except Exception as error:  # Pillow's parsers raise nearly anything on hostile headers
        raise ValueError(f"picture cannot be read ({type(error).__name__})") from error
    # Width and height are left out: the index takes those of the picture's header.
    meta = {k: v for k, v in picture.meta.items() if k not in ("width", "height", "caption", "captions")}
    meta |= {"captions": captions, "source": picture.name}
    return RawSample(key, {ext: data, "json": json.dumps(meta, ensure_ascii=False).encode("utf-8", "replace")})


def _of_shards(patterns: list[str], held_out: float) -> list[Part]:
    if held_out:
        raise UserError(
            f"--held-out: given {held_out} with shards; allowed with a folder of pictures; leave it out, and name some "
            "of the shards in data.val_shards"
        )
    parts: dict[str, Part] = {}
    for path in expand_shards(patterns):
        name = base_name(path)
        for suffix in _TARS:
            name = name.removesuffix(suffix)
        if name in parts:
            raise UserError(f"SOURCE: two shards are called {name}.tar; prepare them into different folders")
        parts[name] = Part(name, _shard_reader(path))
    return list(parts.values())


def _shard_reader(path: str) -> Callable[[], Iterator[RawSample | BadSample]]:
    def read() -> Iterator[RawSample | BadSample]:
        with TemporaryDirectory() as folder:  # a gzipped shard is expanded in it
            index = build_index([path], Path(folder))
            yield from index.bad
            dataset = ImageDataset(index, [(8, 8)], "none")
            for sample_id in range(index.num_samples):
                yield RawSample(index.key(sample_id), dataset.read(sample_id, _KEPT))

    return read
