"""Loads a model for sampling from a run directory, an exported pipeline or a checkpoint in any other layout (format)."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from raphael_dist.checkpoint.folders import resolve_latest
from raphael_dist.checkpoint.reader import open_newest
from raphael_dist.checkpoint.tensors import default_weights
from raphael_dist.config.schema import Config, config_from_tree
from raphael_dist.convert.controlnet_files import read_control
from raphael_dist.convert.layouts import detect, open_checkpoint
from raphael_dist.convert.layouts.dense import read_object, scheduler_settings
from raphael_dist.convert.lora_files import MergedSource, read_adapter
from raphael_dist.convert.source_checkpoint import Checkpoint
from raphael_dist.convert.write_plan import Source
from raphael_dist.data.open_streams import load_encoders
from raphael_dist.errors import UserError
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.runtime.ranks import Ranks, raise_on_all_ranks
from raphael_dist.sampling.rank_group import join_ranks
from raphael_dist.sampling.sampler import Sampler


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A model that was loaded from a checkpoint, with its encoders.

    Attributes:
        model: the U-Net.
        sampler: the U-Net with its encoders, to draw images.
        config: configuration of the run that trained the model.
        origin: description for the user: step, path of the checkpoint, paths and scales of the adapters.
        digest: hash that identifies the loaded weights (16 hex digits). It is computed from the checksums in the
            checkpoint's manifest, or from the checkpoint's path if there is no manifest.
        weights: which weights were loaded: "ema" (their moving average) or "master" (the trained fp32 weights).
    """

    model: RaphaelUNet
    sampler: Sampler
    config: Config
    origin: str
    digest: str
    weights: str

    @property
    def device(self) -> torch.device:
        """The device on which the U-Net's weights are."""
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class AdapterOptions:
    """LoRA adapters and a ControlNet to add to a model in memory.

    Attributes:
        lora: path of the adapters, as for `convert.lora_files.read_adapter`, or None.
        control: path of the ControlNet, as for `convert.controlnet_files.read_control`, or None.
        lora_scale, control_scale: factor of the adapters and of the ControlNet's outputs. 0: no effect. 1: as trained.
    """

    lora: Path | None = None
    lora_scale: float = 1.0
    control: Path | None = None
    control_scale: float = 1.0

    def describe(self) -> list[str]:
        """Return a list with a string "PATH SCALE" for each of the LoRA adapters and the ControlNet that is not None."""
        pairs = ((self.lora, self.lora_scale), (self.control, self.control_scale))
        return [f"{path} {scale}" for path, scale in pairs if path is not None]


@contextmanager
def open_model(
    path: Path, weights: str | None, adapters: AdapterOptions = AdapterOptions()
) -> Iterator[tuple[TrainedModel, Ranks]]:
    """Return a context manager that loads a model on every rank of a launcher, or in this process alone.

    The context yields the model and `Ranks` (this rank and the number of ranks). If loading fails on one rank, all ranks
    raise the error of this rank.

    Args:
        path: a run directory, one of its step-* folders, an exported pipeline, or another checkpoint.
        weights: "ema" (moving average) or "master" (trained fp32 weights). None: the EMA if there is one.
        adapters: LoRA adapters and ControlNet to add to the model.

    Raises:
        UserError: as in `load_trained`.
    """
    with join_ranks() as (ranks, device):
        yield raise_on_all_ranks(lambda: load_trained(path, weights, device, adapters)), ranks


