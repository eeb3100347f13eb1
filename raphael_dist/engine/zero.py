"""What this package needs of DeepSpeed's optimizers: one adapter for each kind, and every private name of theirs is here.

DeepSpeed 0.19 has four kinds of optimizer state, which share no interface: its ZeRO-1 and 2 (`Flat`, and `Collected`, which
reduces gradients its own way), its ZeRO-1 for bfloat16 weights with float32 gradient sums (`Bf16`), ZeRO-3 (`Sharded`), and
none at all (`Plain`, ZeRO-0).
`tests/test_deepspeed_contract.py` names what must be there of each, so that another version fails in one clear place.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

# As torch 2.13 calls it, and as it did before.
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


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


class Zero(Protocol):
    """DeepSpeed's optimizer as the engine sees it."""

    def begin(self, first: bool) -> None:
        """Make ready for a backward pass; `first`: of a step."""
        return

    def fragments(self, module: nn.Module) -> Iterator[Fragment]:
        """Yield what this rank owns of the fp32 weights, in the order of the model's parameters."""

    def sync_model(self) -> None:
        """Copy the fp32 weights into the model that computes. Collective."""

    def gradients(self) -> Sequence[Tensor]:
        """Return this rank's part of the reduced gradients of a whole step, to be read or changed before the update.

        The parts of all ranks together hold each element once; under ZeRO-0 every rank has all (`copies`).
        """

    def quiet(self) -> None:
        """Turn off DeepSpeed's own norm, overflow check and clipping: the engine has taken the norm and clipped already."""

    def drop(self) -> Any:
        """Return a context in which DeepSpeed's `step` throws the gradients away and changes nothing.

        To that end it is made to see an overflow, or an infinite norm. Each kind of optimizer looks for these elsewhere.
        """

    copies: int


def adapter(optimizer: Any, module: nn.Module, world_size: int) -> Zero:
    """Return the adapter for what `deepspeed.initialize` made of the torch optimizer, or for a torch optimizer."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return Sharded(optimizer)
    if hasattr(optimizer, "fp32_groups_gradient_flat_partition"):
        return Bf16(optimizer)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return Collected(optimizer) if Collected.serves(optimizer) else Flat(optimizer)
    return Plain(optimizer, module, world_size)


def global_shape(p: Any) -> tuple[tuple[int, ...], int]:
    """Return the shape of the whole parameter, and where the part that this rank computes with begins in it, flattened.

    A parameter that holds some of K stacked experts says so by `expert_slice = (first expert, K)`.
    """
    shape = tuple(getattr(p, "ds_shape", p.shape))
    first, num_experts = getattr(p, "expert_slice", (0, None))
    if num_experts is None:
        return shape, 0
    return (num_experts, *shape[1:]), first * p[0].numel()


class Plain(Zero):
    """ZeRO-0: torch's optimizer on the model's own float32 weights; every rank holds everything."""

    def __init__(self, optimizer: torch.optim.Optimizer, module: nn.Module, world_size: int) -> None:
        self._optimizer, self._module, self.copies = optimizer, module, world_size

    def fragments(self, module: nn.Module) -> Iterator[Fragment]:
        for name, p in module.named_parameters():
            if p.requires_grad:
                yield Fragment(name, tuple(p.shape), 0, p.detach().view(-1), p, 0, shared=True)

    def sync_model(self) -> None:
        """Nothing to do: the weights are the model's."""

    def gradients(self) -> Sequence[Tensor]:
        return [p.grad for p in self._module.parameters() if p.grad is not None]

    def quiet(self) -> None:
        """Nothing to do here: the engine gives DeepSpeed no clipping."""

    @contextmanager
    def drop(self) -> Iterator[None]:
        with _replaced(self._optimizer, "step", lambda *_, **__: None):
            yield


class Flat(Zero):
    """DeepSpeed's ZeRO-1 and 2, with or without CPU offload: flat buffers, each cut into one part per rank."""

    copies = 1

    def __init__(self, optimizer: Any) -> None:
        self._zero = optimizer

    def fragments(self, module: nn.Module) -> Iterator[Fragment]:
        return _mapped(module, self._zero.single_partition_of_fp32_groups)

    def sync_model(self) -> None:
        self._zero.update_lp_params()

    def gradients(self) -> Sequence[Tensor]:
        zero = self._zero
        if zero.cpu_offload:
            zero._wait_for_offload_copies()
            return [p.grad for p in zero.single_partition_of_fp32_groups]
        found: list[Tensor] = []
        for group in zero.averaged_gradients.values():
            flat = getattr(group, "flat_partition", None)  # one buffer where gradients add up in float32
            found += [flat] if flat is not None else [g for g in group if not getattr(g, "_zero_padding", False)]
        return found

    def quiet(self) -> None:
        self._zero.check_grad_overflow, self._zero.clip_grad = False, 0.0
        self._zero.scaled_global_norm = lambda *_, **__: torch.zeros(())  # on the host: nobody waits for it
        # It lays every weight into the flat buffer anew after each update, where they have been from the start.
        self._zero._update_model_bit16_weights = lambda _: None

    @contextmanager
    def drop(self) -> Iterator[None]:
        zero = self._zero

        def overflow(**_: Any) -> None:
            zero.overflow = True

        zero.check_grad_overflow = True
        try:
            with _replaced(zero, "check_overflow", overflow):
                yield
        finally:
            zero.check_grad_overflow = False
            if zero.cpu_offload:  # DeepSpeed keeps these float32 sums, and the next step would begin with them
                zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)


