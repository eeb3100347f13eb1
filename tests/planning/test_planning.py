"""Parts of the planner on cases computed by hand, and FLOPs compared with torch's counter."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from raphael_dist.config.schema import config_from_tree, load_config
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.losses import compute_losses
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.planning import memory_table
from raphael_dist.planning.calibrate import REFERENCE, random_batch
from raphael_dist.planning.checkpoint_interval import daly, lost_share, plan_saves, young
from raphael_dist.planning.cluster_spec import cluster_names, load_cluster
from raphael_dist.planning.memory import MemoryFootprint, States
from raphael_dist.planning.meta_batch import meta_batch
from raphael_dist.planning.op_costs import CLASSES
from raphael_dist.planning.plan_report import run_so_far
from raphael_dist.planning.run_plan import active_parameters, make_plan
from raphael_dist.planning.search import USABLE, Choice, Search
from raphael_dist.planning.step_time import device_times, step_time
from raphael_dist.planning.trace import Trace, trace
from raphael_dist.training.throughput import FLOPS
from tests.lib.documents import text_of
from tests.lib.synthetic import tiny_config

REFERENCE_CONFIG = config_from_tree(REFERENCE)


def handmade(classes: list[str], flops: list[int], num_bytes: list[int]) -> Trace:
    """Return a trace of 2 images with forward operations outside of segments."""
    n = len(classes)
    zero = np.zeros(n, dtype=np.int64)
    return Trace(
        samples=2, kind=zero, phase=zero, op_class=np.array([CLASSES.index(name) for name in classes]), segment=zero - 1,
        flops=np.array(flops), bytes=np.array(num_bytes), is_block=np.zeros(0, dtype=bool),
        saved_by=zero[:0], peaks=np.zeros((2, 1), dtype=np.int64), saved=0,
    )  # fmt: skip


def cluster_of(**numbers: float):
    """Return the H100's description with a product at 100 TFLOP/s, 1,000 GB/s, nothing for an empty operation."""
    spec = load_cluster("h100x8")
    tree = spec.model_dump()
    for rates in tree["rates"].values():
        for rate in rates.values():
            rate["us"]["value"], rate["gb_s"]["value"] = 0.0, 1000.0
            if rate["tflops"]:
                rate["tflops"]["value"] = 100.0
    for name, value in {"launch_us": 0.0, **numbers}.items():
        tree[name]["value"] = value
    return type(spec).model_validate(tree)


def nothing(contiguous: bool) -> MemoryFootprint:
    """Return the footprint of a rank of ZeRO-2 without memory."""
    return MemoryFootprint(States(0, 0, 0, 0, 0), 0, 2, contiguous, 0, 0, 0)


def test_operation_time_is_the_maximum_of_flops_and_bytes():
    actual = device_times(
        handmade(["product", "product", "pointwise"], [10**14, 10**12, 0], [10**9, 10**12, 10**12]), cluster_of(), "bfloat16"
    )
    assert actual == pytest.approx((1.0 + 1.0, 1.0))


def test_launches_cost_the_time_beyond_the_device():
    config = tiny_config(train={"dtype": "bfloat16", "micro_batch_size": 2, "global_batch_size": 2})
    plan = BatchPlan.of(config, 1)
    work = handmade(["product"] * 10, [10**12] * 10, [1] * 10)  # 0.1 s

    def step(launch_us: float, graphs: bool = False, contiguous: bool = True):
        chosen = config.model_copy(update={"train": config.train.model_copy(update={"cuda_graphs": graphs})})
        return step_time(chosen, plan, work, nothing(contiguous), cluster_of(launch_us=launch_us), 0, num_tensors=5)

    assert step(1_000.0).launches == 0
    assert step(10_000.0).launches == pytest.approx(15 * 0.01 - 0.1)  # ten operations, and one for each of five tensors
    assert step(10_000.0, contiguous=False).launches == pytest.approx(20 * 0.01 - 0.1)  # two, where DeepSpeed reduces
    assert step(20_000.0, graphs=True).launches == 0  # all in one
    assert step(10_000.0).seconds == pytest.approx(0.15)
    assert step(0.0).images_per_s == pytest.approx(20.0)
    assert step(0.0).mfu(200.0) == pytest.approx(3 * 10**13 / 0.1 / 200e12)  # 10 TFLOP forward for two images, times three


def test_communication_overlaps_only_with_its_pass():
    config = tiny_config(train={"dtype": "bfloat16", "micro_batch_size": 2, "global_batch_size": 16})
    plan = BatchPlan.of(config, 8)
    work = handmade(["product"], [10**14], [1])
    work = replace(work, phase=work.phase + 1)  # a backward pass of 1 s

    def step(overlap: bool, contiguous: bool = True):
        return step_time(config, plan, work, nothing(contiguous), cluster_of(), 10**9, 1, overlap=overlap)

    open_, hidden = step(overlap=False), step(overlap=True)
    reduce, gather = open_.parts
    assert open_.exposed == pytest.approx(reduce.seconds + gather.seconds)
    # The last of 16 buckets is complete only when the backward pass ends.
    assert hidden.exposed == pytest.approx(gather.seconds + hidden.parts[0].seconds / 16)
    # What is reduced at once goes once around the ring, and what DeepSpeed reduces twice.
    assert 2 * reduce.seconds == pytest.approx(step(overlap=False, contiguous=False).parts[0].seconds, rel=0.01)


