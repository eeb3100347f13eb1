"""LoRA adapters of a pipeline, under diffusers' method names.

Adapters are added to the weights in memory. This works for attention and for experts, which peft does not support, and
sampling takes no longer than without adapters. The original weights of changed parameters are kept in host memory, because
subtracting an adapter from a rounded sum would not restore them exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raphael_dist.convert.lora_files import Adapter, read_adapter, read_peft_folder
from raphael_dist.errors import UserError, did_you_mean
from raphael_dist.sampling.own_code import IN_PACKAGE
from raphael_dist.sampling.pipeline_arguments import as_list, check_real


@dataclass
class LoraState:
    """The LoRA adapters of a U-Net, which several pipelines may share.

    Attributes:
        adapters: all loaded adapters, by name.
        active: factor by which each active adapter is multiplied, by the adapter's name.
        own: for each parameter that active adapters change, by name, its weights without them, on the CPU.
        fused: for each parameter that `fuse_lora` changed, by name, its weights before that.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    own: dict[str, Tensor] = field(default_factory=dict)
    fused: dict[str, Tensor] = field(default_factory=dict)


class LoraLoader:
    """Base class of pipelines with LoRA: loads adapters and adds them to the weights of `self.unet`."""

    unet: Any

    @property
    def _lora(self) -> LoraState:
        if not hasattr(self.unet, "lora_state"):
            self.unet.lora_state = LoraState()
        state: LoraState = self.unet.lora_state
        return state

    def load_lora_weights(self, pretrained_model_name_or_path: str | Path, adapter_name: str | None = None) -> None:
        """Load LoRA adapters and make them the only active ones, with factor 1.

        Args:
            pretrained_model_name_or_path: a folder of peft (adapter_config.json, adapter_model.safetensors). The installed
                package also reads a run directory with trained adapters.
            adapter_name: name for `set_adapters`; None: default_0, default_1, ...

        Raises:
            UserError: there are no adapters, they do not fit the U-Net, or the name is in use.
        """
        name = f"default_{len(self._lora.adapters)}" if adapter_name is None else adapter_name
        if name in self._lora.adapters:
            raise UserError(
                f"adapter_name={name!r} must be new, but the pipeline has an adapter of this name. Choose another name, or "
                f"call delete_adapters({name!r}) first."
            )
        path, adapter = Path(pretrained_model_name_or_path), None
        if IN_PACKAGE:  # the installed package also reads a run that trained adapters
            adapter = read_adapter(path, option="load_lora_weights")
        if adapter is None:
            adapter = read_peft_folder(path, "load_lora_weights")
        shapes = {name: tuple(p.shape) for name, p in self.unet.named_parameters()}
        adapter.check(shapes, "load_lora_weights")
        self._lora.adapters[name] = adapter
        self.set_adapters(name)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Make these loaded LoRA adapters the only ones that are added to the U-Net's weights.

        Args:
            adapter_names: one name or several.
            adapter_weights: factor by which an adapter is multiplied: one number for all, or one for each. None: 1.

        Raises:
            UserError: no adapter of this name is loaded, or the number of factors is wrong.
        """
        names = as_list(adapter_names)
        weights = as_list(1.0 if adapter_weights is None else adapter_weights)
        weights = weights * len(names) if len(weights) == 1 else weights
        if len(weights) != len(names):
            raise UserError(
                f"adapter_weights={weights} must be one number, or one for each of the {len(names)} adapters, but it has "
                f"{len(weights)} numbers. Pass one number, or a list of length {len(names)}."
            )
        for name, weight in zip(names, weights, strict=True):
            if name not in self._lora.adapters:
                known = list(self._lora.adapters)
                raise UserError(
                    f"adapter_names={name!r} must be a loaded adapter, but the loaded ones are {known}"
                    f"{did_you_mean(str(name), known)}. Use one of these, or load the adapter with load_lora_weights()."
                )
            check_real("adapter_weights", weight, float("inf"))
        self._merge(dict(zip(names, weights, strict=True)))

    def get_active_adapters(self) -> list[str]:
        """Return the names of the LoRA adapters that currently change the weights."""
        return list(self._lora.active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the names of all loaded LoRA adapters as {"unet": names}; {} if there are none."""
        return {"unet": list(self._lora.adapters)} if self._lora.adapters else {}

    def disable_lora(self) -> None:
        """Deactivate all LoRA adapters, and restore the weights without them. `set_adapters` activates adapters again.

        Fused adapters (`fuse_lora`) stay in the weights.
        """
        self._merge({})

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove the LoRA adapters of these names from memory and from the weights. Unknown names are ignored."""
        names = as_list(adapter_names)
        self._merge({name: weight for name, weight in self._lora.active.items() if name not in names})
        for name in names:
            self._lora.adapters.pop(name, None)

    def fuse_lora(self, lora_scale: float = 1.0) -> None:
        """Make the active LoRA adapters, multiplied by `lora_scale`, part of the U-Net's weights, until `unfuse_lora`.

        `save_pretrained` then writes the sum. Afterwards no adapter is loaded.
        """
        check_real("lora_scale", lora_scale, float("inf"))
        self._merge({name: lora_scale * weight for name, weight in self._lora.active.items()})
        # If adapters were fused before, `fused` has the older weights, which take precedence.
        self.unet.lora_state = LoraState(fused=self._lora.own | self._lora.fused)

    def unfuse_lora(self) -> None:
        """Restore the U-Net's weights from before the first `fuse_lora`, bit for bit.

        LoRA adapters that were loaded after it and are active stay active.
        """
        self._lora.own |= self._lora.fused
        self._lora.fused = {}
        self._merge(self._lora.active)

    def unload_lora_weights(self) -> None:
        """Remove all LoRA adapters that are not fused, and restore the weights without them, bit for bit."""
        self._merge({})
        self._lora.adapters.clear()

    @torch.no_grad()
    def _merge(self, active: dict[str, float]) -> None:
        """Set the U-Net's weights to those without active adapters plus the adapters `active` ({name: factor})."""
        parameters, state = dict(self.unet.named_parameters()), self._lora
        names = {name for adapter in active for name in state.adapters[adapter].factors}
        if any(parameters[name].is_meta for name in names | state.own.keys()):
            raise UserError(
                "adapters must be loaded before enable_sequential_cpu_offload(), which moves the weights. Load them first."
            )
        for name, value in state.own.items():
            parameters[name].copy_(value)
        state.active, state.own = active, {name: parameters[name].to("cpu", copy=True) for name in names}
        for key, weight in active.items():
            for name in state.adapters[key].factors:
                parameters[name] += (weight * state.adapters[key].delta(name)).to(parameters[name])
