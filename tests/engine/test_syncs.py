"""Waits of the host are detected without a GPU, and an optimizer step has only the waits listed here."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_dummies import GPU
from benchmarks.pretend_gpu import PretendGpu
from raphael_dist.config.schema import load_config
from raphael_dist.engine import ds_config
from raphael_dist.model.batch import Batch
from raphael_dist.model.device import from_host
from raphael_dist.training import throughput
from raphael_dist.training.metrics import Metrics
from tests.lib.launch import ROOT
from tests.lib.synthetic import synthetic_batch, tiny_config

FLAGS = torch.zeros(4, device=GPU, dtype=torch.bool)
ROWS = torch.zeros(4, 3, device=GPU)
COUNTS = torch.zeros(4, device=GPU, dtype=torch.long)
HOST = torch.zeros(4, 3)

PLANTED = {
    "item": (lambda: ROWS[0, 0].item(), "reads a value"),
    "float": (lambda: float(ROWS.sum()), "reads a value"),
    "bool": (lambda: bool((ROWS > 0).any()), "reads a value"),
    "equal": (lambda: torch.equal(ROWS, ROWS), "reads a value"),
    "tolist": (lambda: ROWS.tolist(), "copies to the host"),
    "cpu": (lambda: ROWS.cpu(), "copies to the host"),
    "copy_ to the host": (lambda: torch.zeros(4, 3).copy_(ROWS), "copies to the host"),
    "non-blocking to pageable memory": (lambda: ROWS.to("cpu", non_blocking=True), "copies to the host"),
    "pageable copy": (lambda: HOST.to(GPU, non_blocking=True), "copies pageable memory"),
    "copy_ from pageable memory": (lambda: ROWS.clone().copy_(HOST), "copies pageable memory"),
    "blocking pinned copy": (lambda: HOST.pin_memory().to(GPU), "a blocking copy"),
    "torch.tensor": (lambda: torch.tensor([1.0, 2.0], device=GPU), "copies pageable memory"),
    "as_tensor": (lambda: torch.as_tensor(3.0, device=GPU), "copies pageable memory"),
    "new_tensor": (lambda: ROWS.new_tensor([1.0]), "copies pageable memory"),
    "list index": (lambda: ROWS[[0, 1]], "copies pageable memory"),
    "index on the host": (lambda: ROWS[torch.tensor([0, 1])], "copies pageable memory"),
    "nonzero": (lambda: FLAGS.nonzero(), "a shape depends on values"),
    "where": (lambda: torch.where(FLAGS), "a shape depends on values"),
    "boolean index": (lambda: ROWS[FLAGS], "a shape depends on values"),
    "boolean index, assigned": (lambda: ROWS.clone().__setitem__(FLAGS, ROWS[:1]), "a shape depends on values"),
    "masked_select": (lambda: ROWS.masked_select(ROWS > 0), "a shape depends on values"),
    "unique": (lambda: COUNTS.unique(), "a shape depends on values"),
    "bincount": (lambda: COUNTS.bincount(minlength=3), "a shape depends on values"),
    "repeat_interleave": (lambda: torch.repeat_interleave(COUNTS), "a shape depends on values"),
    "one_hot without a size": (lambda: torch.nn.functional.one_hot(COUNTS), "reads a value"),
    "synchronize": (torch.cuda.synchronize, "synchronize()"),
    "event": (lambda: torch.cuda.Event().synchronize(), "synchronize()"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_wait_is_found_once_with_its_kind_and_place(name):
    plant, kind = PLANTED[name]
    with PretendGpu() as gpu:
        # Looked up again: torch.cuda.synchronize is another function in here.
        (torch.cuda.synchronize if plant is PLANTED["synchronize"][0] else plant)()
    ((place, actual),) = gpu.notes.waits.elements()
    assert actual.startswith(kind)
    assert re.fullmatch(r"engine/test_syncs\.py:\d+", place)


def test_a_wait_in_the_backward_pass_is_found():
    class Waiting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float(grad.sum())

    with PretendGpu() as gpu:
        Waiting.apply(torch.zeros(3, device=GPU, requires_grad=True)).sum().backward()
    assert [kind for _, kind in gpu.notes.waits.elements()] == ["reads a value"]


def test_what_does_not_wait_is_not_counted_as_a_wait():
    layer = torch.nn.Linear(3, 3, device=GPU)
    with PretendGpu() as gpu:
        x = HOST.pin_memory().to(GPU, non_blocking=True)
        index_B = torch.arange(2, device=GPU)
        loss = torch.where(x[index_B] > 0, layer(x)[index_B], torch.zeros(1, device=GPU)).sum() * 2.0
        loss.backward()
        torch.empty(4, 3, pin_memory=True).copy_(x, non_blocking=True)
        torch.repeat_interleave(COUNTS, output_size=7)
        torch.nn.functional.one_hot(COUNTS, 5)
        float(HOST.sum())
        from_host([1.0, 2.0], GPU)
        torch.cuda.Event().record()
    assert not gpu.notes.waits
    assert gpu.notes.launches.total() > 10


def test_launches_and_bytes_by_hand_also_of_the_backward_pass():
    with PretendGpu() as gpu:
        x = torch.zeros(10, device=GPU).requires_grad_()
        gpu.take()
        y = x.exp().view(2, 5).t()  # one kernel; views are none
        forward = gpu.take()
        torch.autograd.grad(y, x, y)
        backward = gpu.take()
    assert forward.launches.total() == 1
    assert forward.bytes.total() == 2 * 10 * 4  # read and written
    assert backward.launches.total() == 1  # grad * result
    assert backward.bytes.total() == 3 * 10 * 4
    (place,) = backward.launches
    assert place.endswith("(backward)")


def test_packed_batch_is_copied_at_once_without_a_wait():
    config = tiny_config()
    batch = synthetic_batch(config, [(5, 1.0), (6, 0.0)], 3)
    with PretendGpu() as gpu:
        moved = batch.pack().to(GPU)
        notes = gpu.take()
        batch.to(GPU)
    assert not notes.waits
    assert notes.launches.total() == 1
    assert gpu.notes.waits.total() == 11
    for name in ("position", "x0", "text_mask", "edge"):
        assert getattr(moved, name).shape == getattr(batch, name).shape
        assert getattr(moved, name).dtype == getattr(batch, name).dtype


def test_packing_keeps_every_number_and_a_cpu_copies_nothing(monkeypatch):
    empty = torch.empty  # there is no pinned memory without a GPU
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **extra: empty(*size, **extra))
    batch = synthetic_batch(tiny_config(), [(5, 1.0), (6, 0.0), (7, 1.0)], 3)
    packed = batch.pack()
    for item, other in ((packed, batch), (packed.to(torch.device("cpu")), packed)):
        for name, value in tensors_of(item).items():
            assert torch.equal(value, tensors_of(other)[name]), name
    assert {n: t.data_ptr() for n, t in tensors_of(packed).items()} == {
        n: t.data_ptr() for n, t in tensors_of(packed.to(torch.device("cpu"))).items()
    }
    assert all(t.data_ptr() % 16 == 0 for t in tensors_of(packed).values())


def tensors_of(batch: Batch) -> dict[str, torch.Tensor]:
    actual = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor) and name != "memory"}
    assert batch.gate_noise is not None
    return actual | {"time": batch.gate_noise.time_BLK, "space": batch.gate_noise.space_BLYK}


def test_metrics_are_collected_without_a_wait():
    metrics, losses = Metrics(GPU), torch.zeros(3, device=GPU)
    with PretendGpu() as gpu:
        for _ in range(2):
            metrics.add("loss", losses.sum(), "mean", losses.sum())
            metrics.add("bytes", 5.0, "sum")
            metrics.add("peak", 2.0, "max")
    assert not gpu.notes.waits


def test_deepspeeds_throughput_timer_is_off_unless_asked_for():
    config = load_config("emoji-tiny")
    assert ds_config.merge(config, {}, 2, 2)["timers"]["throughput"]["enabled"] is False
    asked = {"timers": {"throughput": {"enabled": True}}}
    assert ds_config.merge(config, asked, 2, 2)["timers"] == asked["timers"]


def test_flops_of_grouped_products_are_exact_in_both_passes():
    rows, inner, outer, groups = 32, 16, 24, 4
    x = torch.empty(rows, inner, device="meta", dtype=torch.bfloat16, requires_grad=True)
    w = torch.empty(groups, outer, inner, device="meta", dtype=torch.bfloat16, requires_grad=True)
    ends = torch.empty(groups, device="meta", dtype=torch.int32)
    with FlopCounterMode(display=False, custom_mapping=throughput.FLOPS) as counter:
        out = torch.nn.functional.grouped_mm(x, w.transpose(1, 2), offs=ends)
        assert counter.get_total_flops() == 2 * rows * inner * outer
        torch.autograd.grad(out, (x, w), torch.empty_like(out))
    assert counter.get_total_flops() == 3 * 2 * rows * inner * outer
    assert throughput.grouped_product_flops(torch.Size([4, 5, 6]), torch.Size([4, 6, 7])) == 4 * 2 * 5 * 6 * 7


# One wait per optimizer step, in which the host reads the loss, the gradient norm and the ranks' wishes.
ONE = {("raphael_dist/training/trainer.py", "copies to the host"): 1}
# With deferred_update it reads those of the step before, while the GPU has the work of this step.
DEFERRED = {("raphael_dist/model/device.py", "synchronize()"): 1}
# DeepSpeed's ZeRO-1 in bfloat16 with several micro-steps asks for a norm, though of nothing (engine/zero.py, Zero1Bf16).
ASKED = {
    ("deepspeed/runtime/utils.py", "copies pageable memory to the GPU"): 1,
    ("deepspeed/runtime/utils.py", "reads a value"): 1,
}
SMALL = [
    *("model.channels=[32,64]", "model.attention=[true,false]", "model.expert_width=[32,64]", "model.layers_per_block=1"),
    *("model.checkpoint_activations=blocks", "image.vae=none", "train.dtype=bfloat16", "train.micro_batch_size=2"),
]


def counted(output: str) -> Counter[tuple[str, str]]:
    """Return the waits of a step by file and kind from the tool's output, whose last line must be their number."""
    actual: Counter[tuple[str, str]] = Counter()
    for count, file, kind in re.findall(r"^ +(\d+)  (\S+):\d+: (.*)$", output.split("a log line adds")[0], flags=re.M):
        actual[file, kind] += int(count)
    assert output.splitlines()[-1] == f"host synchronisations per step: {actual.total()}"
    return actual


