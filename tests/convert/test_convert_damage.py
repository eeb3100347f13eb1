"""A problem of a source, a target or the command line is reported in one line, and no files are left."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raphael_dist.convert.conversion import convert
from raphael_dist.convert.inspect_checkpoint import inspect_layers
from raphael_dist.convert.layouts import names, open_checkpoint
from raphael_dist.convert.write_plan import Options
from raphael_dist.errors import UserError
from tests.lib.checkpoints import (
    MOE,
    assert_same,
    copy,
    fingerprint,
    flip_a_bit,
    handmade_canonical,
    in_manifest,
    options,
    random_state,
    read_state,
    rewrite_checksums,
    tool,
)
from tests.lib.launch import ROOT


def test_convert_prints_a_table_and_a_mistake_is_one_line(tmp_path, sources):
    _, canonical = sources["moe"]
    done = tool("--from", "auto", canonical, "--to", "raphael", tmp_path / "run", "--ep", "2,1", "--world", 2)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("master", "exp_avg_sq", "ema", "161,512", "646,048", "GB/s"))
    again = tool("--from", "auto", canonical, "--to", "raphael", tmp_path / "run", launcher=("env",))  # a program of its own
    assert (again.returncode, again.stdout, len(again.stderr.splitlines())) == (2, "", 1)
    assert "exists already" in again.stderr


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("canonical", [], "--to peft requires the run directory .* --from canonical"),
        ("auto", [], "--from auto .* contains no checkpoint"),
        ("auto", ["--world", "2"], "--world 2 have no effect with --to peft"),
        ("auto", ["--dtype", "float16"], "--dtype float16 is not supported with --to peft"),
        ("auto", ["--lora", "x"], "--to peft does not support the option --lora, but --lora x is given"),
    ],
)
def test_adapter_export_refuses_other_sources_and_options(tmp_path, sources, source, options, message):
    done = tool("--from", source, sources["moe"][1], "--to", "peft", tmp_path / "out", *options)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert re.search(message, done.stderr)
    assert not list(tmp_path.iterdir())


MISTAKES = [
    ("canonical", "raphel", {}, r"--to raphel: there is no such layout \(did you mean 'raphael'\?\)"),
    ("canonicl", "raphael", {}, r"--from canonicl: there is no such layout"),
    ("deepspeed", "raphael", {}, r"must contain mp_rank_00_model_states.pt, or a file `latest`"),
    ("dense", "raphael", {}, r"manifest.json is not valid: it must have the layout dense"),
    ("canonical", "dense", {}, r"--to dense requires a model without experts"),
    ("canonical", "raphael", {"world": 4, "space_ep": 3}, r"parallel.space_ep=3 must divide the number of ranks \(4\)"),
    ("canonical", "raphael", {"world": 4, "space_ep": 4}, r"parallel.space_ep=4 must divide model.space_experts=6"),
    ("canonical", "deepspeed", {"world": 2, "space_ep": 2, "stage": 3}, r"stage 3, which cannot partition sharded experts"),
    ("canonical", "deepspeed", {"world": 13}, r"train.global_batch_size=12 must be at least the number of ranks .13."),
]


@pytest.mark.parametrize(("a", "b", "chosen", "message"), MISTAKES)
def test_mistake_is_reported_by_value_and_leaves_nothing(tmp_path, sources, a, b, chosen, message):
    with pytest.raises(UserError, match=message):
        convert(a, sources["moe"][1], b, tmp_path / "out", Options(**chosen))
    assert not list(tmp_path.iterdir())


EXPERT = "down_blocks.0.attentions.0.transformer_blocks.0.space_moe.experts.3.w1.weight"


def lose_an_expert(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(EXPERT)
    save_file(tensors, folder / "model.safetensors")
    rewrite_checksums(folder)


def double_an_expert(folder: Path) -> None:
    save_file({EXPERT: load_file(folder / "model.safetensors")[EXPERT]}, folder / "model-more.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    in_manifest(folder, files=manifest["files"] | {"model-more.safetensors": fingerprint(folder / "model-more.safetensors")})


def one_expert_more(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[EXPERT.replace(".3.", ".6.")] = tensors[EXPERT].clone()
    save_file(tensors, folder / "model.safetensors")
    rewrite_checksums(folder)


def another_architecture(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["model"]["gate_width"] = 11
    in_manifest(folder, config=manifest["config"])


def truncate(folder: Path) -> None:
    os.truncate(folder / "ema.safetensors", (folder / "ema.safetensors").stat().st_size - 5)


def remove_a_file(folder: Path) -> None:
    (folder / "exp_avg_sq.safetensors").unlink()


def huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")


def overlapping(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def name_outside(folder: Path) -> None:
    in_manifest(folder, files={"../model.safetensors": {"bytes": 1, "sha256": ""}})


def only_the_average(folder: Path) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    in_manifest(folder, files={"ema.safetensors": files["ema.safetensors"]})


DAMAGES = [
    (lose_an_expert, r"master of down.*space_moe.w1, expert 3 is missing"),
    (double_an_expert, r"experts.3.w1.weight must be in one file only"),
    (one_expert_more, r"experts.6.w1.weight, which is not a tensor of the model"),
    (another_architecture, r"must have the shape \[11\], but it has \[10\]"),
    (flip_a_bit, r"exp_avg.safetensors does not match its checksum"),
    (truncate, r"ema.safetensors cannot be read .*: the file has .* bytes, but the tensors in its header end at"),
    (remove_a_file, r"exp_avg_sq.safetensors is missing"),
    (huge_header, r"truncated, or is not a safetensors file"),
    (overlapping, r"overlap or leave a gap"),
    (name_outside, r"lies outside the folder"),
    (lambda f: in_manifest(f, files={}), r"must contain the fp32 weights .* it only contains other files"),
    (lambda f: in_manifest(f, files={"model.safetensors": {"bytes": 1}}), r"each entry of files must have a size"),
    (lambda f: in_manifest(f, step="7"), r"step='7'.*must be"),
    (only_the_average, r"must contain the fp32 weights .* contains ema"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=lambda d: getattr(d, "__name__", ""))
def test_damaged_source_is_refused_and_leaves_nothing(tmp_path, sources, damage, message):
    folder = copy(sources["moe"][1], tmp_path / "source")
    damage(folder)
    with pytest.raises(UserError, match=message):
        convert("auto", folder, "raphael", tmp_path / "out", Options())
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_disk_that_is_too_small_is_reported_before_writing(tmp_path, sources, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"requires 2584192 bytes .*, but 1000 bytes are free"):
        convert("auto", sources["moe"][1], "canonical", tmp_path / "out", Options())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["canonical", "deepspeed"])
def test_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path, sources, to):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200 << 10, before[1]))
    try:
        done = tool("--from", "auto", sources["moe"][1], "--to", to, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, "cannot be read or written: File too large" in line) == (2, True), line
    assert not list(tmp_path.iterdir())


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_few_files_are_open_at_a_time_and_none_after_a_failure(tmp_path, sources, monkeypatch):
    _, canonical = sources["moe"]
    most, fsync = [], os.fsync

    def slow(descriptor: int) -> None:
        most.append(open_files())
        time.sleep(0.02)
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", slow)
    before = open_files()
    convert("auto", canonical, "raphael", tmp_path / "out", options("raphael", (60, 1, 1, 1)))
    assert max(most) < before + 30
    for i in range(3):
        folder = copy(canonical, tmp_path / f"source{i}")
        flip_a_bit(folder)
        with pytest.raises(UserError, match="does not match its checksum"):
            convert("auto", folder, "raphael", tmp_path / "none", Options())
    assert open_files() <= before


def test_weights_that_the_manifest_does_not_list_are_refused(tmp_path, sources):
    convert("auto", sources["moe"][1], "diffusers", tmp_path / "out", options("diffusers", part_bytes=200_000))
    (tmp_path / "out/unet/diffusion_pytorch_model.safetensors.index.json").unlink()
    parts = {}
    for part in (tmp_path / "out/unet").glob("*.safetensors"):
        parts |= load_file(part)
    save_file(parts, tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"diffusion_pytorch_model.safetensors must be listed in the manifest"):
        open_checkpoint("auto", tmp_path / "out")


def test_damaged_newest_checkpoint_is_skipped_with_a_note(tmp_path, sources):
    convert("auto", sources["moe"][1], "raphael", tmp_path / "run", options("raphael"))
    newer = copy(tmp_path / "run/checkpoints/step-00000007", tmp_path / "run/checkpoints/step-00000009")
    in_manifest(newer, step=9)
    os.truncate(newer / "rank-00001.safetensors", 1000)
    report = convert("auto", tmp_path / "run", "canonical", tmp_path / "out", Options())
    assert len(report.notes) == 1
    assert re.search(
        r"a newer checkpoint cannot be used, so step-00000007 is read: .*step-00000009.*cannot be read", report.notes[0]
    )


def test_target_that_is_a_link_or_has_a_bad_name_is_refused(tmp_path, sources):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for target, message in ((tmp_path / "link", "exists already"), (tmp_path / ("x" * 300), "File name too long")):
        with pytest.raises(UserError, match=message):
            convert("auto", sources["moe"][1], "canonical", target, Options())
    with pytest.raises(UserError, match="File name too long"):
        open_checkpoint("auto", tmp_path / ("x" * 300))
    assert [p.name for p in tmp_path.iterdir()] == ["link"]


def test_killed_conversion_leaves_no_target_and_the_next_one_works(tmp_path, sources):
    state, canonical = sources["moe"]
    arguments = ["--from", "auto", str(canonical), "--to", "raphael", str(tmp_path / "out"), "--world", "6"]
    code = "import os, sys; sys.path[:0] = ['tools']; import raphael_dist.convert.conversion as c\n"
    code += "write, done = c.write_file, []\n"
    code += "def dying(*a):\n  done.append(write(*a))\n  if len(done) == 3: os.kill(os.getpid(), 9)\n  return done[-1]\n"
    code += "c.write_file = dying; import convert_checkpoint; convert_checkpoint.main(sys.argv[1:])"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=env, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == [".converting-out"]
    for layout in names():
        with pytest.raises(UserError):
            open_checkpoint(layout, tmp_path / ".converting-out")
    convert("auto", canonical, "raphael", tmp_path / "out", options("raphael", (6, 1, 1, 1)))
    assert_same(read_state("auto", tmp_path / "out"), state)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


DEEPSPEED_DAMAGES = [
    (lambda f: (f / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink(), r"the file of rank 1 is missing"),
    (
        lambda f: os.truncate(f / "zero_pp_rank_1_mp_rank_00_optim_states.pt", 999),
        r"rank_1.*cannot be read as a file of torch.save",
    ),
    (
        lambda f: (f / "mp_rank_00_model_states.pt").write_bytes(b""),
        r"mp_rank_00_model_states.pt cannot be read as a file of torch.save",
    ),
    (
        lambda f: (f / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(
            (f / "zero_pp_rank_0_mp_rank_00_optim_states.pt").read_bytes()
        ),
        r"of conv_in.bias in the flat buffer must be none, as the model",
    ),
    (lambda f: torch.save({}, f / "mp_rank_00_model_states.pt"), r"must contain .*(dp_world_size|optimizer_state)"),
    (lambda f: torch.save([1], f / "mp_rank_00_model_states.pt"), r"must contain .*dp_world_size"),
    (
        lambda f: torch.save({}, f / "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        r"must contain .*(dp_world_size|optimizer_state)",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DEEPSPEED_DAMAGES)
def test_damage_to_deepspeed_files_is_reported_by_name(tmp_path, sources, damage, message):
    convert("auto", sources["moe"][1], "deepspeed", tmp_path / "ds", options("deepspeed", (2, 2, 1, 2)))
    damage(tmp_path / "ds/global_step7")
    with pytest.raises(UserError, match=message):
        convert("deepspeed", tmp_path / "ds", "canonical", tmp_path / "out", Options())
    assert not (tmp_path / "out").exists()


def test_inspection_reports_dead_and_identical_experts(tmp_path):
    state = random_state(MOE, ("master",))
    layer = "mid_block.attentions.0.transformer_blocks.0.space_moe"
    for leaf in ("w1", "b1", "w2", "b2"):
        state["master", f"{layer}.{leaf}"][2] = 0
        state["master", f"{layer}.{leaf}"][5] = state["master", f"{layer}.{leaf}"][1]
    folder = handmade_canonical(tmp_path / "canonical", MOE, state)
    reports = {report.name: report for report in inspect_layers(open_checkpoint("auto", folder))}
    dead = "expert 2 is dead: all its weights are zero"
    assert reports[layer].warnings == [dead, "experts 1 and 5 are identical"]
    assert not any(report.warnings for name, report in reports.items() if name != layer)
    expected = sum(float(state["master", f"{layer}.{leaf}"][3].square().sum()) for leaf in ("w1", "b1", "w2", "b2")) ** 0.5
    assert reports[layer].norms[3] == pytest.approx(expected)
    done = tool(folder, name="inspect_checkpoint")
    assert done.returncode == 1, done.stderr
    assert all(
        word in done.stdout for word in ("canonical", "step 7", "84 samples", "161,512", "identical", "dead", "verified")
    )
