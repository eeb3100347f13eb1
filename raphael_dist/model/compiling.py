"""`train.compile`: torch.compile for the parts of the U-Net that are one graph whatever the data.

These are the residual blocks (GroupNorm and SiLU become one kernel beside the convolutions) and the experts' activations.
The rest of a transformer block decides by counts, exchanges rows with other ranks, or is a kernel of its own already
(attention). Parts are compiled in place, so that parameters keep their names. Recomputation lies around compiled parts,
never inside.
"""

import os
import shutil
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from raphael_dist.errors import UserError
from raphael_dist.model.experts import Experts
from raphael_dist.model.residual import ResidualBlock

# Graphs that one function may have: residual blocks differ in width, size, and whether gradients are wanted. torch's own
# limit of 8 would run the others as they are.
_MAX_GRAPHS = 512


def compile_parts(model: nn.Module, device: torch.device, dynamic: bool) -> None:
    """Compile the parts of `model` in place; each is compiled when it first runs.

    `dynamic`: one graph for all sizes. Give it where sizes change within a run (several image sizes, rows that travel
    between ranks): a graph that is replaced between a forward pass and its recomputation would not fit what was kept.

    Raises UserError where there is no compiler for `device`.
    """
    require_compiler(device)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_GRAPHS)
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            module.compile(dynamic=dynamic)
        elif isinstance(module, Experts):
            # Not the module: its forward pass routes. An attribute that is no parameter hides the method of the class.
            module.wide = torch.compile(module.wide, dynamic=dynamic)  # type: ignore[method-assign]
            module.activate = torch.compile(module.activate, dynamic=dynamic)  # type: ignore[method-assign]


def uncompiled() -> AbstractContextManager[Any]:
    """Run the parts as they are, for what has to see every operation (a count of FLOPs, of synchronisations).

    Without it torch finds a watcher at work, gives up the part it met, and never compiles it again.
    """
    return torch.compiler.set_stance("force_eager")


def require_compiler(device: torch.device) -> None:
    """Raise UserError where torch.compile has no compiler for `device`: a C++ compiler on CPUs, Triton as well on GPUs."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(f"train.compile=true needs a C++ compiler, given {compiler}, not found; install g++ or set CXX")
    if device.type != "cpu" and not torch.utils._triton.has_triton():
        raise UserError("train.compile=true needs Triton on a GPU; pip install triton, or train.compile=false")