def load_trained(
    path: Path, weights: str | None, device: torch.device, adapters: AdapterOptions = AdapterOptions()
) -> TrainedModel:
    """Load a model with its encoders, in eval mode: in bfloat16 for a run in bfloat16 on a GPU, else in float32.

    The checksums of the checkpoint's files are verified first.

    Args:
        path: a run directory, one of its step-* folders, an exported pipeline, or another checkpoint.
        weights: "ema" (moving average) or "master" (trained fp32 weights). None: the EMA if there is one.
        device: device to load the model to.
        adapters: LoRA adapters and ControlNet to add to the model.

    Raises:
        UserError: `path` contains no checkpoint, the checkpoint is damaged or lacks the requested weights, an encoder is
            missing, or an adapter belongs to another model.
    """
    with open_for_sampling(path) as checkpoint:
        config = exported_config(checkpoint, path)
        half = config.train.dtype == "bfloat16" and device.type == "cuda"
        dtype = torch.bfloat16 if half else torch.float32
        text, image = load_encoders(config, device, dtype)
        kind = _kind(checkpoint, weights)
        source: Source = checkpoint
        if adapters.lora is not None:
            source = MergedSource(checkpoint, read_adapter(adapters.lora, weights), adapters.lora_scale)
        model = read_model(source, config, kind)
        if adapters.control is not None:
            model.control = read_control(adapters.control, config, weights)
            model.control_scale = adapters.control_scale
        model = model.to(device, dtype)
        step = f"step {checkpoint.progress.step} of " if checkpoint.progress.step else ""
        sums = sorted(str(entry.get("sha256")) for entry in checkpoint.files.values()) or [str(path)]
    digest = hashlib.sha256("".join([kind, *sums, *adapters.describe()]).encode()).hexdigest()[:16]
    origin = " + ".join([f"{step}{path}", *adapters.describe()])
    return TrainedModel(model, Sampler.of(model, text, image), config, origin, digest, kind)


def open_for_sampling(path: Path) -> Checkpoint:
    """Open the checkpoint at `path`, in any layout (format on disk), for reading its weights.

    For a run directory, open its newest undamaged checkpoint. Raises UserError if there is no checkpoint, or if it is
    damaged.
    """
    path = resolve_latest(path)
    try:
        layout = detect(path, "--checkpoint").name
    except UserError:
        if path.is_dir():
            raise UserError(
                f"--checkpoint {path} contains no checkpoint. Use a run directory, a step-* folder or an exported pipeline."
            ) from None
        raise
    if layout == "raphael":
        return open_checkpoint(layout, open_newest(path).folder)  # open_newest has verified the checksums
    checkpoint = open_checkpoint(layout, path)
    if problem := checkpoint.integrity_error():
        raise UserError(f"--checkpoint {path} is damaged: {problem}. Copy it again from its source, or use another one.")
    return checkpoint


def exported_config(checkpoint: Checkpoint, path: Path) -> Config:
    """Return the configuration of the run that wrote a checkpoint.

    If `path` (the checkpoint's path as given by the user) is the folder of an exported pipeline, the encoders, noise
    schedule, number of sampling steps and guidance scale in this folder replace those of the run.
    """
    config = checkpoint.config
    if not (path / "model_index.json").is_file():
        return config
    tree, index = config.model_dump(mode="json"), read_object(path / "model_index.json")
    tree["text"]["encoder"] = index.get("text") or str(path)
    tree["image"]["vae"] = str(path) if (path / "vae").is_dir() else "none"
    tree["diffusion"] |= scheduler_settings(path)
    for section, field in (("text", "max_tokens"), ("sample", "steps"), ("sample", "guidance")):
        if index.get(field) is not None:
            tree[section][field] = index[field]
    if "size" in index and not checkpoint.files:
        tree["image"]["buckets"] = [index["size"]]
    return config_from_tree(tree)


def _kind(checkpoint: Checkpoint, weights: str | None) -> str:
    """Return which weights of a checkpoint to read: "ema" (moving average) or "master" (fp32 weights).

    `weights`: value of the option --weights; None: the EMA if the checkpoint has one. A layout (format on disk) that
    contains only one kind of weights always calls it "master", even if it is the EMA. Raises UserError if the checkpoint
    lacks the weights that the option requires.
    """
    kinds = checkpoint.kinds()
    if weights == "ema" and "ema" not in kinds and not checkpoint.whole:
        return "master"
    if weights is not None and weights not in kinds:
        raise UserError(
            f"--weights {weights} must be one of {', '.join(kinds)}, the kinds of weights in this checkpoint. Leave out "
            "--weights, or give one of these."
        )
    return weights or default_weights(kinds)


def read_model(checkpoint: Source, config: Config, kind: str) -> RaphaelUNet:
    """Build the U-Net that `config` describes and fill it with weights, in float32 on the CPU and in eval mode.

    `checkpoint`: the checkpoint to read. `kind`: which of its weights: "ema" (moving average) or "master" (trained fp32
    weights).
    """
    with torch.device("meta"):
        model = RaphaelUNet(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(checkpoint.read(kind, name, 0, p.numel()).view(p.shape))
    return model.eval()
