"""Conversions: every layout to every other and back bit for bit; what is wrong is said in one line, with nothing left."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from itertools import product
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from safetensors.torch import load_file, save_file

from raphael_dist.checkpoint.reader import CheckpointReader, open_newest
from raphael_dist.convert.inspect import layers, open_for_inspection
from raphael_dist.convert.plan import Options
from raphael_dist.convert.run import LAYOUTS, convert, open_checkpoint
from raphael_dist.engine.fragments import MOMENTS
from raphael_dist.errors import UserError
from raphael_dist.storage.tensorfile import HashedFile
from raphael_dist.storage.torchfile import load_tree, write_tree
from tests.checkpoints import KINDS, assert_same, fingerprint, handmade_canonical, random_state, read_state, vouch_again
from tests.launch import ROOT
from tests.synthetic import TREE, tiny_config

MOE = tiny_config(parallel={"placement": ["move"]})
DENSE = tiny_config(
    model={**TREE["model"], "space_experts": 0, "time_experts": 0, "time_activation": "geglu", "expert_width": [64, 96]},
    edge={"weight": 0.0},
)
WHOLE = ("raphael", "deepspeed", "canonical")
# (ranks, space_ep, time_ep, ZeRO): all that is allowed on 1, 2, 4 and 6 ranks, of which some run each time.
QUICK = [
    (1, 1, 1, 0),
    (1, 1, 1, 1),
    (2, 1, 1, 3),
    (2, 2, 2, 2),
    (4, 2, 4, 1),
    (4, 1, 1, 0),
    (6, 3, 2, 2),
    (6, 6, 1, 1),
    (6, 1, 1, 3),
]
TOPOLOGIES = [
    *[(world, 1, 1, stage) for world in (1, 2, 4, 6) for stage in (0, 1, 2, 3)],
    *[(world, space, time, stage)
      for world in (2, 4, 6) for space in (1, 2, 3, 6) for time in (1, 2, 4) for stage in (1, 2)
      if world % space == 0 and world % time == 0 and (space, time) != (1, 1)],
]  # fmt: skip
TOPOLOGIES = [pytest.param(t, id=str(t), marks=() if t in QUICK else pytest.mark.slow) for t in TOPOLOGIES]


def options(layout: str, topology: tuple[int, int, int, int] = (2, 1, 1, 2), **more) -> Options:
    world, space, time, stage = topology
    more.setdefault("unet_only", layout == "diffusers")
    more.setdefault("weights", None if layout in WHOLE else "master")
    return Options(space, time, world, stage, **more) if layout in ("raphael", "deepspeed") else Options(**more)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Return the random state of a model with experts and of a dense one, and their canonical folders."""
    folder = tmp_path_factory.mktemp("sources")
    found = {}
    for name, config in (("moe", MOE), ("dense", DENSE)):
        state = random_state(config)
        found[name] = (state, handmade_canonical(folder / name, config, state))
    return found


def weights(state, kind="master"):
    return {("master", name): value for (k, name), value in state.items() if k == kind}


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_state_survives_every_topology_in_both_layouts_of_ranks(tmp_path, sources, topology):
    state, canonical = sources["moe"]
    convert("canonical", canonical, "raphael", tmp_path / "run", options("raphael", topology))
    assert_same(read_state("auto", tmp_path / "run"), state)
    convert("auto", tmp_path / "run", "deepspeed", tmp_path / "ds", options("deepspeed", topology))
    found = open_checkpoint("auto", tmp_path / "ds")
    assert (found.step, found.updates, found.samples_seen, found.dataset) == (7, 5, 84, "synthetic")
    assert found.guard == {"skipped": 2}
    assert_same(read_state("auto", tmp_path / "ds"), state)
    convert("auto", tmp_path / "ds", "canonical", tmp_path / "back", Options(part_bytes=300_000))
    assert len(list((tmp_path / "back").glob("model-*"))) > 2
    manifest = json.loads((tmp_path / "back/manifest.json").read_text())
    assert (manifest["step"], manifest["updates"], manifest["guard"]) == (7, 5, {"skipped": 2})
    assert_same(read_state("auto", tmp_path / "back"), state)


