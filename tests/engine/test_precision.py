"""Steps with every precision, ZeRO stage, accumulation and placement of experts equal those of PyTorch in float32.

One step of SGD, since Adam hides the scale of a gradient: the change of the fp32 master weights is the gradient. The oracle
starts from the masters that the run started from, so that what is compared is the gradient and no rounding of the weights.
Before it comes what comes before it in a run: the warm-up step, and a step of NaN that is dropped. The stages are those of
`ds_configs/`. On a machine with GPUs the ranks use them, as far as there is one for each.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from raphael_dist.engine.ds_config import merge
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.losses import compute_losses
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel.batch_plan import BatchPlan
from tests.lib.launch import ROOT, run_ranks, train_many
from tests.lib.synthetic import synthetic_batch, tiny_config

GLOBAL_BATCH, LR, CLIP = 8, 0.05, 0.5
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
ZERO = {path.stem: json.loads(path.read_text())["zero_optimization"] for path in sorted(ROOT.glob("ds_configs/*.json"))}
ZERO["zero3_offload"] = {**ZERO["zero3"], **OFFLOAD}
ZERO["zero1_overlap"] = {**ZERO["zero1"], "overlap_comm": True}
# With the bucket that we set by default, gradients are reduced at once; with a small one DeepSpeed reduces them in pieces,
# or we do, during the backward pass (`overlap_comm`).
ZERO["zero2_contiguous"] = ZERO["zero2"]
# Several buckets: the tiny model has 40 thousand parameters, its largest tensor 9 thousand.
SMALL = {"reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000, "stage3_param_persistence_threshold": 100}
# Hidden widths that the grouped product of a GPU takes.
MODEL = {"expert_width": [24, 32]}
MORE: dict[str, dict[str, dict[str, Any]]] = {
    "": {},
    "odd": {"train": {"global_batch_size": 13, "micro_batch_size": 3}},  # on 2 ranks 3 micro-steps with 5 empty slots
    "kept": {"model": {"checkpoint_activations": "none"}},
    "recomputed": {"model": {"checkpoint_activations": "all"}},
    "dense": {"model": {"expert_backend": "dense"}},
    # In Triton's interpreter without a GPU. SGD has no fused update.
    "kernels": {"train": {"kernels": ["group_norm", "layer_norm", "cross_attention", "space_moe", "time_moe"]}},
    "dense kernel": {"train": {"kernels": ["space_moe_dense"]}},
    "space kernel": {"train": {"kernels": ["cross_attention", "space_moe"]}},  # on sharded experts
}
KERNELS = ("kernels", "dense kernel") if find_spec("triton") is not None else ()
SHARDED_KERNELS = ("space kernel", "dense kernel") if KERNELS else ()
KERNEL_DTYPES = ("float32", "bfloat16") if torch.cuda.is_available() else ("float32",)  # the interpreter cuts bfloat16 off


@dataclass(frozen=True)
class Case:
    """One run: settings that must not change the gradient."""

    dtype: str
    zero: str
    micro_steps: int
    world_size: int
    ep: int = 1
    extra: str = ""

    def __str__(self) -> str:
        return f"{self.dtype}-{self.zero}-{self.micro_steps}x{self.world_size}-ep{self.ep}{self.extra and '-'}{self.extra}"

    @property
    def clip(self) -> float:
        return CLIP if self.world_size == 2 else 0.0

    @property
    def sections(self) -> dict:
        micro = GLOBAL_BATCH // (self.micro_steps * self.world_size)
        actual = {
            "train": {
                "global_batch_size": GLOBAL_BATCH,
                "micro_batch_size": micro,
                "dtype": self.dtype,
                "check_gradients": True,
            },
            "optim": {"kind": "sgd", "max_grad_norm": self.clip, "lr": LR},
            "parallel": {"space_ep": self.ep, "time_ep": self.ep, "placement": ["shard"]},
            "model": MODEL,
        }
        return {name: {**section, **MORE[self.extra].get(name, {})} for name, section in actual.items()}

    @property
    def deepspeed(self) -> dict:
        return {"zero_optimization": {**ZERO[self.zero], **({} if self.zero == "zero2_contiguous" else SMALL)}}

    def refusal(self) -> str | None:
        """Return the trainer's error message if the case is refused."""
        config = tiny_config(**self.sections)
        plan = BatchPlan.of(config, self.world_size)
        assert plan.accumulation == self.micro_steps
        try:
            merge(config, self.deepspeed, plan.accumulation, self.world_size)
        except UserError as error:
            return str(error)
        return None


CASES = [
    Case(dtype, zero, micro_steps, world_size, ep)
    for dtype, zero, micro_steps, (world_size, ep) in product(
        ("float32", "bfloat16"), ZERO, (1, 4), ((1, 1), (2, 1), (2, 2))
    )
    # Collected gradients in float32 are zero1's, several micro-steps apart.
    if zero != "zero2_contiguous" or dtype == "bfloat16" or micro_steps > 1
]
REFUSED = {case: why for case in CASES if (why := case.refusal()) is not None}
# What else could change a gradient, with the stages that bend to it most.
OTHERS = [
    *(
        Case("bfloat16", zero, 3, 2, 1, "odd")
        for zero in ("zero1", "zero2", "zero2_contiguous", "zero2_offload", "zero3", "zero2_overlap")
    ),
    *(Case("bfloat16", zero, 3, 2, 2, "odd") for zero in ("zero2", "zero2_contiguous", "zero2_offload")),
    *(Case("bfloat16", "zero2", 4, 2, 2, extra) for extra in ("kept", "recomputed", "dense")),
    *(Case("bfloat16", "zero3", 4, 2, 1, extra) for extra in ("kept", "recomputed", "dense")),
    *(Case(dtype, "zero2", 1, 1, 1, extra) for dtype in KERNEL_DTYPES for extra in KERNELS),
    *(Case(dtype, "zero2", 2, 2, 2, extra) for dtype in KERNEL_DTYPES for extra in SHARDED_KERNELS),
]


