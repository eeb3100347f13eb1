"""LoRA adapters of a pipeline, under diffusers' method names.

Adapters are added to the weights in memory. This works for attention and for experts (peft does not support experts).
Sampling takes no longer than without adapters. The original weights of changed parameters are kept in host memory, because
subtracting an adapter from a rounded sum would not restore them exactly.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raphael_dist.convert.lora_files import Adapter, adapter_of_tensors
from raphael_dist.errors import UserError, did_you_mean
from raphael_dist.model.diffusers_model import uncompiled
from raphael_dist.sampling.pipeline_arguments import as_list
from raphael_dist.sampling.pipeline_lora_files import LoraFiles, read_adapters

_COMPONENTS = ("unet",)  # components that may have adapters
_NO_EFFECT = ("local_files_only", "low_cpu_mem_usage", "use_safetensors")  # options of diffusers that are always on here


@dataclass
class LoraState:
    """The LoRA adapters of a U-Net, which several pipelines may share.

    Attributes:
        adapters: all loaded adapters that are not fused, by name.
        active: factor by which each active adapter is multiplied, by the adapter's name.
        enabled: whether the active adapters are added to the weights.
        own: for each parameter that active adapters change, by name, its weights without these adapters, on the CPU.
        fused: for each parameter that `fuse_lora` changed, by name, its weights before the first `fuse_lora`.
        fused_adapters: the adapters that `fuse_lora` made part of the weights, by name, each with the factor that it had in
            `active`. `unfuse_lora` makes them active again with this factor.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    enabled: bool = True
    own: dict[str, Tensor] = field(default_factory=dict)
    fused: dict[str, Tensor] = field(default_factory=dict)
    fused_adapters: dict[str, tuple[Adapter, float]] = field(default_factory=dict)