def test_flops_are_those_of_torchs_counter_on_the_same_model():
    config = REFERENCE_CONFIG
    model, batch = RaphaelUNet(config), random_batch(config, 6)
    batch = random_batch(config, model.num_blocks)
    schedule = NoiseSchedule.create(config.diffusion)
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        compute_losses(model, batch, schedule, config, torch.float32).total.sum().backward()
    traced = trace(config, config.train.micro_batch_size, "none")
    assert traced.total(traced.flops) == counter.get_total_flops()


def test_a_line_through_two_traces_is_the_trace_between_them():
    from raphael_dist.planning.trace import profile

    three, direct = profile(REFERENCE_CONFIG).at(3), trace(REFERENCE_CONFIG, 3, "none")
    assert np.array_equal(three.flops, direct.flops)
    assert three.total(three.bytes) == pytest.approx(direct.total(direct.bytes), rel=1e-3)
    assert three.peak == pytest.approx(direct.peak, rel=0.02)


def test_intervals_by_hand():
    assert young(2.0, 10_000.0) == pytest.approx(200.0)
    # sqrt(2 s M) (1 + 1/3 sqrt(s/2M) + 1/9 (s/2M)) - s with s/2M = 1e-4
    assert daly(2.0, 10_000.0) == pytest.approx(200.0 * (1 + 0.01 / 3 + 1e-4 / 9) - 2.0)
    assert daly(5.0, 2.0) == 2.0
    assert lost_share(99.0, 1.0, 10.0, 1000.0, 40.5) == pytest.approx(0.01 + (49.5 + 10 + 40.5) / 1000)
    assert plan_saves(1, 0.001, 500.0, 1e6, 0.0).interval_s == 500.0  # no save before the last one is on disk
    near = [lost_share(daly(2.0, 1e4) * f, 2.0, 0.0, 1e4, 0.0) for f in (0.7, 1.0, 1.4)]
    assert near[1] == min(near)


