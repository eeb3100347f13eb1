"""Whole runs with real ranks on real images, at a size for tests: the demo's emoji as 8 x 8 pixels, a tiny U-Net."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from raphael_dist import sample, train
from raphael_dist.checkpoint.reader import CheckpointReader, open_newest
from raphael_dist.errors import EXIT_INTERRUPTED, EXIT_NON_FINITE
from raphael_dist.runtime.ranks import free_port
from raphael_dist.training.metrics_files import read_metrics
from tests.data.features.test_edges import needs_weights
from tests.lib.documents import DOCUMENTS, blocks_of, text_of
from tests.lib.launch import ROOT, rank_env, run_ranks

SMALL = ["--config=tests/fixtures/small.yaml"]

SPREAD = ("parallel.space_ep=2", "parallel.time_ep=2", "parallel.placement=shard")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.cache_dir={tmp_path_factory.mktemp('cache')}"


def arguments(run_dir: Path, cache: str, stage: int, *options: str) -> list[str]:
    config = f"--deepspeed_config=ds_configs/zero{stage}.json"
    return ["tests/workers/train_run.py", *SMALL, config, f"run.dir={run_dir}", cache, *options]


def files_of(run_dir: Path, step: int) -> dict:
    return json.loads((run_dir / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())["files"]


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 3))])
def test_resumed_run_equals_an_uninterrupted_run_bit_for_bit(tmp_path: Path, cache: str, stage: int) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_ranks(arguments(whole, cache, stage, "train.max_steps=6"), 2)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000006")
    run_ranks(arguments(resumed, cache, stage, "train.max_steps=6"), 2)
    # Sizes and SHA-256 of weights, moments and average on every rank.
    assert files_of(whole, 6) == files_of(resumed, 6)
    loss_a, loss_b = (read_metrics(d / "metrics.jsonl")["train/loss"] for d in (whole, resumed))
    assert loss_a == loss_b
    assert len(loss_a) == 6


@pytest.mark.slow
def test_killed_and_resumed_run_equals_an_uninterrupted_run(tmp_path: Path, cache: str) -> None:
    options = ("train.max_steps=20", "checkpoint.every=10", "sample.prompts=[]")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_ranks(arguments(whole, cache, 2, *options), 2)
    env = rank_env(2)
    ranks = [
        subprocess.Popen(
            [sys.executable, *arguments(killed, cache, 2, *options)], env={**env, "RANK": r, "LOCAL_RANK": r}, cwd=ROOT
        )
        for r in "01"
    ]
    try:
        wait_for(lambda: (killed / "checkpoints" / "latest").is_file() and len(logged(killed)) > 12)
    finally:
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
            rank.wait()
    assert not (killed / "checkpoints" / "step-00000020").exists(), "the kill came too late to prove anything"
    run_ranks(arguments(killed, cache, 2, *options), 2)
    assert files_of(whole, 20) == files_of(killed, 20)
    a, b = (read_metrics(d / "metrics.jsonl") for d in (whole, killed))
    assert a["train/loss"] == b["train/loss"]
    assert a["val/loss"] == b["val/loss"]


def test_run_with_expert_parallelism_equals_the_run_of_one_rank(tmp_path: Path, cache: str) -> None:
    """The whole trainer: validation, samples and averages, and a checkpoint that one process loads."""
    spread, alone = tmp_path / "spread", tmp_path / "alone"
    run_ranks(arguments(alone, cache, 1, "train.max_steps=3"), 1)
    options = (*SPREAD, "model.checkpoint_activations=blocks")
    run_ranks(arguments(spread, cache, 2, "train.max_steps=3", *options), 2)
    expected, metrics = (read_metrics(folder / "metrics.jsonl") for folder in (alone, spread))
    for tag in ("train/loss", "optim/grad_norm", "val/loss", "moe/space/L00/density", "moe/time/L00/load_max"):
        assert [v for _, v in metrics[tag]] == pytest.approx([v for _, v in expected[tag]], rel=1e-4), tag
    for part in ("experts", "gradients", "weights"):
        assert all(v == 0 for _, v in expected[f"comm/{part}"])
        assert all(v > 0 for _, v in metrics[f"comm/{part}"])
    theirs, ours = (averages(folder) for folder in (alone, spread))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=2e-3, msg=name)


@pytest.mark.parametrize(
    ("stage", "spread"), [(2, SPREAD), pytest.param(3, (), marks=pytest.mark.slow)], ids=["expert parallelism", "ZeRO-3"]
)
def test_super_resolution_on_two_ranks_equals_that_on_one(
    stage: int, spread: tuple[str, ...], tmp_path: Path, cache: str
) -> None:
    for name in "ab":
        pixels = np.random.default_rng(ord(name)).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    images = f"sample.images=[{tmp_path}/a.png,{tmp_path}/b.png]"
    options = ("train.max_steps=3", "upscale.factor=2", 'sample.prompts=["a sun","a sun"]', images, "sample.seed=4")
    two, alone = tmp_path / "two", tmp_path / "alone"
    run_ranks(arguments(alone, cache, 1, *options), 1)
    run_ranks(arguments(two, cache, stage, *options, *spread), 2)
    expected, metrics = (read_metrics(folder / "metrics.jsonl") for folder in (alone, two))
    for tag in ("train/loss", "val/loss"):
        assert [v for _, v in metrics[tag]] == pytest.approx([v for _, v in expected[tag]], rel=1e-4), tag
    drawn, theirs = (np.asarray(Image.open(f / "samples" / "step-00000003.png")).astype(int) for f in (two, alone))
    assert np.abs(drawn - theirs).mean() < 1
    assert sample.main(["--checkpoint", str(alone), "--out", str(tmp_path / "again.png")]) == 0
    assert (np.asarray(Image.open(tmp_path / "again.png")) == theirs).all(), (
        "the same from the checkpoint, with no prompt given"
    )
    first, second = np.split(theirs[:, : theirs.shape[1] // 2 * 2], 2, axis=1)
    assert (first != second).any(), "two small images"


@pytest.mark.slow
@needs_weights
@pytest.mark.parametrize("stage", [2, 3])
def test_control_run_draws_samples_from_edge_images(stage: int, tmp_path: Path, cache: str) -> None:
    options = ("train.max_steps=1", "image.buckets=[[32,32]]")
    run_ranks(arguments(tmp_path / "base", cache, 1, *options, "sample.prompts=[]"), 1)
    square = np.zeros((32, 32), np.uint8)
    square[8:24, 8:24] = 255
    Image.fromarray(square).save(tmp_path / "square.png")
    control = (*options, "control.enabled=true", f"run.init_from={tmp_path / 'base'}", "model.gate_noise=0")
    drawing = ('sample.prompts=["a sun"]', f"sample.images=[{tmp_path}/square.png]")
    run_ranks(arguments(tmp_path / "run", cache, stage, *control, *drawing), 2)
    assert (tmp_path / "run" / "samples" / "step-00000001.png").is_file()
    missing = ('sample.prompts=["a sun"]', "sample.images=[no.png]")
    output = run_ranks(arguments(tmp_path / "other", cache, stage, *control, *missing), 2, exit_code=2)
    assert "sample.images=no.png cannot be read" in output[0]


def test_user_error_is_left_next_to_the_exit_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher ends all ranks as soon as one exits: rank 0 gets time to print the error before the others exit."""
    slept: list[float] = []
    monkeypatch.setattr(train, "time", SimpleNamespace(sleep=slept.append))  # not the sleep of other threads
    monkeypatch.setenv("RAPHAEL_EXIT_FILE", str(tmp_path / "code"))
    for rank, printed, waits in (("1", False, [train.HEAD_START_S]), ("0", True, [])):
        monkeypatch.setenv("RANK", rank)
        slept.clear()
        assert train.main(["--config", "emoji-tiny", "train.max_step=1"]) == 2
        assert (tmp_path / "code").read_text() == "2\n"
        (why,) = (tmp_path / "code.why").read_text().splitlines()
        assert "did you mean 'train.max_steps'?" in why
        assert (why in capsys.readouterr().err) == printed
        assert slept == waits


