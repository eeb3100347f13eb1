"""A simulated GPU: tensors without data replace its tensors, and every operation on it is recorded.

Inside `PretendGpu` a tensor on torch's `meta` device counts as one on the GPU and a CPU tensor as host memory. The
operations of a program are recorded one by one, in the backward pass too. So this works for any code, and nothing is
computed. Values that the host reads from the GPU are constants: 1 for floats, 0 and False for others.

A *wait* is a moment at which the host waits until the GPU has finished all its work:
- a value that is read (`item`, `float`, `bool`, `int`), or a copy to the host (`cpu`, `tolist`) unless it is non-blocking
  into pinned memory;
- a copy from the host out of pageable memory, also that of a list (`torch.tensor(list, device=...)`, `x[[0, 1]]`);
- a shape that depends on values (`nonzero`, an index of booleans, `masked_select`, `unique`, `bincount`, `one_hot` and
  `repeat_interleave` without a size);
- `synchronize()` of the device, a stream or an event, through torch or through DeepSpeed's accelerator.

A *launch* is an operation on the GPU's tensors that does not only return a view. On a real GPU some operations of torch need
several kernels, and an operation on many small tensors (`_foreach_`) needs only a few. *Bytes* are those of an operation's
inputs and outputs by their shapes, as if nothing stayed in a cache. Collectives are launches; they make a stream wait, not
the host (NCCL). A replay of a CUDA graph is one launch of 0 bytes; operations are recorded only while it is captured.
"""

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.gpu_dummies import on_gpu, patches
from raphael_dist.planning.op_costs import launches_work

aten = torch.ops.aten
OURS = ("/raphael_dist/", "/deepspeed/")  # files with one of these in their path; their lines are reported as places
_NOT_A_PLACE = ("/torch/", "/contextlib.py", "/gpu_dummies.py", __file__)


@dataclass
class Notes:
    """What was recorded on the simulated GPU. A place is a line of code, `file:line`, that caused a wait or an operation.

    Attributes:
        waits: number of times that the host waited for the GPU, by (place, kind).
        launches: number of operations, by place.
        bytes: bytes that these operations read and write, by place.
    """

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)


