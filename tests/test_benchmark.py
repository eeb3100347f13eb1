"""The benchmarks run and count what they say they count."""

import re

import numpy as np

from raphael_dist.benchmark_moe import bench_balance
from tests.launch import run_ranks

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
