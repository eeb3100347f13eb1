"""What is known before anything is trained: `--dry-run`, who owns a run directory, and what mistakes are told as."""

import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from raphael_dist import sample, train
from raphael_dist.checkpoint.reader import open_newest
from raphael_dist.config import Config, load_config
from raphael_dist.convert.layouts import open_checkpoint
from raphael_dist.convert.plan import Options
from raphael_dist.convert.run import convert
from raphael_dist.data.index import BadSample
from raphael_dist.data.open_index import find_shards
from raphael_dist.data.shards import build_index
from raphael_dist.data.stream import _check_bad
from raphael_dist.errors import UserError
from raphael_dist.training.ready import problems
from raphael_dist.training.rundir import claim
from tests.checkpoints import MOE, handmade_canonical, random_state, tool
from tests.launch import ROOT

OLD_RUN = ROOT / "tests/data/run-6865f08"
SMALL = "tests/data/small.yaml"


def small(folder: Path, *overrides: str) -> Config:
    given = {override.partition("=")[0] for override in overrides}
    own = [f"run.dir={folder}/run", f"data.cache_dir={folder}/cache"]
    return load_config(str(ROOT / SMALL), [*(o for o in own if o.partition("=")[0] not in given), *overrides])


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_a_configuration_that_can_start_has_no_problem(tmp_path: Path) -> None:
    assert problems(small(tmp_path)) == []
    assert list(tmp_path.iterdir()) == [], "a look leaves nothing behind"


def test_a_dry_run_finds_what_a_start_would_be_refused_for(tmp_path: Path) -> None:
    plain = tmp_path / "plain.tar"
    with tarfile.open("data/emoji-demo/train-0000.tar") as source, tarfile.open(plain, "w") as target:
        for member in source:
            if not member.name.endswith(".edge.png"):
                target.addfile(member, source.extractfile(member))
    (tmp_path / "used" / "checkpoints").mkdir(parents=True)
    shutil.copytree(OLD_RUN / "checkpoints/step-00000003", tmp_path / "used/checkpoints/step-00000003")
    (tmp_path / "a_file").write_text("")
    cases = {
        "data.shards=[]": "data.shards: none given",
        "data.shards=/d/0000{0..2}.tar": "data.shards: '/d/00000.tar' (from '/d/0000{0..2}.tar') is not a file",
        "data.val_shards=gone.tar": "data.val_shards: 'gone.tar'",
        f"data.shards={plain}": "hold no edge.png",
        f"data.shards={tmp_path}/a_file": "cannot be read as a tar file",
        "text.encoder=openai/clip-vit-large-patch14": "'openai/clip-vit-large-patch14' is not a folder",
        "image.encoder=stabilityai/sd-vae": "'stabilityai/sd-vae' is not a folder",
        "model.text_width=100": "model.text_width is 100",
        "run.init_from=nowhere": "run.init_from: cannot read nowhere: nowhere: no such file or folder",
        f"run.init_from={OLD_RUN}": "do not fit the model",
        f"run.dir={tmp_path}/used": "holds another run",
        f"run.dir={tmp_path}/a_file/run": "run.dir:",
        "data.cache_dir=/proc/x": "data.cache_dir: /proc/x cannot be made or written",
    }
    for override, wanted in cases.items():
        found = problems(small(tmp_path, override))
        assert len(found) == 1, (override, found)
        assert wanted in found[0], (override, found)
        assert "\n" not in found[0]
    vae = ["image.encoder=data/vae-emoji", "model.latent_channels=4", "image.buckets=[[10,12]]"]
    (found,) = problems(small(tmp_path, *vae))
    assert "image.buckets: [10, 12] is not a multiple of 4, the image encoder's factor" in found


def test_the_dry_run_prints_the_plan_and_every_problem_and_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    own = [f"run.dir={tmp_path}/run", f"data.cache_dir={tmp_path}/cache"]
    assert train.main(["--config", SMALL, "--dry-run", *own]) == 0
    assert capsys.readouterr().err == ""
    assert train.main(["--config", "raphael-3b", "--dry-run", *own]) == 2
    out, err = capsys.readouterr()
    assert "# 1 ranks x 2 images x 1000 micro-steps" in out
    assert [line.split(":")[1] for line in err.splitlines()] == [" text.encoder", " data.shards"]
    assert train.main(["--config", "raphael-3b", "--plan", *own]) == 0