def averages(run_dir: Path) -> dict[str, torch.Tensor]:
    reader = open_newest(run_dir)
    return {name: reader.whole("ema", name) for name in reader.shapes}


def logged(run_dir: Path) -> list[str]:
    file = run_dir / "metrics.jsonl"
    return file.read_text().splitlines() if file.is_file() else []


def wait_for(condition: object, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, cache: str) -> Path:
    """A finished run of 4 steps, started by the deepspeed launcher as a user would."""
    folder = tmp_path_factory.mktemp("launched") / "run"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    command = [*launcher, "raphael_dist/train.py", *arguments(folder, cache, 2, "train.max_steps=4")[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def documented_run_files() -> list[str]:
    """Return the files and folders/ of blocks in the documents that show a run directory, as runs/NAME/."""
    blocks = [block for document in DOCUMENTS for block in blocks_of(document) if block.lines[0].startswith("runs/NAME/")]
    words = " ".join(line.partition("#")[0] for block in blocks for line in block.lines).replace("runs/NAME/", "").split()
    names = [word for word in words if re.fullmatch(r"[\w/-]+(/|\.\w+)", word)]
    return [re.sub(r"step-\d+", "step-00000004", name) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("program", [["--module", "raphael_dist", "sample"], ["raphael_dist/sample.py"]])
def test_deepspeed_launcher_samples_on_several_ranks(program: list[str], run_dir: Path, tmp_path: Path) -> None:
    """The launcher puts --local_rank behind the name of the program, before the command."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    options = ["--checkpoint", str(run_dir), "--prompt=a", "--prompt=b", "--steps=1", "--out", str(tmp_path / "a.png")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, *program, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "a.png").is_file()


def test_deepspeed_launcher_writes_metrics_samples_and_checkpoint(run_dir: Path) -> None:
    metrics = read_metrics(run_dir / "metrics.jsonl")
    expected = {
        "train/loss", "train/loss_weighted", "train/loss_edge", "optim/lr", "optim/grad_norm", "throughput/samples_per_s",
        "throughput/tflops", "throughput/mfu", "time/data_wait_frac", "memory/peak_gib", "val/loss", "val/loss_t0",
        "moe/space/L00/load_max", "moe/space/L00/load_min", "moe/space/L00/density", "moe/time/L00/load_max",
        "moe/time/L00/load_min", "comm/experts", "comm/gradients", "comm/weights",
    }  # fmt: skip
    assert expected <= set(metrics)
    assert [step for step, _ in metrics["train/loss"]] == [1, 2, 3, 4]
    documented = " ".join(map(text_of, DOCUMENTS))
    assert [path.name for path in run_dir.iterdir() if not path.name.startswith(".") and path.name not in documented] == []
    assert [name for name in documented_run_files() if not (run_dir / name).exists()] == []
    assert (run_dir / "samples" / "step-00000004.png").is_file()
    assert list((run_dir / "tensorboard").iterdir())
    assert (run_dir / "checkpoints" / "latest").read_text() == "step-00000004"
    assert "step 4/4" in (run_dir / "train.log").read_text()
    assert json.loads((run_dir / "versions.json").read_text())["torch"]


def test_samples_depend_on_seed_scheduler_and_weights_only(run_dir: Path, tmp_path: Path) -> None:
    def grid(name: str, *options: str) -> np.ndarray:
        out = tmp_path / name
        command = ["--checkpoint", str(run_dir), "--prompt", "a red heart", "--prompt", "a sun", "--out", str(out)]
        assert sample.main([*command, "--steps", "3", *options]) == 0
        return np.asarray(Image.open(out))

    first = grid("a.png")
    assert (first == grid("b.png")).all()
    assert (first != grid("c.png", "--seed", "1")).any()
    assert (first != grid("d.png", "--scheduler", "dpm++")).any()
    assert (first != grid("e.png", "--weights", "master")).any()


def test_sampling_refuses_wrong_arguments_in_one_line(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        ("--checkpoint", str(tmp_path)): "contains no checkpoint",
        ("--checkpoint", str(run_dir), "--steps", "0"): "--steps 0 must be",
        ("--checkpoint", str(run_dir), "--guidance", "-1"): "--guidance -1.0 must be",
        ("--checkpoint", str(run_dir), "--size", "0", "8"): "--size 0 8 must be",
    }
    for arguments_, message in cases.items():
        assert sample.main([*arguments_, "--prompt", "x", "--out", str(tmp_path / "x.png")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_damaged_checkpoint_is_refused_by_name(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    broken = tmp_path / "run"
    shutil.copytree(run_dir, broken)
    for folder in (broken / "checkpoints").glob("step-*"):
        file = folder / "rank-00001.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    assert sample.main(["--checkpoint", str(broken), "--prompt", "x"]) == 2
    assert "rank-00001.safetensors does not match its checksum" in capsys.readouterr().err


def test_resume_uses_the_newest_checkpoint_that_verifies(run_dir: Path, tmp_path: Path, cache: str) -> None:
    damaged = tmp_path / "run"
    shutil.copytree(run_dir, damaged)
    file = damaged / "checkpoints" / "step-00000004" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    output = run_ranks(arguments(damaged, cache, 2, "train.max_steps=4"), 2)[0]
    assert "resumed at step 3" in output
    assert "skipping checkpoint" in output
    assert files_of(damaged, 4) == files_of(run_dir, 4)


def test_non_finite_loss_ends_all_ranks_and_keeps_the_checkpoint(tmp_path: Path, cache: str) -> None:
    folder = tmp_path / "run"
    options = ("optim.lr=1e30", "optim.max_grad_norm=0", "optim.warmup_steps=0", "checkpoint.every=1", "train.max_steps=6")
    outputs = run_ranks(arguments(folder, cache, 1, *options, "sample.prompts=[]"), 2, exit_code=EXIT_NON_FINITE)
    error = next(line for line in outputs[0].splitlines() if line.startswith("error: "))
    assert "not finite" in error or "gradient norm" in error
    assert "Traceback" not in "".join(outputs)
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        assert CheckpointReader(checkpoint).integrity_error() is None


def test_signal_to_one_rank_stops_all_after_saving(tmp_path: Path, cache: str) -> None:
    folder, env = tmp_path / "run", rank_env(2)
    options = ("train.max_steps=4000", "checkpoint.every=0", "sample.prompts=[]", "data.val_shards=[]")
    command = [sys.executable, *arguments(folder, cache, 2, *options)]
    output = {"stdout": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen(command, env={**env, "RANK": r, "LOCAL_RANK": r}, cwd=ROOT, **output) for r in "01"]
    try:
        wait_for(lambda: len(logged(folder)) >= 2)
        ranks[1].send_signal(signal.SIGTERM)  # SIGUSR1 is in test_watchdog.py
        assert "stopped by a signal" in ranks[0].communicate(timeout=60)[0]
        assert [rank.wait(timeout=60) for rank in ranks] == [EXIT_INTERRUPTED] * 2
    finally:
        for rank in ranks:
            rank.kill()
    assert (folder / "checkpoints" / "latest").is_file()


@pytest.mark.parametrize(("world_size", "spread"), [pytest.param(1, (), marks=pytest.mark.slow), (2, SPREAD)])
def test_several_image_sizes_train_and_validate(world_size: int, spread: tuple, tmp_path: Path, cache: str) -> None:
    """Ranks that share experts see one size at a time, also where the batch of 11 is no multiple of their 6 slots."""
    sizes = ("image.buckets=[[8,8],[8,16]]", "data.bucket_run=6", "train.micro_batch_size=3", "train.global_batch_size=11")
    options = ("train.max_steps=2", "sample.prompts=[]", *spread)
    output = run_ranks(arguments(tmp_path / "run", cache, 1, *sizes, *options), world_size)[0]
    assert "validation loss" in output


def test_resume_with_other_image_sizes_batch_and_learning_rate(tmp_path: Path, cache: str) -> None:
    """A curriculum by hand: step 4 begins at sample 30, within a run of one image size and no multiple of the batch."""
    folder, quiet = tmp_path / "run", ("sample.prompts=[]", "data.val_shards=[]")
    run_ranks(arguments(folder, cache, 1, "train.max_steps=3", *quiet), 1)
    changed = ("image.buckets=[[8,8],[8,16]]", "data.bucket_run=7", "train.global_batch_size=11", "optim.lr=1e-4")
    names = [name.partition("=")[0] for name in changed]
    options = (*changed, "train.max_steps=5", f"run.allow_change=[{', '.join(names)}]", *quiet)
    output = run_ranks(arguments(folder, cache, 1, *options), 1)[0]
    assert "resumed at step 3" in output
    assert all(f"{name} was " in output for name in names)
    last = CheckpointReader(folder / "checkpoints" / "step-00000005").manifest
    assert (last["samples_seen"], last["updates"]) == (3 * 10 + 2 * 11, 5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_run_resumes_bit_for_bit(tmp_path: Path, cache: str, stage: int) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = ("train.max_steps=4", "checkpoint.every=2", "train.dtype=bfloat16")
    run_ranks(arguments(whole, cache, stage, *options), 2)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000004")
    run_ranks(arguments(resumed, cache, stage, *options), 2)
    assert files_of(whole, 4) == files_of(resumed, 4)


def test_bfloat16_run_starts_from_unrounded_float32_weights(run_dir: Path, tmp_path: Path, cache: str) -> None:
    options = ("train.max_steps=1", "train.dtype=bfloat16", "optim.lr=1e-30", f"run.init_from={run_dir}", "ema.decay=0")
    output = run_ranks(arguments(tmp_path / "run", cache, 2, *options, "sample.prompts=[]", "data.val_shards=[]"), 2)[0]
    assert f"from the weights of {run_dir}" in output
    source, started = (open_newest(folder / "checkpoints") for folder in (run_dir, tmp_path / "run"))
    for name in source.shapes:
        averaged = source.whole("ema", name)
        assert torch.equal(started.whole("master", name), averaged)
        assert torch.equal(started.whole("ema", name), averaged), "the average begins at the weights"


def test_wrong_settings_are_refused_with_field_and_values(run_dir: Path, tmp_path: Path, cache: str) -> None:
    (tmp_path / "empty.tar").write_bytes(b"\0" * 10240)
    used = tmp_path / "used"
    shutil.copytree(run_dir, used)
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    (other / "config.yaml").unlink()
    base = [cache]
    cases = {
        "channels": ([*base, "model.latent_channels=4"], ["model.latent_channels=4 must be 3"]),
        "text width": ([*base, "model.text_width=100"], ["model.text_width=100 must be 384"]),
        "missing shard": ([*base, "data.shards=nowhere.tar"], ["nowhere.tar"]),
        "empty data set": ([*base, f"data.shards={tmp_path}/empty.tar"], ["empty.tar"]),
        "no encoder": ([*base, "text.encoder=/nowhere"], ["text.encoder", "/nowhere"]),
        "no edge maps": ([*base, "data.edge_maps=none"], ["edge.weight", "edge"]),
        "batch too small": ([*base, "train.global_batch_size=1"], None),
        "another run": ([*base, f"run.dir={used}", "run.seed=7"], ["run.seed was 0", "7", "run.allow_change=[run.seed]"]),
        "another model": ([*base, f"run.dir={other}", "model.gate_width=9"], ["model.gate_width", "8", "9"]),
    }
    spec = tmp_path / "cases.json"
    # Each in a directory of its own, unless the case is about the directory.
    own = {
        name: [] if "run.dir=" in "".join(overrides) else [f"run.dir={tmp_path / name}"]
        for name, (overrides, _) in cases.items()
    }
    spec.write_text(json.dumps({name: [*own[name], *overrides] for name, (overrides, _) in cases.items()}))
    run_ranks(["tests/workers/refusals.py", str(tmp_path / "out.json"), str(spec)], 1)
    messages = json.loads((tmp_path / "out.json").read_text())
    for name, (_, parts) in cases.items():
        if parts is None:
            assert messages[name] is None, f"{name}: {messages[name]}"
            continue
        assert messages[name], f"{name} was accepted"
        assert "\n" not in messages[name]
        assert all(part in messages[name] for part in parts), f"{name}: {messages[name]}"


def test_wrong_arguments_exit_with_2_and_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    cases = {
        ("--config", "emoji-tiny", "train.max_step=5"): "did you mean 'train.max_steps'?",
        ("--config", "emoji-tini"): "did you mean 'emoji-tiny'?",
        (
            "--config",
            "emoji-tiny",
            "--config",
            "raphael-3b",
        ): "--config must be given once",
        ("--config", "emoji-tiny", "train.micro_batch_size=0"): "train.micro_batch_size=0 must be at least 1",
        ("--config", "raphael-3b"): "data.shards=[] must name the training data",
        ("--config", "emoji-tiny", "--world-size", "64", "--dry-run"): "must be at least the number of ranks (64)",
        ("--config", "emoji-tiny", "--world-size", "4", "--dry-run", "parallel.space_ep=3"): "the number of ranks (4)",
        ("--config", "emoji-tiny", "parallel.time_ep=2"): "parallel.time_ep=2 must divide the number of ranks (1)",
        ("--config", "emoji-tiny", "--deepspeed_config", "nowhere.json"): "nowhere.json must be an existing file",
        ("--config", "emoji-tiny", "--world-size", "-4", "--dry-run"): "--world-size=-4 must be at least 1",
        (
            "--config",
            "emoji-tiny",
            "image.buckets=[[8,8],[8,16]]",
        ): "data.bucket_run=1 must be at least train.micro_batch_size=8",
        ("--config", "emoji-tiny", "run.seed=100000000000000000000000"): "run.seed=100000000000000000000000 must be below",
        ("--config", "emoji-tiny", "diffusion.beta_end=5"): "diffusion.beta_start",
    }
    for argv, message in cases.items():
        assert train.main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1


def cpu_seconds(*arguments: str) -> tuple[float, str]:
    """Run Python; return its processor time, which other processes of a busy machine hardly change, and its stderr."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stderr


@pytest.mark.parametrize("flag", ["--help", "--plan"])
def test_help_and_plan_are_quick_and_import_no_torch(flag: str) -> None:
    code = f"from raphael_dist import train; train.main(['--config', 'raphael-3b', '{flag}'])"
    assert " torch\n" not in cpu_seconds("-X", "importtime", "-c", code)[1]
    # These imports, which every start needs, measure the speed of the machine. torch takes 19 times as long.
    baseline = min(cpu_seconds("-c", "import pydantic, yaml, json, logging")[0] for _ in range(3))
    assert min(cpu_seconds("-c", code)[0] for _ in range(3)) < 8 * baseline
