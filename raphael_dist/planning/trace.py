"""Traces one micro-step of the model on tensors without data: FLOPs and bytes of each operation, and live memory.

The model has its true widths and uses the code paths of a GPU. Attention counts as one fused kernel. Nothing is computed, so
a trace of a model with 3 B parameters takes a second. All counts are linear in the number of images, so two traces give the
trace of any micro-batch.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from raphael_dist.config.schema import Config
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.kernels.selection import require_triton, set_kernels
from raphael_dist.model.losses import compute_losses
from raphael_dist.planning.meta_batch import META, meta_batch
from raphael_dist.planning.operation_recorder import KINDS, PHASES, Recorder, TracedUNet, observe_modules

Recompute = Literal["none", "blocks", "all"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "blocks", "all")
SAMPLES = (2, 4)  # images of the two traces of a profile


@dataclass(frozen=True)
class Trace:
    """Operations and memory of one micro-step on a rank.

    A *segment* is a part of the model that can be recomputed: a transformer block or a residual block.

    Attributes:
        samples: images of the micro-step.
        kind: int64 [ops], for each operation the part of the model, as an index into KINDS.
        phase: int64 [ops], for each operation the pass, as an index into PHASES (forward, backward, recomputed).
        op_class: int64 [ops], for each operation its class, such as convolution, as an index into CLASSES.
        segment: int64 [ops], the number of each operation's segment; -1 outside of segments. A backward operation belongs to
            the segment of the forward operation that it differentiates.
        flops, bytes: int64 [ops]. Bytes are those of inputs and outputs by their shapes, as if nothing stayed in a cache.
        is_block: bool [segments], True for transformer blocks.
        saved_by: int64 [segments], bytes that the forward pass of a segment keeps for its backward pass.
        peaks: int64 [2, segments + 1], peak bytes of live tensors. Element [0, i] is the peak in the part of the forward
            pass after the start of segment i and before the start of segment i + 1, counted from 1. Element [1, i] is the
            peak in the backward pass of this part. Gradients of weights are freed at once, as ZeRO does.
        saved: bytes of activations that are alive after the forward pass.
    """

    samples: int
    kind: NDArray[np.int64]
    phase: NDArray[np.int64]
    op_class: NDArray[np.int64]
    segment: NDArray[np.int64]
    flops: NDArray[np.int64]
    bytes: NDArray[np.int64]
    is_block: NDArray[np.bool_]
    saved_by: NDArray[np.int64]
    peaks: NDArray[np.int64]
    saved: int

    @property
    def launches(self) -> int:
        return len(self.flops)

    @property
    def peak(self) -> int:
        """The largest number of bytes of activations that exist at the same time in the micro-step."""
        return int(self.peaks.max())

    def total(self, values: NDArray[np.int64], phase: str | None = None, kind: str | None = None) -> int:
        """Return the sum of `values` (`flops` or `bytes`) over the operations of one pass and one part of the model.

        `phase`: the pass, a name in PHASES; None: all passes. `kind`: the part, a name in KINDS; None: all parts.
        """
        chosen = np.ones(len(values), dtype=bool)
        if phase is not None:
            chosen &= self.phase == PHASES.index(phase)
        if kind is not None:
            chosen &= self.kind == KINDS.index(kind)
        return int(values[chosen].sum())

    def with_recomputation(self, recompute: Recompute) -> "Trace":
        """Return a trace in which the backward pass recomputes segments, from a trace without recomputation.

        A segment is a transformer block or a residual block. The forward operations of recomputed segments are repeated, and
        the memory that they keep for the backward pass is freed. Real recomputation skips the last few operations of a
        segment; this trace counts them.

        `recompute`: "none", "blocks" (transformer blocks) or "all" (all segments).
        """
        if recompute == "none":
            return self
        recomputed = self.is_block | (recompute == "all")
        repeated = (self.phase == 0) & (self.segment >= 0)
        repeated[repeated] = recomputed[self.segment[repeated]]
        freed = np.where(recomputed, self.saved_by, 0)
        freed_before = np.concatenate([[0], np.cumsum(freed)])  # by all segments that ended before
        freed_earlier = np.concatenate([[0], freed_before[:-1]])  # without the segment that is being recomputed

        def with_repeated(values: NDArray[np.int64]) -> NDArray[np.int64]:
            return np.concatenate([values, values[repeated]])

        return replace(
            self,
            kind=with_repeated(self.kind),
            op_class=with_repeated(self.op_class),
            segment=with_repeated(self.segment),
            flops=with_repeated(self.flops),
            bytes=with_repeated(self.bytes),
            phase=np.concatenate([self.phase, np.full(repeated.sum(), PHASES.index("recomputed"))]),
            # A recomputed segment needs as much as in its forward pass, on top of what is alive before it.
            peaks=self.peaks - freed_earlier,
            saved=self.saved - int(freed.sum()),
        )


@dataclass(frozen=True)
class Profile:
    """Two traces (operations, memory) of a micro-step, from which traces for other numbers of images are extrapolated.

    Attributes:
        few, many: the traces with two and with four images.
    """

    few: Trace
    many: Trace

    def at(self, samples: int, recompute: Recompute = "none") -> Trace:
        """Return the trace (operations and memory) of a micro-step of `samples` images, by linear extrapolation.

        `recompute`: activations that the backward pass recomputes: "none", "blocks" (those of transformer blocks) or "all".
        """
        share = (samples - self.few.samples) / (self.many.samples - self.few.samples)

        def line(name: str) -> NDArray[np.int64]:
            few, many = getattr(self.few, name), getattr(self.many, name)
            return np.rint(few + (many - few) * share).astype(np.int64)

        trace = replace(
            self.few,
            samples=samples,
            flops=line("flops"),
            bytes=line("bytes"),
            saved_by=line("saved_by"),
            peaks=line("peaks"),
            saved=int(line("saved")),
        )
        return trace.with_recomputation(recompute)


def profile(config: Config) -> Profile:
    """Trace one micro-step (forward and backward) twice, with two and with four images.

    Both traces are without expert parallelism and without recomputation.

    Args:
        config: the run's configuration.

    Returns:
        A `Profile`, which computes the costs of any micro-batch size from the two traces.
    """
    few, many = (trace(config, samples, "none") for samples in SAMPLES)
    assert few.launches == many.launches, "the number of images changed which operations run"
    return Profile(few, many)


def trace(config: Config, samples: int, recompute: Recompute | None = None) -> Trace:
    """Trace one micro-step on tensors without data; return FLOPs and bytes of each operation, and the memory.

    The images have the largest size in `image.buckets`.

    Args:
        config: the run's configuration.
        samples: images of the micro-step.
        recompute: replaces `model.checkpoint_activations`; None keeps it.
    """
    update = {} if recompute is None else {"checkpoint_activations": recompute}
    config = config.model_copy(update={"model": config.model.model_copy(update=update)})
    dtype: torch.dtype = getattr(torch, config.train.dtype)
    recorder = Recorder()
    with META:
        model = TracedUNet(config, recorder).to(dtype)
    require_triton(config.train.kernels)  # nothing runs, but the module of the kernels also has the shapes of results
    set_kernels(model, config.train.kernels)
    observe_modules(model, recorder)
    schedule = NoiseSchedule.create(config.diffusion, META)
    batch = meta_batch(config, samples, model.num_blocks)
    with recorder:
        losses = compute_losses(model, batch, schedule, config, dtype)
        saved, recorder.phase = recorder.live, "backward"
        losses.total.sum().backward()
    kind, phase, classes, segment, flops, num_bytes = (np.array(c, dtype=np.int64) for c in zip(*recorder.rows, strict=True))
    num_segments = len(recorder.segments)
    return Trace(
        samples=samples,
        kind=kind,
        phase=phase,
        op_class=classes,
        segment=segment,
        flops=flops,
        bytes=num_bytes,
        is_block=np.array([is_block for is_block, _ in recorder.segments], dtype=bool),
        saved_by=np.array([size for _, size in recorder.segments], dtype=np.int64),
        peaks=np.array([[peaks.get(i, 0) for i in range(num_segments + 1)] for peaks in recorder.peaks]),
        saved=saved,
    )