def test_a_start_that_failed_owns_nothing(tmp_path: Path) -> None:
    """A run directory is a run's from its first checkpoint on."""
    claim(small(tmp_path, "optim.lr=0.1")).close()
    claim(small(tmp_path, "optim.lr=0.2", "model.gate_width=4")).close()
    folder = tmp_path / "old"
    shutil.copytree(OLD_RUN, folder)
    old = open_newest(folder).config()
    same = old.model_copy(update={"run": old.run.model_copy(update={"dir": folder})})
    other = same.model_copy(update={"optim": old.optim.model_copy(update={"lr": 0.5})})
    with pytest.raises(UserError, match=r"optim.lr was 0.003 there and is 0.5 here"):
        claim(other)
    # A start that was allowed and then failed leaves its configuration behind; it is the checkpoint's that counts.
    allowed = other.model_copy(update={"run": other.run.model_copy(update={"allow_change": ("optim.lr",)})})
    claim(allowed).close()
    claim(same).close()


# ---- what mistakes are told as ----------------------------------------------------------------------------------------


def test_a_reason_that_all_bad_samples_share_is_told_first() -> None:
    bad = [BadSample("a.tar", str(i), "no edge.png") for i in range(352)]
    with pytest.raises(UserError) as told:
        _check_bad(352, bad, 352, 0.05)
    assert "352 of 352 samples are bad (no edge.png)" in str(told.value)
    assert "train without by edge.weight=0" in str(told.value)
    with pytest.raises(UserError, match=r"4 of 4 samples are bad \(3 of them: no caption\), .*; repair the shards"):
        _check_bad(4, [BadSample("a.tar", str(i), "no caption" if i else "no image") for i in range(4)], 4, 0.05)


def test_mistakes_in_held_out_shards_name_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data.val_shards: 'gone.tar'"):
        find_shards(small(tmp_path, "data.val_shards=gone.tar"), training=False)


def test_a_cache_that_cannot_be_made_is_not_blamed_on_the_shards() -> None:
    with pytest.raises(UserError, match=r"^data.cache_dir: /proc/x"):
        build_index([ROOT / "data/emoji-demo/val-0000.tar"], Path("/proc/x/index"))


def test_sampling_takes_an_export_and_the_file_latest(tmp_path: Path) -> None:
    """Neither is called damaged."""
    convert("auto", OLD_RUN, "canonical", tmp_path / "canonical", Options())
    shutil.copytree(OLD_RUN, tmp_path / "run")
    (tmp_path / "run/checkpoints/latest").write_text("step-00000003")
    for path in ("canonical", "run/checkpoints/latest"):
        out = ["--out", str(tmp_path / "x.png"), "--steps", "1"]
        assert sample.main(["--checkpoint", str(tmp_path / path), "--prompt", "x", *out]) == 0


def test_the_file_latest_stands_for_the_checkpoint_that_it_names(tmp_path: Path) -> None:
    shutil.copytree(OLD_RUN, tmp_path / "run")
    latest = tmp_path / "run/checkpoints/latest"
    latest.write_text("step-00000003")
    assert open_checkpoint("auto", latest).progress.step == 3
    assert open_newest(latest).step == 3
    for text in ("", "step-00000004", "../../etc", "x" * 5000):
        latest.write_text(text)
        with pytest.raises(UserError, match=r"latest: names .*, which is no checkpoint beside it") as told:
            open_checkpoint("auto", latest)
        assert len(str(told.value)) < 1000


def test_an_inspection_that_is_piped_keeps_the_names_of_layers_whole(tmp_path: Path) -> None:
    dead = {key: torch.zeros_like(value) for key, value in random_state(MOE, ("master",)).items()}
    handmade_canonical(tmp_path / "dead", MOE, dead)
    done = tool(tmp_path / "dead", name="inspect_checkpoint", COLUMNS="80")
    assert done.returncode == 1, done.stderr
    layers = {name.rpartition(".")[0].replace("transformer_blocks.0.", "") for _, name in dead if name.endswith("_moe.w1")}
    assert len(layers) == 8
    assert all(f" {layer} " in done.stdout for layer in layers), done.stdout
