"""Checks before training: `--dry-run`, the owner of a run directory, and error messages about data."""

import json
import re
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from raphael_dist import sample, train
from raphael_dist.checkpoint.reader import open_newest
from raphael_dist.config.schema import Config, load_config, load_leniently
from raphael_dist.convert.conversion import convert
from raphael_dist.convert.layouts import open_checkpoint
from raphael_dist.convert.write_plan import Options
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.shards.dataset_index import BadSample
from raphael_dist.data.shards.open_index import find_shards
from raphael_dist.data.stream import _check_bad_fraction
from raphael_dist.errors import UserError
from raphael_dist.training import dry_run
from raphael_dist.training.dry_run import problems
from raphael_dist.training.run_dir import acquire
from tests.data.shards.test_shards import extended_headers
from tests.lib.checkpoints import MOE, handmade_canonical, random_state, tool
from tests.lib.launch import ROOT

SMALL_RUN = ROOT / "tests/fixtures/small-run"
SMALL = "tests/fixtures/small.yaml"


def small(folder: Path, *overrides: str) -> Config:
    fields = {override.partition("=")[0] for override in overrides}
    own = [f"run.dir={folder}/run", f"data.cache_dir={folder}/cache"]
    return load_config(str(ROOT / SMALL), [*(o for o in own if o.partition("=")[0] not in fields), *overrides])


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_dry_run_of_a_valid_configuration_reports_nothing(tmp_path: Path) -> None:
    assert problems(small(tmp_path)) == []
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"


def test_dry_run_reports_what_a_start_would_refuse(tmp_path: Path) -> None:
    plain = tmp_path / "plain.tar"
    with tarfile.open("data/emoji-demo/train-0000.tar") as source, tarfile.open(plain, "w") as target:
        for member in source:
            if not member.name.endswith(".edge.png"):
                target.addfile(member, source.extractfile(member))
    (tmp_path / "used" / "checkpoints").mkdir(parents=True)
    shutil.copytree(SMALL_RUN / "checkpoints/step-00000003", tmp_path / "used/checkpoints/step-00000003")
    (tmp_path / "a_file").write_text("")
    cases = {
        "data.shards=[]": "data.shards=[] must name the training data",
        "data.shards=/d/0000{0..2}.tar": "data.shards='/d/0000{0..2}.tar' names the file '/d/00000.tar'",
        "data.val_shards=gone.tar": "data.val_shards='gone.tar'",
        f"data.shards={plain}": "have no edge.png",
        f"data.shards={tmp_path}/a_file": "cannot be read as a tar file",
        "text.encoder=openai/clip-vit-large-patch14": "text.encoder='openai/clip-vit-large-patch14' must be",
        "image.vae=stabilityai/sd-vae": "image.vae='stabilityai/sd-vae' must be",
        "model.text_width=100": "model.text_width=100",
        "run.init_from=nowhere": "run.init_from=nowhere cannot be read: nowhere: there is no such file or folder",
        f"run.init_from={SMALL_RUN}": "must fit the model",
        f"run.dir={tmp_path}/used": "was created with different settings",
        f"run.dir={tmp_path}/a_file/run": "a_file is a file",
        "data.cache_dir=/proc/x": "data.cache_dir=/proc/x must be writable",
    }
    for override, part in cases.items():
        lines = problems(small(tmp_path, override))
        assert len(lines) == 1, (override, lines)
        assert part in lines[0], (override, lines)
        assert "\n" not in lines[0]
    vae = ["image.vae=data/vae-emoji", "model.latent_channels=4", "image.buckets=[[10,12]]"]
    (line,) = problems(small(tmp_path, *vae))
    assert "image.buckets=[10, 12] must be multiples of 4, the downsampling factor of the VAE" in line


def test_dry_run_reports_shards_without_the_stored_features(tmp_path: Path) -> None:
    lines = problems(small(tmp_path, "data.features=stored"))
    assert [line.partition("the first samples of ")[2].partition(".tar")[0] for line in lines] == [
        "data/emoji-demo/train-0000",
        "data/emoji-demo/val-0000",
    ]
    assert all("have no features. Add them with tools/prepare_data.py --features" in line for line in lines)
    whole = tmp_path / "whole.tar"
    with tarfile.open("data/emoji-demo/train-0000.tar") as source, tarfile.open(whole, "w") as target:
        for member in source:
            target.addfile(member, source.extractfile(member))
            if member.name.endswith(".edge.png"):
                target.addfile(tarfile.TarInfo(member.name.replace(".edge.png", ".features")))
    assert problems(small(tmp_path, "data.features=stored", f"data.shards={whole}", "data.val_shards=[]")) == []