@pytest.mark.parametrize("name", cluster_names())
def test_descriptions_give_every_number_a_source(name):
    assert {"a100x8", "b200x8", "cpu", "h100x8", "h200x8"} == set(cluster_names())
    spec = load_cluster(name)
    assert spec.name == name
    assert spec.rate("float32", "convolution").tflops is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("device: gpu", "per_node"),
        ("device: [", "not valid YAML"),
        ("42", "value: NUMBER, source: TEXT"),
    ],
)
def test_a_wrong_description_is_refused_in_a_line(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_cluster(str(tmp_path / "mine.yaml"))
    assert "\n" not in str(error.value)


def test_an_unknown_cluster_is_named_with_those_that_there_are():
    with pytest.raises(UserError, match="did you mean 'h100x8'"):
        load_cluster("h100x9")


def search_of(world: int, **allowed) -> Search:
    config = tiny_config(train={"dtype": "bfloat16", "micro_batch_size": 2, "global_batch_size": 64})
    return Search(config, load_cluster("h100x8"), world, allowed)


def test_choices_are_those_that_the_engine_allows():
    actual = {(c.space_ep, c.time_ep, c.stage) for c, _, _ in search_of(4).choices()}
    assert {(1, 1, 1), (1, 1, 2), (1, 1, 3), (2, 2, 2), (1, 4, 1)} <= actual
    assert not [f for f in actual if f[2] == 3 and f[:2] != (1, 1)]  # ZeRO-3 does not support sharded experts
    assert not [f for f in actual if f[0] in (3, 6)]  # does not divide four ranks
    assert not [f for f in actual if f[2] == 0]  # not in bfloat16
    assert {c.micro_batch_size for c, _, _ in search_of(4).choices()} == {1, 2, 3, 4, 6, 8, 12, 16}  # 64 images on 4 ranks


def test_ranking_is_by_images_per_second_and_then_by_memory():
    search = search_of(8, stage=(2,), space_ep=(1,), time_ep=(1,))
    ranked = search.ranked()
    rates = [o.step.images_per_s for o in ranked if o.fits]
    fastest = max(rates)
    slower = [rate for rate in rates if rate <= 0.99 * fastest]
    assert ranked[0].step.images_per_s > 0.99 * fastest
    assert slower == sorted(slower, reverse=True)
    tight = search.cluster.model_copy(update={"memory_gb": search.cluster.memory_gb.model_copy(update={"value": 1e-6})})
    with pytest.raises(UserError, match="has too little memory on"):
        make_plan(replace(search, cluster=tight))


def test_memory_table_has_the_largest_micro_batch_that_fits(monkeypatch):
    search = search_of(1, stage=(2,))
    outcome = search.evaluate(Choice(1, 1, 2, False, 6, "none", "auto"))
    assert outcome is not None
    just_enough = outcome.memory.total / 1e9 / USABLE
    monkeypatch.setattr(memory_table, "SIZES_GB", (1e-6, 1.0001 * just_enough, 0.9999 * just_enough, 80))
    cells = memory_table.memory_table("tiny", search).splitlines()[-1].split(" | ")[3:]
    assert [cell.partition(" ")[0] for cell in cells] == ["-", "6", "4", "64"]


@pytest.mark.slow
def test_documented_memory_table_is_the_planners():
    search = Search(load_config("sd2-dense"), load_cluster("h100x8"), 8, {"stage": (2, 3)})
    for row in memory_table.memory_table("`sd2-dense`", search).splitlines()[2:]:
        assert row in text_of("docs/memory.md")


def test_days_hours_and_money_follow_from_images_a_second():
    plan = make_plan(search_of(8), images=10**6, price=2.0)
    seconds = 10**6 / plan.best.step.images_per_s / (1 - plan.saves.lost)
    assert plan.gpu_hours == pytest.approx(8 * seconds / 3600)
    assert plan.dollars == pytest.approx(2.0 * plan.gpu_hours)
    assert plan.saves.bytes == 16 * plan.search.parameters


def test_active_parameters_count_one_expert_per_layer():
    search = search_of(1)
    config = search.config.model_copy(
        update={"model": search.config.model.model_copy(update={"space_experts": 1, "time_experts": 1})}
    )
    with torch.device("meta"):
        model = RaphaelUNet(config)
    gates = 2 * model.num_blocks  # the gates' last layers are narrower with one expert
    lone = sum(p.numel() for p in model.parameters())
    hidden = config.model.gate_width + 1
    assert active_parameters(search.shapes) == lone + gates // 2 * hidden * (5 + 3)


def test_a_batch_without_data_has_the_shapes_of_one_with_data():
    config = REFERENCE_CONFIG
    empty, full = meta_batch(config, 8, 6), random_batch(config, 6)
    assert [t.shape for t in empty.gate_noise] == [t.shape for t in full.gate_noise]
    assert empty.x0.shape == full.x0.shape


def test_the_tool_plans_and_draws(tmp_path, monkeypatch, capsys):
    import plan_run

    words = [
        "--config",
        "emoji-tiny",
        "--cluster",
        "cpu",
        "--ranks",
        "2",
        "--only",
        "stage=1,2",
    ]
    monkeypatch.setattr(sys, "argv", ["plan_run.py", *words, "--figure", str(tmp_path / "plan.png")])
    assert plan_run.main() == 0
    printed = capsys.readouterr().out
    for message in (
        "images/s",
        "the first choice compared with others:",
        "command for the first choice:",
        "torchrun --nproc_per_node 2",
    ):
        assert message in printed
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "0"], "--nodes=0"),
        (["--cluster", "tpu"], "no such cluster"),
        (["--only", "stag=2"], "--only stag=2"),
        (["--price", "-1"], "--price=-1"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, words, message):
    import plan_run

    monkeypatch.setattr(sys, "argv", ["plan_run.py", "--config", "emoji-tiny", *words])
    assert plan_run.main() == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_needs_no_torch():
    code = (
        "import sys; sys.argv = ['plan_run.py']; sys.path.insert(0, 'tools'); import plan_run; print('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.slow
def test_presets_can_be_planned():
    plan = make_plan(
        Search(load_config("sd2-dense"), load_cluster("a100x8"), 8, {"micro_batch_size": (16, 32), "stage": (2,)})
    )
    assert plan.search.parameters == 865_910_724
    assert plan.best.fits


def test_plan_says_that_nothing_ran_on_several_gpus():
    config, plain = load_config("raphael-3b"), Choice(1, 1, 2, False, 6, "none", "auto")
    for choice in (plain, Choice(2, 2, 1, False, 6, "blocks", "shard")):
        assert "on several GPUs: nothing yet" in run_so_far(choice, "gpu", 8, config)
    assert run_so_far(plain, "gpu", 1, config) == "one H200"
    assert "H200" not in run_so_far(replace(plain, overlap=True), "gpu", 1, config)
    other = ("train.kernels=[layer_norm]", "train.dtype=float32", "optim.kind=muon", "model.expert_backend=megablocks")
    for setting in other:
        assert "H200" not in run_so_far(plain, "gpu", 1, load_config("raphael-3b", [setting])), setting


@pytest.mark.slow
def test_kernels_halve_the_bytes_of_a_micro_step():
    """The numbers of docs/kernels.md, of two images without recomputation."""
    pytest.importorskip("triton", reason="needs the package triton")
    kernels = "group_norm,layer_norm,cross_attention,space_moe,time_moe"
    plain, fused = (trace(load_config("raphael-3b", [f"train.kernels=[{names}]"]), 2, "none") for names in ("", kernels))
    assert fused.total(fused.bytes) < 0.53 * plain.total(plain.bytes)
    assert fused.launches < 0.86 * plain.launches