class LoraLoader(LoraFiles):
    """Base class of pipelines with LoRA: loads adapters and adds them to the weights of `self.unet`."""

    unet: Any

    @property
    def _lora(self) -> LoraState:
        unet = uncompiled(self.unet)
        if not hasattr(unet, "lora_state"):
            unet.lora_state = LoraState()
        return unet.lora_state

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        **options: Any,
    ) -> None:
        """Load LoRA adapters and make them the only active ones, with factor 1.

        Args:
            pretrained_model_name_or_path_or_dict: a local folder of peft (adapter_config.json, adapter_model.safetensors) or
                diffusers (pytorch_lora_weights.safetensors), a safetensors file, or tensors by name. The installed package
                also reads a run directory with trained adapters.
            adapter_name: name for `set_adapters`; None: default_0, default_1, ...
            hotswap: whether to replace the loaded adapters that have the name `adapter_name`. Their factor is kept.
            weight_name: name of the safetensors file in the folder; None: one of the names above.
            subfolder: subfolder with the adapters, if the first argument is a folder; None: no subfolder.
            options: other options of diffusers, such as those for downloads. They must be None or False, except for options
                that make no difference here.

        Raises:
            UserError: there are no adapters, they do not fit the U-Net, the name is in use, or an option is not supported.
        """
        for option, value in options.items():
            if value and option not in _NO_EFFECT:
                raise UserError(
                    f"{option}={value!r} is not supported by load_lora_weights, which reads safetensors files from a local "
                    f"folder. Leave out {option}."
                )
        state, source = self._lora, pretrained_model_name_or_path_or_dict
        name = self._name_to_load(adapter_name, hotswap)
        if isinstance(source, Mapping):
            adapter = adapter_of_tensors(source, None, Path("the tensors"), "load_lora_weights")
        else:
            adapter = read_adapters(Path(source) / (subfolder or ""), weight_name)
        shapes = {name: tuple(p.shape) for name, p in uncompiled(self.unet).named_parameters()}
        adapter.check(shapes, "load_lora_weights")
        state.adapters[name] = adapter
        if hotswap:
            self._merge(state.active, state.enabled)
        else:
            self.set_adapters(name)

    def _name_to_load(self, adapter_name: str | None, hotswap: bool) -> str:
        """Return the name for adapters to load: `adapter_name`, or the first of default_0, default_1, ... that is not used.

        Raises UserError if adapters of this name exist already; with `hotswap`, if no loaded adapters have this name.
        """
        state = self._lora
        used = state.adapters.keys() | state.fused_adapters
        name = next(n for i in count() if (n := f"default_{i}") not in used) if adapter_name is None else adapter_name
        if hotswap and name not in state.adapters:
            raise UserError(
                f"hotswap=True requires a loaded adapter of the name adapter_name={adapter_name!r}, but the loaded ones are "
                f"{list(state.adapters)}. Use one of these, or leave out hotswap."
            )
        if name in used and not hotswap:
            raise UserError(
                f"adapter_name={name!r} must be new, but the pipeline has an adapter of this name. Choose another name, or "
                f"call delete_adapters({name!r}) first."
            )
        return name

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | dict[str, float] | Sequence[Any] | None = None
    ) -> None:
        """Make the loaded LoRA adapters `adapter_names` the only ones that are added to the U-Net's weights.

        Args:
            adapter_names: one name or several.
            adapter_weights: factor by which an adapter is multiplied: one number for all adapters, or one for each adapter.
                None: 1. A number may be written as {"unet": number}.

        Raises:
            UserError: no adapter with one of the names is loaded, or the number of factors is wrong.
        """
        names = as_list(adapter_names)
        weights = [_factor("adapter_weights", weight) for weight in as_list(adapter_weights)]
        weights = weights * len(names) if len(weights) == 1 else weights
        if len(weights) != len(names):
            raise UserError(
                f"adapter_weights={weights} must be one number, or one for each of the {len(names)} adapters, but it has "
                f"{len(weights)} numbers. Pass one number, or a list of length {len(names)}."
            )
        self._check_loaded(names)
        self._merge(dict(zip(names, weights, strict=True)))

    def _check_loaded(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._lora.adapters:
                known = list(self._lora.adapters)
                raise UserError(
                    f"adapter_names={name!r} must be a loaded adapter, but the loaded ones are {known}"
                    f"{did_you_mean(str(name), known)}. Use one of these, or load the adapter with load_lora_weights()."
                )

    def get_active_adapters(self) -> list[str]:
        """Return the names of the active LoRA adapters. `disable_lora` does not change them."""
        return list(self._lora.active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the names of all loaded LoRA adapters as {"unet": names}; {} if there are none."""
        return {"unet": list(self._lora.adapters)} if self._lora.adapters else {}

    def disable_lora(self) -> None:
        """Restore the weights without the active LoRA adapters, until `enable_lora` or `set_adapters`.

        Fused adapters (`fuse_lora`) stay in the weights.
        """
        self._merge(self._lora.active, enabled=False)

    def enable_lora(self) -> None:
        """Add the active LoRA adapters to the weights again, after `disable_lora`."""
        self._merge(self._lora.active)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove the LoRA adapters of these names from memory, and from the weights unless they are fused.

        Unknown names are ignored.
        """
        state, names = self._lora, as_list(adapter_names)
        self._merge({name: weight for name, weight in state.active.items() if name not in names}, state.enabled)
        for name in names:
            state.adapters.pop(name, None)
            state.fused_adapters.pop(name, None)

    def fuse_lora(
        self,
        components: str | Sequence[str] = _COMPONENTS,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: str | Sequence[str] | None = None,
    ) -> None:
        """Make LoRA adapters, multiplied by `lora_scale`, part of the U-Net's weights, until `unfuse_lora`.

        `save_pretrained` then writes the sum. Other active adapters stay active.

        Args:
            components: only ["unet"], since no other component has adapters.
            lora_scale: factor by which adapters are multiplied, in addition to the factor from `set_adapters`.
            safe_fusing: whether to refuse adapters whose values are not finite.
            adapter_names: names of the adapters to fuse; None: all active adapters.

        Raises:
            UserError: an argument has a value that is not allowed, or no adapter with one of the names is loaded.
        """
        _check_components(components)
        scale, state = _factor("lora_scale", lora_scale), self._lora
        names = list(state.active) if adapter_names is None else as_list(adapter_names)
        self._check_loaded(names)
        for name in names if safe_fusing else ():
            if not all(matrix.isfinite().all() for pair in state.adapters[name].factors.values() for matrix in pair):
                raise UserError(
                    f"safe_fusing=True requires finite adapters, but {name!r} contains NaN or infinity. Train it again."
                )
        factors = {name: state.active.get(name, 1.0) for name in names}
        others = {name: weight for name, weight in state.active.items() if name not in names}
        enabled = state.enabled
        self._merge({name: scale * factor for name, factor in factors.items()})
        state.fused = state.own | state.fused  # if adapters were fused before, `fused` has the older weights
        state.own = {}
        state.fused_adapters |= {name: (state.adapters.pop(name), factor) for name, factor in factors.items()}
        self._merge(others, enabled)

    def unfuse_lora(self, components: str | Sequence[str] = _COMPONENTS) -> None:
        """Restore the U-Net's weights from before the first `fuse_lora`, bit for bit.

        Fused LoRA adapters that were not unloaded are active again, with the factors of `set_adapters`, as in diffusers.
        Other active adapters, loaded after `fuse_lora`, stay active. `components`: only ["unet"] is allowed.
        """
        _check_components(components)
        state = self._lora
        state.own |= state.fused
        again = {name: factor for name, (_, factor) in state.fused_adapters.items()}
        state.adapters |= {name: adapter for name, (adapter, _) in state.fused_adapters.items()}
        state.fused, state.fused_adapters = {}, {}
        self._merge(again | state.active, state.enabled)

    def unload_lora_weights(self) -> None:
        """Remove all LoRA adapters, and restore the weights without them, bit for bit.

        Fused adapters stay in the weights.
        """
        self._merge({})
        self._lora.adapters.clear()
        self._lora.fused_adapters.clear()

    @torch.no_grad()
    def _merge(self, active: dict[str, float], enabled: bool = True) -> None:
        """Make `active` ({name: factor}) the active adapters, in place of those that were active before.

        The previously active adapters are removed from the U-Net's weights and, if `enabled`, the new ones are added. Raises
        UserError if the weights have been moved by sequential offload.
        """
        parameters, state = dict(uncompiled(self.unet).named_parameters()), self._lora
        added = active if enabled else {}
        names = {name for adapter in added for name in state.adapters[adapter].factors}
        if any(parameters[name].is_meta for name in names | state.own.keys()):
            raise UserError(
                "adapters must be loaded before enable_sequential_cpu_offload(), which moves the weights, but it has been "
                "called already. Load the adapters first."
            )
        for name, value in state.own.items():
            parameters[name].copy_(value)
        state.active, state.enabled = active, enabled
        state.own = {name: parameters[name].to("cpu", copy=True) for name in names}
        for key, weight in added.items():
            for name in state.adapters[key].factors:
                parameters[name] += (weight * state.adapters[key].delta(name)).to(parameters[name])


def _factor(name: str, value: Any) -> float:
    """Return the factor of an adapter: `value`, which may be {"unet": number}; None: 1.

    Raises UserError, which names the argument `name`, if the value is not a finite number.
    """
    number = value.get("unet") if isinstance(value, dict) and value.keys() <= {"unet"} else value
    if number is None:
        return 1.0
    if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
        raise UserError(f"{name}={value!r} must be a finite number. Use e.g. {name}=1.0.")
    return float(number)


def _check_components(components: str | Sequence[str]) -> None:
    if as_list(components) != list(_COMPONENTS):
        raise UserError(
            f"components={components!r} must be {list(_COMPONENTS)}, the only component with adapters. Leave out components."
        )
