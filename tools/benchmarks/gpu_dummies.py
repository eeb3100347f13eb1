"""Replacements for the GPU interfaces of torch, DeepSpeed and the package, used by `pretend_gpu.PretendGpu`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.fx.experimental._config
from torch import Tensor

from raphael_dist.model import cuda_graphs
from raphael_dist.model import device as package_device
from raphael_dist.model.experts import Experts

GPU = torch.device("meta")


def on_gpu(device: Any) -> bool:
    """Return whether `device` (a torch.device, its name, or None) is the simulated GPU."""
    return device is not None and torch.device(device).type == GPU.type


def _has_list(index: Any) -> bool:
    return any(isinstance(i, (list, range)) for i in (index if isinstance(index, tuple) else (index,)))


def patches(wait: Callable[[str], None], launch: Callable[[int], None]) -> Iterator[Any]:
    """Yield mock patches that make torch, DeepSpeed and the package use their GPU code with the simulated GPU.

    `wait`: called with a reason whenever the host would wait for the GPU. `launch`: called with 0 whenever a CUDA graph is
    launched.
    """
    from deepspeed.accelerator import real_accelerator
    from torch.optim import optimizer as torch_optimizer

    yield mock.patch.object(package_device, "GPU_KINDS", (*package_device.GPU_KINDS, GPU.type))
    yield mock.patch.object(real_accelerator, "ds_accelerator", _accelerator(wait))
    yield mock.patch.object(torch_optimizer, "_get_fused_kernels_supported_devices", return_value=[GPU.type])
    yield mock.patch.object(torch.fx.experimental._config, "meta_nonzero_assume_all_nonzero", True)
    for name, value in (_stand_ins(wait) | _graphs(launch)).items():
        yield mock.patch.object(torch.cuda, name, value)
    # The mode that records operations would make the model run without graphs.
    yield mock.patch.object(cuda_graphs, "_get_current_dispatch_mode", return_value=None)
    yield mock.patch.object(Experts, "_loop", _with_even_loads(Experts._loop))
    # Parts of torch that are not operations: attributes, and tensors made from Python numbers.
    yield mock.patch.object(Tensor, "is_cuda", property(lambda tensor: tensor.is_meta))
    yield mock.patch.object(Tensor, "record_stream")
    for name in ("tensor", "as_tensor", "asarray"):
        yield mock.patch.object(torch, name, _by_way_of_the_host(getattr(torch, name)))
    yield mock.patch.object(Tensor, "new_tensor", _new_tensor)
    for name in ("__getitem__", "__setitem__"):
        yield mock.patch.object(Tensor, name, _noting_lists(wait, getattr(Tensor, name)))


def _by_way_of_the_host(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap torch.tensor or a similar function: for the simulated GPU it makes a tensor on the host, and copies it."""

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if not on_gpu(device):
            return make(data, *args, device=device, **kwargs)
        return make(data, *args, **kwargs).to(device)

    return made


def _with_even_loads(loop: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap the function `loop` that runs the experts one by one: give each expert equally many tokens if counts are unknown.

    The host reads the number of tokens of each expert from a tensor. If this tensor has no data, it reads 0 for all experts.
    """

    def divided(experts: Experts, x_RD: Tensor, counts: list[int], bias: bool) -> Tensor:
        rows, number = x_RD.shape[0], experts.num_experts
        if sum(counts) != rows:
            counts = [rows * (k + 1) // number - rows * k // number for k in range(number)]
        return loop(experts, x_RD, counts, bias)

    return divided


def _new_tensor(self: Tensor, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """Replace Tensor.new_tensor: return `data` as a tensor on the device and in the dtype of `self`."""
    made = torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)
    return made.requires_grad_(requires_grad)


def _noting_lists(wait: Callable[[str], None], access: Callable[..., Any]) -> Callable[..., Any]:
    def noting(tensor: Tensor, index: Any, *value: Any) -> Any:
        if tensor.is_meta and _has_list(index):
            wait("copies pageable memory to the GPU (an index of Python's numbers)")
        return access(tensor, index, *value)

    return noting


def _stand_ins(wait: Callable[[str], None]) -> dict[str, Any]:
    """Return replacements for the members of torch.cuda that the package and DeepSpeed use, by name."""

    class Moment:
        """Replaces a CUDA stream or event. Only its method `synchronize` counts as a wait of the host for the GPU."""

        def __init__(self, *_: Any, **__: Any) -> None:
            """Accept the arguments of torch's class."""

        def synchronize(self) -> None:
            wait("synchronize()")

        def elapsed_time(self, _: Any) -> float:
            return 0.0

        def query(self) -> bool:
            return True

        def record(self, *_: Any) -> None:
            """Do nothing: the order of work is not simulated."""

        wait_stream = wait_event = wait = record

    @contextmanager
    def stream(_: Any) -> Iterator[None]:
        yield

    return {
        "Stream": Moment,
        "Event": Moment,
        "stream": stream,
        "current_stream": lambda *_: Moment(),
        "default_stream": lambda *_: Moment(),
        "synchronize": lambda *_: wait("synchronize()"),
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "get_device_name": lambda *_: "NVIDIA H200",
        "get_device_capability": lambda *_: (9, 0),
    }


def _graphs(launch: Callable[[int], None]) -> dict[str, Any]:
    """Return replacements for torch.cuda.CUDAGraph and torch.cuda.graph. `launch`: as in `patches`."""

    class Graph:
        """Replaces a CUDA graph, whose operations are computed while it is captured. A replay only counts as a launch."""

        def pool(self) -> None:
            """Return no memory pool."""

        def replay(self) -> None:
            launch(0)

    @contextmanager
    def capture(*_: Any, **__: Any) -> Iterator[None]:
        yield

    return {"CUDAGraph": Graph, "graph": capture}


def _accelerator(wait: Callable[[str], None]) -> Any:
    """Return an accelerator object for DeepSpeed that represents the simulated GPU. `wait`: as in `patches`."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Pretended(CPU_Accelerator):
        def is_synchronized_device(self) -> bool:
            return False

        def device_name(self, device_index: int | None = None) -> str:
            return GPU.type

        def current_device_name(self) -> str:
            return GPU.type

        def current_device(self) -> Any:
            return GPU

        def on_accelerator(self, tensor: Tensor) -> bool:
            return tensor.is_meta

        def synchronize(self, device_index: int | None = None) -> None:
            wait("synchronize()")

        def stream(self, stream: Any) -> Any:
            return torch.cuda.stream(stream)

        def current_stream(self, device_index: int | None = None) -> Any:
            return torch.cuda.current_stream()

        default_stream = current_stream

        @property
        def Stream(self) -> Any:
            return torch.cuda.Stream

        @property
        def Event(self) -> Any:
            return torch.cuda.Event

        def available_memory(self, device_index: int | None = None) -> int:
            return 2**40

    return Pretended()
