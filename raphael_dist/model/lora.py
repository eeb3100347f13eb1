"""LoRA (arXiv 2106.09685): a frozen model, and beside its matrices W small ones that are trained: `W + alpha / rank B A`.

Attention's are peft's layers. The experts of a layer are one parameter, of which expert parallelism gives each rank a slice;
peft's wrapper of parameters cannot be cut like that, so theirs are parameters of `Experts`. On disk both are as peft has
them (`convert.adapter`).
"""

import math
import re
from typing import Any

import torch

from raphael_dist.config_adapters import Lora
from raphael_dist.errors import UserError
from raphael_dist.model.experts import Experts
from raphael_dist.model.unet import RaphaelUNet

# The linear layers of self-attention and cross-attention, by diffusers' names, as peft matches them.
ATTENTION = r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
_ADAPTER = re.compile(r"(.*)\.(?:lora_([AB])\.default\.weight|(w[12])_lora_([AB]))")


def add_lora(model: RaphaelUNet, lora: Lora, seed: int) -> None:
    """Freeze the model and give it adapters, which change nothing yet: B is zero. `seed` fixes A.

    The model's parameters keep their names but for attention's layers, whose weights become `....base_layer.weight`.
    UserError: peft is not installed.
    """
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if "attention" in lora.targets:
            config = peft().LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=ATTENTION)
            peft().inject_adapter_in_model(config, model)
        if "experts" in lora.targets:
            for layer in model.modules():
                if isinstance(layer, Experts):
                    layer.add_lora(lora.rank, lora.alpha)


def adapted(name: str) -> tuple[str, str] | None:
    """Return which parameter of the frozen model an adapter's is for, and "A" or "B"; None for another parameter."""
    match = _ADAPTER.fullmatch(name)
    if match is None:
        return None
    layer, attention, expert, of_expert = match.groups()
    return (f"{layer}.weight", attention) if expert is None else (f"{layer}.{expert}", of_expert)


def scale_of(rank: int, alpha: float, root: bool = False) -> float:
    """Return how often B A counts; `root`: by alpha / sqrt(rank), peft's `use_rslora`."""
    return alpha / (math.sqrt(rank) if root else rank)


def peft() -> Any:
    """Return the package peft. UserError: it is not installed."""
    try:
        import peft as package
    except ImportError:
        raise UserError("lora.targets: adapters need the package peft: pip install 'raphael_dist[lora]'") from None
    return package
