"""What can be known before any rank starts: `--dry-run` looks at shards, encoders, checkpoints, folders, without a GPU."""

import os
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from raphael_dist.checkpoint.reader import newest
from raphael_dist.config import Config
from raphael_dist.config_adapters import beside
from raphael_dist.convert.initial import check_initial, open_initial
from raphael_dist.data.encoders import ImageFacts, TextFacts
from raphael_dist.data.open import check_encoders
from raphael_dist.data.open_index import find_shards
from raphael_dist.data.remote import is_remote
from raphael_dist.data.shard_store import store_of
from raphael_dist.data.tar_scan import EDGE_EXT
from raphael_dist.errors import UserError
from raphael_dist.sampling.prompts import sample_requests
from raphael_dist.training.rundir import check_unowned

_MEMBERS = 32  # of the first shard: enough to meet a sample with all it has


def problems(config: Config) -> list[str]:
    """Return a line for everything that a start with this configuration would be refused for, as far as names, headers and
    small files tell. No shard is read, and no weights but HED's where it is to find edges in `sample.pictures`."""
    shards = [partial(_shards, name=name) for name in ("shards", "val_shards")]
    looks: list[Callable[[Config], object]] = [_run_dir, _cache_dir, _encoders, *shards, _initial, sample_requests]
    return [line for look in looks if (line := _said(look, config))]


def _said(look: Callable[[Config], object], config: Config) -> str | None:
    try:
        look(config)
    except UserError as error:
        return str(error)
    return None


def _run_dir(config: Config) -> None:
    _check_writable("run.dir", config.run.dir)
    check_unowned(config)


def _cache_dir(config: Config) -> None:
    _check_writable("data.cache_dir", config.data.cache_dir)


def _check_writable(field: str, folder: Path) -> None:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{field}: {there} is a file; choose another folder")
    if not os.access(there, os.W_OK | os.X_OK) or str(there).startswith("/proc"):
        raise UserError(f"{field}: {folder} cannot be made or written, no right to write in {there}; choose another folder")


def _encoders(config: Config) -> None:
    text = TextFacts.read(config.text.encoder, config.text.max_tokens, getattr(torch, config.train.dtype))
    check_encoders(config, text, ImageFacts.read(config.image.encoder))


def _shards(config: Config, name: str) -> None:
    if not getattr(config.data, name) and not (name == "shards" and config.data.sources):
        if name == "shards":
            raise UserError("data.shards: none given; e.g. data.shards='data/emoji/train-*'")
        return
    given = find_shards(config, training=name == "shards")[0]
    if is_remote(given):
        store_of(config.data).stamp(given)
        return
    first = Path(given)
    if config.edge.weight > 0 and config.data.edges == "stored" and not any(_edges_in(first)):
        raise UserError(
            f"edge.weight is {config.edge.weight}, but the first samples of {first} (data.{name}) hold no {EDGE_EXT}; add "
            "edge maps, or set edge.weight=0"
        )


def _edges_in(shard: Path) -> Iterator[bool]:
    """Say of the first members of a shard whether they are edge maps. UserError: it is no tar."""
    try:
        with tarfile.open(shard) as tar:
            for member in islice(tar, _MEMBERS):
                yield member.name.lower().endswith(f".{EDGE_EXT}")
    except (OSError, tarfile.TarError, EOFError) as error:
        why = str(error).splitlines()[0].rstrip(":")
        raise UserError(f"data.shards: {shard} cannot be read as a tar file ({why})") from None


def _initial(config: Config) -> None:
    if config.run.init_from is None or (not beside(config) and newest(config.run.dir / "checkpoints")):
        return
    with open_initial(config.run.init_from) as checkpoint:
        check_initial(config, checkpoint)
