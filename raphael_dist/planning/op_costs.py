"""Counts the cost of single torch operations, as they are dispatched below autograd: FLOPs, launches, and live memory.

This works on real tensors and on tensors of the `meta` device, which have shapes but no data.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from raphael_dist.training.throughput import FLOPS

Arguments = tuple[object, ...]  # of an operation
Options = dict[str, object]  # its keyword arguments
# Operations that run nothing on a device.
FREE = {"_unsafe_view", "lift_fresh", "is_pinned", "set_", "resize_", "record_stream", "_has_compatible_shallow_copy_type"}
FREE |= {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_local_scalar_dense", "is_same_size"}

# Classes of operations, each with its own rates in `cluster_spec.Rates`. All other operations are "pointwise".
CLASSES = ("product", "convolution", "attention", "pointwise", "transcendental", "norm", "copy")
_OPERATIONS = {
    "product": ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "sparse_experts", "sparse_experts_backward",
        "dense_experts", "dense_experts_hidden_gradient",
    ),
    "convolution": ("convolution", "convolution_backward"),
    "attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward", "cross_attention", "cross_attention_backward",
    ),
    "transcendental": (
        "gelu", "gelu_backward", "silu", "silu_backward", "_softmax", "_softmax_backward_data", "exp", "log_sigmoid_forward",
        "log_sigmoid_backward",
    ),
    "norm": (
        "native_layer_norm", "native_layer_norm_backward", "native_group_norm", "native_group_norm_backward", "sum", "mean",
        "amax", "argmax", "group_norm", "group_norm_backward", "layer_norm_backward",
    ),
    "copy": (
        "copy_", "clone", "_to_copy", "cat", "stack", "index", "index_copy", "index_select", "gather", "scatter", "argsort",
        "sort", "zeros_like", "new_zeros", "fill_", "zero_", "upsample_nearest2d", "upsample_nearest2d_backward",
    ),
}  # fmt: skip
_CLASS_INDEX = {name: CLASSES.index(kind) for kind, names in _OPERATIONS.items() for name in names}


def op_name(func: OpOverload) -> str:
    """Return the name of a torch operation without namespace and overload: "mm" for `aten.mm.default`."""
    return str(func._schema.name).split("::")[1]


def op_class(func: OpOverload) -> int:
    """Return the class of a torch operation (such as "convolution"), as an index into CLASSES."""
    return _CLASS_INDEX.get(op_name(func), CLASSES.index("pointwise"))


def launches_work(func: OpOverload) -> bool:
    """Return whether an operation launches work on the device; False if it only returns a view or allocates memory."""
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return not is_view and op_name(func) not in FREE


def flops_of(func: OpOverload, args: Arguments, kwargs: Options, result: object) -> int:
    """Return the FLOPs of a call of a matrix product, convolution or attention; 0 for other operations.

    `func` was called with `args` and `kwargs`, and returned `result`.
    """
    packet = func._overloadpacket
    if packet in FLOPS:
        flops_from_shapes = cast(Callable[..., int], FLOPS[packet])
        return flops_from_shapes(*(a.shape if isinstance(a, Tensor) else a for a in args))
    count = flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=result))


class LiveBytes(TorchDispatchMode):
    """A context manager that counts the bytes of all tensors that are created inside it and not yet freed.

    Tensors that share a storage count once. Memory allocated before the context does not count.

    Attributes:
        live: current bytes.
        peak: largest value of `live`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: Arguments = (), kwargs: Options | None = None
    ) -> object:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.track((args, kwargs), result)
        return result

    def track(self, arguments: object, result: object) -> None:
        """Start to count the memory (storages) of an operation's `result`, until this memory is freed.

        `arguments`: the operation's arguments. A storage of an argument that was created before this context was entered is
        not counted.
        """
        for tree, counts in ((arguments, False), (result, True)):
            for tensor in tree_leaves(tree):
                if isinstance(tensor, Tensor):
                    self._add(tensor.untyped_storage(), counts)

    def _add(self, storage: torch.UntypedStorage, counts: bool) -> None:
        key, size = storage._cdata, storage.nbytes() if counts else 0
        if key in self._known:
            return

        def free(_: object) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)
