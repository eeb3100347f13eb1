"""What operations of torch cost, seen below autograd one by one: FLOPs, bytes, launches, and the memory that is alive.

It works on tensors of the `meta` device, which have shapes and no data, as on real ones.
"""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from raphael_dist.training.measure import FLOPS

# Operations that run nothing on a device.
FREE = {"_unsafe_view", "lift_fresh", "is_pinned", "set_", "resize_", "record_stream", "_has_compatible_shallow_copy_type"}
FREE |= {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_local_scalar_dense", "is_same_size"}


def is_view(func: Any) -> bool:
    """Return whether an operation's result shares the memory of an argument and nothing is computed."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def runs(func: Any) -> bool:
    """Return whether an operation launches work."""
    return not is_view(func) and func._schema.name.split("::")[1] not in FREE


# Classes of operations; what a class costs is `cluster.Rates`. Operations of no other class are "pointwise".
CLASSES = ("product", "convolution", "attention", "pointwise", "transcendental", "norm", "copy")
_CLASS_OF = {
    "product": ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm"),
    "convolution": ("convolution", "convolution_backward"),
    "attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "transcendental": (
        "gelu", "gelu_backward", "silu", "silu_backward", "_softmax", "_softmax_backward_data", "exp", "log_sigmoid_forward",
        "log_sigmoid_backward",
    ),
    "norm": (
        "native_layer_norm", "native_layer_norm_backward", "native_group_norm", "native_group_norm_backward", "sum", "mean",
        "amax", "argmax",
    ),
    "copy": (
        "copy_", "clone", "_to_copy", "cat", "stack", "index", "index_copy", "index_select", "gather", "scatter", "argsort",
        "sort", "zeros_like", "new_zeros", "fill_", "zero_", "upsample_nearest2d", "upsample_nearest2d_backward",
    ),
}  # fmt: skip
CLASS_OF = {name: CLASSES.index(kind) for kind, names in _CLASS_OF.items() for name in names}
POINTWISE = CLASSES.index("pointwise")


def flops_of(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return the FLOPs of one operation: of products, convolutions and attention; 0 for all others."""
    packet = func._overloadpacket
    if packet in FLOPS:
        shapes: Any = FLOPS[packet]
        return int(shapes(*(a.shape if isinstance(a, Tensor) else a for a in args)))
    count = flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=result))


class LiveBytes(TorchDispatchMode):
    """Context that follows the memory of the tensors that operations make in it, each storage once, until it is freed.

    live: bytes at the moment; peak: the most since the last `restart`. Memory from before the context does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def restart(self) -> int:
        """Return the peak so far, and begin a new one at what is alive."""
        peak, self.peak = self.peak, self.live
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.see((args, kwargs), result)
        return result

    def see(self, arguments: Any, result: Any) -> None:
        """Take in the storages of a result; those of arguments that are not known are from before the context."""
        for things, counts in ((arguments, False), (result, True)):
            for tensor in tree_leaves(things):
                if isinstance(tensor, Tensor):
                    self._add(tensor.untyped_storage(), counts)

    def _add(self, storage: Any, counts: bool) -> None:
        key, size = storage._cdata, storage.nbytes() if counts else 0
        if key in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
