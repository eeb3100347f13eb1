"""A model to sample from, out of a run directory, an exported pipeline or any other layout."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raphael_dist.checkpoint.folders import followed
from raphael_dist.checkpoint.reader import open_newest
from raphael_dist.config import Config, config_from_tree
from raphael_dist.convert.adapter import Merged, read_adapter
from raphael_dist.convert.control import read_control
from raphael_dist.convert.layouts import detect, open_checkpoint
from raphael_dist.convert.plan import Source
from raphael_dist.convert.source import Checkpoint
from raphael_dist.data.open import load_encoders
from raphael_dist.errors import UserError
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel.ranks import Ranks, all_or_none
from raphael_dist.sampling.ranks import joined
from raphael_dist.sampling.sampling import Sampler


@dataclass(frozen=True, eq=False)
class Trained:
    """What was loaded: the model, its sampler, the configuration of its run, and where it comes from in words.

    digest: a checksum of the checkpoint by its manifest, or of where it lies where there is none.
    weights: "ema" or "master".
    """

    model: RaphaelUNet
    sampler: Sampler
    config: Config
    origin: str
    digest: str
    weights: str

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class Beside:
    """What is put beside a model in memory, and how much each counts: 0 nothing, 1 as it was trained.

    lora: adapters (`convert.adapter.read_adapter`). control: what follows edge maps (`convert.control.read_control`).
    """

    lora: Path | None = None
    lora_scale: float = 1.0
    control: Path | None = None
    control_scale: float = 1.0

    def words(self) -> list[str]:
        """Return each that is there, with its scale."""
        both = ((self.lora, self.lora_scale), (self.control, self.control_scale))
        return [f"{what} {scale}" for what, scale in both if what is not None]


@contextmanager
def opened(path: Path, weights: str | None, beside: Beside = Beside()) -> Iterator[tuple[Trained, Ranks]]:
    """Load a model on all ranks of a launcher, or alone, and yield it with them. Raises on all what `load_trained` does."""
    with joined() as (ranks, device):
        yield all_or_none(lambda: load_trained(path, weights, device, beside=beside)), ranks


def load_trained(
    path: Path,
    weights: str | None,
    device: torch.device,
    dtype: torch.dtype | None = None,
    beside: Beside = Beside(),
) -> Trained:
    """Load a model with its encoders. Files are checked by their checksums.

    weights: "ema", "master" for the last ones, or None: the average where there is one. dtype: of the weights; None:
    bfloat16 for a run in bfloat16 on a GPU, float32 otherwise. UserError: nothing is there, damage, no such weights,
    encoders that are missing, something beside it that does not fit.
    """
    with open_for_sampling(path) as checkpoint:
        config = exported_config(checkpoint, path)
        if dtype is None:
            half = config.train.dtype == "bfloat16" and device.type == "cuda"
            dtype = torch.bfloat16 if half else torch.float32
        text, image = load_encoders(config, device, dtype)
        kind = _kind(checkpoint, weights)
        source: Source = checkpoint
        if beside.lora is not None:
            source = Merged(checkpoint, read_adapter(beside.lora, weights or "ema"), beside.lora_scale)
        model = read_model(source, config, kind)
        if beside.control is not None:
            model.control, model.control_scale = read_control(beside.control, config, weights or "ema"), beside.control_scale
        model = model.to(device, dtype)
        step = f"step {checkpoint.progress.step} of " if checkpoint.progress.step else ""
        sums = sorted(str(entry.get("sha256")) for entry in checkpoint.files.values()) or [str(path)]
    digest = hashlib.sha256("".join([kind, *sums, *beside.words()]).encode()).hexdigest()[:16]
    origin = " + ".join([f"{step}{path}", *beside.words()])
    return Trained(model, Sampler.of(model, text, image), config, origin, digest, kind)


def open_for_sampling(path: Path) -> Checkpoint:
    """Open what lies at `path` in whatever layout, of a run the newest checkpoint that verifies.

    UserError, which begins with the option that named it: nothing there, or damage.
    """
    path = followed(path)
    try:
        layout = detect(path).name
    except UserError as error:
        if path.is_dir():
            raise UserError(
                f"--checkpoint {path}: no checkpoint there; give a run directory, a step-* folder or an exported pipeline"
            ) from None
        raise UserError(f"--checkpoint {str(error).removeprefix('--from ')}") from None
    if layout == "raphael":
        return open_checkpoint(layout, open_newest(path).folder)  # which has compared the checksums
    checkpoint = open_checkpoint(layout, path)
    if wrong := checkpoint.damage():
        raise UserError(f"--checkpoint {path}: {wrong}")
    return checkpoint


def exported_config(checkpoint: Checkpoint, path: Path) -> Config:
    """Return the run's configuration; of an exported pipeline, with the encoders and the scheduler that lie beside it."""
    config = checkpoint.config
    if not (path / "model_index.json").is_file():
        return config
    tree = config.model_dump(mode="json")
    index, schedule = _read(path / "model_index.json"), _read(path / "scheduler" / "scheduler_config.json")
    tree["text"]["encoder"] = index.get("text") or str(path)
    tree["image"]["encoder"] = str(path) if (path / "vae").is_dir() else "none"
    found = {
        ("text", "max_tokens"): index.get("max_tokens"),
        ("sample", "steps"): index.get("steps"),
        ("sample", "guidance"): index.get("guidance"),
        ("image", "buckets"): [index["size"]] if "size" in index and not checkpoint.files else None,
        ("diffusion", "num_timesteps"): schedule.get("num_train_timesteps"),
        ("diffusion", "beta_start"): schedule.get("beta_start"),
        ("diffusion", "beta_end"): schedule.get("beta_end"),
        ("diffusion", "schedule"): schedule.get("beta_schedule"),
        ("diffusion", "prediction"): schedule.get("prediction_type"),
        ("diffusion", "zero_terminal_snr"): schedule.get("rescale_betas_zero_snr"),
    }
    for (section, field), value in found.items():
        if value is not None:
            tree[section][field] = value
    return config_from_tree(tree)


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _kind(checkpoint: Checkpoint, weights: str | None) -> str:
    """Return the kind of weights to load. A layout of weights alone has one, which is taken for the averaged ones."""
    kinds = checkpoint.kinds()
    if "ema" not in kinds and (weights is None or (weights == "ema" and not checkpoint.whole)):
        return "master"
    if weights is not None and weights not in kinds:
        raise UserError(f"--weights {weights}: the checkpoint holds only {', '.join(kinds)}")
    return weights or "ema"


def read_model(checkpoint: Source, config: Config, kind: str) -> RaphaelUNet:
    """Return the model with the weights of a kind that the checkpoint holds, in float32 on the CPU, in eval mode."""
    with torch.device("meta"):
        model = RaphaelUNet(config)
    model.to_empty(device="cpu")
    fill(model, lambda name, numel: checkpoint.read(kind, name, 0, numel))
    return model.eval()


def fill(model: torch.nn.Module, read: Callable[[str, int], torch.Tensor]) -> None:
    """Copy into each parameter what `read` returns for its name and number of elements."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(read(name, p.numel()).view(p.shape))
