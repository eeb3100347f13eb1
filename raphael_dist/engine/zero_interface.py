"""The common interface of the adapters in `engine.zero`, and classes for the parts of the weights that a rank stores."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor, nn

from raphael_dist.engine.deepspeed_comm import DeepSpeedObject


@dataclass(frozen=True)
class Fragment:
    """The elements [start, start + numel) of a flattened parameter, which this rank stores in fp32.

    Attributes:
        name, shape: name and shape of the whole parameter.
        start: index, in the flattened parameter, of the fragment's first element.
        master: the fp32 weights, a view, float32 [numel].
        owner, offset: the tensor that the optimizer updates, and the index in it of the fragment's first element.
        shared: whether every rank has this fragment (ZeRO-0).
    """

    name: str
    shape: tuple[int, ...]
    start: int
    master: Tensor
    owner: Tensor
    offset: int
    shared: bool = False

    @property
    def numel(self) -> int:
        return self.master.numel()


@dataclass(frozen=True)
class FlatPart:
    """This rank's part of one of DeepSpeed's flat tensors, in which many parameters lie one after another.

    Attributes:
        master: fp32 weights, float32 [n].
        gradient: their gradient after the reduction over ranks, [n].
        copy: the weights that the model computes with, [n].
    """

    master: Tensor
    gradient: Tensor
    copy: Tensor


@dataclass(frozen=True)
class FlatLayout:
    """A flat tensor that holds whole parameters one after another. Each rank of a group stores a part of this tensor.

    Attributes:
        part: this rank's part of the fp32 weights, float32 [numel].
        group: the process group whose i-th rank stores the i-th part of the tensor; None: `part` is the whole tensor.
        places: for each parameter in the flat tensor, (parameter, index of its first element in that tensor).
    """

    part: Tensor
    group: dist.ProcessGroup | None
    places: Sequence[tuple[nn.Parameter, int]]


class Zero(Protocol):
    """The common interface of the adapters: classes that hide the differences between DeepSpeed's ZeRO optimizers.

    `copies`: the number of ranks that have each gradient element after the reduction: 1, or with ZeRO-0 all ranks.
    """

    copies: int = 1

    def prepare_backward(self, first: bool, last: bool) -> None:
        """Prepare the parameters' gradients for the next backward pass. By default, do nothing.

        `first`, `last`: whether that pass is the first, and whether it is the last, of an optimizer step.
        """
        return

    def fragments(self, module: nn.Module) -> Iterator[Fragment]:
        """Yield the parts (fragments) of the fp32 weights that this rank stores, in the order of the model's parameters.

        `module`: the model.
        """

    def sync_model(self) -> None:
        """Copy the fp32 weights into the weights that the model computes with. Collective."""

    def gradients(self) -> Sequence[Tensor]:
        """Return this rank's part of the reduced gradients of a step. The caller may change them before the update.

        The attribute `copies` states how many ranks have each gradient element.
        """

    def disable_builtin_clipping(self) -> None:
        """Turn off the gradient norm, overflow check and clipping in DeepSpeed's step. `engine.Engine` does them instead."""

    def skip_step(self) -> AbstractContextManager[None]:
        """Return a context manager inside which a step of DeepSpeed's engine drops the gradients and changes no weights."""


def global_shape(p: Tensor) -> tuple[tuple[int, ...], int]:
    """Return the shape of a whole parameter, and the index in the flattened parameter at which this rank's experts start.

    `p` is the parameter on this rank. If it has only some of K stacked experts, it has the attribute `expert_slice = (first
    expert, K)`. For other parameters the index is 0.
    """
    shape = tuple(getattr(p, "ds_shape", p.shape))
    first, num_experts = getattr(p, "expert_slice", (0, None))
    if num_experts is None:
        return shape, 0
    return (num_experts, *shape[1:]), first * p[0].numel()


class DeepSpeedZero(Zero):
    """Base class of the adapters that give DeepSpeed's optimizers for ZeRO-1, 2 and 3 the interface `Zero`."""

    def __init__(self, optimizer: DeepSpeedObject) -> None:
        self._zero = optimizer


def linked_fragments(module: nn.Module, owners: Sequence[Tensor]) -> Iterator[Fragment]:
    """Yield this rank's fragments of the model, from the attribute `_hp_mapping` that ZeRO-1 and 2 set on its parameters.

    `module`: the model. `owners`: for each parameter group, the tensor that the optimizer updates on this rank.
    """
    for name, p in module.named_parameters():
        mapping = getattr(p, "_hp_mapping", None)
        if mapping is None:  # the parameter is on other ranks, or frozen
            continue
        shape, first = global_shape(p)
        yield Fragment(
            name=name,
            shape=shape,
            start=first + mapping.lp_fragment_address.start,
            master=mapping.hp_fragment.detach(),
            owner=owners[mapping.param_group_index],
            offset=mapping.hp_fragment_address.start,
        )


@contextmanager
def replaced(instance: DeepSpeedObject, name: str, value: object) -> Iterator[None]:
    """Return a context manager inside which the attribute `name` of `instance` is replaced by `value`."""
    missing = object()
    before = vars(instance).get(name, missing)
    setattr(instance, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(instance, name)
        else:
            setattr(instance, name, before)
