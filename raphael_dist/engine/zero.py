"""Adapters that give DeepSpeed's ZeRO optimizers one interface. Only engine/zero*.py use private names of these optimizers.

DeepSpeed 0.19 has one optimizer class for each kind of ZeRO and no common interface.
`tests/engine/test_deepspeed_contract.py` lists the attributes that each class must have, so that an incompatible version
fails there.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from raphael_dist.engine.deepspeed_comm import DeepSpeedObject
from raphael_dist.engine.zero12 import Zero12, Zero12Contiguous
from raphael_dist.engine.zero_interface import DeepSpeedZero, FlatLayout, Fragment, Zero, linked_fragments, replaced


def adapter(optimizer: DeepSpeedObject, module: nn.Module, world_size: int) -> Zero:
    """Return an adapter around `optimizer`, whose methods are the same for all ZeRO stages (`zero_interface.Zero`).

    Args:
        optimizer: one of DeepSpeed's ZeRO optimizers, or a torch optimizer (ZeRO-0).
        module: the model that the optimizer trains.
        world_size: number of ranks.
    """
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return Zero3(optimizer)
    if hasattr(optimizer, "fp32_groups_gradient_flat_partition"):
        return Zero1Bf16(optimizer)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return Zero12Contiguous(optimizer) if Zero12Contiguous.supports(optimizer) else Zero12(optimizer)
    return Zero0(optimizer, module, world_size)


class Zero0(Zero):
    """Adapter for ZeRO-0: torch's optimizer on the float32 weights of the model; every rank has all weights."""

    def __init__(self, optimizer: torch.optim.Optimizer, module: nn.Module, world_size: int) -> None:
        self._optimizer, self._module, self.copies = optimizer, module, world_size

    def fragments(self, module: nn.Module) -> Iterator[Fragment]:
        for name, p in module.named_parameters():
            if p.requires_grad:
                yield Fragment(name, tuple(p.shape), 0, p.detach().view(-1), p, 0, shared=True)

    def layouts(self) -> Iterator[FlatLayout]:
        """Yield a layout for each tensor that the optimizer updates. With ZeRO-0 each tensor is one whole parameter."""
        for p in self._module.parameters():
            if p.requires_grad:
                yield FlatLayout(p, None, [(p, 0)])

    def sync_model(self) -> None:
        """Do nothing. With ZeRO-0 the optimizer updates the model's own weights, so there is no copy to update."""

    def gradients(self) -> Sequence[Tensor]:
        return [p.grad for p in self._module.parameters() if p.grad is not None]

    def disable_builtin_clipping(self) -> None:
        """Do nothing. With ZeRO-0 clipping is a part of DeepSpeed's engine, not of the optimizer; `Engine` turns it off."""

    @contextmanager
    def skip_step(self) -> Iterator[None]:
        with replaced(self._optimizer, "step", lambda *_, **__: None):
            yield


class Zero1Bf16(DeepSpeedZero):
    """Adapter for ZeRO-1 with bfloat16 weights and gradient sums in float32. Every rank keeps the sums of all gradients."""

    def fragments(self, module: nn.Module) -> Iterator[Fragment]:
        return linked_fragments(module, self._zero.fp32_groups_flat_partition)

    def sync_model(self) -> None:
        self._zero.update_lp_params()

    def gradients(self) -> Sequence[Tensor]:
        return list(self._zero.fp32_groups_gradient_flat_partition)

    def disable_builtin_clipping(self) -> None:
        self._zero.clip_grad = 0.0
        # Its step computes a norm nevertheless; with a single zero that costs two waits for the device.
        zero = self._zero.fp32_groups_flat_partition[0].new_zeros(1)
        self._zero.get_grads_for_norm = lambda for_clipping=False: [] if for_clipping else ([zero], {})

    @contextmanager
    def skip_step(self) -> Iterator[None]:
        with replaced(self._zero, "get_grads_for_norm", lambda *_, **__: ([torch.tensor([torch.inf])], {})):
            yield


class Zero3(DeepSpeedZero):
    """Adapter for ZeRO-3, with or without CPU offload. Each rank stores one part of every parameter."""

    def fragments(self, module: nn.Module) -> Iterator[Fragment]:
        zero = self._zero
        parameters: Iterator[tuple[str, DeepSpeedObject]] = module.named_parameters()
        for name, p in parameters:
            if not p.requires_grad:
                continue
            group, offset, size = zero.grad_position[zero.get_param_id(p)]
            start = torch.distributed.get_rank(p.ds_process_group) * size
            numel = min(size, p.ds_numel - start)  # the last rank's part is padded
            if numel <= 0:
                continue
            owner = zero.fp32_partitioned_groups_flat[group]
            yield Fragment(name, tuple(p.ds_shape), start, owner.detach().narrow(0, offset, numel), owner, offset)

    def sync_model(self) -> None:
        zero = self._zero
        # A forward pass without gradients leaves old weights gathered, and the next one would use them.
        zero._partition_all_parameters()
        for half, master in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
            if half.data_ptr() != master.data_ptr():
                half.data.copy_(master.data)
        persistent = zero.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    def gradients(self) -> Sequence[Tensor]:
        zero = self._zero
        if zero.offload_optimizer:
            return [p.grad for p in zero.fp32_partitioned_groups_flat]
        return [g for group in zero.averaged_gradients.values() for g in group]

    def disable_builtin_clipping(self) -> None:
        self._zero.clip_grad = 0.0
        self._zero._get_norm_groups = lambda: [torch.zeros(())]

    @contextmanager
    def skip_step(self) -> Iterator[None]:
        with replaced(self._zero, "_get_norm_groups", lambda: [torch.tensor(torch.inf)]):
            yield