@pytest.mark.parametrize("placement", [["keep", "move"], ["move", "keep"], ["auto"]])
def test_levels_whose_experts_stay_on_every_rank_survive_too(tmp_path, placement):
    config = tiny_config(parallel={"placement": placement})
    state = random_state(config)
    handmade_canonical(tmp_path / "canonical", config, state)
    for stage, layout in ((1, "raphael"), (2, "deepspeed")):
        convert("canonical", tmp_path / "canonical", layout, tmp_path / layout, options(layout, (4, 2, 4, stage)))
        assert_same(read_state("auto", tmp_path / layout), state)


PAIRS = [("moe", a, b) for a, b in product(LAYOUTS, LAYOUTS) if "dense" not in (a, b) and a != b] + [
    ("dense", a, b) for a, b in product(LAYOUTS, LAYOUTS) if "megablocks" not in (a, b) and "dense" in (a, b)
]


@pytest.mark.parametrize(("model", "a", "b"), PAIRS)
def test_every_pair_of_layouts_goes_there_and_back_bit_for_bit(tmp_path, sources, model, a, b):
    state, canonical = sources[model]
    convert("canonical", canonical, a, tmp_path / "a", options(a))
    before = read_state(a, tmp_path / "a")
    assert_same(before, state if a in WHOLE else weights(state))
    report = convert(a, tmp_path / "a", b, tmp_path / "b", options(b, (4, 1, 1, 1)))
    convert(b, tmp_path / "b", a, tmp_path / "again", options(a, (3, 1, 1, 2)))
    after = read_state(a, tmp_path / "again")
    if {a, b} <= set(WHOLE):
        assert_same(after, state)
        return
    # A layout of weights alone lets go of the moments, and says so; a run without them begins with zeros.
    assert_same(weights(after), weights(state))
    assert a not in WHOLE or any("left out" in note for note in report.notes)
    assert all(not value.any() for (kind, _), value in after.items() if kind in MOMENTS)


def test_the_trainers_own_reader_reads_a_converted_run(tmp_path, sources):
    state, canonical = sources["moe"]
    convert("canonical", canonical, "raphael", tmp_path / "run", options("raphael", (4, 2, 4, 2)))
    reader = open_newest(tmp_path / "run")
    assert (reader.step, reader.damage(), reader.kinds()) == (7, None, set(KINDS))
    assert reader.config().parallel.space_ep == 2
    for (kind, name), value in state.items():
        assert torch.equal(reader.whole(kind, name), value)


def test_weights_alone_make_a_run_that_begins_at_step_0_with_zero_moments(tmp_path, sources):
    state, canonical = sources["moe"]
    convert("canonical", canonical, "megablocks", tmp_path / "mb", options("megablocks", weights="ema"))
    report = convert("megablocks", tmp_path / "mb", "raphael", tmp_path / "run", options("raphael"))
    assert "zero, at step 0" in report.notes[0]
    reader = CheckpointReader(tmp_path / "run/checkpoints/step-00000000")
    name = next(iter(reader.shapes))
    assert torch.equal(reader.whole("master", name), state["ema", name])
    assert not reader.whole("exp_avg", name).any()


