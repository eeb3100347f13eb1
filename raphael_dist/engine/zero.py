"""Adapters that give DeepSpeed's ZeRO optimizers one interface. Only this file uses their private attributes.

DeepSpeed 0.19 has one optimizer class for each kind of ZeRO and no common interface.
`tests/engine/test_deepspeed_contract.py` lists the attributes that each class must have, so that an incompatible version
fails there.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raphael_dist.engine.deepspeed_comm import DeepSpeedObject, deepspeed_comm
from raphael_dist.engine.ds_config import uses_contiguous_gradients
from raphael_dist.engine.zero_interface import FlatLayout, FlatPart, Fragment, Zero, global_shape


def adapter(optimizer: DeepSpeedObject, module: nn.Module, world_size: int) -> Zero:
    """Return an adapter around `optimizer`, whose methods are the same for all ZeRO stages (`zero_interface.Zero`).

    Args:
        optimizer: one of DeepSpeed's ZeRO optimizers, or a torch optimizer (ZeRO-0).
        module: the model that it trains.
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
        """Yield a layout for each tensor that the optimizer updates. With ZeRO-0 each of them is one whole parameter."""
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
        with _replaced(self._optimizer, "step", lambda *_, **__: None):
            yield


class DeepSpeedZero(Zero):
    """Base class of the adapters that give DeepSpeed's optimizers for ZeRO-1, 2 and 3 the interface `Zero`."""

    def __init__(self, optimizer: DeepSpeedObject) -> None:
        self._zero = optimizer


class Zero12(DeepSpeedZero):
    """Adapter for ZeRO-1 and 2, with or without CPU offload.

    Parameters lie in flat buffers, one after another, and each rank stores a part of the fp32 weights of each buffer.
    """

    def fragments(self, module: nn.Module) -> Iterator[Fragment]:
        return _linked_fragments(module, self._zero.single_partition_of_fp32_groups)

    def sync_model(self) -> None:
        self._zero.update_lp_params()

    def gradients(self) -> Sequence[Tensor]:
        zero = self._zero
        if zero.cpu_offload:
            zero._wait_for_offload_copies()
            return [p.grad for p in zero.single_partition_of_fp32_groups]
        parts: list[Tensor] = []
        for group in zero.averaged_gradients.values():
            flat = getattr(group, "flat_partition", None)  # one buffer if gradients accumulate in float32
            parts += [flat] if flat is not None else [g for g in group if not getattr(g, "_zero_padding", False)]
        return parts

    def disable_builtin_clipping(self) -> None:
        self._zero.check_grad_overflow, self._zero.clip_grad = False, 0.0
        self._zero.scaled_global_norm = lambda *_, **__: torch.zeros(())  # on the host, without a wait
        # After each update it would copy every weight to its place in the flat buffer, where it is already.
        self._zero._update_model_bit16_weights = lambda _: None

    @contextmanager
    def skip_step(self) -> Iterator[None]:
        zero = self._zero

        def overflow(**_: object) -> None:
            zero.overflow = True

        zero.check_grad_overflow = True
        try:
            with _replaced(zero, "check_overflow", overflow):
                yield
        finally:
            zero.check_grad_overflow = False
            if zero.cpu_offload:  # DeepSpeed keeps these float32 sums, and the next step would start with them
                zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)