def test_dry_run_reports_endless_tar_headers(tmp_path: Path) -> None:
    for count, num_bytes in ((2000, 1), (1, 2 << 20)):
        path = tmp_path / f"{count}.tar"
        path.write_bytes(extended_headers(tarfile.XHDTYPE, count, num_bytes))
        lines = problems(small(tmp_path, f"data.shards={path}"))
        assert [line.count(f"{path} cannot be read as a tar file") for line in lines] == [1]


def test_dry_run_prints_the_plan_and_all_problems_and_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    own = [f"run.dir={tmp_path}/run", f"data.cache_dir={tmp_path}/cache"]
    assert train.main(["--config", SMALL, "--dry-run", *own]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(dry_run, "free_bytes", lambda folder: 1 << 50)
    assert train.main(["--config", "raphael-3b", "--dry-run", *own]) == 2
    out, err = capsys.readouterr()
    assert "# 1 rank x 2 images x 1000 micro-steps" in out, "the plan is printed in addition to the problems"
    fields = ["text.encoder", "image.vae", "data.shards"]
    assert re.findall(r"^error: ([\w.]+)", err, re.MULTILINE) == fields
    assert train.main(["--config", "raphael-3b", "--plan", *own]) == 0


def test_dry_run_lists_all_problems(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of the configuration, and of all that it refers to."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    wrong = [
        "train.max_step=5", "parallel.space_ep=5", "run.trackers=[wandb]", "text.encoder=nowhere", "image.vae=gone",
        "data.shards=[a.tar,b.tar]", f"run.dir={tmp_path}/run", f"data.cache_dir={tmp_path}/cache",
    ]  # fmt: skip
    monkeypatch.setattr("raphael_dist.training.wandb_mlflow.find_spec", lambda name: None)
    assert train.main(["--config", "emoji-tiny", "--dry-run", "--deepspeed_config", "gone.json", *wrong]) == 2
    lines = capsys.readouterr().err.splitlines()
    starts = (
        "train.max_step: unknown key", "--deepspeed_config=gone.json", "parallel.space_ep=5", "run.trackers=wandb",
        "text.encoder='nowhere'", "image.vae='gone'", "data.shards='a.tar'", "data.shards='b.tar'",
    )  # fmt: skip
    assert len(lines) == len(starts)
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(f"error: {start}"), line


def test_all_contradictions_of_sections_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        small(tmp_path, "parallel.space_ep=5", "edge.max_timestep=5000")
    assert len(error.value.args) == 2
    assert "\n" not in str(error.value)


def test_refused_section_brings_no_mistakes_of_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train: 5\nmodel: [1]\n")
    config, lines = load_leniently(str(tmp_path / "a.yaml"))
    assert config is None
    assert [line.partition(" ")[0] for line in lines] == ["model=[1]", "train=5"]


def test_dry_run_checks_the_space_for_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(tmp_path, "checkpoint.every=0")
    need = dry_run._checkpoint_bytes(config)
    monkeypatch.setattr(dry_run, "free_bytes", lambda folder: need)
    assert problems(config) == []
    monkeypatch.setattr(dry_run, "free_bytes", lambda folder: need - 1)
    (line,) = problems(config)
    assert line.startswith(f"run.dir={tmp_path}/run requires")
    monkeypatch.setattr(dry_run, "free_bytes", lambda folder: 0)
    assert [line.partition("=")[0].partition(":")[0] for line in problems(config)] == ["run.dir", "data.cache_dir"]


def test_checkpoint_bytes_count_what_is_trained(tmp_path: Path) -> None:
    manifest = json.loads((SMALL_RUN / "checkpoints/step-00000003/manifest.json").read_text())
    numbers = sum(numel for file in manifest["files"].values() for _, numel in file["ranges"].values())
    assert dry_run._checkpoint_bytes(open_newest(SMALL_RUN).config()) == 4 * numbers


def test_validation_on_training_shards_is_refused(tmp_path: Path) -> None:
    shard = "data/emoji-demo/train-0000.tar"
    (tmp_path / "linked.tar").symlink_to(ROOT / shard)
    for name in (shard, "data/emoji-demo/*.tar", str(tmp_path / "linked.tar")):
        config = small(tmp_path, f"data.shards={shard}", f"data.val_shards={name}")
        assert any("must not be in data.shards too" in line for line in problems(config)), name
        with pytest.raises(UserError, match=r"^data\.val_shards=.* 1 of "):
            find_shards(config, training=False)
    mixed = small(tmp_path, "data.shards=[]", f"data.sources=[{{shards: {shard}}}]", f"data.val_shards={shard}")
    with pytest.raises(UserError, match=r"must not be in data\.shards too"):
        find_shards(mixed, training=False)


def test_run_directory_of_a_failed_start_can_be_reused(tmp_path: Path) -> None:
    """A run directory is a run's from its first checkpoint on."""
    acquire(small(tmp_path, "optim.lr=0.1")).close()
    acquire(small(tmp_path, "optim.lr=0.2", "model.gate_width=4")).close()
    folder = tmp_path / "old"
    shutil.copytree(SMALL_RUN, folder)
    old = open_newest(folder).config()
    same = old.model_copy(update={"run": old.run.model_copy(update={"dir": folder})})
    other = same.model_copy(update={"optim": old.optim.model_copy(update={"lr": 0.5})})
    with pytest.raises(UserError, match=r"optim.lr was 0.003 and is now 0.5"):
        acquire(other)
    # A start that was allowed and then failed leaves its configuration behind; it is the checkpoint's that counts.
    allowed = other.model_copy(update={"run": other.run.model_copy(update={"allow_change": ("optim.lr",)})})
    acquire(allowed).close()
    acquire(same).close()


# ---- error messages -----------------------------------------------------------------------------------------------


def test_most_common_reason_of_bad_samples_comes_first() -> None:
    bad = [BadSample("a.tar", str(i), "no edge.png") for i in range(352)]
    with pytest.raises(UserError) as error:
        _check_bad_fraction(352, bad, 352, 0.05)
    assert "352 of 352 samples cannot be used (no edge.png)" in str(error.value)
    assert "set edge.weight=0 to train without them" in str(error.value)
    with pytest.raises(
        UserError, match=r"4 of 4 samples cannot be used \(the reason of 3 of them is: no caption\)\. Replace these samples"
    ):
        _check_bad_fraction(4, [BadSample("a.tar", str(i), "no caption" if i else "no image") for i in range(4)], 4, 0.05)


def test_error_in_val_shards_names_val_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data.val_shards='gone.tar'"):
        find_shards(small(tmp_path, "data.val_shards=gone.tar"), training=False)


def test_unwritable_cache_folder_is_named_not_the_shards() -> None:
    with pytest.raises(UserError, match=r"^data.cache_dir: /proc/x.* cannot be written"):
        build_index([ROOT / "data/emoji-demo/val-0000.tar"], Path("/proc/x/index"))


def test_sampling_accepts_an_export_and_the_latest_file(tmp_path: Path) -> None:
    """Neither is called damaged."""
    convert("auto", SMALL_RUN, "canonical", tmp_path / "canonical", Options())
    shutil.copytree(SMALL_RUN, tmp_path / "run")
    (tmp_path / "run/checkpoints/latest").write_text("step-00000003")
    for path in ("canonical", "run/checkpoints/latest"):
        out = ["--out", str(tmp_path / "x.png"), "--steps", "1"]
        assert sample.main(["--checkpoint", str(tmp_path / path), "--prompt", "x", *out]) == 0


def test_latest_file_refers_to_the_checkpoint_it_names(tmp_path: Path) -> None:
    shutil.copytree(SMALL_RUN, tmp_path / "run")
    latest = tmp_path / "run/checkpoints/latest"
    latest.write_text("step-00000003")
    assert open_checkpoint("auto", latest).progress.step == 3
    assert open_newest(latest).step == 3
    for text in ("", "step-00000004", "../../etc", "x" * 5000):
        latest.write_text(text)
        with pytest.raises(
            UserError, match=r"latest must contain the name of a checkpoint folder next to it .*, but it contains"
        ) as caught:
            open_checkpoint("auto", latest)
        assert len(str(caught.value)) < 1000


def test_piped_inspection_prints_whole_layer_names(tmp_path: Path) -> None:
    dead = {key: torch.zeros_like(value) for key, value in random_state(MOE, ("master",)).items()}
    handmade_canonical(tmp_path / "dead", MOE, dead)
    done = tool(tmp_path / "dead", name="inspect_checkpoint", COLUMNS="80")
    assert done.returncode == 1, done.stderr
    layers = {name.rpartition(".")[0].replace("transformer_blocks.0.", "") for _, name in dead if name.endswith("_moe.w1")}
    assert len(layers) == 8
    assert all(f" {layer} " in done.stdout for layer in layers), done.stdout
