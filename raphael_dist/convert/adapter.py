"""Adapters (`model.lora`) between a run that trained them, peft's files, and a model that they are added to.

    adapter_config.json           peft's LoraConfig: rank, alpha, which layers
    adapter_model.safetensors     A [rank, in] and B [out, rank] of each linear layer, float32; of a layer's K experts
                                  A [K rank, in] and B [out, rank K], as peft has them for stacked parameters

peft wraps a layer once for each of its parameters: the wrapper of w1, the first, is called `LAYER.base_layer`, that of w2
`LAYER`.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raphael_dist.checkpoint.progress import START
from raphael_dist.checkpoint.reader import CheckpointReader
from raphael_dist.checkpoint.tensors import Shapes, stacked
from raphael_dist.config_adapters import Lora
from raphael_dist.convert.beside import exported, open_run, read_tensors
from raphael_dist.convert.plan import Source
from raphael_dist.errors import UserError
from raphael_dist.model.lora import ATTENTION, adapted, peft, scale_of
from raphael_dist.storage.files import read_text

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_EXPERTS = tuple(f"{kind}_moe.{name}" for kind in ("time", "space") for name in ("w1", "w2"))
# What peft's adapters may have and these have not, with the value that says so.
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
}
_EMPTY = ("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "trainable_token_indices")


@dataclass(frozen=True)
class Adapter:
    """What is added to a model's parameters: `scale B A`.

    factors: A [rank, in] and B [out, rank], float32, by the parameter's name; of experts [K, rank, in], [K, out, rank].
    """

    path: Path
    scale: float
    factors: Mapping[str, tuple[Tensor, Tensor]]

    def delta(self, name: str) -> Tensor:
        """Return what is added to a parameter, in its shape, float32."""
        a, b = self.factors[name]
        return self.scale * (b @ a)

    def check(self, shapes: Shapes, option: str) -> None:
        """Raise UserError unless every parameter that it is for is there, in its shape."""
        for name, (a, b) in self.factors.items():
            wanted = (*b.shape[:-1], a.shape[-1])
            if shapes.get(name) != wanted:
                found = f"it in {list(shapes[name])}" if name in shapes else "no such parameter"
                raise UserError(
                    f"{option} {self.path}: its adapter of {name} is for shape {list(wanted)}, the model has {found}; give "
                    "the model that it was trained beside"
                )


class Merged:
    """A source with adapters added to its weights, as they are read; the source itself stays as it is. At step 0."""

    whole = False

    def __init__(self, source: Source, adapter: Adapter, strength: float = 1.0, option: str = "--lora") -> None:
        """`strength`: times which the adapter counts beside its own scale."""
        adapter.check(source.shapes, option)
        self.path, self.config, self.shapes = source.path, source.config, source.shapes
        self.progress, self.dataset = START, ""
        self._source, self._adapter, self._strength = source, adapter, strength
        self._last: tuple[str, Tensor] = ("", torch.empty(0))

    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of weights; moments belong to training them, which this is not."""
        return tuple(kind for kind in self._source.kinds() if kind in ("master", "ema"))

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Return elements [start, start + numel) of a flattened tensor, float32."""
        found = self._source.read(kind, name, start, numel)
        if name not in self._adapter.factors:
            return found
        if self._last[0] != name:
            self._last = (name, self._strength * self._adapter.delta(name).flatten())
        return found + self._last[1][start : start + numel].view_as(found)


def read_adapter(path: Path, weights: str = "ema", option: str = "--lora") -> Adapter:
    """Read the adapters in peft's folder, or of a run (its newest checkpoint that verifies) or one of its step folders.

    weights: of a run, "ema" (if it has an average) or "master". UserError: there are none, or of a kind that is not known.
    """
    if (path / CONFIG).is_file():
        return _read_folder(path, option)
    return adapter_of(open_run(path, CONFIG, option), weights, option)


def adapter_of(reader: CheckpointReader, weights: str = "ema", option: str = "--lora") -> Adapter:
    """Return the adapters in a checkpoint of a run that trained them. UserError: it trained all weights."""
    lora = reader.config().lora
    if not lora.rank:
        raise UserError(f"{option} {reader.folder}: that run trained all of its weights (lora.rank = 0), not adapters")
    kind = weights if weights in reader.kinds() else "master"
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name in reader.shapes:
        found = adapted(name)
        assert found is not None, name
        parts[found[0]][found[1]] = reader.whole(kind, name)
    factors = {name: (both["A"], both["B"]) for name, both in parts.items()}
    return Adapter(reader.folder, scale_of(lora.rank, lora.alpha), factors)


def write_adapter(adapter: Adapter, lora: Lora, base: str, folder: Path) -> None:
    """Write adapters as peft's folder, which must not exist; it appears whole or not at all. base: what they belong to."""
    from safetensors.torch import save_file

    attention, experts = "attention" in lora.targets, "experts" in lora.targets
    config = peft().LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=ATTENTION if attention else [],
        target_parameters=[name for name in _EXPERTS if any(n.endswith(name) for n in adapter.factors)] if experts else None,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    with exported(folder) as temporary:
        config.save_pretrained(str(temporary))
        save_file(_files_tensors(adapter), str(temporary / WEIGHTS), metadata={"format": "pt"})


