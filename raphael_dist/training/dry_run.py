"""`--dry-run`: checks of shards, encoders, checkpoints and folders before any rank starts, without a GPU."""

import os
import tarfile
import zlib
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch

from raphael_dist.checkpoint.folders import newest
from raphael_dist.config.schema import Config
from raphael_dist.convert.init_weights import check_initial, open_initial
from raphael_dist.data.features.encoders import ImageFacts, TextFacts
from raphael_dist.data.fetch.remote import is_remote
from raphael_dist.data.fetch.shard_cache import store_of
from raphael_dist.data.open_streams import check_encoders, edge_encoder
from raphael_dist.data.shards.open_index import find_shards, patterns_of, require_shards
from raphael_dist.data.shards.tar_scan import EDGE_EXT, FEATURES_EXT, TAR_ERRORS, TarHeader
from raphael_dist.errors import UserError
from raphael_dist.model.controlnet import add_control
from raphael_dist.model.kernels.selection import require_triton
from raphael_dist.model.lora import add_lora
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.sampling.prompts import sample_requests
from raphael_dist.storage.files import free_bytes
from raphael_dist.training.run_dir import check_unowned
from raphael_dist.training.wandb_mlflow import check_installed

T = TypeVar("T")
_MEMBERS = 32  # of the first shard: enough for a whole sample


def problems(config: Config) -> list[str]:
    """Return one error line for each reason why training with this configuration would fail to start; [] if none.

    The checks read only file names, headers and small files. They read no whole shard and no weights, except those of HED
    (the edge detector) if `sample.images` requires it.
    """
    shards = [partial(_check_shards, name=name) for name in ("shards", "val_shards")]
    checks: list[Callable[[Config], object]] = [_check_run_dir, _check_cache_dir, check_installed]
    checks += [lambda c: require_triton(c.train.kernels), _check_encoders, partial(edge_encoder, device=torch.device("cpu"))]
    checks += [*shards, _check_initial_weights, sample_requests]
    lines: list[str] = []
    for check in checks:
        attempt(lines, partial(check, config))
    return lines


def attempt(lines: list[str], work: Callable[[], T]) -> T | None:
    """Call `work` and return its result. If it raises UserError, append the error's lines to `lines` and return None."""
    try:
        return work()
    except UserError as error:
        lines += error.args
        return None


def _check_run_dir(config: Config) -> None:
    _check_writable("run.dir", config.run.dir)
    check_unowned(config)
    _check_space(config)


