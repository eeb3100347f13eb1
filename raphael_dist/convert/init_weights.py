"""Loads the weights that a new run starts from (`run.init_from`), also if parts of the checkpoint do not fit the model.

- `run.reinit` names the parts of the model that may differ from the checkpoint: edge, space, time or text. In these parts,
  parameters that the checkpoint lacks or has in another shape get the random weights of a new run. Parameters that only the
  checkpoint has are ignored.
- A dense checkpoint (without experts) may initialise a model with experts: its feed-forward layers become time experts.
- A checkpoint without super-resolution may initialise a super-resolution model.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from raphael_dist.checkpoint.tensors import default_weights
from raphael_dist.config.schema import Config
from raphael_dist.convert.layouts import open_checkpoint
from raphael_dist.convert.source_checkpoint import Checkpoint, is_dense, parameter_shapes
from raphael_dist.convert.upcycle import UpcycledSource
from raphael_dist.convert.write_plan import Source
from raphael_dist.engine.zero_interface import Fragment
from raphael_dist.errors import UserError
from raphael_dist.model.controlnet import add_control
from raphael_dist.model.lora import add_lora
from raphael_dist.model.routing import gate_kind
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.runtime.progress_bar import Reporter, no_report
from raphael_dist.storage.tensorfile import as_bytes

_log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
INPUT_CONV = "conv_in.weight"  # its input channels: the latents, then the small image of a super-resolution model


def part_of(name: str) -> str:
    """Return the part of the model to which the parameter `name` belongs; "" if it belongs to none of the parts below.

    The setting run.reinit names the same parts: "edge" (edge modules), "space" and "time" (experts and gates), and "text"
    (layers that read text tokens).
    """
    if ".edge." in name:
        return "edge"
    if ".attn2.to_k." in name or ".attn2.to_v." in name:
        return "text"
    if ".space_moe." in name:
        return "space"
    return gate_kind(name) or ("time" if ".time_moe." in name or ".ff." in name else "")


@dataclass(frozen=True)
class InitialWeights:
    """Which parameters of a new run are read from the checkpoint that it starts from (the setting run.init_from).

    Attributes:
        loaded: names of the parameters that are read from the checkpoint.
        reinitialised: names of the parameters that get the random weights of a new run.
        unused: names of the parameters of the checkpoint that the model does not have, or has in another shape.
        upcycled: names of the parameters of experts and gates that a dense checkpoint does not have. `UpcycledSource` makes
            the experts from the checkpoint's feed-forward layers.
    """

    loaded: tuple[str, ...]
    reinitialised: tuple[str, ...]
    unused: tuple[str, ...]
    upcycled: tuple[str, ...] = ()

    def describe(self, path: Path) -> str:
        """Return one log line with the numbers of loaded, upcycled, reinitialised and unused parameters.

        `path`: the checkpoint that parameters are loaded from.
        """
        texts = [f"{len(self.loaded)} parameters were loaded from {path}"]
        groups = ((self.upcycled, "upcycled to experts"), (self.reinitialised, "reinitialised"), (self.unused, "not loaded"))
        texts += [f"{what}: {len(names)} ({_parts(names)})" for names, what in groups if names]
        return "; ".join(texts)


def check_initial(config: Config, checkpoint: Checkpoint) -> InitialWeights:
    """Compare the parameters of a checkpoint with those of the run's model, without reading values.

    Args:
        config: configuration of the run that starts from the checkpoint.
        checkpoint: the opened checkpoint of run.init_from.

    Returns:
        Which parameters of the model will be read from the checkpoint, upcycled or reinitialised.

    Raises:
        UserError: a parameter is missing or has another shape, and run.reinit does not allow it; the prediction types
            differ; or the experts cannot be made from the layers of a dense checkpoint.
    """
    ours, theirs, allowed = parameter_shapes(config), checkpoint.shapes, set[str](config.run.reinit)
    if _widens(config, checkpoint):
        theirs = {**theirs, INPUT_CONV: _widened_shape(theirs[INPUT_CONV], config)}
    new = tuple(n for n in ours if theirs.get(n) != ours[n])
    unused = tuple(n for n in theirs if theirs[n] != ours.get(n))
    refused = [n for n in sorted({*new, *unused}) if not _may_differ(n, n in new and n in unused, allowed)]
    if refused:
        raise UserError(_refusal(refused, ours, checkpoint, config))
    checkpoint.check_prediction(config.diffusion.prediction)
    upcycled = tuple(n for n in new if part_of(n) in ("time", "space")) if _upcycles(config, checkpoint) else ()
    loaded = tuple(n for n in ours if n not in set(new))
    initial = InitialWeights(loaded, tuple(n for n in new if n not in set(upcycled)), unused, upcycled)
    _source(config, checkpoint, bool(upcycled))
    return initial


def load_initial(
    fragments: Iterable[Fragment],
    path: Path,
    config: Config,
    *,
    verify: bool = True,
    report: Reporter = no_report,
) -> InitialWeights:
    """Copy the weights of a checkpoint (the EMA if there is one) into this rank's fp32 weights.

    Each rank reads only the elements that it owns under ZeRO. Afterwards, call the method `sync_model` of the engine's
    `Fragments`, which copies the fp32 weights into the model.

    Args:
        fragments: this rank's fragments (ranges of parameters that it owns), whose fp32 weights are overwritten.
        path: a checkpoint in any layout (format on disk).
        config: the run's configuration.
        verify: whether to compare the files with their checksums first; True on one rank is enough.
        report: called with a line of progress for each parameter.

    Returns:
        Which parameters of the model were read from the checkpoint, upcycled or reinitialised.

    Raises:
        UserError: the checkpoint cannot be read, is damaged, or does not fit the model (see `check_initial`). No weights
            are copied then.
    """
    checkpoint = open_initial(path)
    report("its checksums")
    with checkpoint:
        if verify and (integrity_error := checkpoint.integrity_error()):
            raise UserError(
                f"run.init_from={path} is damaged: {integrity_error}. Copy it again from its source, or use another "
                "checkpoint."
            )
        for note in checkpoint.notes:
            _log.warning("run.init_from: %s", note)
        initial = check_initial(config, checkpoint)
        source = _source(config, checkpoint, bool(initial.upcycled))
        kind, names = default_weights(source.kinds()), {*initial.loaded, *initial.upcycled}
        widens = _widens(config, checkpoint)
        with torch.no_grad():
            for f in fragments:
                report(f.name)
                if widens and f.name == INPUT_CONV and f.name in names:
                    f.master.copy_(_widened_input(source, kind, config)[f.start : f.start + f.numel])
                elif f.name in names:
                    f.master.copy_(source.read(kind, f.name, f.start, f.numel).view(-1))
    return initial


def adapted_base(config: Config, *, verify: bool = True, report: Reporter = no_report) -> tuple[RaphaelUNet, str]:
    """Build a model with the weights of run.init_from, which stay frozen, and a new ControlNet or new LoRA adapters.

    Every rank gets the whole model; expert parallelism and ZeRO shard it afterwards.

    Args:
        config: the run's configuration. It names the checkpoint of the base model (run.init_from), and states whether to add
            a ControlNet (control.enabled) or LoRA adapters.
        verify: whether to compare the files of the checkpoint with their checksums first.
        report: called with a line of progress for each parameter.

    Returns:
        The model on the CPU, and the SHA-256 (hex) of the base model's weights. The hash does not depend on the checkpoint's
        format on disk.

    Raises:
        UserError: the checkpoint cannot be read, is damaged, or does not fit the model.
    """
    assert config.run.init_from is not None  # config.checks requires it
    with torch.device("meta"):
        model = RaphaelUNet(config)
    model.to_empty(device="cpu")
    whole = [Fragment(n, tuple(p.shape), 0, p.detach().view(-1), p, 0, shared=True) for n, p in model.named_parameters()]
    load_initial(whole, config.run.init_from, config, verify=verify, report=report)
    digest = hashlib.sha256()
    for fragment in whole:
        digest.update(fragment.name.encode() + as_bytes(fragment.master))
    if config.control.enabled:
        add_control(model, config, config.run.seed)
    else:
        add_lora(model, config.lora, config.run.seed)
    return model, digest.hexdigest()


def open_initial(path: Path) -> Checkpoint:
    """Open the checkpoint from which a new run starts, in any layout (format on disk), without reading its values.

    `path`: value of the setting run.init_from. Raises UserError, which names this setting, if the checkpoint cannot be read.
    """
    try:
        return open_checkpoint("auto", path)
    except UserError as error:
        raise UserError(f"run.init_from={path} cannot be read: {str(error).removeprefix('--from ')}") from None


def _upcycles(config: Config, checkpoint: Checkpoint) -> bool:
    return is_dense(checkpoint.config) and config.model.space_experts + config.model.time_experts > 0


def _widens(config: Config, checkpoint: Checkpoint) -> bool:
    # On top of a frozen base the new channels would never be trained.
    return config.upscale.factor > 0 and checkpoint.config.upscale.factor == 0 and not config.trains_adapter_only


def _widened_shape(shape: tuple[int, ...], config: Config) -> tuple[int, ...]:
    width, channels, *kernel = shape
    return (width, channels + config.upscale.channels, *kernel)


def _source(config: Config, checkpoint: Checkpoint, upcycles: bool) -> Source:
    """Return an object that gives the values of the new model's parameters (of `config`), under their names in this model.

    This is `checkpoint` itself, or an object that computes experts from a dense checkpoint (`upcycles`). Shapes are those of
    the new model, except that the first convolution (INPUT_CONV) has the shape in the checkpoint. Raises UserError if the
    experts cannot be computed.
    """
    if not upcycles:
        return checkpoint
    if _widens(config, checkpoint):
        config = config.model_copy(update={"upscale": checkpoint.config.upscale})
    return UpcycledSource(checkpoint, config, any_text_width="text" in config.run.reinit)


def _widened_input(source: Source, kind: str, config: Config) -> Tensor:
    """Return the flat weights of a super-resolution model's first convolution, made from those of an ordinary model.

    The input of the super-resolution model has more channels, for the small image that it enlarges. The weights for these
    channels are zero. `source`: the ordinary model. `kind`: which of its weights to read, such as "ema". `config`:
    configuration of the super-resolution model.
    """
    shape = source.shapes[INPUT_CONV]
    # Zeros for the channels of the small image: at first the new model computes what the old one does.
    whole = torch.zeros(_widened_shape(shape, config))
    whole[:, : shape[1]] = source.read(kind, INPUT_CONV, 0, prod(shape)).view(shape)
    return whole.view(-1)


def _may_differ(name: str, reshaped: bool, allowed: set[str]) -> bool:
    # The first layer of a text gate has the width of the captions' tokens.
    by_width = reshaped and gate_kind(name) == "space" and name.endswith(".net.0.weight")
    return part_of(name) in allowed or (by_width and "text" in allowed)


def _refusal(refused: list[str], ours: Shapes, checkpoint: Checkpoint, config: Config) -> str:
    first, theirs = refused[0], checkpoint.shapes
    text = (
        f"run.init_from={checkpoint.path} must fit the model, but tensors differ ({len(refused)} in all): {first} is "
        f"{theirs.get(first, 'missing')} in the checkpoint and {ours.get(first, 'missing')} in the model. "
    )
    parts = {part_of(name) for name in refused}
    if "" in parts:
        return text + (
            "Only edge modules, experts and the width of the captions' tokens may differ from the checkpoint. Use the model "
            "settings of the checkpoint."
        )
    allowed = ", ".join(sorted({*config.run.reinit, *parts}))
    return text + f"To start with random weights in these parts of the model, set run.reinit=[{allowed}]."


def _parts(names: tuple[str, ...]) -> str:
    return ", ".join(dict.fromkeys(part_of(name) or "others" for name in names))
