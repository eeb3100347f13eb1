"""Every knob can be found: `python -m raphael_dist config`, docs/configuration.md, the schema for editors; --version."""

import json
import re
import subprocess
import sys

import pytest
import yaml

from raphael_dist import __main__ as commands
from raphael_dist import train
from raphael_dist.config import Config, load_config
from raphael_dist.config_reference import json_schema, keys, markdown
from raphael_dist.config_yaml import preset_names
from raphael_dist.shipped import located, root
from tests.launch import ROOT

NAMES = [f"{section}.{field}" for section, info in Config.model_fields.items() for field in info.annotation.model_fields]


def test_every_key_is_described() -> None:
    found = {key.name: key for key in keys()}
    assert list(found) == NAMES
    assert [name for name, key in found.items() if not key.description] == []
    assert found["optim.lr"].line() == "optim.lr=0.0001  number (above 0): learning rate after the warm-up"
    assert found["train.caption_drop"].range == "at least 0, at most 1"
    assert found["image.buckets"].type == "list of [integer, integer]"
    assert found["train.dtype"].type == "float32 or bfloat16"
    assert found["run.init_from"].type == "path or null"
    assert found["model.channels"].default == "[320, 640, 1280, 1280]"


def test_defaults_are_printed_as_they_are_given() -> None:
    given = [f"{key.name}={key.default}" for key in keys() if key.default != "null"]
    assert load_config(str(ROOT / "tests/data/nothing.yaml"), given) == Config()


def test_the_document_is_current() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    assert text == markdown() + "\n", "write it anew: python -m raphael_dist config --markdown > docs/configuration.md"


def test_the_schema_describes_each_key_and_knows_the_presets() -> None:
    schema = json.loads(json_schema())
    for name in NAMES:
        section, field = name.split(".")
        properties = schema["$defs"][schema["properties"][section]["$ref"].rpartition("/")[2]]["properties"]
        assert field in properties, name
    assert schema["additionalProperties"] is False
    assert schema["properties"].keys() == {*Config.model_fields, "base"}


def test_every_number_of_a_preset_that_is_not_the_default_comes_with_its_reason() -> None:
    for preset in preset_names():
        text = (ROOT / "raphael_dist/presets" / f"{preset}.yaml").read_text()
        for section in yaml.safe_load(text):
            if section != "base":
                at = text.index(f"\n{section}:")
                rest = re.split(r"\n(?=[a-z]+:)", text[at + 1 :])[0]
                before = text[:at].rpartition("\n")[2]
                assert "#" in rest or before.startswith("#"), f"{preset}: {section} has no comment"


def test_the_commands_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["config", "bucket_run"]) == 0
    assert capsys.readouterr().out.startswith("data.bucket_run=1  integer (at least 1): ")
    assert commands.main(["config", "no such word"]) == 1
    assert commands.main(["slurm"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(ROOT / "slurm")
    assert commands.main(["train", "train.max_steps=1"]) == 2
    assert "--config: none given" in capsys.readouterr().err
    assert commands.main(["inspect", "nowhere"]) == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err
    for main in (commands.main, train.main):
        try:
            code = main(["--version"])
        except SystemExit as end:
            code = end.code
        assert code == 0
        line = capsys.readouterr().out
        assert re.fullmatch(r"raphael_dist \S+ \(git [0-9a-f]{12}\+?\), Python 3\S+, torch \S+, deepspeed \S+, .*\n", line)


def test_what_is_printed_may_be_cut_off() -> None:
    command = f"{sys.executable} -m raphael_dist config --json-schema | head -c 10"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_level_of_the_log_is_a_key_too() -> None:
    args = train.parse(["--config", "emoji-tiny", "--log-level", "debug"])
    assert load_config(args.config, args.overrides).run.log_level == "debug"


def test_presets_find_what_was_shipped_from_any_folder(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert load_config("emoji-tiny").image.encoder == "data/vae-emoji"
    monkeypatch.chdir(tmp_path)
    config = load_config("emoji-tiny")
    assert config.image.encoder == str(root() / "data/vae-emoji")
    assert config.data.shards == (str(root() / "data/emoji-demo/train-0000.tar"),)
    assert located("ds_configs/zero2.json") == str(root() / "ds_configs/zero2.json")
    (tmp_path / "ds_configs").mkdir()
    assert located("ds_configs/zero2.json") == "ds_configs/zero2.json", "what the user has comes first"
    assert located("elsewhere/x") == "elsewhere/x"