@pytest.mark.parametrize(
    ("stage", "micro_steps"), [*(pytest.param(*c, marks=pytest.mark.slow) for c in [(1, 1), (1, 3), (2, 1)]), (2, 3)]
)
def test_an_optimizer_step_waits_once_and_no_layer_or_micro_step_waits(stage, micro_steps):
    output = bench("emoji-tiny", f"--deepspeed_config=ds_configs/zero{stage}.json", f"--micro-steps={micro_steps}", *SMALL)
    assert counted(output) == ONE | (ASKED if (stage, micro_steps) == (1, 3) else {})


@pytest.mark.slow
def test_a_step_in_graphs_has_few_launches_and_waits_for_the_step_before():
    pytest.importorskip("triton", reason="needs the package triton")
    graphs = ["train.cuda_graphs=true", "train.kernels=[adamw,deferred_update]"]
    one, three = (bench("emoji-tiny", f"--micro-steps={n}", "--places=400", *SMALL, *graphs) for n in (1, 3))
    assert counted(one) == counted(three) == DEFERRED
    launches = [int(re.findall(r"^ +(\d+) .* in all$", output, flags=re.M)[0]) for output in (one, three)]
    assert launches[0] < 200
    assert launches[1] < 3 * launches[0]
    for output in (one, three):
        assert "model/unet.py" not in output
        assert re.search(r"^ +\d+ +0.0  raphael_dist/model/cuda_graphs.py:\d+$", output, flags=re.M)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["raphael-3b", "raphael-sd2", "sd2-dense"])
def test_a_step_of_a_preset_for_gpus_waits_once(preset):
    """With the model's true widths and its default DeepSpeed configuration."""
    assert counted(bench(preset, "--micro-steps=1")) == ONE


def bench(*arguments: str) -> str:
    command = [sys.executable, "tools/bench.py", "syncs", "--config", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