class Zero12Contiguous(Zero12):
    """Adapter for ZeRO-1 and 2 with all gradients of a parameter group in one buffer, which is reduced at once.

    DeepSpeed's own reduction runs a hook for every parameter (0.1 ms of host time each). It copies gradients into a bucket,
    from there into a flat part, and by default sends every bucket to all ranks. With this adapter the backward pass writes
    gradients directly into the input of a reduce-scatter: no hooks, no copies, and half of the bytes.
    """

    def __init__(self, optimizer: DeepSpeedObject) -> None:
        super().__init__(optimizer)
        zero = self._zero
        for hook in zero._grad_acc_hooks:
            hook.remove()
        zero.overlapping_partition_gradients_reduce_epilogue = self._reduce  # ZeRO-2, in every micro-step
        zero.reduce_gradients = lambda pipeline_parallel: self._reduce()  # ZeRO-1, in the last micro-step
        # With the layout of the flat weights, including gaps between parameters.
        self.buffers: list[Tensor] = [torch.zeros_like(flat) for flat in zero.bit16_groups_flat]
        self._sums: list[Tensor | None] = [None] * len(self.buffers)
        # The gradient of each parameter, as a view of a buffer.
        self.views: dict[nn.Parameter, Tensor] = {}
        groups = zip(self.buffers, zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, strict=True)
        for buffer, parameters, offsets in groups:
            for p, offset in zip(parameters, offsets, strict=True):
                self.views[p] = buffer[offset : offset + p.numel()].view(p.shape)

    @staticmethod
    def supports(zero: DeepSpeedObject) -> bool:
        """Return whether this adapter can replace the gradient reduction of `zero`, a ZeRO-1 or 2 optimizer of DeepSpeed.

        It can if `ds_config.uses_contiguous_gradients` is true for its settings, and gradients are added up in the
        parameters' attribute `grad`.
        """
        return not zero.use_grad_accum_attribute and uses_contiguous_gradients(
            2 if zero.partition_gradients else 1,
            overlap=zero.overlap_comm,
            offload=zero.cpu_offload,
            elements=sum(flat.numel() for flat in zero.bit16_groups_flat),
            bucket=zero.reduce_bucket_size,
        )

    def layouts(self) -> Iterator[FlatLayout]:
        """Yield a layout for each flat tensor of parameters: this rank's part of it, and where each parameter starts."""
        zero = self._zero
        groups = zip(
            zero.single_partition_of_fp32_groups,
            zero.real_dp_process_group,
            zero.round_robin_bit16_groups,
            zero.round_robin_bit16_offsets,
            strict=True,
        )
        for part, group, parameters, offsets in groups:
            yield FlatLayout(part, group, list(zip(parameters, offsets, strict=True)))

    def replace_step(self, update: Callable[[Sequence[FlatPart]], None]) -> None:
        """Make DeepSpeed call `update` in each optimizer step, in place of its own optimizer.

        `update` gets this rank's part of each flat tensor. It changes the fp32 weights, Adam's moments and the weights that
        the model computes with, in place. Then every rank gathers the weights that the model computes with.
        """
        self._update, self._builtin_step = update, self._zero.step
        self._zero.step = self._step

    def _step(self) -> None:
        zero = self._zero
        if zero.check_grad_overflow:  # within `skip_step`
            self._builtin_step()
            return
        ranks = [dist.get_rank(group) for group in zero.real_dp_process_group]
        copies = [parts[rank] for parts, rank in zip(zero.parallel_partitioned_bit16_groups, ranks, strict=True)]
        gradients = [zero.averaged_gradients[i].flat_partition for i in range(len(copies))]
        self._update([FlatPart(*part) for part in zip(zero.single_partition_of_fp32_groups, gradients, copies, strict=True)])
        for flat, copy, group in zip(zero.bit16_groups_flat, copies, zero.real_dp_process_group, strict=True):
            if dist.get_world_size(group) > 1:
                deepspeed_comm().all_gather_into_tensor(flat, copy, group=group)
        # What DeepSpeed's own step resets.
        zero.overflow = False
        zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)
        for p in self.views:
            p.grad = None

    def prepare_backward(self, first: bool) -> None:
        if first or self._zero.partition_gradients:
            torch._foreach_zero_(self.buffers)
        for p, view in self.views.items():
            p.grad = view

    @torch.no_grad()
    def _reduce(self) -> None:
        """Reduce the gradients: compute this rank's part of their mean over ranks, added to that of earlier micro-steps."""
        zero = self._zero
        ranks, last = dist.get_world_size(zero.dp_process_group), zero.is_gradient_accumulation_boundary()
        for i, (buffer, group) in enumerate(zip(self.buffers, zero.real_dp_process_group, strict=True)):
            part = _reduce_scatter(buffer.div_(ranks) if ranks > 1 else buffer, group, zero.communication_data_type)
            previous = self._sums[i]
            if previous is not None:
                part = previous.add_(part)
            elif not last:
                part = part.to(zero.gradient_accumulation_dtype, copy=part is buffer)
            self._sums[i] = None if last else part
            if last:
                zero.averaged_gradients[i] = SimpleNamespace(flat_partition=part)  # the form that `step` reads


def _reduce_scatter(whole: Tensor, group: dist.ProcessGroup, dtype: torch.dtype) -> Tensor:
    """Return this rank's part of the sum of `whole` over a group, in `dtype`; `whole` itself if the group has one rank."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return whole
    sent = whole.to(dtype)
    part = sent.new_empty(sent.numel() // ranks)
    deepspeed_comm().reduce_scatter_tensor(part, sent, group=group)
    return part


class Zero1Bf16(DeepSpeedZero):
    """Adapter for ZeRO-1 with bfloat16 weights and gradient sums in float32. Every rank keeps the sums of all gradients."""

    def fragments(self, module: nn.Module) -> Iterator[Fragment]:
        return _linked_fragments(module, self._zero.fp32_groups_flat_partition)

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
        with _replaced(self._zero, "get_grads_for_norm", lambda *_, **__: ([torch.tensor([torch.inf])], {})):
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
        with _replaced(self._zero, "_get_norm_groups", lambda: [torch.tensor(torch.inf)]):
            yield


def _linked_fragments(module: nn.Module, owners: Sequence[Tensor]) -> Iterator[Fragment]:
    """Yield the fragments of `module`, from the attribute `_hp_mapping` that ZeRO-1 and 2 set on each parameter."""
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
def _replaced(instance: DeepSpeedObject, name: str, value: object) -> Iterator[None]:
    """Return a context manager inside which an attribute of `instance` is replaced by `value`."""
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
