"""The benchmarks run and count what they say they count."""

import argparse
import re
from math import prod

import numpy as np
import pytest
import yaml

from bench import main
from benchmarks import convert
from benchmarks.balance import bench_balance
from raphael_dist.config.schema import config_from_tree, load_config
from raphael_dist.convert.layouts import open_checkpoint
from raphael_dist.convert.source_checkpoint import parameter_shapes
from raphael_dist.convert.write_plan import Options
from tests.lib.launch import ROOT, run_ranks
from tests.lib.synthetic import TREE

SIZES = ["--batch", "2", "--tokens", "16", "--text-tokens", "8", "--dim", "8", "--repeats", "1", "--threads", "1"]


def test_expert_layers_are_compared_with_deepspeeds_on_two_ranks():
    output = run_ranks(["tools/bench.py", "moe", *SIZES, "--masks", "1.0"], 2)[0]
    rows = dict(re.findall(r"^(\S.*?) {2,}(\d+) +[\d.]+ +\d+ +faster", output, flags=re.M))
    tokens = 2 * 2 * 16  # ranks, samples, image tokens
    assert rows["Time-MoE"] == rows["DeepSpeed MoE, k=1"] == str(tokens)
    assert rows["DeepSpeed MoE, k=2"] == str(2 * tokens)
    assert tokens <= int(rows["Space-MoE"]) <= 6 * tokens
    assert "Time-MoE, no overlap" in rows


@pytest.mark.slow
def test_whole_step_is_compared_with_diffusers_in_time_and_flops():
    """Without experts both are the same model, so that only the dense one's FLOPs agree."""
    small = ["model.channels=[32,64]", "model.attention=[true,false]", "model.expert_width=[128,256]", "text.max_tokens=7"]
    dense = ["model.space_experts=0", "model.time_experts=0", "model.time_activation=geglu", "edge.weight=0"]
    arguments = ["--config", "emoji-tiny", "--micro-batch", "1", "2", "--steps", "1", *small]
    for more, same in ((dense, True), ([], False)):
        output = run_ranks(["tools/bench.py", "gpu", *arguments, *more], 1)[0]
        assert re.match(r"1 x .+; python 3.* torch 2", output[output.index("1 x ") :])
        table = re.findall(r"^\| (\S.*?) \| (\d) \| ([\d.]+) \| ([\d.]+) \| ([\d.e-]+) \| [\d.]+% \|", output, flags=re.M)
        assert [(name, micro) for name, micro, *_ in table] == [
            (name, micro) for micro in "12" for name in ("emoji-tiny", "diffusers, widths of emoji-tiny")
        ]
        for ours, theirs in (table[:2], table[2:]):
            per_step = [float(tflops) * float(ms) for _, _, ms, _, tflops in (ours, theirs)]
            assert (per_step[0] == pytest.approx(per_step[1], rel=0.01)) == same
            assert float(ours[3]) == pytest.approx(1e3 * int(ours[1]) / float(ours[2]), rel=0.01)


@pytest.mark.slow
@pytest.mark.timeout(900)  # four runs from scratch
def test_a_run_on_two_ranks_and_the_reading_of_data_are_timed(monkeypatch, capsys):
    ranks = "bench.py scaling --config tests/fixtures/small.yaml --ranks 1 2 --steps 3 --rounds 1"
    data = "bench.py data --images 64 --per-shard 16 --size 64 48 --bucket 32 32 --workers 1 --rounds 1"
    monkeypatch.chdir(ROOT)
    for line in (ranks, f"{data} --only raphael_dist webdataset"):
        monkeypatch.setattr("sys.argv", line.split())
        main()
    output = capsys.readouterr().out
    rows = re.findall(r"^(strong|weak) +(\d) +([\d.]+) +([\d.]+) +[\d.]+ +[\d.]+$", output, flags=re.M)
    assert [row[:2] for row in rows] == [("strong", "1"), ("strong", "2"), ("weak", "1"), ("weak", "2")]
    assert [float(row[3]) for row in rows[::2]] == [1.0, 1.0]
    for reader in ("raphael_dist", "webdataset"):
        assert re.search(rf"^{reader} +\d+ images/s  +\d+ images per second of processor time  first", output, flags=re.M)
        assert re.search(rf"^{reader}, [a-z ]+ +\d+ samples/s of", output, flags=re.M)


def test_the_balance_of_time_experts_by_hand():
    """Groups of 4: one sample for each of 4 experts, or all for one."""
    draws = {"even": lambda _: [0, 1, 2, 3] * 3, "worst": lambda _: [0] * 4 + [1] * 4 + [0, 1, 2, 3]}
    even, worst = bench_balance(draws, 2, 4, 4)
    assert (even.mean, even.worst) == (1.0, 1.0)
    assert (worst.mean, worst.worst) == (np.mean([4, 4, 1]), 4.0)


def test_a_save_is_compared_with_deepspeeds_and_leaves_nothing(tmp_path):
    folder = tmp_path / "bench"
    output = run_ranks(["tools/bench.py", "checkpoint", "--folder", str(folder), "--repeats", "1"], 2)[0]
    size = int(re.search(r"^(\d+) MiB on 2 ranks", output, flags=re.M)[1])
    seconds = {name: float(s) for name, s in re.findall(r"^  (\S.*?) {2,}([\d.]+) s", output, flags=re.M)}
    expected = sum(prod(s) for s in parameter_shapes(load_config("emoji-tiny")).values()) * 16 / 2**20
    assert expected <= size < 1.05 * expected
    assert 0 < seconds["stall"] < seconds["until published"]
    assert {"DeepSpeed save_checkpoint", "copy and sync", "convert to canonical"} <= seconds.keys()
    assert not folder.exists()


def test_conversions_of_a_made_up_model_are_timed(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TREE))
    sizes = ["--config", str(tmp_path / "tiny.yaml"), "--kinds", "master", "--world", "2", "--repeats", "1"]
    convert.run(parser.parse_args([*sizes, "--folder", str(tmp_path / "bench")]))
    printed = capsys.readouterr().out
    rows = r"copy and sync .*1\.00 x copy\n  convert to canonical .*\n  convert to deepspeed .*"
    assert re.search(rf"\(master\) in 2 files, one process, median of 1\n  {rows}\nmost memory in use: ", printed)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.yaml"]


def test_a_made_up_model_is_a_whole_checkpoint_of_different_numbers(tmp_path):
    convert.make_run(config_from_tree(TREE), ("master", "ema"), Options(world=2), tmp_path / "run")
    found = open_checkpoint("raphael", tmp_path / "run")
    found.check()
    assert found.kinds() == ("master", "exp_avg", "exp_avg_sq", "ema")
    assert not any(found.read("exp_avg", name, 0, 1).any() for name in found.shapes), "moments that are not there are zero"
    assert len({float(found.read("ema", name, 0, 1)) for name in found.shapes}) > 10