def _files_tensors(adapter: Adapter) -> dict[str, Tensor]:
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


def _read_folder(folder: Path, option: str) -> Adapter:
    try:
        config = json.loads(read_text(folder / CONFIG))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        parameters = [str(name) for name in config.get("target_parameters") or ()]
        if rank < 1 or not math.isfinite(alpha):
            raise ValueError(f"r = {rank}, lora_alpha = {alpha}")
        odd = [key for key, value in _PLAIN.items() if config.get(key, value) != value]
        odd += [key for key in _EMPTY if config.get(key)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{option} {folder / CONFIG} cannot be read: {error}") from None
    if odd:
        raise UserError(f"{option} {folder}: {odd[0]} = {config[odd[0]]!r} in {CONFIG}; only plain LoRA can be added")
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in read_tensors(folder / WEIGHTS).items():
        module, _, factor = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
        if factor not in ("A", "B") or tensor.ndim != 2:
            raise UserError(f"{option} {folder / WEIGHTS}: {key} of shape {list(tensor.shape)} is no adapter of a matrix")
        parts[module][factor] = tensor
    factors = {}
    for module, both in parts.items():
        name = _parameter_of(module, parts.keys(), parameters)
        if (
            name is None
            or both.keys() != {"A", "B"}
            or both["A"].shape[0] != both["B"].shape[1]
            or both["A"].shape[0] % rank
        ):
            raise UserError(f"{option} {folder / WEIGHTS}: the adapter of {module} does not fit {CONFIG}")
        factors[name] = _unfolded(both["A"], both["B"], rank) if stacked(name) else (both["A"], both["B"])
    return Adapter(folder, scale_of(rank, alpha, bool(config.get("use_rslora"))), factors)


def _parameter_of(module: str, modules: Any, parameters: list[str]) -> str | None:
    """Return the parameter that a module of the file is for; None where the configuration does not say."""
    layer = module.removesuffix(".base_layer")
    names = sorted({f"{layer}.{p.rpartition('.')[2]}" for p in parameters if _ends(f"{layer}.{p.rpartition('.')[2]}", p)})
    if not names:
        return f"{module}.weight"
    wrappers = [name for name in (f"{layer}.base_layer", layer) if name in modules]  # the inner one is the first parameter's
    return names[wrappers.index(module)] if len(wrappers) == len(names) and all(map(stacked, names)) else None


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _unfolded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return peft's A [K rank, in] and B [out, rank K] as [K, rank, in] and [K, out, rank]."""
    return a.view(-1, rank, a.shape[1]), b.view(b.shape[0], rank, -1).permute(2, 0, 1).contiguous()
