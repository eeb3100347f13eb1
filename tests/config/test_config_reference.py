"""Every setting can be found: `python -m raphael_dist config`, docs/configuration.md, the schema for editors; --version."""

import json
import re
import subprocess
import sys

import pytest
import yaml

from raphael_dist import __main__ as commands
from raphael_dist import train
from raphael_dist.config.assets import locate, root
from raphael_dist.config.key_reference import TOPICS, all_keys, find_keys, json_schema, markdown
from raphael_dist.config.load import preset_names
from raphael_dist.config.schema import Config, load_config
from tests.lib.launch import ROOT

NAMES = [f"{section}.{field}" for section, info in Config.model_fields.items() for field in info.annotation.model_fields]


def test_every_key_is_described() -> None:
    keys = {key.name: key for key in all_keys()}
    assert list(keys) == NAMES
    assert [name for name, key in keys.items() if not key.description.endswith(".")] == []
    assert keys["optim.lr"].line().startswith("optim.lr=0.0001  number (above 0): Learning rate at the end of the warm-up.")
    assert keys["train.caption_dropout"].range == "at least 0, at most 1"
    assert keys["image.buckets"].type == "list of [integer, integer]"
    assert keys["train.dtype"].type == "float32 or bfloat16"
    assert keys["run.init_from"].type == "path or null"
    assert keys["model.channels"].default == "[320, 640, 1280, 1280]"
    assert [keys[name].on_resume for name in ("data.workers", "optim.lr", "model.channels")] == ["free", "fixed", "never"]


FOUND = {
    "learning": "optim.lr", "accumulation": "train.micro_batch_size", "memory": "model.checkpoint_activations",
    "resume": "run.dir", "cpu": "data.workers", "early": "train.max_skipped", "workers": "data.workers",
    "precision": "train.dtype", "mixed_precision": "train.dtype", "fine-tuning": "run.init_from",
    "bucket_run": "data.bucket_run", "resolution": "image.buckets",
    "epochs": "train.max_steps", "gradient": "optim.max_grad_norm", "vae": "image.vae",
}  # fmt: skip


@pytest.mark.parametrize(("word", "name"), FOUND.items())
def test_word_finds_the_key_that_it_means(word: str, name: str) -> None:
    assert name in [key.name for key in find_keys(word)[0]]


def test_topics_name_keys_and_pages_that_exist() -> None:
    for keys, page in TOPICS.values():
        assert set(keys.split()) <= set(NAMES)
        assert (ROOT / "docs" / page).is_file()


def test_printed_defaults_can_be_given() -> None:
    overrides = [f"{key.name}={key.default}" for key in all_keys() if key.default != "null"]
    assert load_config(str(ROOT / "tests/fixtures/nothing.yaml"), overrides) == Config()


def test_configuration_page_is_current() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    assert text == markdown() + "\n", "write it again: python -m raphael_dist config --markdown > docs/configuration.md"


def test_json_schema_has_each_key() -> None:
    schema = json.loads(json_schema())
    for name in NAMES:
        section, field = name.split(".")
        properties = schema["$defs"][schema["properties"][section]["$ref"].rpartition("/")[2]]["properties"]
        assert field in properties, name
    assert schema["additionalProperties"] is False
    assert schema["properties"].keys() == {*Config.model_fields, "base"}


def test_every_section_of_a_preset_has_a_comment() -> None:
    for preset in preset_names():
        text = (ROOT / "raphael_dist/config/presets" / f"{preset}.yaml").read_text()
        for section in yaml.safe_load(text):
            if section != "base":
                at = text.index(f"\n{section}:")
                rest = re.split(r"\n(?=[a-z]+:)", text[at + 1 :])[0]
                before = text[:at].rpartition("\n")[2]
                assert "#" in rest or before.startswith("#"), f"{preset}: {section} has no comment"


def test_commands_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["config", "bucket_run"]) == 0
    assert capsys.readouterr().out.startswith("data.bucket_run=1  integer (at least 1): ")
    assert commands.main(["config", "no such word"]) == 1
    assert commands.main(["slurm"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(ROOT / "slurm")
    assert commands.main(["train", "train.max_steps=1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    for field in ("text.encoder", "image.vae", "data.shards"):
        assert any(line.startswith(f"missing: {field}") for line in lines)
    assert "--config=raphael-3b" in lines[-1]
    assert "python -m raphael_dist train --config emoji-tiny" in lines[-1]
    assert commands.main(["inspect", "nowhere"]) == 2
    assert "nowhere: there is no such file or folder" in capsys.readouterr().err
    for main in (commands.main, train.main):
        try:
            code = main(["--version"])
        except SystemExit as end:
            code = end.code
        assert code == 0
        line = capsys.readouterr().out
        assert re.fullmatch(r"raphael_dist \S+ \(git [0-9a-f]{12}\+?\), Python 3\S+, torch \S+, deepspeed \S+, .*\n", line)


@pytest.mark.parametrize(
    "words", [[], *([name] for name in commands.COMMANDS), ["evaluate", "images"], ["evaluate", "text"]], ids=" ".join
)
def test_help_fits_a_screen_and_begins_with_an_example(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["raphael"])
    try:
        code = commands.main([*words, "--help"])
    except SystemExit as end:
        code = end.code
    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    assert lines[0].startswith("example: ")
    assert len(lines) <= 40


def test_printing_into_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m raphael_dist config --json-schema | head -c 10"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_log_level_option_sets_the_key() -> None:
    args = train.parse(["--config", "emoji-tiny", "--log-level", "debug"])
    assert load_config(args.config, args.overrides).run.log_level == "debug"


def test_presets_find_assets_from_any_folder(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert load_config("emoji-tiny").image.vae == "data/vae-emoji"
    monkeypatch.chdir(tmp_path)
    config = load_config("emoji-tiny")
    assert config.image.vae == str(root() / "data/vae-emoji")
    assert config.data.shards == (str(root() / "data/emoji-demo/train-0000.tar"),)
    assert locate("ds_configs/zero2.json") == str(root() / "ds_configs/zero2.json")
    (tmp_path / "ds_configs").mkdir()
    assert locate("ds_configs/zero2.json") == "ds_configs/zero2.json", "what the user has comes first"
    assert locate("elsewhere/x") == "elsewhere/x"
