"""`train.kernels=[adamw]`: one pass over weights, moments, average and copy takes the steps that separate passes take.

Without a GPU the kernel runs in Triton's interpreter (tests/conftest.py), which cuts bfloat16 numbers off.
"""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")

from raphael_dist.engine.adamw import adamw
from tests.lib.launch import train_many

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
pytestmark = [pytest.mark.gpu] if HAS_GPU else []

COUNT, BETAS, EPS, FACTOR = 1500, (0.9, 0.999), 1e-8, 0.7  # more than one block, and no whole one


class Flat:
    """The tensors of one flat part, and the same in float64 for torch's AdamW."""

    def __init__(self, dtype: torch.dtype, averaged: bool) -> None:
        draw = torch.Generator().manual_seed(0)
        self.gradients = [torch.randn(COUNT, generator=draw).to(DEVICE, dtype) for _ in range(3)]
        self.master = torch.randn(COUNT, generator=draw).to(DEVICE)
        self.moments = [torch.zeros_like(self.master) for _ in range(2)]
        self.average = self.master.clone() if averaged else None
        self.copy = torch.empty_like(self.master, dtype=dtype)
        self.numbers, self.corrections = torch.zeros(4, device=DEVICE), torch.zeros(2, device=DEVICE)

    def prepare(self, step: int, lr: float, share: float, apply: float = 1.0) -> None:
        self.numbers.copy_(torch.tensor([lr, FACTOR, share, apply]))
        self.corrections.copy_(torch.tensor([1 - beta**step for beta in BETAS]))

    def launch(self, gradient: torch.Tensor) -> None:
        adamw(
            self.master, *self.moments, gradient, self.average, self.copy, self.numbers, self.corrections, *BETAS, EPS
        )  # fmt: skip


STEPS = ((1e-3, 1.0), (3e-3, 0.4), (2e-3, 0.02))  # learning rate, and share of the new weights in the average


