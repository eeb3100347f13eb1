"""A checkpoint in any layout (format on disk): a table that states which files hold the values of each parameter, and where.

A *span* is a range of consecutive elements of a flattened parameter. For example, with two ZeRO ranks, elements 0 to 999 of
a weight may be in one file from byte 4,096 on, and the rest in another file. The layouts in `layouts/` differ only in how
they make this table from their files. Values are read through it.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from raphael_dist.checkpoint.progress import START, Progress
from raphael_dist.checkpoint.tensors import KINDS, Key, coverage_error
from raphael_dist.config.schema import Config
from raphael_dist.errors import UserError
from raphael_dist.model.layers import TransformerBlock
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.storage.files import FileEntry, integrity_error
from raphael_dist.storage.tensorfile import FileReader, StoredTensor


@dataclass
class Checkpoint:
    """An opened checkpoint in any layout (format on disk). Values are read from its files on request.

    Attributes:
        path: the checkpoint's folder or file.
        config: configuration of the run or model from which the checkpoint was saved.
        spans: for each (kind, parameter), where its ranges of elements are in the files. Kinds are "master" (fp32 weights),
            "exp_avg", "exp_avg_sq" (Adam moments) and "ema" (moving average).
        progress: progress of the run, such as its step.
        dataset: fingerprint of the training data of the run.
        files: size and SHA-256 of each file, from the manifest; empty without a manifest.
        topology: text for the user that describes the ranks that wrote the checkpoint: their number, ZeRO stage, ...
        notes: lines to show to the user.
        layout: name of the checkpoint's layout. `open_checkpoint` sets this attribute and `whole`.
        whole: whether this layout contains everything that a run needs to continue.
        says_prediction: whether the files state the prediction type. If not, `config` has the default.
    """

    path: Path
    config: Config
    spans: dict[Key, list[StoredTensor]]
    progress: Progress = START
    dataset: str = ""
    files: dict[Path, FileEntry] = field(default_factory=dict)
    topology: str = ""
    notes: list[str] = field(default_factory=list)
    layout: str = ""
    whole: bool = False
    says_prediction: bool = True

    def __post_init__(self) -> None:
        self.shapes = parameter_shapes(self.config)
        self._reader = FileReader()

    def kinds(self) -> tuple[str, ...]:
        """Return which kinds of values the checkpoint has.

        Possible kinds: "master" (fp32 weights), "exp_avg", "exp_avg_sq" (Adam moments) and "ema" (moving average).
        """
        return tuple(kind for kind in KINDS if any(k == kind for k, _ in self.spans))

    def check(self) -> None:
        """Check that the files hold every element of every parameter exactly once, for each kind of values.

        Raises:
            UserError: an element is missing or occurs twice, there are no weights, or a file is not in the manifest.
        """
        if "master" not in self.kinds():
            raise UserError(
                f"{self.path} must contain the fp32 weights of the model (master), but it only contains "
                f"{', '.join(self.kinds()) or 'other files'}. Use another checkpoint."
            )
        read = {span.path for spans in self.spans.values() for span in spans}
        if self.files and not read <= self.files.keys():
            raise UserError(
                f"{min(read - self.files.keys())} must be listed in the manifest, but it is not. Remove this file, or "
                "remove the manifest to read all files without their checksums."
            )
        problem = coverage_error(
            {key: [(s.start, s.numel) for s in spans] for key, spans in self.spans.items()}, self.kinds(), self.shapes
        )
        if problem:
            raise UserError(f"{self.path} must contain each tensor exactly once, but {problem}. Use another checkpoint.")
        for spans in self.spans.values():
            spans.sort(key=lambda span: (span.start, span.numel))

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Return elements [start, start + numel) of the flattened parameter `name`, float32 [numel].

        `kind`: "master" (fp32 weights), "exp_avg", "exp_avg_sq" or "ema". Raises LookupError if an element is missing.
        """
        return self._reader.read(self.spans[kind, name], start, numel)

    def set_prediction(self, prediction: str | None) -> None:
        """Set the prediction type (epsilon, v_prediction, ...) from the option --prediction, if the files do not state it.

        `prediction`: value of the option; None: the user did not give the option.

        Raises:
            UserError: the files state another type, or neither the files nor the option state one.
        """
        stored = self.config.diffusion.prediction
        if self.says_prediction and prediction not in (None, stored):
            raise UserError(
                f"--prediction {prediction} must be {stored}, the prediction type that {self.path} states. Leave out "
                "--prediction."
            )
        if not self.says_prediction and prediction is None:
            raise UserError(
                f"{self.path} must state the prediction type with which the model was trained, but it has no "
                "scheduler/scheduler_config.json with prediction_type. Add --prediction epsilon or v_prediction."
            )
        diffusion = self.config.diffusion.model_copy(update={"prediction": prediction or stored})
        self.config, self.says_prediction = self.config.model_copy(update={"diffusion": diffusion}), True

    def check_prediction(self, prediction: str) -> None:
        """Raise UserError unless the checkpoint states the prediction type `prediction`, which a new run will use."""
        if not self.says_prediction:
            raise UserError(
                f"run.init_from={self.path} must state the prediction type with which the model was trained, but it has no "
                "scheduler/scheduler_config.json with prediction_type. Copy the folder scheduler/ of the original pipeline "
                "into this folder, or convert the model by tools/convert_checkpoint.py with --prediction epsilon or "
                "v_prediction."
            )
        check_same_prediction("run.init_from", self.path, self.config, prediction)

    def integrity_error(self) -> str | None:
        """Compare size and SHA-256 of the files with the manifest; return a message about the first damaged file.

        Returns None if no file is damaged, or if there is no manifest.
        """
        return integrity_error(self.files.items())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the files of the checkpoint."""
        self._reader.close()


@lru_cache(maxsize=8)
def _structure(architecture: str) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    with torch.device("meta"):
        model = RaphaelUNet(Config.model_validate_json(architecture))
    blocks = [name for name, module in model.named_modules() if isinstance(module, TransformerBlock)]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return shapes, dict(zip(blocks, model.block_levels, strict=True))


def _structure_of(config: Config) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    # "megablocks" requires its package to build the model; shapes do not depend on the backend.
    model = config.model.model_copy(update={"expert_backend": "auto"})
    return _structure(Config(model=model, edge=config.edge, upscale=config.upscale).model_dump_json())


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of the model that `config` describes, by name, in the model's order."""
    return dict(_structure_of(config)[0])


def block_levels(config: Config) -> dict[str, int]:
    """Return the U-Net level (0: highest resolution) of each transformer block by the block's name, in execution order."""
    return dict(_structure_of(config)[1])


def check_same_prediction(field: str, path: Path, source: Config, prediction: str) -> None:
    """Raise UserError unless a source model has the run's prediction type (epsilon, v_prediction or flow).

    Args:
        field: setting that names the source model, such as run.init_from, for the message.
        path: path of the source model, for the message.
        source: configuration of the source model.
        prediction: diffusion.prediction of the run.
    """
    stored = source.diffusion.prediction
    if stored != prediction:
        raise UserError(
            f"diffusion.prediction={prediction} must be {stored}, the prediction type of {field} {path}. Set "
            f"diffusion.prediction={stored}, or use another model."
        )


def is_dense(config: Config) -> bool:
    """Return whether diffusers' class UNet2DConditionModel can represent the model of `config`.

    It can represent the model unless the model has experts, edge modules (small networks that predict edge maps) or a
    position encoding of image tokens.
    """
    m = config.model
    return not (m.space_experts or m.time_experts or config.edge.weight > 0 or m.image_positions)
