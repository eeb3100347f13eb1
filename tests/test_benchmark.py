"""The benchmarks run and count what they say they count."""

import re
from math import prod

import numpy as np

from raphael_dist.benchmark_convert import make_run, run
from raphael_dist.benchmark_moe import bench_balance
from raphael_dist.config import config_from_tree, load_config
from raphael_dist.convert.convert import open_checkpoint
from raphael_dist.convert.plan import Options
from raphael_dist.convert.state import parameter_shapes
from tests.launch import run_ranks
from tests.synthetic import TREE

SIZES = ["--batch", "2", "--tokens", "16", "--text-tokens", "8", "--dim", "8", "--repeats", "1", "--threads", "1"]


def test_expert_layers_are_timed_beside_deepspeeds_on_two_ranks():
    output = run_ranks(["tools/bench.py", "moe", *SIZES, "--masks", "1.0"], 2)[0]
    rows = dict(re.findall(r"^(\S.*?) {2,}(\d+) +[\d.]+ +\d+ +faster", output, flags=re.M))
    tokens = 2 * 2 * 16  # ranks, samples, image tokens
    assert rows["Time-MoE"] == rows["DeepSpeed MoE, k=1"] == str(tokens)
    assert rows["DeepSpeed MoE, k=2"] == str(2 * tokens)
    assert tokens <= int(rows["Space-MoE"]) <= 6 * tokens
    assert "Time-MoE, no overlap" in rows


def test_the_balance_of_time_experts_by_hand():
    """Groups of 4: one sample for each of 4 experts, or all for one."""
    draws = {"even": lambda _: [0, 1, 2, 3] * 3, "worst": lambda _: [0] * 4 + [1] * 4 + [0, 1, 2, 3]}
    even, worst = bench_balance(draws, 2, 4, 4)
    assert (even.mean, even.worst) == (1.0, 1.0)
    assert (worst.mean, worst.worst) == (np.mean([4, 4, 1]), 4.0)


def test_a_save_is_timed_beside_deepspeeds_and_leaves_nothing(tmp_path):
    arguments = [
        "tools/bench.py",
        "checkpoint",
        "--config",
        "emoji-tiny",
        "--folder",
        str(tmp_path / "bench"),
        "--repeats",
        "1",
    ]
    output = run_ranks(arguments, 2)[0]
    size = int(re.search(r"^(\d+) MiB on 2 ranks", output, flags=re.M)[1])
    seconds = {name: float(s) for name, s in re.findall(r"^  (\S.*?) {2,}([\d.]+) s", output, flags=re.M)}
    assert size == sum(prod(s) for s in parameter_shapes(load_config("emoji-tiny")).values()) * 16 // 2**20
    assert 0 < seconds["stall"] < seconds["until published"]
    assert {"DeepSpeed save_checkpoint", "copy and sync", "convert to canonical"} <= seconds.keys()
    assert not (tmp_path / "bench").exists()


def test_conversions_of_a_made_up_model_are_timed(tmp_path, capsys):
    config = config_from_tree(TREE)
    make_run(config, ("master", "ema"), Options(world=2), tmp_path / "run")
    run(config, ("master",), Options(world=2), tmp_path / "bench", ("canonical", "deepspeed"), 1)
    printed = capsys.readouterr().out
    assert re.search(
        r"in 2 files, one process, median of 1\n  copy and sync .*1\.00 x copy\n  convert to canonical ", printed
    )
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    found = open_checkpoint("raphael", tmp_path / "run")
    found.check()
    assert found.kinds() == ("master", "exp_avg", "exp_avg_sq", "ema"), "Adam's moments are zero, at step 0"
    assert not any(found.read("exp_avg", name, 0, 1).any() for name in found.shapes)
    assert len({float(found.read("ema", name, 0, 1)) for name in found.shapes}) > 10