def torch_steps(flat: Flat) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Return weights, moments and average after STEPS, in float64."""
    weight = flat.master.double().requires_grad_()
    optimizer = torch.optim.AdamW([weight], betas=BETAS, eps=EPS, weight_decay=0.0)
    average = weight.detach().clone()
    for gradient, (lr, share) in zip(flat.gradients, STEPS, strict=True):
        weight.grad = gradient.double() * FACTOR
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        average.lerp_(weight.detach(), share)
    state = optimizer.state[weight]
    return weight.detach(), [state["exp_avg"], state["exp_avg_sq"]], average


def check(flat: Flat, expected: tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]) -> None:
    weight, moments, average = expected
    pairs = [(flat.master, weight), *zip(flat.moments, moments, strict=True)]
    if flat.average is not None:
        pairs.append((flat.average, average))
    for actual, exact in pairs:
        assert (actual.double() - exact).norm() <= 1e-6 * exact.norm()
    last_place = 2**-7 if flat.copy.dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(flat.copy.float(), flat.master, rtol=last_place, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("averaged", [False, True])
def test_kernel_equals_adamw_and_lerp(dtype: torch.dtype, averaged: bool) -> None:
    flat = Flat(dtype, averaged)
    expected = torch_steps(flat)
    for step, (gradient, numbers) in enumerate(zip(flat.gradients, STEPS, strict=True), start=1):
        flat.prepare(step, *numbers)
        flat.launch(gradient)
    check(flat, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_changes_nothing_in_a_bad_step(dtype: torch.dtype) -> None:
    """Not even in the first step, in which the correction of the moments would divide by 0."""
    flat, good = Flat(dtype, averaged=True), Flat(dtype, averaged=True)
    for part in (flat, good):
        part.copy.zero_()
    steps = [(0, float("nan"), 0.0), (1, 1.0, 1.0), (1, float("inf"), 0.0), (2, 1.0, 1.0)]
    for (step, spoil, apply), gradient in zip(steps, [flat.gradients[i] for i in (0, 0, 1, 1)], strict=True):
        flat.prepare(step, *STEPS[step - 1], apply)
        flat.launch(gradient * spoil)
        if apply:
            good.prepare(step, *STEPS[step - 1])
            good.launch(gradient)
        for tensor, other in zip(
            (flat.master, *flat.moments, flat.average, flat.copy),
            (good.master, *good.moments, good.average, good.copy),
            strict=True,
        ):
            assert torch.equal(tensor, other)


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
def test_captured_update_reads_its_numbers_on_the_device() -> None:
    flat = Flat(torch.bfloat16, averaged=True)
    expected, start = torch_steps(flat), flat.master.clone()
    gradient, graph = flat.gradients[0].clone(), torch.cuda.CUDAGraph()
    flat.launch(gradient)  # compiles the kernel
    with torch.cuda.graph(graph):
        flat.launch(gradient)
    for tensor, value in ((flat.master, start), (flat.average, start), *((m, 0 * m) for m in flat.moments)):
        tensor.copy_(value)
    for step, (values, numbers) in enumerate(zip(flat.gradients, STEPS, strict=True), start=1):
        for bad in (True, False):
            gradient.copy_(values * float("nan") if bad else values)
            flat.prepare(step, *numbers, apply=0.0 if bad else 1.0)
            graph.replay()
    check(flat, expected)


# Adam's first steps hide the scale of a gradient, so moments are compared, too.
CASES = {
    "float32, ZeRO-1": ({"dtype": "float32", "micro_batch_size": 3}, {"stage": 1}, 3),
    "bfloat16, ZeRO-2": ({"dtype": "bfloat16", "micro_batch_size": 6}, {"stage": 2}, 1),
    "bfloat16, two micro-steps": ({"dtype": "bfloat16", "micro_batch_size": 3}, {"stage": 2}, 1),
    "bfloat16, overlapped": (
        {"dtype": "bfloat16", "micro_batch_size": 3},
        {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 10_000},
        1,
    ),
}


ONE = pytest.param(1, marks=[] if HAS_GPU else [pytest.mark.slow])
TWO = pytest.param(2, marks=pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs, or none"))


@pytest.mark.parametrize("world_size", [ONE, TWO])
def test_engine_takes_the_same_steps(tmp_path: Path, world_size: int) -> None:
    """After a step of NaN that is dropped, with clipping in float32: in bfloat16 the separate pass rounds what it clips.

    If the device decides which step is dropped, the steps are equal bit by bit.
    """
    specs = []
    for train, zero, steps in CASES.values():
        optim = {"weight_decay": 0.1, "max_grad_norm": 0.5 if train["dtype"] == "float32" else 100.0}
        for kernels in ([], ["adamw"], ["adamw", "deferred_update"]):
            sections = {"train": {**train, "kernels": kernels}, "optim": optim, "ema": {"decay": 0.9}}
            tree = {"zero_optimization": zero}
            specs.append({"sections": sections, "deepspeed": tree, "steps": steps, "spoiled": True, "ema": True})
    results = train_many(tmp_path, world_size, specs, timeout=280, gpus=HAS_GPU)
    for name, separate, fused, deferred in zip(CASES, results[::3], results[1::3], results[2::3], strict=True):
        # On some CPUs torch rounds the square root of a float64 otherwise than Python's math does.
        assert deferred["norms"] == pytest.approx(fused["norms"], rel=1e-15), name
        for kind, tensors in {"weights": fused["weights"], **fused["moments"]}.items():
            others = deferred["weights"] if kind == "weights" else deferred["moments"][kind]
            assert all(torch.equal(tensor, others[parameter]) for parameter, tensor in tensors.items()), f"{name}: {kind}"
        assert fused["losses"] == pytest.approx(separate["losses"], rel=1e-5), name
        kinds = {"weights": separate["weights"], **separate["moments"]}
        assert set(kinds) == {"weights", "exp_avg", "exp_avg_sq", "ema"}
        for kind, tensors in kinds.items():
            others = fused["weights"] if kind == "weights" else fused["moments"][kind]
            for parameter, tensor in tensors.items():
                message = f"{name}: {kind} of {parameter}"
                torch.testing.assert_close(
                    others[parameter], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, at=message: f"{at}: {m}"
                )
