"""Replacements for the classes in DeepSpeed's pickles, so that reading these files neither imports nor runs DeepSpeed."""

import pickle

from raphael_dist.storage.torchfile import Allowed


class FragmentAddress:
    """Replaces DeepSpeed's `fragment_address` when its pickle files are read: where a parameter lies in a flat buffer.

    Attributes:
        start: index of the parameter's first element in the buffer.
        numel: number of the parameter's elements in the buffer.
    """

    numel: int
    start: int


class LossScaler:
    """Replaces DeepSpeed's classes of loss scalers when its pickle files are read. Its content is not used."""


def _zero_stage(value: int) -> int:
    return int(value)


def _enum_member(owner: object, name: str) -> int:
    """Replace `getattr` when a pickle file is read: return the number of the ZeRO stage with the name `name`.

    The first releases of Python 3.11 pickle members of an enum, such as DeepSpeed's ZeRO stages, as calls of
    `getattr(owner, name)`. Raises UnpicklingError if `owner` is not DeepSpeed's enum of ZeRO stages.
    """
    if owner is not _zero_stage or name not in _STAGES:
        raise pickle.UnpicklingError("GLOBAL builtins.getattr is allowed only for DeepSpeed's enum of ZeRO stages")
    return _STAGES[name]


_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}
# All objects in DeepSpeed's files other than tensors and plain values.
ALLOWED: list[Allowed] = [
    (_zero_stage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_enum_member, "builtins.getattr"),
    (LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (LossScaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
]
