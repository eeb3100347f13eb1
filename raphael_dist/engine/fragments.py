"""What this rank owns of the fp32 weights and of Adam's moments, as named ranges, the same for every ZeRO stage.

ZeRO flattens parameters and cuts the result between ranks. A fragment undoes that in words: "elements [start, start + n)
of parameter `name`, flattened, live in this view". EMA, checkpoints and resharding need nothing else, and a fragment means
the same on every topology.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a flattened parameter.

    master: float32 [numel], a view of the live fp32 weights. owner: the tensor that the optimizer steps, in which the view
    begins at `offset`. shared: every rank holds it (ZeRO-0).
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


class Fragments:
    """All fragments of this rank, in the order of the model's parameters."""

    def __init__(self, module: nn.Module, optimizer: Any) -> None:
        """`optimizer`: what DeepSpeed's engine made of the torch optimizer, or the torch optimizer itself (ZeRO-0)."""
        self._zero = optimizer
        self._torch_optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self.shapes = {name: _global(p)[0] for name, p in module.named_parameters()}
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            found = _zero3(module, optimizer)
        elif hasattr(optimizer, "update_lp_params"):
            found = _zero12(module, optimizer)
        else:
            found = _plain(module)
        self.all = list(found)
        self._owners = list({id(f.owner): f.owner for f in self.all}.values())

    def __iter__(self) -> Iterator[Fragment]:
        return iter(self.all)

    def masters(self) -> list[Tensor]:
        """Return the views of the fp32 weights, one per fragment."""
        return [f.master for f in self.all]

    def moment(self, fragment: Fragment, kind: str) -> Tensor | None:
        """Return the live view of one of Adam's moments, float32 [numel]; None before the first step or without one."""
        state = self._torch_optimizer.state.get(fragment.owner, {})
        if kind not in state:
            return None
        return state[kind].view(-1).narrow(0, fragment.offset, fragment.numel)

    def moment_addresses(self) -> list[int]:
        """Return where the optimizer keeps its moments: what changes when views of them, kept by a caller, grow stale."""
        states = [self._torch_optimizer.state.get(owner, {}) for owner in self._owners]
        return [state[kind].data_ptr() for state in states for kind in MOMENTS if kind in state]

    def create_moments(self, steps_taken: int) -> None:
        """Make the optimizer's state as it is after `steps_taken` steps, with moments of zero to be filled in."""
        if not isinstance(self._torch_optimizer, torch.optim.Adam):  # AdamW is a subclass; SGD keeps nothing
            return
        on_device = self._torch_optimizer.defaults.get("fused") or self._torch_optimizer.defaults.get("capturable")
        # By fragment, not by param_groups: ZeRO-3 empties those between steps.
        for owner in self._owners:
            state = self._torch_optimizer.state[owner]
            state["step"] = torch.tensor(float(steps_taken), device=owner.device if on_device else "cpu")
            for kind in MOMENTS:
                state[kind] = torch.zeros_like(owner)

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the fp32 weights into the model that computes (a collective: every rank calls it)."""
        if hasattr(self._zero, "fp32_partitioned_groups_flat"):
            # A forward pass without gradients leaves weights gathered; let go of them, or the next one computes with them.
            self._zero._partition_all_parameters()
            for half, master in zip(
                self._zero.fp16_partitioned_groups_flat, self._zero.fp32_partitioned_groups_flat, strict=True
            ):
                if half.data_ptr() != master.data_ptr():
                    half.data.copy_(master.data)
            persistent = self._zero.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)
        elif hasattr(self._zero, "update_lp_params"):
            self._zero.update_lp_params()


def _global(p: Any) -> tuple[tuple[int, ...], int]:
    """Return the shape of the whole parameter, and where the part that this rank computes with begins in it, flattened.

    A parameter that holds some of K stacked experts says so by `expert_slice = (first expert, K)`.
    """
    shape = tuple(getattr(p, "ds_shape", p.shape))
    first, num_experts = getattr(p, "expert_slice", (0, None))
    if num_experts is None:
        return shape, 0
    return (num_experts, *shape[1:]), first * p[0].numel()


def _zero12(module: nn.Module, optimizer: Any) -> Iterator[Fragment]:
    owners = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    for name, p in module.named_parameters():
        mapping = getattr(p, "_hp_mapping", None)
        if mapping is None:  # this parameter lies wholly on other ranks
            continue
        shape, first = _global(p)
        yield Fragment(
            name=name,
            shape=shape,
            start=first + mapping.lp_fragment_address.start,
            master=mapping.hp_fragment.detach(),
            owner=owners[mapping.param_group_index],
            offset=mapping.hp_fragment_address.start,
        )


def _zero3(module: nn.Module, optimizer: Any) -> Iterator[Fragment]:
    parameters: Iterator[tuple[str, Any]] = module.named_parameters()
    for name, p in parameters:
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
        start = torch.distributed.get_rank(p.ds_process_group) * size
        numel = min(size, p.ds_numel - start)  # the last rank's part is padded
        if numel <= 0:
            continue
        owner = optimizer.fp32_partitioned_groups_flat[group]
        yield Fragment(name, tuple(p.ds_shape), start, owner.detach().narrow(0, offset, numel), owner, offset)


def _plain(module: nn.Module) -> Iterator[Fragment]:
    for name, p in module.named_parameters():
        yield Fragment(name, tuple(p.shape), 0, p.detach().view(-1), p, 0, shared=True)
