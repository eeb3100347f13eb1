"""Adapters for DeepSpeed's optimizer of ZeRO-1 and 2: with its own gradient reduction, and with that of this project."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raphael_dist.engine.deepspeed_comm import DeepSpeedObject, deepspeed_comm
from raphael_dist.engine.ds_config import uses_contiguous_gradients
from raphael_dist.engine.gradient_buckets import ReadyBuckets, Reduction
from raphael_dist.engine.zero_interface import DeepSpeedZero, FlatLayout, FlatPart, Fragment, linked_fragments, replaced


class Zero12(DeepSpeedZero):
    """Adapter for ZeRO-1 and 2, with or without CPU offload.

    Parameters lie in flat buffers, one after another, and each rank stores a part of the fp32 weights of each buffer.
    """

    def fragments(self, module: nn.Module) -> Iterator[Fragment]:
        return linked_fragments(module, self._zero.single_partition_of_fp32_groups)

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
            with replaced(zero, "check_overflow", overflow):
                yield
        finally:
            zero.check_grad_overflow = False
            if zero.cpu_offload:  # DeepSpeed keeps these float32 sums, and the next step would start with them
                zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)


class Zero12Contiguous(Zero12):
    """Adapter for ZeRO-1 and 2 with the gradients of each parameter group in one buffer, which is reduced without copies.

    DeepSpeed's own reduction runs a hook for every parameter (0.1 ms of host time each). It copies gradients into a bucket,
    from there into this rank's flat gradient buffer, and by default sends every bucket to all ranks. With this adapter the
    backward pass writes gradients directly into the input of a reduce-scatter: nothing is copied, and half of the bytes are
    sent. With `overlap_comm` there is a parameter group for each bucket (`gradient_buckets`), and the reduction of a bucket
    starts when its last gradient has been written.
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
        self._pending: dict[int, Reduction] = {}
        # The gradient of each parameter, as a view of a buffer.
        self.views: dict[nn.Parameter, Tensor] = {}
        groups = zip(self.buffers, zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, strict=True)
        for buffer, parameters, offsets in groups:
            for p, offset in zip(parameters, offsets, strict=True):
                self.views[p] = buffer[offset : offset + p.numel()].view(p.shape)
        self._builtin_step = zero.step
        self._ready: ReadyBuckets | None = None
        if zero.overlap_comm and dist.get_world_size(zero.dp_process_group) > 1:
            self._ready = ReadyBuckets(zero.round_robin_bit16_groups, self._launch)
            self.replace_step(self._step_optimizer)

    @staticmethod
    def supports(zero: DeepSpeedObject) -> bool:
        """Return whether this adapter can replace the gradient reduction of `zero`, a ZeRO-1 or 2 optimizer of DeepSpeed.

        True if `ds_config.uses_contiguous_gradients` is True for the settings of `zero`, and gradients are added up in the
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

        `update` is called with this rank's part of each flat tensor. It must change the fp32 weights, Adam's moments and the
        weights that the model computes with, in place. After the call every rank gathers the weights that the model computes
        with.
        """
        self._update = update
        self._zero.step = self._step

    def _step_optimizer(self, parts: Sequence[FlatPart]) -> None:
        """Update the weights with the torch optimizer inside DeepSpeed's. `parts`: this rank's part of each flat tensor.

        (DeepSpeed's own step would gather the weights of each bucket separately.)
        """
        for part in parts:
            part.master.grad = part.gradient.to(part.master.dtype)
        self._zero.optimizer.step()
        for part in parts:
            part.master.grad = None
            part.copy.copy_(part.master.detach())

    def _step(self) -> None:
        zero = self._zero
        if zero.check_grad_overflow:  # within `skip_step`
            self._builtin_step()
            return
        ranks = [dist.get_rank(group) for group in zero.real_dp_process_group]
        copies = [parts[rank] for parts, rank in zip(zero.parallel_partitioned_bit16_groups, ranks, strict=True)]
        gradients = [zero.averaged_gradients[i].flat_partition for i in range(len(copies))]
        self._update([FlatPart(*part) for part in zip(zero.single_partition_of_fp32_groups, gradients, copies, strict=True)])
        if self._ready is None:
            for flat, copy, group in zip(zero.bit16_groups_flat, copies, zero.real_dp_process_group, strict=True):
                if dist.get_world_size(group) > 1:
                    deepspeed_comm().all_gather_into_tensor(flat, copy, group=group)
        else:
            self._gather_at_once(copies)
        # What DeepSpeed's own step resets.
        zero.overflow = False
        zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)
        for p in self.views:
            p.grad = None

    def _gather_at_once(self, copies: Sequence[Tensor]) -> None:
        """Gather the weights of all buckets on all ranks in one collective, which costs one latency instead of many.

        `copies`: for each bucket, this rank's part of the weights that the model computes with.
        """
        flats, group = self._zero.bit16_groups_flat, self._zero.dp_process_group
        sent, ranks = torch.cat(list(copies)), dist.get_world_size(group)
        received = sent.new_empty(ranks, sent.numel())
        deepspeed_comm().all_gather_into_tensor(received.view(-1), sent, group=group)
        parts = received.split([copy.numel() for copy in copies], dim=1)
        torch._foreach_copy_([flat.view(ranks, -1) for flat in flats], parts)

    def prepare_backward(self, first: bool, last: bool) -> None:
        if first or self._zero.partition_gradients:
            torch._foreach_zero_(self.buffers)
        for p, view in self.views.items():
            p.grad = view
        if self._ready is not None:
            self._ready.begin(active=last or self._zero.partition_gradients)

    @torch.no_grad()
    def _launch(self, bucket: int) -> None:
        """Start to reduce the gradients of a bucket (parameter group): compute this rank's part of their mean over ranks."""
        zero = self._zero
        buffer, group = self.buffers[bucket], zero.real_dp_process_group[bucket]
        ranks = dist.get_world_size(zero.dp_process_group)
        self._pending[bucket] = Reduction(buffer.div_(ranks) if ranks > 1 else buffer, group, zero.communication_data_type)

    @torch.no_grad()
    def _reduce(self) -> None:
        """Finish the reduction of the gradients, and add the result to that of earlier micro-steps.

        Buckets that were not launched in the backward pass are launched now, so that all ranks launch all buckets in the
        same order.
        """
        zero = self._zero
        last = zero.is_gradient_accumulation_boundary()
        for i, buffer in enumerate(self.buffers):
            if i not in self._pending:
                self._launch(i)
            part = self._pending.pop(i).wait()
            previous = self._sums[i]
            if previous is not None:
                part = previous.add_(part)
            elif not last:
                part = part.to(zero.gradient_accumulation_dtype, copy=part is buffer)
            self._sums[i] = None if last else part
            if last:
                zero.averaged_gradients[i] = SimpleNamespace(flat_partition=part)  # the form that `step` reads
