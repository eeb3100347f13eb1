"""`tools/bench.py kernels`: the Triton kernels of `train.kernels`, compiled for GPUs. No GPU is needed.

Every operation is called with tensors without data, in the sizes that occur in the preset raphael-3b. The kernel launches
are recorded and compiled by Triton for each target (compute capability). The cuobjdump that Triton ships then reports:
registers per thread, bytes that a thread spills to memory, and shared bytes per program. The largest numbers of a kernel's
launches are printed. Nothing runs.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from raphael_dist.engine import adamw
from raphael_dist.model.kernels import cross_attention, dense_experts, group_norm, layer_norm, pairs, sparse_experts

TARGETS = (80, 90)  # compute capabilities: A100, and H100 and H200
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1"}
_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """The properties of a kernel launch that determine how Triton compiles it.

    Attributes:
        kernel: the kernel.
        signature: types of its arguments, by name.
        constants: values of its constant arguments, by name.
        aligned: names of arguments whose value or, for a tensor, address is a multiple of 16.
        options: options of the launch, such as num_warps.
    """

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs.

    Attributes:
        registers: registers per thread.
        spilled: bytes per thread that are kept in memory, because there are too few registers.
        shared: bytes of shared memory per program.
    """

    registers: int
    spilled: int
    shared: int

    def largest(self, other: "Resources") -> "Resources":
        """Return, for each field, the larger of its values in this object and in `other`."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Resources(*(max(pair) for pair in pairs))


def record_launches(work: Callable[[], object]) -> list[Launch]:
    """Call `work`, and return the different kernel launches that it requests, in order. No kernel runs."""
    launches: dict[Launch, None] = {}

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches[_launch(kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs)] = None

    with mock.patch.object(JITFunction, "run", run):
        work()
    return list(launches)


def _launch(kernel: JITFunction, arguments: dict[str, Any]) -> Launch:
    options = tuple((name, arguments.pop(name)) for name in _OPTIONS if name in arguments)
    signature, constants, aligned = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        # Triton treats None and the number 1 as constants.
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            aligned.append(name)
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                aligned.append(name)
    return Launch(kernel, tuple(signature.items()), tuple(constants.items()), tuple(aligned), options)


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compile a kernel launch for GPUs of a compute capability, e.g. 90 for 9.0; return what the kernel needs.

    Raises Triton's errors.
    """
    kernel = launch.kernel
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(kernel, dict(launch.signature), dict(launch.constants), attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        words = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    return Resources(registers, stack + local, compiled.metadata.shared)


# Sizes at the model's first and last level: samples, channels, side of feature maps; width and grid side of tokens.
LEVELS = ((2, 320, 64, 320, 64), (2, 2560, 8, 1280, 16))


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield (name in the setting train.kernels, operation, arguments) for each Triton operation, in sizes of `raphael-3b`.

    Arguments are meta tensors, which have no data, for a batch of two images.
    """

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    groups, experts, eps = 32, 6, 1e-5
    for samples, channels, side, width, tokens in LEVELS:
        x, w, moments = new(samples, channels, side, side), new(channels), new(samples, groups, dtype=torch.float32)
        for silu in (True, False):
            yield "group_norm", group_norm._forward, (x, w, w, groups, eps, silu)
            yield "group_norm", group_norm._backward, (x, x, w, w, moments, moments, groups, silu)
        rows, hidden = samples * tokens * tokens, 4 * width
        x_RD, w_RK = new(rows, width), new(rows, experts)
        yield "layer_norm", layer_norm._backward, (x_RD, x_RD, new(width), eps)
        k_BYD, heads = new(samples, 77, width), width // 64
        q_BND = x_RD.view(samples, -1, width)
        yield "cross_attention", cross_attention._forward, (q_BND, k_BYD, k_BYD, heads, 0.125)
        for dmap in (new(samples, tokens * tokens, 77, dtype=torch.float32), None):
            yield "cross_attention", cross_attention._backward, (q_BND, dmap, q_BND, k_BYD, k_BYD, heads, 0.125)
        w1, b1, w2 = new(experts, hidden, width), new(experts, hidden), new(experts, width, hidden)
        yield "space_moe_dense", dense_experts._forward, (x_RD, w_RK, w1, b1, w2)
        yield "space_moe_dense", dense_experts._backward_hidden, (x_RD, x_RD, w_RK, w1, b1, w2)
        yield "space_moe", pairs._find_pairs, (w_RK, experts)
        numbered = tuple(new(*shape, dtype=torch.int32) for shape in ((rows * experts,), (rows, experts), (experts,)))
        yield "space_moe", sparse_experts._forward, (x_RD, w_RK, w1, b1, w2, *numbered)
        yield "space_moe", sparse_experts._backward, (x_RD, x_RD, w_RK, w1, w2, *numbered, new(rows * experts, hidden))
    flat, few = new(2**20, dtype=torch.float32), new(3, dtype=torch.float32)
    yield "adamw", adamw.adamw, (flat, flat, flat, new(2**20), flat, new(2**20), few, few, 0.9, 0.999, 1e-8)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to its parser `command`."""
    command.add_argument("--targets", type=int, nargs="+", default=list(TARGETS), help="compute capabilities, 90 for 9.0")
    command.add_argument("--switches", nargs="+", help="names of kernels, as in train.kernels (default: all)")


def run(args: argparse.Namespace) -> None:
    """Compile every kernel for each target, and print registers, spilled bytes and shared bytes."""
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET=1 must not be set, because this command compiles. Unset it.")
    columns = [(dtype, target) for dtype in (torch.float32, torch.bfloat16) for target in args.targets]
    heads = [f"{str(dtype).removeprefix('torch.')}, sm_{target}" for dtype, target in columns]
    print(f"| switch | kernel | {' | '.join(heads)} |")
    print("|" + "---|" * (2 + len(columns)))
    rows: dict[tuple[str, str], dict[tuple[torch.dtype, int], Resources]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for switch, launch in _launches(dtype):
            if args.switches and switch not in args.switches:
                continue
            row = rows.setdefault((switch, launch.kernel.__name__), {})
            for target in args.targets:
                needed = compile_launch(launch, target)
                row[dtype, target] = needed.largest(row.get((dtype, target), needed))
    for (switch, kernel), row in rows.items():
        cells = [f"{r.registers}, {r.spilled}, {r.shared:,}" for r in (row[column] for column in columns)]
        print(f"| {switch} | `{kernel}` | {' | '.join(cells)} |", flush=True)


def _launches(dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """Yield (name in train.kernels, launch) for each different kernel launch of the operations in `calls`."""
    seen: set[Launch] = set()
    for switch, operation, arguments in calls(dtype):
        new = [launch for launch in record_launches(partial(operation._init_fn, *arguments)) if launch not in seen]
        seen |= set(new)
        yield from ((switch, launch) for launch in new)
