"""LoRA (arXiv 2106.09685): trains low-rank matrices on top of a frozen model, `W + (alpha / rank) B A`.

Attention uses the LoRA layers of the package peft. Experts use parameters of `Experts` instead: the experts of a layer are
one parameter, which expert parallelism shards, and peft's wrapper of a parameter cannot be sharded. Files contain the
adapters of attention and experts in peft's format (`convert.lora_files`).
"""

import math
import re
from types import ModuleType

import torch

from raphael_dist.config.model_sections import Lora
from raphael_dist.errors import UserError
from raphael_dist.model.experts import Experts
from raphael_dist.model.unet import RaphaelUNet

# The linear layers of self-attention and cross-attention, by diffusers' names, as peft matches them.
ATTENTION = r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
_ADAPTER = re.compile(r"(.*)\.(?:lora_([AB])\.default\.weight|(w[12])_lora_([AB]))")


def add_lora(model: RaphaelUNet, lora: Lora, seed: int) -> None:
    """Freeze a U-Net and add LoRA adapters (matrices A and B). They have no effect at first, because B is zero.

    Parameters keep their names, except the weights of attention: peft renames `X.weight` to `X.base_layer.weight`.

    Args:
        model: the U-Net, changed in place.
        lora: the section `lora`: rank, alpha and targets.
        seed: fixes the random initial values of A.

    Raises:
        UserError: peft is not installed.
    """
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if "attention" in lora.targets:
            config = import_peft().LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=ATTENTION)
            import_peft().inject_adapter_in_model(config, model)
        if "experts" in lora.targets:
            for layer in model.modules():
                if isinstance(layer, Experts):
                    layer.add_lora(lora.rank, lora.alpha)


def parse_adapter_name(name: str) -> tuple[str, str] | None:
    """Split the name of a LoRA parameter into the name of the frozen parameter that it changes, and its matrix "A" or "B".

    Returns None if `name` is not the name of a LoRA parameter.
    """
    match = _ADAPTER.fullmatch(name)
    if match is None:
        return None
    layer, attention, expert, of_expert = match.groups()
    return (f"{layer}.weight", attention) if expert is None else (f"{layer}.{expert}", of_expert)


def lora_scale(rank: int, alpha: float, root: bool = False) -> float:
    """Return the factor on the LoRA product B A: alpha / rank; with `root`, alpha / sqrt(rank) (peft's `use_rslora`)."""
    return alpha / (math.sqrt(rank) if root else rank)


def import_peft() -> ModuleType:
    """Return the package peft. Raise UserError if it is not installed."""
    try:
        import peft as package
    except ImportError:
        raise UserError(
            "LoRA adapters require the package peft, which is not installed. Run `pip install 'raphael_dist[lora]'`."
        ) from None
    return package
