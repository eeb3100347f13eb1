"""`train.kernels`: selects the parts of the model that run in Triton kernels. Triton is imported only if one is selected."""

import importlib
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import nn

from raphael_dist.config.types import Kernel
from raphael_dist.errors import UserError
from raphael_dist.model.device import is_gpu
from raphael_dist.model.layers import TransformerBlock
from raphael_dist.model.moe import SpaceMoE, TimeMoE
from raphael_dist.model.norms import GroupNorm, LayerNorm

# The type of the modules that each kernel is for, the attribute that makes them use it, and its file in this folder.
_MODULES: dict[str, tuple[type[nn.Module], str, str]] = {
    "group_norm": (GroupNorm, "use_kernel", "group_norm"),
    "layer_norm": (LayerNorm, "use_kernel", "layer_norm"),
    "cross_attention": (TransformerBlock, "use_kernel", "cross_attention"),
    "space_moe": (SpaceMoE, "use_kernel", "sparse_experts"),
    "space_moe_dense": (SpaceMoE, "use_dense_kernel", "dense_experts"),
    "time_moe": (TimeMoE, "use_kernel", "sparse_experts"),
}


def use_kernels(model: nn.Module, kernels: Sequence[Kernel], device: torch.device) -> None:
    """Make the parts of `model` that `kernels` names run in Triton kernels on `device`.

    `kernels`: the setting `train.kernels`, e.g. ["group_norm", "space_moe"]; names of parts outside the model are ignored.
    Nothing changes if it is empty.

    Raises:
        UserError: Triton is not installed, or `device` is not a GPU.
    """
    if not kernels:
        return
    require_triton(kernels)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter, for tests on CPUs
    if not is_gpu(device) and not interpreted:
        raise UserError(
            f"train.kernels={list(kernels)} requires a GPU, but the device is {device.type}. Use a GPU or set "
            "train.kernels=[]."
        )
    set_kernels(model, kernels)


def set_kernels(model: nn.Module, kernels: Sequence[Kernel]) -> None:
    """Make the parts of `model` that `kernels` names run in Triton kernels, without checking the device.

    Unlike `use_kernels`, it can be used to trace the model on `meta` tensors. `kernels`: the setting `train.kernels`.
    """
    switches = [_MODULES[name] for name in kernels if name in _MODULES]
    for _, _, file in switches:  # torch's FLOP counter sees only operations that exist when it is created
        importlib.import_module(f"raphael_dist.model.kernels.{file}")
    for module in model.modules():
        for module_type, attribute, _ in switches:
            if isinstance(module, module_type):
                setattr(module, attribute, True)


def require_triton(kernels: Sequence[Kernel]) -> None:
    """Raise UserError if `kernels` (`train.kernels`) is not empty and Triton is not installed."""
    if kernels and importlib.util.find_spec("triton") is None:
        raise UserError(
            f"train.kernels={list(kernels)} requires the package triton, which is not installed. Run `pip install "
            "'raphael_dist[kernels]'`, or set train.kernels=[]."
        )
