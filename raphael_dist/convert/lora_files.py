"""Reads and writes LoRA adapters (`model.lora`): in a run that trained them, or as files of peft or diffusers.

    adapter_config.json           peft's LoraConfig: rank, alpha, which layers
    adapter_model.safetensors     A [rank, in] and B [out, rank] of each linear layer, float32; of a layer with K experts
                                  A [K rank, in] and B [out, rank K], as peft stores them for stacked parameters

A layer with experts has two stacked weights, w1 and w2. peft wraps the layer once for each weight that has an adapter. If
both have adapters, the tensors for w1 have the prefix `LAYER.base_layer`, and those for w2 the prefix `LAYER`.

diffusers' pytorch_lora_weights.safetensors has the same tensors; it may have the LoraConfig in its metadata.
"""

import math
from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raphael_dist.checkpoint.progress import START
from raphael_dist.checkpoint.reader import CheckpointReader
from raphael_dist.checkpoint.tensors import Shapes, stacked
from raphael_dist.config.model_sections import Lora
from raphael_dist.convert.adapter_files import export_folder, open_run, read_tensors, trained_weights
from raphael_dist.convert.write_plan import Source
from raphael_dist.errors import UserError
from raphael_dist.model.lora import ATTENTION, import_peft, lora_scale, parse_adapter_name
from raphael_dist.storage.tensorfile import save_tensors
from raphael_dist.text import JsonObject, parse_json, read_json, reason_unreadable

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS, _METADATA, _UNET = "pytorch_lora_weights.safetensors", "lora_adapter_metadata", "unet."
_PREFIX = "base_model.model."
_EXPERTS = tuple(f"{kind}_moe.{name}" for kind in ("time", "space") for name in ("w1", "w2"))
# Options of peft that are not supported, with the value that turns each off.
_PLAIN: JsonObject = {
    "peft_type": "LORA",
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
}
_EMPTY = ("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "trainable_token_indices")


@dataclass(frozen=True)
class Adapter:
    """LoRA adapters: matrices A and B that change parameters W of the base model to W + scale B A.

    Attributes:
        path: folder or file from which the adapters were read.
        scale: factor of B A, the same for all parameters.
        factors: for each changed parameter, by name, the matrices A [rank, in] and B [out, rank], float32. For a parameter
            with K stacked experts they are [K, rank, in] and [K, out, rank].
    """

    path: Path
    scale: float
    factors: Mapping[str, tuple[Tensor, Tensor]]

    def delta(self, name: str) -> Tensor:
        """Return the term (scale B A) that these adapters add to the parameter `name`, float32 in the parameter's shape."""
        a, b = self.factors[name]
        return self.scale * (b @ a)

    def check(self, shapes: Shapes, option: str) -> None:
        """Raise UserError unless the model has every adapted parameter in the shape that the LoRA matrices A and B require.

        Args:
            shapes: shape of every parameter of the model, by name.
            option: name of the command line option that gave the adapters, for the message.
        """
        for name, (a, b) in self.factors.items():
            expected = (*b.shape[:-1], a.shape[-1])
            if shapes.get(name) != expected:
                actual = (
                    f"its shape in the model is {list(shapes[name])}"
                    if name in shapes
                    else "the model has no such parameter"
                )
                raise UserError(
                    f"{option} {self.path} requires the parameter {name} with the shape {list(expected)}, but {actual}. "
                    "Use the base model that the adapter was trained with."
                )


class MergedSource:
    """The weights of a checkpoint with merged LoRA adapters, computed when they are read.

    The object has the interface of a checkpoint at step 0 with the merged weights and without Adam moments.
    """

    whole = False

    def __init__(self, source: Source, adapter: Adapter, strength: float = 1.0) -> None:
        """Merge `adapter` into the values that are read from `source`, which does not change.

        Args:
            source: the checkpoint of the base model.
            adapter: the adapters. Raises UserError if they belong to another model.
            strength: factor of the term that is added to the weights, in addition to the adapter's own scale.
        """
        adapter.check(source.shapes, "--lora")
        self.path, self.config, self.shapes = source.path, source.config, source.shapes
        self.progress, self.dataset = START, ""
        self._source, self._adapter, self._strength = source, adapter, strength
        self._last: tuple[str, Tensor] = ("", torch.empty(0))

    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of values that can be read: "master" (fp32 weights) and, if the checkpoint has it, "ema".

        The checkpoint is that of the base model, into whose weights the adapters are merged. Its Adam moments are left out,
        because they do not fit the merged weights.
        """
        return tuple(kind for kind in self._source.kinds() if kind in ("master", "ema"))

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Return elements [start, start + numel) of the flattened parameter `name` with merged adapters, float32 [numel].

        `kind`: which weights of the base model to read, "master" (fp32 weights) or "ema" (moving average).
        """
        values = self._source.read(kind, name, start, numel)
        if name not in self._adapter.factors:
            return values
        if self._last[0] != name:
            self._last = (name, self._strength * self._adapter.delta(name).flatten())
        return values + self._last[1][start : start + numel].view_as(values)


def read_adapter(path: Path, weights: str | None = None, option: str = "--lora") -> Adapter:
    """Read LoRA adapters from a folder that peft wrote, or from a run that trained them.

    Args:
        path: a folder of peft; a run directory, whose newest undamaged checkpoint is read; or one of its step-* folders.
        weights: "ema" (moving average) or "master" (fp32 weights) of a run. None: the EMA if the run has one.
        option: name of the command line option that gave `path`, for messages.

    Raises:
        UserError: `path` contains no adapters, or adapters of a kind that is not supported.
    """
    if (path / CONFIG).is_file():
        return read_peft_folder(path, option)
    return adapter_of(open_run(path, CONFIG, option), weights, option)


def adapter_of(reader: CheckpointReader, weights: str | None = None, option: str = "--lora") -> Adapter:
    """Return the LoRA adapters in a run's checkpoint. Raises UserError if the run trained none.

    Args:
        reader: the opened checkpoint.
        weights: "ema" (moving average) or "master" (fp32 weights). None: the EMA if the run has one.
        option: name of the command line option that gave the run's path, for messages.
    """
    lora = reader.config().lora
    if not lora.rank:
        raise UserError(
            f"{option} {reader.folder} must be of a run that trained LoRA adapters (lora.rank above 0), but it has "
            "lora.rank=0. Give a run that was trained with lora.rank above 0."
        )
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in trained_weights(reader, weights).items():
        target = parse_adapter_name(name)
        assert target is not None, name
        parameter, factor = target
        parts[parameter][factor] = value
    factors = {name: (both["A"], both["B"]) for name, both in parts.items()}
    return Adapter(reader.folder, lora_scale(lora.rank, lora.alpha), factors)


def write_adapter(adapter: Adapter, lora: Lora, base: str, folder: Path) -> None:
    """Write LoRA adapters as a new folder that peft reads. The folder appears only when it is complete.

    Args:
        adapter: the adapters.
        lora: the run's settings of LoRA (rank, alpha, adapted layers).
        base: name or path of the base model, which adapter_config.json states.
        folder: the new folder.

    Raises:
        UserError: `folder` exists already, or cannot be written.
    """
    attention, experts = "attention" in lora.targets, "experts" in lora.targets
    config = import_peft().LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=ATTENTION if attention else [],
        target_parameters=[name for name in _EXPERTS if any(n.endswith(name) for n in adapter.factors)] if experts else None,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    with export_folder(folder) as temporary:
        config.save_pretrained(str(temporary))
        with open(temporary / WEIGHTS, "xb") as file:
            save_tensors(file, _peft_tensors(adapter), {"format": "pt"})


def _peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    tensors = {}
    for name, (a, b) in adapter.factors.items():
        owner = stacked(name)
        module = name.removesuffix(".weight") if owner is None else owner[0]
        if owner is not None:
            both = owner[1] == "w1" and f"{module}.w2" in adapter.factors
            module += ".base_layer" if both else ""
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = a.contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = b.contiguous()
    return tensors


def read_peft_folder(folder: Path, option: str) -> Adapter:
    """Read the LoRA adapters in a folder that peft wrote.

    Raises UserError if the adapters are not plain LoRA (but, for example, DoRA), or if the tensors do not match the folder's
    adapter_config.json. `option`: name of the command line option that gave `folder`, for messages.
    """
    config = _read_config(folder / CONFIG, option)
    return adapter_of_tensors(read_tensors(folder / WEIGHTS), config, folder / WEIGHTS, option)


def read_lora_file(file: Path, option: str) -> Adapter:
    """Read the LoRA adapters in a safetensors file of diffusers' `save_lora_weights`.

    Raises UserError if the adapters are not plain LoRA. `option`: name of the option that gave `file`, for messages.
    """
    return adapter_of_tensors(read_tensors(file), _read_config(file, option), file, option)


def adapter_of_tensors(tensors: Mapping[str, Tensor], config: JsonObject | None, file: Path, option: str) -> Adapter:
    """Make LoRA adapters from the tensors in a file of peft or diffusers. Raises UserError if they are not plain LoRA.

    Args:
        tensors: matrices A and B, under the names that peft or diffusers gives them.
        config: peft's LoraConfig. None: the shapes of the tensors state the rank, and alpha is equal to the rank.
        file: path of the file with the tensors, for messages and for the result's `path`.
        option: name of the option that gave the file, for messages.
    """
    pairs: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        name = key.removeprefix(_UNET).removeprefix(_PREFIX).removesuffix(".weight")
        name = name.replace(".lora.down", ".lora_A").replace(".lora.up", ".lora_B")  # in diffusers' training scripts
        module, _, factor = name.rpartition(".lora_")
        if factor not in ("A", "B") or tensor.ndim != 2:
            raise UserError(
                f"{option}: {key} in {file} must be a LoRA matrix A or B, but it is not (shape {list(tensor.shape)}). Use "
                "plain LoRA adapters."
            )
        pairs[module][factor] = tensor
    parameters, factors = [str(name) for name in (config or {}).get("target_parameters") or ()], {}
    source = CONFIG if file.name == WEIGHTS else "its metadata"
    for module, pair in pairs.items():
        parameter = _parameter_of(module, pairs, parameters)
        rows = len(pair.get("A", ()))
        rank = rows if config is None else int(config["r"])
        if parameter is None or pair.keys() != {"A", "B"} or rows != pair["B"].shape[1] or not rows or rows % rank:
            raise UserError(
                f"{option}: the adapter of {module} in {file} must have one matrix A and one matrix B, with the rank and "
                f"the target parameters that {source} states, but it does not. Use the files of one training run."
            )
        if not stacked(parameter) and rows != rank:
            raise UserError(
                f"{option} {file}: r={rank} in {source} must be the rank of the tensors, but the rank of {module} is "
                f"{rows}. Use the files of one training run."
            )
        factors[parameter] = _unstack(pair["A"], pair["B"], rank) if stacked(parameter) else (pair["A"], pair["B"])
    if config is None:
        return Adapter(file, 1.0, factors)
    return Adapter(file, lora_scale(int(config["r"]), float(config["lora_alpha"]), bool(config.get("use_rslora"))), factors)


def _file_config(file: Path) -> JsonObject | None:
    """Return the LoraConfig of the U-Net's adapters in the metadata of a safetensors file; None if it has no LoraConfig."""
    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get(_METADATA)
    return {key.removeprefix(_UNET): value for key, value in parse_json(text).items()} if text else None


def _read_config(file: Path, option: str) -> JsonObject | None:
    """Return the LoraConfig in peft's adapter_config.json or in a safetensors file; None if the latter has no LoraConfig.

    Raises UserError if the file cannot be read, or the LoraConfig is not that of plain LoRA. `option`: name of the option
    that gave the file, for messages.
    """
    try:
        config = read_json(file) if file.name == CONFIG else _file_config(file)
        if config is None:
            return None
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        if rank < 1 or not math.isfinite(alpha):
            raise ValueError(f"r={rank} must be at least 1, and lora_alpha={alpha} must be finite")
        unsupported = [key for key, value in _PLAIN.items() if config.get(key, value) != value]
        unsupported += [key for key in _EMPTY if config.get(key)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"{option}: {file} cannot be read: {reason_unreadable(error)}. Copy the folder of the adapters again "
            "from its source."
        ) from None
    if unsupported:
        key = unsupported[0]
        raise UserError(
            f"{option} {file.parent}: {key}={config[key]!r} in {file.name} is not supported. Use plain LoRA adapters, which "
            f"are trained without {key}."
        )
    return config


def _parameter_of(module: str, modules: Container[str], parameters: list[str]) -> str | None:
    """Return the name of the model's parameter that is changed by the matrices A and B of a module in peft's file.

    `module`: name of the module. `modules`: names of all modules in the file. `parameters`: `target_parameters` in peft's
    adapter_config.json. Returns None if the parameters do not match the modules.
    """
    layer = module.removesuffix(".base_layer")
    adapted = [(f"{layer}.{target.rpartition('.')[2]}", target) for target in parameters]
    names = sorted({name for name, target in adapted if f".{name}".endswith(f".{target}")})
    if not names:
        return f"{module}.weight"
    wrappers = [name for name in (f"{layer}.base_layer", layer) if name in modules]  # the inner wrapper is for w1
    return names[wrappers.index(module)] if len(wrappers) == len(names) and all(map(stacked, names)) else None


def _unstack(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Convert peft's matrices A [K rank, in] and B [out, rank K] for K experts to [K, rank, in] and [K, out, rank]."""
    return a.view(-1, rank, a.shape[1]), b.view(b.shape[0], rank, -1).permute(2, 0, 1).contiguous()