class Collected(Flat):
    """ZeRO-1 and 2 where a rank has room for a step's gradients: they are written into one buffer and reduced at once.

    DeepSpeed has a hook for each parameter, which costs the host 0.1 ms; copies gradients into a bucket, out of it and into
    a flat part; and, as it is configured by default, sends every bucket to all ranks, of which each keeps its own part. Here
    gradients lie from the start where a reduce-scatter takes them: no hooks, no copies, and half of the bytes sent.
    """

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        zero = self._zero
        for hook in zero._grad_acc_hooks:
            hook.remove()
        zero.overlapping_partition_gradients_reduce_epilogue = self._reduce  # ZeRO-2's, in every micro-step
        zero.reduce_gradients = lambda pipeline_parallel: self._reduce()  # ZeRO-1's, in the last
        # Laid out as the flat weights are, the gaps between parameters included.
        self.buffers: list[Tensor] = [torch.zeros_like(flat) for flat in zero.bit16_groups_flat]
        self._sums: list[Tensor | None] = [None] * len(self.buffers)
        # Where the gradient of each parameter lies in them.
        self.views: dict[nn.Parameter, Tensor] = {}
        groups = zip(self.buffers, zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, strict=True)
        for buffer, parameters, offsets in groups:
            for p, offset in zip(parameters, offsets, strict=True):
                self.views[p] = buffer[offset : offset + p.numel()].view(p.shape)

    @staticmethod
    def serves(zero: Any) -> bool:
        """Return whether an optimizer can be served so: not where gradients leave the device or during the backward pass."""
        numbers = sum(flat.numel() for flat in zero.bit16_groups_flat)
        return (
            not (zero.cpu_offload or zero.overlap_comm or zero.use_grad_accum_attribute)
            and zero.gradient_predivide_factor == 1.0
            # ZeRO-2 is there to save memory: of its own it holds a bucket, and a copy of as much while that is reduced.
            and (not zero.partition_gradients or numbers <= 2 * zero.reduce_bucket_size)
        )

    def begin(self, first: bool) -> None:
        if first or self._zero.partition_gradients:
            torch._foreach_zero_(self.buffers)
        for p, view in self.views.items():
            p.grad = view

    @torch.no_grad()
    def _reduce(self) -> None:
        """Take the mean over ranks, keep this rank's part, and add it to those of the step's micro-steps before."""
        zero = self._zero
        ranks, last = dist.get_world_size(zero.dp_process_group), zero.is_gradient_accumulation_boundary()
        for i, (buffer, group) in enumerate(zip(self.buffers, zero.real_dp_process_group, strict=True)):
            part = _reduce_scatter(buffer.div_(ranks) if ranks > 1 else buffer, group, zero.communication_data_type)
            before = self._sums[i]
            if before is not None:
                part = before.add_(part)
            elif not last:
                part = part.to(zero.gradient_accumulation_dtype, copy=part is buffer)
            self._sums[i] = None if last else part
            if last:
                zero.averaged_gradients[i] = SimpleNamespace(flat_partition=part)  # so that `step` takes it whole


def _reduce_scatter(whole: Tensor, group: Any, dtype: torch.dtype) -> Tensor:
    """Return this rank's part of the sum of `whole` over a group; of `whole` itself where it is alone."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return whole
    sent = whole.to(dtype)
    part = sent.new_empty(sent.numel() // ranks)
    _REDUCE_SCATTER(part, sent, group=group)
    return part


class Bf16(Zero):
    """DeepSpeed's ZeRO-1 for bfloat16 weights whose gradients add up in float32: every rank holds the whole sum."""

    copies = 1

    def __init__(self, optimizer: Any) -> None:
        self._zero = optimizer

    def fragments(self, module: nn.Module) -> Iterator[Fragment]:
        return _mapped(module, self._zero.fp32_groups_flat_partition)

    def sync_model(self) -> None:
        self._zero.update_lp_params()

    def gradients(self) -> Sequence[Tensor]:
        return list(self._zero.fp32_groups_gradient_flat_partition)

    def quiet(self) -> None:
        self._zero.clip_grad = 0.0
        # Its step asks for a norm all the same; that of a single zero costs two waits for the device.
        nothing = self._zero.fp32_groups_flat_partition[0].new_zeros(1)
        self._zero.get_grads_for_norm = lambda for_clipping=False: [] if for_clipping else ([nothing], {})

    @contextmanager
    def drop(self) -> Iterator[None]:
        with _replaced(self._zero, "get_grads_for_norm", lambda *_, **__: ([torch.tensor([torch.inf])], {})):
            yield


class Sharded(Zero):
    """DeepSpeed's ZeRO-3, with or without CPU offload: each parameter is cut into one part per rank."""

    copies = 1

    def __init__(self, optimizer: Any) -> None:
        self._zero = optimizer

    def fragments(self, module: nn.Module) -> Iterator[Fragment]:
        zero = self._zero
        parameters: Iterator[tuple[str, Any]] = module.named_parameters()
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
        # A forward pass without gradients leaves weights gathered; let go of them, or the next one computes with them.
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

    def quiet(self) -> None:
        self._zero.clip_grad = 0.0
        self._zero._get_norm_groups = lambda: [torch.zeros(())]

    @contextmanager
    def drop(self) -> Iterator[None]:
        with _replaced(self._zero, "_get_norm_groups", lambda: [torch.tensor(torch.inf)]):
            yield


def _mapped(module: nn.Module, owners: Sequence[Tensor]) -> Iterator[Fragment]:
    """Yield the fragments by the links that ZeRO-1 and 2 leave at each parameter."""
    for name, p in module.named_parameters():
        mapping = getattr(p, "_hp_mapping", None)
        if mapping is None:  # this parameter lies wholly on other ranks, or is frozen
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
def _replaced(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Run the body with an attribute of an instance replaced, then put back what the instance itself had."""
    missing = object()
    before = vars(thing).get(name, missing)
    setattr(thing, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(thing, name)
        else:
            setattr(thing, name, before)
