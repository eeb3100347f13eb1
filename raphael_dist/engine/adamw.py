"""A Triton kernel for AdamW that updates a rank's fp32 weights, and writes their moving average and the model's copy too.

Without this kernel an update takes several passes over the weights: clip the gradients, convert them to float32, run AdamW,
copy the weights to the model, update the moving average. The kernel reads and writes each number once, and needs no float32
copy of the gradients. Weight decay is a separate pass in `engine.Engine`, since only some parameters decay.

The kernel reads everything that changes between steps, such as the learning rate and whether to change anything at all, from
device memory. So the host need not know whether a step is good when it launches the kernel, and a CUDA graph can contain the
launch.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from raphael_dist.config.run_sections import Optim
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.fragments import Fragments
from raphael_dist.engine.zero_interface import FlatPart
from raphael_dist.model.device import from_host

_BLOCK = 1024


@triton.jit
def _adamw(
    master, exp_avg, exp_avg_sq, gradient, average, copy, numbers, corrections, count, beta1, rest1, beta2, rest2, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lr, factor, share, apply = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    mask = i < tl.where(apply != 0, count, 0)
    correction1, correction2 = tl.load(corrections), tl.load(corrections + 1)
    g = tl.load(gradient + i, mask, 0.0).to(tl.float32) * factor
    m = beta1 * tl.load(exp_avg + i, mask, 0.0) + rest1 * g
    v = beta2 * tl.load(exp_avg_sq + i, mask, 0.0) + rest2 * g * g
    w = tl.load(master + i, mask, 0.0) - lr / correction1 * m / (tl.sqrt(v) / tl.sqrt(correction2) + eps)
    tl.store(exp_avg + i, m, mask)
    tl.store(exp_avg_sq + i, v, mask)
    tl.store(master + i, w, mask)
    tl.store(copy + i, w.to(copy.dtype.element_ty), mask)
    if average is not None:
        old = tl.load(average + i, mask, 0.0)
        # As torch.lerp: a share of 1 gives the weights themselves.
        tl.store(average + i, tl.where(share < 0.5, old + share * (w - old), w - (w - old) * (1 - share)), mask)


@torch.library.custom_op(
    "raphael::adamw", mutates_args=("master", "exp_avg", "exp_avg_sq", "average", "copy")
)  # fmt: skip
def adamw(
    master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, average: Tensor | None, copy: Tensor,
    numbers: Tensor, corrections: Tensor, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    """Update weights and moments in place by one step of AdamW without weight decay.

    Tensors are flat, with one value for each of n weights, except `numbers` and `corrections`.

    Args:
        master: float32 weights.
        exp_avg: Adam's first moment, float32.
        exp_avg_sq: Adam's second moment, float32.
        gradient: gradient of the weights, float32 or bfloat16.
        average: moving average of the weights, float32; None: there is none.
        copy: the weights that the model computes with, float32 or bfloat16; overwritten.
        numbers: learning rate, factor by which the gradient is multiplied, share of the new weights in the average, and 1
            to update or 0 to change nothing, float32 [4].
        corrections: 1 - beta1 ** step and 1 - beta2 ** step, float32 [2].
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        eps: added to the root of the second moment.
    """
    count = master.numel()
    _adamw[(triton.cdiv(count, _BLOCK),)](
        master, exp_avg, exp_avg_sq, gradient, average, copy, numbers, corrections, count,
        beta1, 1 - beta1, beta2, 1 - beta2, eps, BLOCK=_BLOCK,
    )  # fmt: skip


@adamw.register_fake
def _(*_: object) -> None:
    """Do nothing. torch calls this function in place of `adamw` on fake tensors, which have a shape but no data."""


class FusedUpdate:
    """Updates the trained weights with the Triton kernel `adamw`, in place of DeepSpeed's optimizer step.

    For each step call `prepare`, and then DeepSpeed's step. DeepSpeed's step calls `launch`, if `launch` was passed to
    `engine.zero.Zero12Contiguous.replace_step`.

    Args:
        fragments: this rank's part of the weights, with the optimizer's state.
        optim: the section `optim`, with the constants of AdamW.
        device: this rank's device.
    """

    def __init__(self, fragments: Fragments, optim: Optim, device: torch.device) -> None:
        self._fragments, self._optim = fragments, optim
        self._numbers = torch.zeros(4, device=device)
        self._betas = torch.tensor(optim.betas, dtype=torch.float64).to(device)
        self._averages: dict[int, Tensor] = {}

    def prepare(self, lr: float, factor: float, ema: Ema | None, step: int) -> None:
        """Copy the values that the next `launch` uses to the device.

        Args:
            lr: learning rate.
            factor: number by which the gradients are multiplied (clipping).
            ema: the moving average, created with `flat=True`; None: there is none.
            step: the optimizer step, counted from 1. It decides the factor on the new weights in the average (`Ema.share`).
        """
        assert ema is None or ema.flat, "the average must be laid out as the weights"
        share = 0.0 if ema is None else ema.share(step)
        self._averages = {} if ema is None else ema.flat
        self._numbers.copy_(from_host([lr, factor, share, 1.0], self._numbers.device), non_blocking=True)

    def decide(self, good: Tensor, factor: Tensor) -> None:
        """Replace `factor` of the last `prepare`, and let the next `launch` change nothing unless `good` is true.

        `good`: bool []. `factor`: float []. Both are on the device, and the host does not wait for them.
        """
        self._numbers[1].copy_(factor)
        self._numbers[3].copy_(good)

    def launch(self, parts: Sequence[FlatPart]) -> None:
        """Run one step of AdamW on this rank's parts of the weights, in place, with the values that `prepare` copied.

        DeepSpeed stores many parameters one after another in a flat tensor. `parts`: for each flat tensor, the fp32 weights
        of this rank's part, their gradients, and the model's copy of these weights. Nothing is copied from the host.
        """
        if self._fragments.moment_addresses() == []:
            self._fragments.create_moments(0)
        beta1, beta2 = self._optim.betas
        for part in parts:
            state = self._fragments.optimizer_state(part.master)
            if not state:  # nothing but padding
                continue
            state["step"].add_(self._numbers[3])
            corrections = (1 - self._betas ** state["step"]).float()
            adamw(
                part.master, state["exp_avg"], state["exp_avg_sq"], part.gradient, self._averages.get(id(part.master)),
                part.copy, self._numbers, corrections, beta1, beta2, self._optim.eps,
            )  # fmt: skip
