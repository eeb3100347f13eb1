"""Mistakes of a tired person: each is answered in one line that says what was given and what was meant."""

import re
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest
import yaml

from raphael_dist import sample, train
from raphael_dist.cli.missing_packages import PACKAGES
from raphael_dist.config.key_suggestions import NAMES_ELSEWHERE
from raphael_dist.config.schema import Config, load_config
from raphael_dist.config.training_stages import every_stage
from raphael_dist.config.types import keys_of, sections_of
from raphael_dist.data.shards.shard_names import expand_shards
from raphael_dist.engine.ds_config import read_deepspeed_json
from raphael_dist.errors import UserError
from tests.lib.launch import ROOT


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def refusal(*overrides: str, config: str = "emoji-tiny") -> str:
    with pytest.raises(UserError) as error:
        load_config(config, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def last_line(main: typing.Callable[[list[str]], int], words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the last line that a command answers a mistake with."""
    try:
        code: typing.Any = main(words)
    except SystemExit as end:
        code = end.code
    assert code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


# ---- the configuration -------------------------------------------------------------------------------------------------


def annotation_of(key: str) -> str:
    section, _, name = key.partition(".")
    return str(sections_of(Config)[section].model_fields[name].annotation)


def number_fields() -> list[str]:
    types = {key: annotation_of(key) for key in keys_of(Config)}
    return [key for key, kind in types.items() if ("int" in kind or "float" in kind) and "bool" not in kind]


def test_true_is_no_number_in_any_field() -> None:
    fields = number_fields()
    assert len(fields) >= 74
    for field in fields:
        assert field in refusal(f"{field}=true"), field
    for override in ("optim.betas=[true, 0.9]", "data.caption_weights={txt: true}", "data.filters=[{column: x, min: true}]"):
        assert "must be a number, not true or false" in refusal(override)


@pytest.mark.parametrize(
    "key", ["run.dir", "run.init_from", "text.encoder", "image.vae", "data.shards", "data.val_shards", "data.cache_dir"]
)
def test_impossible_file_names_are_refused(key: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    section, _, name = key.partition(".")
    value: typing.Any = "a\0b"
    path.write_text(yaml.safe_dump({section: {name: [value] if "shards" in name else value}}))
    assert "must not contain NUL characters" in refusal(config=str(path))
    if "shards" not in key:
        assert "must not have a file name of more than 255 bytes" in refusal(f"{key}=x/{'9' * 256}")


def test_endless_yaml_is_refused_by_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    line = last_line(train.main, ["--config", "emoji-tiny", "--dry-run", "train.max_steps=&a [*a]"], capsys)
    assert "must have at most 100,000 keys and list entries" in line


@pytest.mark.parametrize("pattern", ["b" * 300, f"{{{'b' * 300},c}}", f"{'b' * 300}*"])
def test_shard_names_that_are_too_long_are_refused(pattern: str) -> None:
    with pytest.raises(UserError, match=r"data\.shards='/tmp/.* (cannot be read \(File name too long\)|matches no file)"):
        expand_shards([f"/tmp/{pattern}"])


def test_integer_beyond_64_bits_is_refused_in_every_count_field() -> None:
    fields = [name for name in number_fields() if "float" not in annotation_of(name)]
    assert len(fields) >= 40
    for field in fields:
        line = refusal(f"{field}={2**64}")
        assert field in line
        assert str(2**63) in line or "must be a list" in line or "to 32768" in line, line
    assert str(2**63) in refusal(f"image.buckets=[[64, {2**64}]]")


def test_numbers_and_booleans_are_accepted() -> None:
    config = load_config("emoji-tiny", ["optim.lr=1", "data.flip=true", "model.checkpoint_activations=all"])
    assert (config.optim.lr, config.data.flip, config.model.checkpoint_activations) == (1.0, True, "all")


MEANT = {
    "train.lr=1": "optim.lr",
    "train.batch_size=8": "train.global_batch_size",
    "optim.learning_rate=1": "optim.lr",
    "train.learnig_rate=1": "optim.lr",
    "model.space_ep=2": "parallel.space_ep",
    "model.lr=2": "optim.lr",
    "train.max_step=5": "train.max_steps",
    "ckpt.every=5": "checkpoint.every",
    "trian.max_steps=5": "train",
    "lr=1e-4": "optim.lr=1e-4",
    "output_dir=x": "run.dir=x",
    "train.max_steps": "train.max_steps=VALUE",
    "train,max_steps=5": "train.max_steps=5",
    "ds.json": "--deepspeed_config ds.json",
    "emoji": "--config emoji",
    "my.yaml": "--config my.yaml",
    "train.dtype=bf16": "bfloat16",
    "run.trackers=wand": "wandb",
}


def test_wrong_name_suggests_the_right_one() -> None:
    for override, meant in MEANT.items():
        assert f"(did you mean '{meant}'?)" in refusal(override), override


def test_wrong_path_suggests_the_right_one(tmp_path: Path) -> None:
    for config, meant in {
        "tests/fixtures/small-run": "tests/fixtures/small-run/config.yaml",
        "emoji-tiny.yaml": "emoji-tiny",
        "configs/emoji.yml": "emoji",
    }.items():
        assert f"(did you mean '{meant}'?)" in refusal(config=config)
    assert "(did you mean 'optim.lr'?)" in refusal("run.allow_change=lr")
    stages = load_config("emoji-tiny", ["train.stages=[{until: 5, set: {lr: 1}}, {set: {lr: 2}}]"])
    with pytest.raises(UserError, match=r"sets 'lr' \(did you mean 'optim.lr'\?\)"):
        every_stage(stages)
    for path, expected in {"zero2": "did you mean 'ds_configs/zero2.json'", "ds_configs": "is a folder"}.items():
        with pytest.raises(UserError, match=expected):
            read_deepspeed_json(path)
    with pytest.raises(UserError, match=r"it is a folder. Name its tar files, '.*/\*\.tar'"):
        expand_shards([str(tmp_path)])


def test_names_of_other_trainers_lead_to_keys() -> None:
    assert set(NAMES_ELSEWHERE.values()) <= set(keys_of(Config))


def test_wrong_image_sizes_suggest_an_example() -> None:
    assert "e.g. [[64, 64]]" in refusal("image.buckets=[64,64]")
    assert "e.g. [[512, 768]]" in refusal("image.buckets=[512, 768]")
    for text in ("64,64", "64x64", "[64, 64, 64]"):
        assert "must be a list of sizes [height, width]" in refusal(f"image.buckets={text}")
    assert load_config("emoji-tiny", ["image.buckets=64"]).image.buckets


def test_empty_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("base: emoji-tiny\nrun: {dir: ''}\ntext: {encoder: ''}\n")
    line = refusal(config=str(tmp_path / "c.yaml"))
    assert "run.dir='' must not be empty" in line
    assert "text.encoder='' must not be empty" in line
    assert "run.dir=null must be a path" in refusal("run.dir=")
    assert load_config("emoji-tiny", ["data.val_shards=", "sample.prompts="]).data.val_shards == ()


def test_each_configuration_has_its_own_run_directory(tmp_path: Path) -> None:
    assert load_config("emoji-tiny").run.dir == Path("runs/emoji-tiny")
    assert load_config("emoji").run.dir == Path("runs/emoji")
    (tmp_path / "red.dogs.yaml").write_text("base: emoji-tiny\n")
    assert load_config(str(tmp_path / "red.dogs.yaml")).run.dir == Path("runs/red.dogs")
    (tmp_path / "other.yaml").write_text("base: red.dogs.yaml\nrun: {dir: mine}\n")
    assert load_config(str(tmp_path / "other.yaml")).run.dir == Path("mine")
    assert load_config("emoji-tiny", ["run.dir=x"]).run.dir == Path("x")


def test_setting_without_effect_within_the_run_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "optim.warmup_steps=500": "optim.warmup_steps=500 is larger than train.max_steps=480",
        "model.gate_noise_steps=481": "model.gate_noise_steps=481",
        "ema.start_step=1000": "ema.start_step=1000",
        "train.stages=[{until: 600, set: {optim.lr: 1}}, {set: {optim.lr: 2}}]": "train.stages: until=600",
    }
    assert load_config("emoji-tiny", ["optim.warmup_steps=480"]).find_warnings() == []
    for override, expected in cases.items():
        (line,) = load_config("emoji-tiny", [override]).find_warnings()
        assert line.startswith(expected)
    assert train.main(["--config", "emoji-tiny", "--plan", "--world-size", "1", "optim.warmup_steps=500"]) == 0
    assert "# warning: optim.warmup_steps=500 is larger than" in capsys.readouterr().out


# ---- the command lines -------------------------------------------------------------------------------------------------


def test_unknown_option_suggests_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "--batch_size 8": "'train.global_batch_size=8'",
        "--learning_rate=1e-4": "'optim.lr=1e-4'",
        "--output_dir x": "'run.dir=x'",
        "--lr 3": "'optim.lr=3'",
        "--deepspeed ds.json": "'--deepspeed_config ds.json'",
        "--deepspeed=ds.json": "'--deepspeed_config'",
        "--deepspeed-config ds.json": "'--deepspeed_config'",
        "--dry_run": "'--dry-run'",
    }
    for words, meant in cases.items():
        line = last_line(train.main, ["--config", "emoji-tiny", "--plan", *words.split()], capsys)
        assert f"(did you mean {meant}?)" in line, line
    model = ["--checkpoint", "x"]
    drawn = {
        ("a red circle",): "--prompt 'a red circle'",
        ("--chekpoint", "x"): "'--checkpoint'",
        (*model, "--prompt", "a", "red", "circle"): "--prompt 'red'? Several words need quotes",
        (*model, "--num_inference_steps", "5"): "'--steps'",
        (*model, "--guidance_scale", "5"): "'--guidance'",
        (*model, "--n", "3"): "unrecognized arguments: --n 3",
    }
    for words, meant in drawn.items():
        assert meant in last_line(sample.main, list(words), capsys)


def test_option_without_required_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--checkpoint", "x", "--prompt", "y"]
    assert "--strength=0.5 requires --image" in last_line(sample.main, [*model, "--strength", "0.5"], capsys)
    for option in (["--control-scale", "0.5"], ["--control-kind", "canny"]):
        assert "require --control" in last_line(sample.main, [*model, *option], capsys)


def test_missing_packages_are_named_by_every_entry_point(tmp_path: Path) -> None:
    """By every entry point, before anything else, in one line and in what a Slurm script reads."""
    env = {"PATH": "/usr/bin:/bin", "RAPHAEL_EXIT_FILE": str(tmp_path / "exit")}
    bare = [sys.executable, "-I", "-S", "-c"]
    for entry in ("raphael_dist/train.py", "raphael_dist/sample.py", "raphael_dist/__main__.py", "tools/check_cluster.py"):
        path = [str(ROOT), str((ROOT / entry).parent)]
        code = f"import sys, runpy; sys.path[:0] = {path}; runpy.run_path({str(ROOT / entry)!r}, run_name='__main__')"
        done = subprocess.run([*bare, code], capture_output=True, text=True, cwd=ROOT, env=env)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith(f"error: {sys.executable} requires packages that are not installed: torch, ")
        for words in ("pydantic, PyYAML", ".venv/bin/python", "set PYTHON"):
            assert words in done.stderr
        assert (tmp_path / "exit").read_text() == "2\n"
        assert "not installed: torch" in (tmp_path / "exit.why").read_text()


def test_checked_packages_are_the_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {re.split("[<>=]", line)[0] for line in project["dependencies"]} == set(PACKAGES.values())
