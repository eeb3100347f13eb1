"""Reads and writes the files of a pipeline's LoRA adapters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders import StableDiffusionLoraLoaderMixin
from torch import Tensor

from raphael_dist.convert.lora_files import (
    CONFIG,
    DIFFUSERS_WEIGHTS,
    WEIGHTS,
    Adapter,
    read_adapter,
    read_lora_file,
    read_peft_folder,
)
from raphael_dist.errors import UserError
from raphael_dist.sampling.code_origin import IN_PACKAGE


class LoraFiles:
    """Base class of pipelines with LoRA: writes adapters, as diffusers' pipelines do."""

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        unet_lora_layers: Mapping[str, Tensor] | None = None,
        text_encoder_lora_layers: None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Any = None,
        safe_serialization: bool = True,
        unet_lora_adapter_metadata: Mapping[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: None = None,
    ) -> None:
        """Write the tensors of LoRA adapters to a file, as diffusers' pipelines do. `load_lora_weights` reads this file.

        Args:
            save_directory: the folder; it is created if it does not exist.
            unet_lora_layers: tensors of adapters of the U-Net, as peft's `get_peft_model_state_dict` returns them.
            text_encoder_lora_layers: not supported.
            is_main_process: without effect, as in diffusers.
            weight_name: name of the file; None: pytorch_lora_weights.safetensors.
            save_function: called with (tensors, path) instead of writing safetensors.
            safe_serialization: always True, since only safetensors files are read.
            unet_lora_adapter_metadata: peft's `LoraConfig.to_dict()`, to be stored in the file. Without it, code that
                loads the file assumes that alpha equals the rank, and does not recognise adapters of experts.
            text_encoder_lora_adapter_metadata: not supported.

        Raises:
            UserError: an argument is not supported.
        """
        unsupported = {
            "text_encoder_lora_layers": bool(text_encoder_lora_layers),
            "text_encoder_lora_adapter_metadata": bool(text_encoder_lora_adapter_metadata),
            "safe_serialization=False": not safe_serialization,
        }
        if name := next((name for name, is_set in unsupported.items() if is_set), None):
            raise UserError(
                f"{name} is not supported: only adapters of the U-Net can be saved, and only with safe_serialization=True, "
                f"because load_lora_weights() reads only safetensors files. Leave out {name}."
            )
        if not unet_lora_layers:
            raise UserError(
                "unet_lora_layers must be the tensors of adapters by name, but there are none. Pass what peft's "
                "get_peft_model_state_dict returns."
            )
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            save_directory,
            unet_lora_layers=dict(unet_lora_layers),
            weight_name=weight_name or DIFFUSERS_WEIGHTS,
            save_function=save_function,
            unet_lora_adapter_metadata=dict(unet_lora_adapter_metadata or {}),
        )


def read_adapters(path: Path, weight_name: str | None) -> Adapter:
    """Read LoRA adapters from a safetensors file, or from a folder of peft or diffusers.

    If this code runs in the installed package, and not as the copy in an exported model, `path` may also be a run directory.

    Args:
        path: the file or folder.
        weight_name: name of the safetensors file in the folder; None: the name that peft uses if the folder contains peft's
            adapter_config.json, otherwise the name that diffusers uses.

    Raises:
        UserError: `path` contains no adapters, or adapters of a kind that is not supported.
    """
    option = "load_lora_weights"
    if weight_name in (None, WEIGHTS) and (path / CONFIG).is_file():
        return read_peft_folder(path, option)
    file, adapter = path if path.is_file() else path / (weight_name or DIFFUSERS_WEIGHTS), None
    if IN_PACKAGE:
        adapter = None if weight_name or file.is_file() else read_adapter(path, option=option)
    return read_lora_file(file, option) if adapter is None else adapter
