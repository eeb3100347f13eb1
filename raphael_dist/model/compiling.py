"""`train.compile`: applies torch.compile to the parts of the U-Net whose computation graph does not depend on the data.

The compiled parts are the residual blocks (GroupNorm and SiLU become one kernel) and the activations of the experts. The
rest of a transformer block depends on the number of tokens per expert, exchanges tokens with other ranks, or is a single
kernel already (attention). Parts are compiled in place, so parameters keep their names. Activation recomputation is applied
around compiled parts, never inside them.
"""

import os
import shutil
from contextlib import AbstractContextManager

import torch
from torch import nn

from raphael_dist.errors import UserError
from raphael_dist.model.experts import Experts
from raphael_dist.model.residual_block import ResidualBlock

# Graphs per function: residual blocks differ in width, size, and whether gradients are needed. Beyond torch's own limit of 8
# they would run uncompiled.
_MAX_GRAPHS = 512


def compile_parts(model: nn.Module, device: torch.device, dynamic: bool) -> None:
    """Compile the residual blocks and the expert activations of `model` in place. Each part is compiled when it first runs.

    Args:
        model: the U-Net.
        device: the device that the model runs on.
        dynamic: whether one graph is compiled for all tensor sizes. It must be True if sizes change within a run (several
            image sizes, expert parallelism). Otherwise torch could compile another graph after a forward pass and before its
            recomputation in the backward pass, and the two passes would save different tensors.

    Raises:
        UserError: there is no compiler for `device`.
    """
    require_compiler(device)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_GRAPHS)
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            module.compile(dynamic=dynamic)
        elif isinstance(module, Experts):
            # Not the whole module: its forward pass depends on the number of tokens per expert.
            module.dense = torch.compile(module.dense, dynamic=dynamic)  # type: ignore[method-assign]
            module.activate = torch.compile(module.activate, dynamic=dynamic)  # type: ignore[method-assign]


def uncompiled() -> AbstractContextManager[object]:
    """Return a context manager inside which parts compiled by torch.compile run uncompiled.

    Tools that intercept single operations, such as FLOP counters, require this context. Without it, torch notices such a
    tool, runs the compiled part uncompiled, and never compiles it again.
    """
    context: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return context


def require_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile has no compiler for `device`: a C++ compiler, and Triton on GPUs."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"train.compile=true requires a C++ compiler, but {compiler} is not in a folder of PATH. Install g++, set CXX, "
            "or set train.compile=false."
        )
    if device.type != "cpu" and not torch.utils._triton.has_triton():
        raise UserError(
            "train.compile=true requires the package triton on a GPU, but it is not installed. Run `pip install triton`, or "
            "set train.compile=false."
        )
