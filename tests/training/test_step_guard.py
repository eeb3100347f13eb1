"""Steps that would harm the weights are skipped or undone on all ranks alike; the counts survive a resume."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from raphael_dist.checkpoint.manifest import MANIFEST, seal
from raphael_dist.checkpoint.reader import CheckpointReader
from raphael_dist.config.run_sections import Train
from raphael_dist.errors import EXIT_NON_FINITE
from raphael_dist.storage.files import sha256
from raphael_dist.training.metrics_files import read_metrics
from raphael_dist.training.step_guard import MIN_LOSSES, Guard
from tests.lib.forks import Forks, output_of

G = 12


def spec(stage: int = 2, ep: tuple[int, int] = (2, 2), faults: dict | None = None, **sections: dict) -> dict[str, Any]:
    base: dict[str, dict[str, Any]] = {
        "train": {"global_batch_size": G, "micro_batch_size": 3, "max_steps": 4, "log_every": 1},
        "optim": {"lr": 1e-3, "max_grad_norm": 0.5},
        "checkpoint": {"every": 1, "keep": 99},
        "parallel": {"space_ep": ep[0], "time_ep": ep[1]},
    }
    merged = {n: {**base.get(n, {}), **sections.get(n, {})} for n in base | sections}
    return {"stage": stage, "sections": merged, "faults": faults or {}}


def at(run: Path, step: int) -> CheckpointReader:
    return CheckpointReader(run / "checkpoints" / f"step-{step:08d}")


def differing(a: CheckpointReader, b: CheckpointReader) -> set[str]:
    """Return the kinds in which two checkpoints differ anywhere."""
    return {kind for kind in a.kinds() for name in a.shapes if not torch.equal(a.whole(kind, name), b.whole(kind, name))}


def log(run: Path) -> str:
    return (run / "train.log").read_text()


# ---- the rule -------------------------------------------------------------------------------------------------------


def guard(**settings: Any) -> Guard:
    return Guard(Train(**settings))


def test_spike_is_sigma_deviations_above_the_mean_of_recent_losses() -> None:
    g = guard(spike_sigma=3, spike_window=10)
    for loss in [1.0, 3.0] * 5:  # mean 2, deviation 1
        assert g.judge(1e9) == "good", "too few losses to judge"
        g.record_good_step(loss)
    assert [g.judge(x) for x in (-100, 5.0, 5.001)] == ["good", "good", "spike"]
    assert [g.judge(x) for x in (math.nan, math.inf, -math.inf)] == ["not finite"] * 3
    for _ in range(10):
        g.record_good_step(100.0)  # the old losses leave the window
    assert g.judge(100.0) == "good"
    assert guard(spike_sigma=0).judge(1e30) == "good"


def test_guard_restored_from_json_judges_alike() -> None:
    import json

    g = guard(spike_sigma=2)
    for i in range(2 * MIN_LOSSES):
        g.record_good_step(1 / (i + 3))
    g.skip()
    other = guard(spike_sigma=2)
    other.restore(json.loads(json.dumps(g.state())))
    assert other.state() == g.state()
    limit = 0.2
    for _ in range(60):  # close in on the limit: both agree at every float on the way
        limit = math.nextafter(limit, 1) if g.judge(limit) == "good" else math.nextafter(limit, 0)
        assert g.judge(limit) == other.judge(limit)


def test_only_consecutive_skips_end_a_run() -> None:
    g = guard(max_skipped=3)
    assert [g.skip(), g.skip()] == [False, False]
    g.record_good_step(1.0)
    assert [g.skip(), g.skip(), g.skip()] == [False, False, True]
    assert g.skipped == 5


# ---- real runs ------------------------------------------------------------------------------------------------------

INF = {"ranks": [1], "steps": [2], "name": "down_blocks.0.attentions.0.transformer_blocks.0.space_moe.w1"}
CASES = [
    ("nan", 2, (2, 2), "float32"),
]
SLOW_CASES = [
    ("inf_grad", 2, (2, 2), "float32"),
    ("nan", 0, (1, 1), "float32"), ("nan", 1, (1, 2), "float32"), ("nan", 3, (1, 1), "float32"),
    ("inf_grad", 0, (1, 1), "float32"), ("inf_grad", 1, (2, 1), "float32"), ("inf_grad", 3, (1, 1), "float32"),
    ("nan", 1, (2, 2), "bfloat16"), ("inf_grad", 2, (2, 2), "bfloat16"), ("inf_grad", 1, (1, 1), "bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "stage", "ep", "dtype"), [*CASES, *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW_CASES)]
)
def test_bad_step_of_one_rank_is_skipped_on_all_and_changes_nothing(
    forks: Forks, tmp_path: Path, kind: str, stage: int, ep: tuple[int, int], dtype: str
) -> None:
    run = tmp_path / "run"
    bad = G + 4  # the second step, the second rank
    faults = {"nan": [bad]} if kind == "nan" else {"inf_grad": INF}
    forks.must(run, 2, **spec(stage, ep, faults, train={"dtype": dtype}))
    short = tmp_path / "short"  # ends with the bad step, and so is saved then
    forks.must(short, 2, **spec(stage, ep, faults, train={"dtype": dtype, "max_steps": 2}))
    assert differing(at(run, 1), at(short, 2)) == set()
    assert not (run / "checkpoints" / "step-00000002").exists(), "saved while steps were being skipped"
    assert differing(at(short, 2), at(run, 3)) == {"master", "exp_avg", "exp_avg_sq", "ema"}
    assert [at(run, step).manifest["updates"] for step in (1, 3, 4)] == [1, 2, 3]
    assert at(run, 4).manifest["samples_seen"] == 4 * G, "the samples of a skipped step are used up"
    assert [v for _, v in read_metrics(run / "metrics.jsonl")["train/skipped"]] == [0, 1, 1, 1]
    assert (f"positions [{bad}]" if kind == "nan" else f"positions {G} to {2 * G - 1}") in log(run)
    if kind == "inf_grad":
        return
    # Adam counts updates, not steps: a resumed run must not count the skipped one.
    again = tmp_path / "again"
    shutil.copytree(short, again)
    forks.must(again, 2, **spec(stage, ep, train={"dtype": dtype}))
    assert differing(at(run, 4), at(again, 4)) == set()


def test_three_bad_steps_in_a_row_end_the_run_with_exit_code_3(forks: Forks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    waiting = {"every": 1, "keep": 99, "background": False}
    faults = {"nan": [2 * G, 3 * G + 5, 4 * G + 11]}
    codes = forks.run(run, 2, **spec(faults=faults, train={"max_steps": 9}, checkpoint=waiting))
    assert codes == [EXIT_NON_FINITE] * 2, output_of(run, 2)
    errors = [line for line in output_of(run, 2).splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "step 5 was skipped, because the loss is not finite" in errors[0]
    assert "train.max_skipped=3 of consecutive skipped steps" in errors[0]
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*"))[-1] == "step-00000002"
    assert at(run, 2).integrity_error() is None


def poison(run: Path, step: int) -> None:
    """Let the weights of a checkpoint be such that no loss is finite, and the checkpoint be whole."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in manifest["files"]:
        with safe_open(folder / name, framework="pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        save_file({key: t * 1e30 if "master" in key else t for key, t in tensors.items()}, folder / name, metadata)
        manifest["files"][name] |= {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    (folder / MANIFEST).write_bytes(seal(manifest))


@pytest.mark.slow
def test_checkpoint_without_good_steps_is_left_for_an_earlier_one(forks: Forks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    forks.must(run, 2, **spec())
    poison(run, 4)
    poison(run, 3)
    ends = forks.run(run, 2, **spec(train={"max_steps": 5}))  # before three steps are skipped
    assert ends == [EXIT_NON_FINITE] * 2
    assert "weights are not saved: the last steps were skipped" in output_of(run, 2)
    assert not (run / "checkpoints" / "step-00000005").exists()
    forks.must(run, 2, **spec(train={"max_steps": 9}))
    for step in (4, 3):
        assert f"No step after step {step} was good" in log(run)
        assert (run / "checkpoints" / f"damaged-step-{step:08d}").is_dir()
    assert f"back at step 2 and continues with sample {10 * G}" in log(run)
    assert at(run, 9).integrity_error() is None
    assert at(run, 9).manifest["samples_seen"] == (4 + 3 + 3 + 7) * G
    # Without one before it the run ends as it does after good steps, and nothing is renamed.
    alone = tmp_path / "alone"
    forks.must(alone, 2, **spec(train={"max_steps": 1}))
    poison(alone, 1)
    assert forks.run(alone, 2, **spec()) == [EXIT_NON_FINITE] * 2
    assert [path.name for path in (alone / "checkpoints").glob("*step*")] == ["step-00000001"]


def test_return_to_an_earlier_stage_trains_with_its_settings(forks: Forks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stages = {"stages": [{"until": 3, "set": {"optim.lr": 0.01}}, {"set": {"optim.lr": 0.02}}]}
    forks.must(run, 2, **spec(train={"max_steps": 3, **stages}))
    poison(run, 3)
    forks.must(run, 2, **spec(train={"max_steps": 7, "log_every": 1, **stages}))
    assert "No step after step 3 was good" in log(run)
    assert "step 2: the rollback returned to an earlier stage" in log(run)
    rates = dict(read_metrics(run / "metrics.jsonl")["optim/lr"])
    assert [rates[step] for step in (3, 4, 7)] == pytest.approx([0.01, 0.02, 0.02])
    assert at(run, 7).manifest["samples_seen"] == (3 + 3 + 5) * G  # those of the skipped steps are not seen again


SPIKE = MIN_LOSSES + 2  # the step, from 1
SPIKED = {"spike": [(SPIKE - 1) * G + 7]}


def spike_spec(action: str, max_steps: int = SPIKE + 1, faults: dict | None = None, stage: int = 2) -> dict[str, Any]:
    ep = (2, 2) if stage in (1, 2) else (1, 1)
    train = {"max_steps": max_steps, "spike_action": action, "spike_sigma": 8.0}
    return spec(stage, ep, SPIKED if faults is None else faults, train=train, checkpoint={"every": SPIKE - 2})


@pytest.mark.slow
def test_spike_is_skipped_before_it_changes_the_weights(forks: Forks, tmp_path: Path) -> None:
    run, calm = tmp_path / "run", tmp_path / "calm"
    forks.must(run, 2, **spike_spec("skip", SPIKE))
    forks.must(calm, 2, **spike_spec("skip", SPIKE - 1))
    assert differing(at(run, SPIKE), at(calm, SPIKE - 1)) == set()
    assert f"step {SPIKE}: the loss" in log(run)
    assert dict(read_metrics(run / "metrics.jsonl")["train/spikes"])[SPIKE] == 1
    assert "is a spike" not in log(calm)


@pytest.mark.slow
def test_spike_action_warn_only_warns(forks: Forks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    forks.must(run, 2, **spike_spec("warn", SPIKE))
    assert "is a spike" in log(run)
    assert at(run, SPIKE).manifest["updates"] == SPIKE


@pytest.mark.parametrize("stage", [2, *(pytest.param(s, marks=pytest.mark.slow) for s in (0, 1, 3))])
def test_rollback_continues_after_the_spike_and_survives_a_resume(forks: Forks, tmp_path: Path, stage: int) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    forks.must(run, 2, **spike_spec("rollback", stage=stage))
    back = SPIKE - 2  # the checkpoint before the spike
    assert f"back at step {back} and continues with sample {SPIKE * G}" in log(run)
    assert at(run, back).manifest["samples_seen"] == SPIKE * G
    # Steps back+1 .. SPIKE+1 were taken after it, on samples that were not seen before.
    assert at(run, SPIKE + 1).manifest["samples_seen"] == (SPIKE + SPIKE + 1 - back) * G
    assert at(run, SPIKE + 1).manifest["updates"] == SPIKE + 1
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / f"step-{SPIKE + 1:08d}")
    (again / "train.log").unlink()
    forks.must(again, 2, **spike_spec("rollback", stage=stage))
    assert "is a spike" not in log(again), "the samples of the spike were met again"
    assert differing(at(run, SPIKE + 1), at(again, SPIKE + 1)) == set()


@pytest.mark.slow
def test_logs_and_annealing_follow_steps_not_positions(forks: Forks, tmp_path: Path) -> None:
    """A run with a stage of another global batch, a skipped step and a rollback: logged once a step, and once for all."""
    first, last, half = 4, SPIKE + 3, G // 2
    spike = first * half + (SPIKE - first) * G + 7  # a position of step SPIKE + 1
    faults = {"nan": [2 * half + 1], "spike": [spike], "gate_noise": str(tmp_path / "noise.jsonl")}
    run_spec = spike_spec("rollback", last, faults)
    run_spec["sections"]["diffusion"] = {"min_snr_gamma": 5.0}
    run_spec["sections"]["train"]["stages"] = [
        {"until": first, "set": {"train.global_batch_size": half}},
        {"set": {"train.global_batch_size": G}},
    ]
    run_spec["sections"] |= {"model": {"gate_noise": 0.5, "gate_noise_steps": 20}, "edge": {"weight": 0.0}}
    each, whole = tmp_path / "each", tmp_path / "whole"
    forks.must(each, 2, **run_spec)
    assert f"back at step {SPIKE - 2} and continues with sample" in log(each)
    noise = [json.loads(line) for line in (tmp_path / "noise.jsonl").read_text().splitlines()]
    assert {step for step, *_ in noise} == set(range(1, last + 1))
    for step, low, high in noise:
        assert (low, high) == pytest.approx([0.5 * (1 - (step - 1) / 20)] * 2)
    run_spec["sections"]["train"]["log_every"] = 99
    forks.must(whole, 2, **run_spec)
    steps = [step for step in range(1, last + 1) if step != 3]  # that step is skipped
    for tag in ("train/loss", "train/loss_weighted"):
        losses = read_metrics(each / "metrics.jsonl")[tag]
        assert [step for step, _ in losses] == [step for step, _ in shown(each, tag)] == steps
        (logged,) = read_metrics(whole / "metrics.jsonl")[tag]  # since the second stage began
        expected = sum(loss for step, loss in losses if step > first) / (last - first)
        assert logged == (last, pytest.approx(expected, rel=1e-5))
    weighted, plain = (dict(read_metrics(each / "metrics.jsonl")[tag]) for tag in ("train/loss_weighted", "train/loss"))
    assert all(weighted[step] <= plain[step] for step in steps)  # predicted noise: every weight is at most 1
    rows = [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "optim/lr" in row] == list(range(1, last + 1))


def shown(run: Path, tag: str) -> list[tuple[int, float]]:
    """Return what TensorBoard shows of a tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.slow
def test_repeated_rollbacks_end_the_run_on_a_failing_disk(forks: Forks, tmp_path: Path) -> None:
    """Spikes and a failing disk: neither the next save nor the return is noted anywhere, nor a word printed."""
    run, every_second = tmp_path / "run", [(SPIKE - 1 + 2 * k) * G for k in range(40)]
    faults = {"spike": every_second, "saving": [{"ranks": [0], "step": SPIKE - 1, "file_size": 1000}]}
    run_spec = spike_spec("rollback", SPIKE + 9, faults)
    run_spec["sections"]["checkpoint"] |= {"every": 1, "keep": 2}
    codes = forks.run(run, 2, **run_spec)
    assert codes == [EXIT_NON_FINITE] * 2, output_of(run, 2)
    assert at(run, SPIKE - 2).integrity_error() is None
    assert at(run, SPIKE - 2).manifest["guard"]["rollbacks"] == 0


def test_rollbacks_are_counted_until_there_is_another_checkpoint() -> None:
    g = guard(max_skipped=3)
    # The second checkpoint begins at none; a restart counts on from what the checkpoint says.
    assert [g.record_rollback({}, 10), g.record_rollback({}, 10), g.record_rollback({}, 20)] == [False, False, False]
    assert [g.record_rollback({}, 20), g.record_rollback({}, 20)] == [False, True]
    assert guard(max_skipped=3).record_rollback({"rollbacks": 2}, 20)


@pytest.mark.slow
def test_repeated_rollbacks_end_the_run(forks: Forks, tmp_path: Path) -> None:
    run, late = tmp_path / "run", [(SPIKE - 1 + k) * G for k in range(40)]
    codes = forks.run(run, 2, **spike_spec("rollback", SPIKE + 9, {"spike": late}))
    assert codes == [EXIT_NON_FINITE] * 2, output_of(run, 2)
    assert "too often without reaching a new checkpoint: 3 times" in output_of(run, 2)