def test_megablocks_matrices_compute_what_the_experts_compute(tmp_path, sources):
    """x @ w1^T, activation, @ w2, with rows sorted by expert, as its grouped product takes them."""
    state, canonical = sources["moe"]
    convert("canonical", canonical, "megablocks", tmp_path / "mb", options("megablocks"))
    stored = load_file(tmp_path / "mb/model.safetensors")
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.space_moe"
    w1, w2 = (state["master", f"{layer}.w{i}"] for i in (1, 2))
    experts, width, dim = w1.shape
    assert stored[f"{layer}.experts.mlp.w1"].shape == stored[f"{layer}.experts.mlp.w2"].shape == (experts * width, dim)
    x = torch.randn(5, dim)
    for k in range(experts):
        rows = slice(k * width, (k + 1) * width)
        theirs = torch.relu(x @ stored[f"{layer}.experts.mlp.w1"][rows].t()) @ stored[f"{layer}.experts.mlp.w2"][rows]
        torch.testing.assert_close(theirs, torch.relu(x @ w1[k].t()) @ w2[k].t())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_megablocks_own_module_takes_the_matrices(tmp_path):
    layers = pytest.importorskip("megablocks.layers.mlp")
    arguments = pytest.importorskip("megablocks.layers.arguments")
    config = tiny_config(model={**TREE["model"], "channels": [64, 64], "head_dim": 16, "expert_width": [128, 128]})
    state = random_state(config, ("master",))
    handmade_canonical(tmp_path / "canonical", config, state)
    convert("canonical", tmp_path / "canonical", "megablocks", tmp_path / "mb", options("megablocks", dtype=torch.bfloat16))
    stored = load_file(tmp_path / "mb/model.safetensors")
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.space_moe"
    module = layers.GroupedMLP(
        arguments.Arguments(
            hidden_size=64, ffn_hidden_size=128, moe_num_experts=6, mlp_impl="grouped", fp16=False, bf16=True
        )
    )
    module.load_state_dict({f"w{i}": stored[f"{layer}.experts.mlp.w{i}"] for i in (1, 2)})
    x, counts = torch.randn(18, 64).bfloat16(), torch.tensor([3, 0, 5, 4, 2, 4])
    found = module.cuda()(x.cuda(), counts).float().cpu()
    w1, w2 = (state["master", f"{layer}.w{i}"].bfloat16().float() for i in (1, 2))
    gelu = torch.nn.GELU("tanh")
    rows = [gelu(r.float() @ w1[k].t()) @ w2[k].t() for k, r in enumerate(x.split(counts.tolist()))]
    torch.testing.assert_close(found, torch.cat(rows), rtol=3e-2, atol=3e-2 * float(found.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_when_asked(tmp_path, sources, dtype):
    state, canonical = sources["dense"]
    convert("canonical", canonical, "dense", tmp_path / "unet", options("dense", dtype=dtype))
    rounded = {key: value.to(dtype).float() for key, value in weights(state).items()}
    assert_same(read_state("auto", tmp_path / "unet"), rounded)


# ---- what is wrong ---------------------------------------------------------------------------------------------------


def tool(
    *arguments: object, name: str = "convert_checkpoint", launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    command = [*launcher, sys.executable, f"tools/{name}.py", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def test_the_command_line_prints_a_table_and_a_mistake_is_one_line(tmp_path, sources):
    _, canonical = sources["moe"]
    done = tool("--from", "auto", canonical, "--to", "raphael", tmp_path / "run", "--ep", "2,1", "--world", 2)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("master", "exp_avg_sq", "ema", "161,512", "646,048", "GB/s"))
    again = tool("--from", "auto", canonical, "--to", "raphael", tmp_path / "run")
    assert (again.returncode, again.stdout, len(again.stderr.splitlines())) == (2, "", 1)
    assert "exists already" in again.stderr


MISTAKES = [
    ("canonical", "raphel", {}, r"--to raphel: unknown layout \(did you mean 'raphael'\?\)"),
    ("canonicl", "raphael", {}, r"--from canonicl: unknown layout"),
    ("deepspeed", "raphael", {}, r"neither mp_rank_00_model_states.pt nor a `latest`"),
    ("dense", "raphael", {}, r"manifest.json is not of layout dense"),
    ("canonical", "dense", {}, r"--to dense: the model has experts or edge modules"),
    ("canonical", "raphael", {"world": 4, "space_ep": 3}, r"parallel.space_ep = 3 must divide the number of ranks \(4\)"),
    ("canonical", "raphael", {"world": 4, "space_ep": 4}, r"parallel.space_ep = 4 must divide model.space_experts = 6"),
    ("canonical", "deepspeed", {"world": 2, "space_ep": 2, "stage": 3}, r"ZeRO-3 cannot partition experts"),
    ("canonical", "deepspeed", {"world": 13}, r"train.global_batch = 12 cannot serve 13 ranks"),
]


@pytest.mark.parametrize(("a", "b", "chosen", "message"), MISTAKES)
def test_a_mistake_names_what_was_given_and_leaves_nothing(tmp_path, sources, a, b, chosen, message):
    with pytest.raises(UserError, match=message):
        convert(a, sources["moe"][1], b, tmp_path / "out", Options(**chosen))
    assert not list(tmp_path.iterdir())


def copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


EXPERT = "down_blocks.0.attentions.0.transformer_blocks.0.space_moe.experts.3.w1.weight"


def lose_an_expert(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(EXPERT)
    save_file(tensors, folder / "model.safetensors")
    vouch_again(folder)


def double_an_expert(folder: Path) -> None:
    save_file({EXPERT: load_file(folder / "model.safetensors")[EXPERT]}, folder / "model-more.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model-more.safetensors"] = fingerprint(folder / "model-more.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def one_expert_more(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[EXPERT.replace(".3.", ".6.")] = tensors[EXPERT].clone()
    save_file(tensors, folder / "model.safetensors")
    vouch_again(folder)


def another_architecture(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["model"]["gate_width"] = 11
    (folder / "manifest.json").write_text(json.dumps(manifest))


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "exp_avg.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "exp_avg.safetensors").write_bytes(data)


def truncate(folder: Path) -> None:
    os.truncate(folder / "ema.safetensors", (folder / "ema.safetensors").stat().st_size - 5)


def remove_a_file(folder: Path) -> None:
    (folder / "exp_avg_sq.safetensors").unlink()


def huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")


def overlapping(folder: Path) -> None:
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"a": one, "b": one}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def name_outside(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../model.safetensors"] = {"bytes": 1, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def in_manifest(folder: Path, **values) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | values))


def only_the_average(folder: Path) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    in_manifest(folder, files={"ema.safetensors": files["ema.safetensors"]})


DAMAGES = [
    (lose_an_expert, r"master of down.*space_moe.w1, expert 3 is missing"),
    (double_an_expert, r"experts.3.w1.weight is there twice"),
    (one_expert_more, r"experts.6.w1.weight is no tensor of this.*one expert too many"),
    (another_architecture, r"has shape \[10\], the model wants \[11\]"),
    (flip_a_bit, r"exp_avg.safetensors does not match its checksum"),
    (truncate, r"ema.safetensors cannot be read: it has .* bytes, its header says"),
    (remove_a_file, r"exp_avg_sq.safetensors is missing"),
    (huge_header, r"cut short, or no safetensors file"),
    (overlapping, r"overlap or leave a gap"),
    (name_outside, r"names a file outside"),
    (lambda f: in_manifest(f, files={}), r"it holds no weights \(nothing at all\)"),
    (lambda f: in_manifest(f, files={"model.safetensors": {"bytes": 1}}), r"gives a file no size and checksum"),
    (lambda f: in_manifest(f, step="7"), r"step and samples_seen must be numbers"),
    (only_the_average, r"it holds no weights \(ema\)"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=lambda d: getattr(d, "__name__", ""))
def test_a_damaged_source_is_refused_and_leaves_nothing(tmp_path, sources, damage, message):
    folder = copy(sources["moe"][1], tmp_path / "source")
    damage(folder)
    with pytest.raises(UserError, match=message):
        convert("auto", folder, "raphael", tmp_path / "out", Options())
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_disk_that_is_too_small_is_found_out_before_writing(tmp_path, sources, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"2584192 bytes are needed, 1000 are free"):
        convert("auto", sources["moe"][1], "canonical", tmp_path / "out", Options())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["canonical", "deepspeed"])
def test_a_disk_that_fills_up_meanwhile_is_one_line_and_nothing_stays(tmp_path, sources, to):
    limit = ("bash", "-c", 'ulimit -f 200; exec "$@"', "bash")  # KiB a file may have
    done = tool("--from", "auto", sources["moe"][1], "--to", to, tmp_path / "out", launcher=limit)
    assert (done.returncode, done.stderr.splitlines()) == (2, ["error: File too large"])
    assert not list(tmp_path.iterdir())


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_few_files_are_open_at_a_time_however_many_are_written_and_none_after_a_failure(tmp_path, sources, monkeypatch):
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


def test_weights_that_no_manifest_names_are_not_taken_for_verified(tmp_path, sources):
    convert("auto", sources["moe"][1], "diffusers", tmp_path / "out", options("diffusers", part_bytes=200_000))
    (tmp_path / "out/unet/diffusion_pytorch_model.safetensors.index.json").unlink()
    parts = {}
    for part in (tmp_path / "out/unet").glob("*.safetensors"):
        parts |= load_file(part)
    save_file(parts, tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"diffusion_pytorch_model.safetensors is not in the manifest"):
        open_checkpoint("auto", tmp_path / "out")


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_note(tmp_path, sources):
    convert("auto", sources["moe"][1], "raphael", tmp_path / "run", options("raphael"))
    newer = copy(tmp_path / "run/checkpoints/step-00000007", tmp_path / "run/checkpoints/step-00000009")
    os.truncate(newer / "rank-00001.safetensors", 1000)
    report = convert("auto", tmp_path / "run", "canonical", tmp_path / "out", Options())
    assert len(report.notes) == 1
    assert re.search(r"skipped, step-00000007 is taken instead: .*step-00000009.*cannot be read", report.notes[0])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_without_moments_keeps_its_step(tmp_path, optimizer):
    config = tiny_config(optim={"kind": optimizer})
    folder = handmade_canonical(tmp_path / "canonical", config, random_state(config, ("master", "ema")))
    updates = 5 if optimizer == "sgd" else 0  # AdamW before its first update
    in_manifest(folder, updates=updates)
    convert("auto", folder, "deepspeed", tmp_path / "ds", options("deepspeed"))
    convert("auto", tmp_path / "ds", "raphael", tmp_path / "run", options("raphael", (4, 2, 2, 1)))
    for path in (tmp_path / "ds", tmp_path / "run"):
        found = open_checkpoint("auto", path)
        assert (found.step, found.samples_seen, found.updates, found.guard) == (7, 84, updates, {"skipped": 2})
    weights = convert("auto", folder, "megablocks", tmp_path / "weights", Options())
    assert "ema here" in weights.notes[0]
    convert("auto", tmp_path / "weights", "raphael", tmp_path / "new", options("raphael"))
    assert open_checkpoint("auto", tmp_path / "new").step == 0, "weights alone are no run"


def test_a_model_is_upcycled_from_any_layout_once(tmp_path, sources):
    config = tiny_config(model={**TREE["model"], "time_experts": 0, "time_activation": "geglu", "expert_width": [64, 96]})
    report = convert("auto", sources["dense"][1], "canonical", tmp_path / "out", Options(), config)
    assert open_checkpoint("auto", tmp_path / "out").config.model.space_experts == config.model.space_experts
    assert report.rows[0].kind == "master"
    with pytest.raises(UserError, match=r"--config: .* has experts or edge modules already; leave it out"):
        convert("auto", tmp_path / "out", "canonical", tmp_path / "again", Options(), config)


def test_a_target_that_is_a_link_or_has_no_proper_name_is_refused(tmp_path, sources):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for target, message in ((tmp_path / "link", "exists already"), (tmp_path / ("x" * 300), "File name too long")):
        with pytest.raises(UserError, match=message):
            convert("auto", sources["moe"][1], "canonical", target, Options())
    with pytest.raises(UserError, match="File name too long"):
        open_checkpoint("auto", tmp_path / ("x" * 300))
    assert [p.name for p in tmp_path.iterdir()] == ["link"]


def test_a_killed_conversion_leaves_no_target_and_the_next_one_works(tmp_path, sources):
    state, canonical = sources["moe"]
    arguments = ["--from", "auto", str(canonical), "--to", "raphael", str(tmp_path / "out"), "--world", "6"]
    code = "import os, sys; sys.path[:0] = ['tools']; import raphael_dist.convert.run as c\n"
    code += "write, done = c.write_file, []\n"
    code += "def dying(*a):\n  done.append(write(*a))\n  if len(done) == 3: os.kill(os.getpid(), 9)\n  return done[-1]\n"
    code += "c.write_file = dying; import convert_checkpoint; convert_checkpoint.main(sys.argv[1:])"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=env, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == [".converting-out"]
    for layout in LAYOUTS:
        with pytest.raises(UserError):
            open_checkpoint(layout, tmp_path / ".converting-out")
    convert("auto", canonical, "raphael", tmp_path / "out", options("raphael", (6, 1, 1, 1)))
    assert_same(read_state("auto", tmp_path / "out"), state)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---- pickles ---------------------------------------------------------------------------------------------------------


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, sources, file):
    convert("auto", sources["moe"][1], "deepspeed", tmp_path / "ds", options("deepspeed", (2, 2, 1, 2)))
    canary, victim = tmp_path / "canary", tmp_path / "ds/global_step7" / file
    torch.save({"module": Evil(canary)}, victim)
    torch.load(victim, weights_only=False)
    time.sleep(0.1)
    assert canary.exists()  # it would run
    canary.unlink()
    done = tool("--from", "auto", tmp_path / "ds", "--to", "canonical", tmp_path / "out")
    assert done.returncode == 2
    assert "is refused: it is a pickle of more than weights, and was not run" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    for path, unpickle, message in (
        (tmp_path / "ds", False, "is not opened"),
        (tmp_path / "ds", True, "was not run"),
        (victim, False, "no manifest vouches for"),
        (victim, True, "was not run"),
    ):
        with pytest.raises(UserError, match=message):
            open_for_inspection(path, unpickle, None)
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


class ByGetattr:
    """Is pickled as the first releases of Python 3.11 pickle a member of an enum."""

    def __init__(self, of: object, name: str) -> None:
        self.of, self.name = of, name

    def __reduce__(self):
        return getattr, (self.of, self.name)


def test_stages_of_zero_are_read_as_any_python_writes_them_and_written_alike_by_all(tmp_path):
    stages = {stage.name: stage for stage in ZeroStageEnum}
    torch.save({name: ByGetattr(ZeroStageEnum, name) for name in stages}, tmp_path / "old.pt")
    with HashedFile(tmp_path / "ours.pt") as file:
        write_tree(file, stages)
    file.entry()
    assert load_tree(tmp_path / "old.pt") == load_tree(tmp_path / "ours.pt") == {n: int(s) for n, s in stages.items()}
    assert torch.load(tmp_path / "ours.pt", weights_only=False) == stages
    with zipfile.ZipFile(tmp_path / "ours.pt") as archive:
        assert b"getattr" not in archive.read("archive/data.pkl")


@pytest.mark.parametrize(("of", "name"), [(ZeroStageEnum, "__class__"), (LossScaler, "__init__"), ("text", "upper")])
def test_getattr_of_anything_else_is_refused(tmp_path, of, name):
    torch.save({"zero_stage": ByGetattr(of, name)}, tmp_path / "file.pt")
    with pytest.raises(UserError, match="is refused: it is a pickle of more than weights, and was not run"):
        load_tree(tmp_path / "file.pt")


def other_byte_order(path: Path) -> None:
    torch.save({"w": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else data)


def contains_itself(path: Path) -> None:
    loop: list = []
    loop.append(loop)
    torch.save(loop, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (other_byte_order, "other byte order"),
        (contains_itself, "recursion"),
        (lambda path: torch.save({"w": torch.ones(2, 3).t()}, path), r"a tensor of shape \[3, 2\] is not contiguous"),
        (lambda path: torch.save({"w": torch.ones(2).to_sparse()}, path), "is damaged, or no file of torch.save"),
    ],
)
def test_a_file_of_torch_that_cannot_be_taken_is_one_line(tmp_path, write, message):
    write(tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=message):
        open_checkpoint("dense", tmp_path / "model.ckpt")


def test_inspection_warns_of_dead_and_identical_experts_and_says_what_is_there(tmp_path):
    state = random_state(MOE, ("master",))
    layer = "mid_block.attentions.0.transformer_blocks.0.space_moe"
    for leaf in ("w1", "b1", "w2", "b2"):
        state["master", f"{layer}.{leaf}"][2] = 0
        state["master", f"{layer}.{leaf}"][5] = state["master", f"{layer}.{leaf}"][1]
    folder = handmade_canonical(tmp_path / "canonical", MOE, state)
    found = {one.name: one for one in layers(open_checkpoint("auto", folder))}
    assert (found[layer].dead, found[layer].same) == ([2], [(1, 5)])
    assert not any(one.warnings for name, one in found.items() if name != layer)
    expected = sum(float(state["master", f"{layer}.{leaf}"][3].square().sum()) for leaf in ("w1", "b1", "w2", "b2")) ** 0.5
    assert found[layer].norms[3] == pytest.approx(expected)
    done = tool(folder, name="inspect_checkpoint")
    assert done.returncode == 1, done.stderr
    assert all(
        word in done.stdout for word in ("canonical", "step 7", "84 samples", "161,512", "identical", "dead", "verified")
    )


DEEPSPEED_DAMAGES = [
    (lambda f: (f / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink(), r"the ZeRO file of rank 1 of 2 is missing"),
    (lambda f: os.truncate(f / "zero_pp_rank_1_mp_rank_00_optim_states.pt", 999), r"rank_1.*is damaged"),
    (lambda f: (f / "mp_rank_00_model_states.pt").write_bytes(b""), r"mp_rank_00_model_states.pt is damaged"),
    (
        lambda f: (f / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(
            (f / "zero_pp_rank_0_mp_rank_00_optim_states.pt").read_bytes()
        ),
        r"is said to lie at",
    ),
    (lambda f: torch.save({}, f / "mp_rank_00_model_states.pt"), r"not of this layout: KeyError"),
    (lambda f: torch.save([1], f / "mp_rank_00_model_states.pt"), r"not of this layout: TypeError"),
    (lambda f: torch.save({}, f / "zero_pp_rank_1_mp_rank_00_optim_states.pt"), r"not of this layout: KeyError"),
]


@pytest.mark.parametrize(("damage", "message"), DEEPSPEED_DAMAGES)
def test_damage_to_deepspeeds_files_is_named(tmp_path, sources, damage, message):
    convert("auto", sources["moe"][1], "deepspeed", tmp_path / "ds", options("deepspeed", (2, 2, 1, 2)))
    damage(tmp_path / "ds/global_step7")
    with pytest.raises(UserError, match=message):
        convert("deepspeed", tmp_path / "ds", "canonical", tmp_path / "out", Options())
    assert not (tmp_path / "out").exists()


# ---- several processes -----------------------------------------------------------------------------------------------


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def mpirun(processes: int) -> tuple[str, ...]:
    pytest.importorskip("mpi4py")
    program = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
    if program is None:
        pytest.skip("no mpirun")
    return (program, "--allow-run-as-root", "--oversubscribe", "-n", str(processes))


def test_two_processes_write_the_same_bytes_as_one(tmp_path, sources):
    launcher = mpirun(2)
    convert("auto", sources["moe"][1], "canonical", tmp_path / "one", options("canonical"))
    two = tool("--from", "auto", sources["moe"][1], "--to", "canonical", tmp_path / "two", launcher=launcher)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("exp_avg_sq") == 1
    assert bytes_below(tmp_path / "one") == bytes_below(tmp_path / "two")


@pytest.mark.slow
def test_four_processes_write_the_same_bytes_as_one_and_fail_together(tmp_path, sources):
    launcher = mpirun(4)
    convert("auto", sources["moe"][1], "raphael", tmp_path / "run", options("raphael", (6, 2, 1, 1)))
    convert("auto", tmp_path / "run", "deepspeed", tmp_path / "a/ds", options("deepspeed", (3, 1, 1, 2)))
    four = tool("--from", "auto", tmp_path / "run", "--to", "deepspeed", tmp_path / "b/ds", "--world", 3, "--zero", 2,
                launcher=launcher)  # fmt: skip
    assert four.returncode == 0, four.stderr
    assert bytes_below(tmp_path / "a") == bytes_below(tmp_path / "b")
    step = tmp_path / "run/checkpoints/step-00000007"
    with open(step / "rank-00004.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    failed = tool("--from", "auto", tmp_path / "run", "--to", "canonical", tmp_path / "c", launcher=launcher)
    assert failed.returncode != 0
    assert failed.stderr.count("rank-00004.safetensors does not match its checksum") == 1
    assert not (tmp_path / "c").exists()