def _check_space(config: Config) -> None:
    """Raise UserError if the checkpoints of the run do not fit on the disk.

    The disk must have space for checkpoint.keep checkpoints and for one more that is being written. Checkpoints that already
    exist need no further space.
    """
    saved, every = len(newest(config.run.dir / "checkpoints")), config.checkpoint.every or config.train.max_steps
    count = max(1, min(config.checkpoint.keep + 1, -(-config.train.max_steps // every)) - saved)
    folder = _existing(config.run.dir)
    need, free = count * _checkpoint_bytes(config), free_bytes(folder)
    if need > free:
        raise UserError(
            f"run.dir={config.run.dir} requires {need / 1e9:.2f} GB for {count} checkpoints (checkpoint.keep, plus the one "
            f"being written), but {free / 1e9:.2f} GB are free in {folder}. Free some space, or choose another run.dir."
        )


def _checkpoint_bytes(config: Config) -> int:
    """Return the bytes of a checkpoint: trained weights, Adam's moments and the moving average, all in float32."""
    with torch.device("meta"):
        model = RaphaelUNet(config)
        if config.control.enabled:
            add_control(model, config, config.run.seed)
        elif config.lora.rank:
            add_lora(model, config.lora, config.run.seed)
    kinds = 1 + 2 * config.optim.has_moments + config.ema.enabled
    return 4 * kinds * sum(p.numel() for p in model.parameters() if p.requires_grad)


def _check_cache_dir(config: Config) -> None:
    _check_writable("data.cache_dir", config.data.cache_dir)
    folder = _existing(config.data.cache_dir)
    if not free_bytes(folder):
        raise UserError(f"data.cache_dir: no space is left in {folder}. Free some space, or choose another folder.")


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _check_writable(field: str, folder: Path) -> None:
    parent = _existing(folder)
    if not parent.is_dir():
        raise UserError(f"{field}={folder} must be a folder, but {parent} is a file. Choose another folder.")
    if not os.access(parent, os.W_OK | os.X_OK) or str(parent).startswith("/proc"):
        raise UserError(f"{field}={folder} must be writable, but {parent} is not. Choose another folder.")


def _check_encoders(config: Config) -> None:
    lines: list[str] = []
    dtype = getattr(torch, config.train.dtype)
    text = attempt(lines, lambda: TextFacts.read(config.text.encoder, config.text.max_tokens, dtype, config.text.layer))
    image = attempt(lines, lambda: ImageFacts.read(config.image.vae))
    if text is not None and image is not None:
        check_encoders(config, text, image)
    if lines:
        raise UserError(*lines)


def _check_shards(config: Config, name: str) -> None:
    if name == "shards":
        require_shards(config)
    elif not config.data.val_shards:
        return
    first = _find_shards(config, name)[0]
    if is_remote(first):
        store_of(config.data).stamp(first)
        return
    if config.data.features == "stored" and not _has_member(Path(first), FEATURES_EXT):
        raise UserError(
            f"data.features=stored requires encoded features, but the first samples of {first} (data.{name}) have no "
            f"{FEATURES_EXT}. Add them with tools/prepare_data.py --features, or set data.features=online."
        )
    if config.edge.weight > 0 and config.data.edge_maps == "stored" and not _has_member(Path(first), EDGE_EXT):
        raise UserError(
            f"edge.weight={config.edge.weight} requires edge maps, but the first samples of {first} (data.{name}) have no "
            f"{EDGE_EXT}. Add edge maps, set data.edge_maps=auto, or set edge.weight=0."
        )


def _find_shards(config: Config, name: str) -> list[str]:
    """Return the paths of the training shards (`name` is "shards") or validation shards (`name` is "val_shards").

    Raises UserError with a line for each pattern in data.shards or data.val_shards that matches no shard.
    """
    training, lines = name == "shards", list[str]()
    names = attempt(lines, lambda: find_shards(config, training=training))
    if names is not None:
        return names
    patterns = [pattern for patterns, _ in patterns_of(config, training) for pattern in patterns]
    if len(patterns) > 1:
        each: list[str] = []
        for pattern in patterns:
            data = config.data.model_copy(update={"sources": (), name: (pattern,)})
            alone = config.model_copy(update={"data": data})
            attempt(each, partial(find_shards, alone, training=training))
        lines = each or lines
    raise UserError(*lines)


def _has_member(shard: Path, ext: str) -> bool:
    """Return whether one of the first 32 files in a shard has the extension `ext`.

    Raises UserError if the shard cannot be read as a tar file.
    """
    try:
        with tarfile.open(shard, tarinfo=TarHeader) as tar:
            return any(member.name.lower().endswith(f".{ext}") for member in islice(tar, _MEMBERS))
    except (OSError, EOFError, zlib.error, *TAR_ERRORS) as error:
        why = str(error).splitlines()[0].rstrip(":")
        raise UserError(
            f"data.shards: {shard} cannot be read as a tar file ({why}). Copy it again from its source, or remove it from "
            "data.shards."
        ) from None


def _check_initial_weights(config: Config) -> None:
    if config.run.init_from is None or (not config.trains_adapter_only and newest(config.run.dir / "checkpoints")):
        return
    with open_initial(config.run.init_from) as checkpoint:
        check_initial(config, checkpoint)