class PretendGpu:
    """A context manager inside which tensors on the `meta` device count as tensors on a GPU.

    Waits, launches and bytes are recorded in `notes` inside the `with` block. `take` returns and clears them.
    """

    def __init__(self) -> None:
        self.notes = Notes()
        self.noting = True  # False while nothing is recorded, which is faster
        self._origin: dict[int, str] = {}  # line of code of the forward pass, by sequence number of its autograd node
        self._stack = ExitStack()

    def take(self) -> Notes:
        """Return the launches, bytes and waits recorded on the simulated GPU since the last call, and clear the records."""
        taken, self.notes, self._origin = self.notes, Notes(), {}
        return taken

    def wait(self, kind: str) -> None:
        """Record that the host waits for the GPU at the current line of code. `kind`: why it waits."""
        if self.noting:
            self.notes.waits[self.place(), kind] += 1

    def launch(self, num_bytes: int) -> None:
        """Record an operation on the GPU at the current line of code, which reads and writes `num_bytes`."""
        if not self.noting:
            return
        place = self.place()
        self.notes.launches[place] += 1
        self.notes.bytes[place] += num_bytes

    def place(self) -> str:
        """Return the innermost line of this package or of DeepSpeed that is running, as `file:line`.

        In the backward pass, it is the line of the forward pass whose gradient is being computed.
        """
        frame: FrameType | None = sys._getframe(1)
        outer = None
        while frame is not None:
            name = frame.f_code.co_filename
            if frame.f_code.co_name == "_engine_run_backward" and (node := torch._C._current_autograd_node()) is not None:
                return f"{self._origin.get(node._sequence_nr(), node.name())} (backward)"
            if any(part in name for part in OURS) and name != __file__:
                place = _line(frame)
                self._origin[torch.autograd._get_sequence_nr() - 1] = place
                return place
            if outer is None and not any(part in name for part in _NOT_A_PLACE):
                outer = frame
            frame = frame.f_back
        return "?" if outer is None else _line(outer)

    def __enter__(self) -> "PretendGpu":
        for patch in patches(self.wait, self.launch):
            self._stack.enter_context(patch)
        self._stack.enter_context(_Operations(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _line(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    for root in ("raphael_dist", "deepspeed"):
        if root in path.parts:
            start = len(path.parts) - 1 - path.parts[::-1].index(root)
            return f"{'/'.join(path.parts[start:])}:{frame.f_lineno}"
    return f"{'/'.join(path.parts[-2:])}:{frame.f_lineno}"


class _Operations(TorchDispatchMode):
    """Intercepts all torch operations below autograd, and records those on the simulated GPU."""

    def __init__(self, gpu: PretendGpu) -> None:
        super().__init__()
        self._gpu = gpu
        self._pinned: dict[int, Tensor] = {}  # by address; kept alive, so that no other tensor gets this address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, tensors = func._schema.name.split("::")[1], [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name in ("is_pinned", "_pin_memory") or kwargs.get("pin_memory"):
            return self._pin(func, name, args, kwargs)
        if not any(t.is_meta for t in tensors) and not on_gpu(kwargs.get("device")):
            return func(*args, **kwargs)
        if kind := self._wait_of(name, args, kwargs):
            self._gpu.wait(kind)
        result = _run(func, name, args, kwargs)
        if launches_work(func):
            written = tree_leaves(result) or _written(func, args, kwargs)
            self._gpu.launch(sum(t.nbytes for t in [*tensors, *written] if isinstance(t, Tensor) and t.is_meta))
        return result

    def _wait_of(self, name: str, args: Any, kwargs: Any) -> str | None:
        """Return why the host must wait for the GPU in the operation `name`; None if it does not."""
        if name in ("_to_copy", "copy_"):
            return self._wait_of_copy(name, args, kwargs)
        if name in ("_local_scalar_dense", "equal"):
            return "reads a value"
        if name in _SHAPES and kwargs.get("output_size") is None:
            return f"a shape depends on values ({name})"
        if name.lstrip("_").startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)):
            return _wait_of_index(args)
        return None

    def _wait_of_copy(self, name: str, args: Any, kwargs: Any) -> str | None:
        destination, source, non_blocking = _copy_of(name, args, kwargs)
        if not on_gpu(destination) and source.is_meta:
            pinned = name == "copy_" and self._is_pinned(args[0])
            return None if pinned and non_blocking else "copies to the host"
        if source.is_meta or not on_gpu(destination):
            return None
        if not self._is_pinned(source):
            return "copies pageable memory to the GPU"
        return None if non_blocking else "a blocking copy to the GPU"

    def _pin(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name == "is_pinned":
            return self._is_pinned(args[0])
        made = args[0].clone() if name == "_pin_memory" else func(*args, **{**kwargs, "pin_memory": False})
        self._pinned[made.untyped_storage().data_ptr()] = made
        return made

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned


def _run(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Run an operation on tensors without data; return its result. Values that are copied to the host are constants."""
    if name == "_local_scalar_dense":
        return _made_up(args[0].dtype)
    if name == "equal":
        return True
    if name in _SHAPES and kwargs.get("output_size") is None:
        return _SHAPES[name](*args)
    if name in ("_to_copy", "copy_") and not on_gpu(_copy_of(name, args, kwargs)[0]):
        dtype = kwargs.get("dtype") or args[0].dtype
        return (args[0] if name == "copy_" else torch.empty(args[0].shape, dtype=dtype)).fill_(_made_up(dtype))
    return _collective(func, args, kwargs) if func.namespace == "c10d" else func(*args, **kwargs)


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Return the arguments that the operation `func` changes in place."""
    arguments = func._schema.arguments
    values = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
    names = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return tree_leaves([values.get(name) for name in names])


def _wait_of_index(args: Any) -> str | None:
    indices = [index for index in args[1] if index is not None]
    flags = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
    if flags and not (len(args) > 2 and args[2].numel() == 1):  # with a single value it is a masked fill
        return "a shape depends on values (an index of booleans)"
    return "copies pageable memory to the GPU (an index on the host)" if any(not i.is_meta for i in indices) else None


def _copy_of(name: str, args: Any, kwargs: Any) -> tuple[torch.device, Tensor, bool]:
    """Return (target device, copied tensor, whether it is non-blocking) for the operation `_to_copy` or `copy_`."""
    if name == "copy_":
        return args[0].device, args[1], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
    return torch.device(kwargs.get("device") or args[0].device), args[0], bool(kwargs.get("non_blocking"))


def _made_up(dtype: torch.dtype) -> Any:
    return 1.0 if dtype.is_floating_point else False if dtype == torch.bool else 0


def _flat(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.numel())


# Operations whose shape depends on values, with the shape that they have if all elements are selected.
_SHAPES: dict[str, Callable[..., Any]] = {
    "nonzero": lambda x: x.new_empty(x.numel(), x.dim(), dtype=torch.long),
    "masked_select": lambda x, mask: x.new_empty(torch.broadcast_shapes(x.shape, mask.shape).numel()),
    "_unique2": lambda x, *_: (_flat(x), _flat(x).long(), _flat(x).long()),
    "unique_consecutive": lambda x, *_: (_flat(x), _flat(x).long(), _flat(x).long()),
    "bincount": lambda x, weights=None, minlength=0: x.new_empty(max(1, minlength)),
    "repeat_interleave": _flat,
}


def _collective(func: Any, args: Any, kwargs: Any) -> Any:
    """Run a collective on empty CPU tensors, because torch's fake process group accepts no tensors on the meta device."""
    on_host = tree_map(lambda x: torch.empty(0) if isinstance(x, Tensor) else x, (args, kwargs))
    returned = func(*on_host[0], **on_host[1])
    if isinstance(returned, tuple):  # (tensors, work)
        return args[0], *returned[1:]
    return returned
