"""The weights that a new run starts from (`run.init_from`), also of a checkpoint that does not fit in every part.

`run.init_missing` names the parts that may differ: what a part has in the model alone is drawn anew, what it has in the
checkpoint alone is left there, and so is what has another shape. A dense model's feed-forward layers become time experts. A
model that enlarges small pictures may start from one that draws from captions alone.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from raphael_dist.config import Config
from raphael_dist.config_adapters import beside
from raphael_dist.convert.layouts import open_checkpoint
from raphael_dist.convert.source import Checkpoint, is_dense, parameter_shapes
from raphael_dist.convert.upcycle import Upcycled
from raphael_dist.engine.zero import Fragment
from raphael_dist.errors import UserError
from raphael_dist.model.control import add_control
from raphael_dist.model.lora import add_lora
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.storage.tensorfile import as_bytes

_log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
ENTRANCE = "conv_in.weight"  # which sees the latents, and a small picture beside them where there is one


def part_of(name: str) -> str:
    """Return the part of the model, as run.init_missing names it, that a parameter belongs to; "" for all that is common."""
    if ".edge." in name:
        return "edge"
    if ".attn2.to_k." in name or ".attn2.to_v." in name:
        return "text"
    if ".space_moe." in name or name.startswith("text_gates."):
        return "space"
    return "time" if ".time_moe." in name or ".ff." in name or name.startswith("time_gates.") else ""


@dataclass(frozen=True)
class Initial:
    """What a new run's model takes from a checkpoint: parameters that are taken, drawn anew, left in the checkpoint.

    copied: those of a dense model that become experts here.
    """

    taken: tuple[str, ...]
    anew: tuple[str, ...]
    left: tuple[str, ...]
    copied: tuple[str, ...] = ()

    def describe(self, path: Path) -> str:
        """Return one line about it."""
        words = [f"{len(self.taken)} parameters were taken from {path}"]
        if self.copied:
            words.append(f"experts begin as the dense model ({len(self.copied)}: {_parts(self.copied)})")
        for names, what in ((self.anew, "drawn anew"), (self.left, "left out there")):
            words += [f"{what}: {len(names)} ({_parts(names)})"] if names else []
        return "; ".join(words)


def check_initial(config: Config, checkpoint: Checkpoint) -> Initial:
    """Return what the model of a configuration takes from an opened checkpoint.

    UserError names the first parameter that does not fit and that run.init_missing does not allow, another prediction than
    the run's, or what keeps a dense model from becoming experts.
    """
    ours, theirs, allowed = parameter_shapes(config), checkpoint.shapes, set[str](config.run.init_missing)
    if _widens(config, checkpoint):
        theirs = {**theirs, ENTRANCE: _widened_shape(theirs[ENTRANCE], config)}
    anew = tuple(n for n in ours if theirs.get(n) != ours[n])
    left = tuple(n for n in theirs if theirs[n] != ours.get(n))
    refused = [n for n in sorted({*anew, *left}) if not _may_differ(n, n in anew and n in left, allowed)]
    if refused:
        raise UserError(_refusal(refused, ours, checkpoint, config))
    checkpoint.check_prediction(config.diffusion.prediction)
    copied = tuple(n for n in anew if part_of(n) in ("time", "space")) if _upcycles(config, checkpoint) else ()
    taken = tuple(n for n in ours if n not in set(anew))
    initial = Initial(taken, tuple(n for n in anew if n not in set(copied)), left, copied)
    _reader(config, checkpoint, initial)
    return initial


def load_initial(
    fragments: Iterable[Fragment],
    path: Path,
    config: Config,
    *,
    verify: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> Initial:
    """Copy weights (averaged ones, if there are any) of a checkpoint in any layout into this rank's fp32 weights.

    Each rank reads what it owns, in float32, so that nothing is rounded to the type that the model computes in; call
    `fragments.sync_model` after it. verify: hash the files first, which one rank does for all. tell: gets a word about every
    parameter. Returns what was taken. Raises UserError as `check_initial` does, and copies nothing.
    """
    checkpoint = open_initial(path)
    tell("its checksums")
    with checkpoint:
        if verify and (damage := checkpoint.damage()):
            raise UserError(f"run.init_from: {damage}")
        for note in checkpoint.notes:
            _log.warning("run.init_from: %s", note)
        initial = check_initial(config, checkpoint)
        read = _reader(config, checkpoint, initial)
        wanted = {*initial.taken, *initial.copied}
        with torch.no_grad():
            for f in fragments:
                tell(f.name)
                if f.name in wanted:
                    f.master.copy_(read(f.name, f.start, f.numel).view(-1))
    return initial


def adapted_base(
    config: Config, *, verify: bool = True, tell: Callable[[str], None] = lambda _: None
) -> tuple[RaphaelUNet, str]:
    """Return the frozen model of run.init_from with adapters or a control, the same on every rank, and its weights' SHA-256.

    It is whole: expert parallelism and ZeRO divide it afterwards. The checksum does not depend on a layout. verify, tell and
    UserError as in `load_initial`.
    """
    assert config.run.init_from is not None  # config_adapters.check_lora
    with torch.device("meta"):
        model = RaphaelUNet(config)
    model.to_empty(device="cpu")
    whole = [Fragment(n, tuple(p.shape), 0, p.detach().view(-1), p, 0, shared=True) for n, p in model.named_parameters()]
    load_initial(whole, config.run.init_from, config, verify=verify, tell=tell)
    digest = hashlib.sha256()
    for fragment in whole:
        digest.update(fragment.name.encode() + as_bytes(fragment.master))
    if config.control.enabled:
        add_control(model, config, config.run.seed)
    else:
        add_lora(model, config.lora, config.run.seed)
    return model, digest.hexdigest()


def open_initial(path: Path) -> Checkpoint:
    """Open the checkpoint of run.init_from. UserError: it cannot be read."""
    try:
        return open_checkpoint("auto", path)
    except UserError as error:
        raise UserError(f"run.init_from: cannot read {path}: {str(error).removeprefix('--from ')}") from None


def _upcycles(config: Config, checkpoint: Checkpoint) -> bool:
    return is_dense(checkpoint.config) and config.model.space_experts + config.model.time_experts > 0


def _widens(config: Config, checkpoint: Checkpoint) -> bool:
    # Beside a frozen model what is new in its entrance would never be trained.
    return config.upscale.factor > 0 and checkpoint.config.upscale.factor == 0 and not beside(config)


def _widened_shape(shape: tuple[int, ...], config: Config) -> tuple[int, ...]:
    width, channels, *kernel = shape
    return (width, channels + config.upscale.channels, *kernel)


def _reader(config: Config, checkpoint: Checkpoint, initial: Initial) -> Callable[[str, int, int], Tensor]:
    if not _widens(config, checkpoint):
        return _plain_reader(config, checkpoint, initial)
    narrow = config.model_copy(update={"upscale": checkpoint.config.upscale})
    read, shape = _plain_reader(narrow, checkpoint, initial), checkpoint.shapes[ENTRANCE]

    def widened(name: str, start: int, numel: int) -> Tensor:
        if name != ENTRANCE:
            return read(name, start, numel)
        # Zeros for the small picture's channels: the new model begins as the one that did not see it.
        whole = torch.zeros(_widened_shape(shape, config))
        whole[:, : shape[1]] = read(name, 0, prod(shape)).view(shape)
        return whole.view(-1)[start : start + numel]

    return widened


def _plain_reader(config: Config, checkpoint: Checkpoint, initial: Initial) -> Callable[[str, int, int], Tensor]:
    if initial.copied:
        try:
            upcycled = Upcycled(checkpoint, config, any_text_width="text" in config.run.init_missing)
        except UserError as error:
            raise UserError(str(error).replace("--config:", "run.init_from:", 1)) from None
        return lambda name, start, numel: upcycled.read("master", name, start, numel)
    kind = "ema" if "ema" in checkpoint.kinds() else "master"
    return lambda name, start, numel: checkpoint.read(kind, name, start, numel)


def _may_differ(name: str, reshaped: bool, allowed: set[str]) -> bool:
    # The first layer of a text gate reads the captions' tokens.
    by_width = reshaped and name.startswith("text_gates.") and name.endswith(".net.0.weight")
    return part_of(name) in allowed or (by_width and "text" in allowed)


def _refusal(refused: list[str], ours: Shapes, checkpoint: Checkpoint, config: Config) -> str:
    first, theirs = refused[0], checkpoint.shapes
    text = (
        f"run.init_from: {len(refused)} tensors of {checkpoint.path} do not fit the model, the first {first}: "
        f"{theirs.get(first, 'missing')} there, {ours.get(first, 'not in the model')} here"
    )
    parts = {part_of(name) for name in refused}
    if "" in parts:
        return text + "; the model must be the checkpoint's but for edge modules, experts and the captions' width"
    wanted = sorted({*config.run.init_missing, *parts})
    return text + f"; to start without what does not fit, set run.init_missing=[{', '.join(wanted)}]"


def _parts(names: tuple[str, ...]) -> str:
    return ", ".join(dict.fromkeys(part_of(name) or "others" for name in names))