# By default several micro-steps on two ranks in bfloat16: what goes wrong with one micro-step goes wrong with them, and
# tests/engine/test_zero_parity.py compares float32.
SLOW = {case for case in CASES if case.world_size == 1 or case.micro_steps == 1 or case.dtype == "float32"} | set(OTHERS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run all cases of a kind in the same processes, when the first is requested."""

    @cache
    def of(world_size: int, others: bool, slow: bool) -> dict[Case, dict]:
        reference = OTHERS if others else [case for case in CASES if case not in REFUSED]
        cases = [case for case in reference if case.world_size == world_size and (case in SLOW) == slow]
        folder: Path = tmp_path_factory.mktemp("precision")
        specs = [{"sections": c.sections, "deepspeed": c.deepspeed, "steps": 1, "spoiled": True} for c in cases]
        gpus = torch.cuda.device_count() >= world_size
        return dict(zip(cases, train_many(folder, world_size, specs, timeout=880, gpus=gpus), strict=True))

    return lambda case: of(case.world_size, bool(case.extra), case in SLOW)[case]


def plain_gradient(start: dict[str, torch.Tensor], global_batch_size: int) -> dict[str, torch.Tensor]:
    """Return the gradient of the whole batch in float32, computed by torch."""
    config = tiny_config(train={"global_batch_size": global_batch_size}, model=MODEL)
    model = RaphaelUNet(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(start[name].view(p.shape))
    batch = synthetic_batch(config, [(p, 1.0) for p in range(global_batch_size)], model.num_blocks)
    losses = compute_losses(model, batch, NoiseSchedule.create(config.diffusion), config, torch.float32)
    losses.total.mean().backward()
    return {name: p.grad.flatten() for name, p in model.named_parameters()}


@pytest.mark.timeout(900)  # the first of a kind runs all of them
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=pytest.mark.slow if case in SLOW else ())
        for case in [*CASES, *OTHERS]
        if case not in REFUSED
    ],
)
def test_one_step_changes_the_masters_by_the_gradient_of_the_whole_batch(case, runs):
    actual = runs(case)
    start = actual["resumed"]["weights"]
    expected = plain_gradient(start, case.sections["train"]["global_batch_size"])
    norm = float(torch.cat(list(expected.values())).norm())
    assert actual["norms"][0] == pytest.approx(norm, rel=0.01 if case.dtype == "bfloat16" else 1e-5)
    assert norm > 2 * CLIP, "clipping must be at work"
    scale = LR * min(1.0, CLIP / norm if case.clip else 1.0)
    change = {name: (start[name] - weight) / scale for name, weight in actual["weights"].items()}
    a, b = (torch.cat([g[name].double() for name in sorted(expected)]) for g in (change, expected))
    cosine, length = float(a @ b / (a.norm() * b.norm())), float(a.norm() / b.norm())
    if case.dtype == "bfloat16":
        assert cosine > 0.999, f"cosine {cosine:.5f}, length {length:.4f}"
        assert length == pytest.approx(1, abs=0.01)
        for name, gradient in expected.items():  # the whole vector says little of one parameter
            if gradient.norm() > 1e-3 * norm:
                assert (change[name] - gradient).norm() < 0.2 * gradient.norm(), name
    else:
        assert cosine > 1 - 1e-5
        assert length == pytest.approx(1, abs=1e-5)
        for name, gradient in expected.items():
            rounding = 1e-6 * start[name].abs().max() / scale  # of the masters, in which the change is seen
            assert (change[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + rounding, name


def test_wrong_precision_settings_are_refused_with_a_reason():
    """bfloat16 without float32 masters, and sharded experts under stages that reduce them wrongly."""
    for case, why in REFUSED.items():
        sums = case.zero == "zero1_overlap" and case.micro_steps > 1  # in other tensors, in float32
        assert case.ep > 1 or (case.dtype == "bfloat16" and (sums or case.zero == "zero0")), f"{case}: {why}"
        assert "use " in why.lower(), why
    sharded = {case.zero for case in CASES if case.ep > 1 and case not in REFUSED}
    assert sharded == {"zero1", "zero2", "zero2_contiguous", "zero2_offload"}


ADAMW = {"optim": {"kind": "adamw", "max_grad_norm": 0.5, "lr": 3e-3}}


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero1", "zero2_contiguous"])
def test_thirty_adamw_steps_in_bfloat16_stay_close_to_float32(zero, tmp_path):
    """With four micro-steps on two ranks; the losses within 2%."""
    cases = [Case(dtype, zero, 4, 2) for dtype in ("float32", "bfloat16")]
    specs = [{"sections": {**case.sections, **ADAMW}, "deepspeed": case.deepspeed, "steps": 30} for case in cases]
    exact, rounded = (run["losses"] for run in train_many(tmp_path, 2, specs, timeout=280))
    assert sum(exact[-5:]) < 0.8 * sum(exact[:5]), "it must learn"
    assert rounded == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_warmup_step_uses_the_memory_of_a_step_and_changes_nothing(world_size):
    run_ranks(["tests/workers/warmup_step.py"], world_size)
