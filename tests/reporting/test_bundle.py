"""The debug bundle: its members, no secrets, files that vanish, and nothing half written."""

import json
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from raphael_dist.cli import doctor
from raphael_dist.config.schema import load_config
from raphael_dist.planning import search
from raphael_dist.reporting import bundle
from raphael_dist.reporting.bundle import scrub
from raphael_dist.text import HIDDEN
from tests.lib.planted_run import log_line, plant

SECRETS = [
    "hunter2hunter2", "hf_abcdefghijklmnopqrst", "AKIAABCDEFGHIJKLMNOP", "s3cr3tpassw0rd", "wandb0123456789",
    "eyJhbGciOi.JIUzI1",
]  # fmt: skip


def text_of(path: Path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read().decode() for member in archive}  # type: ignore[union-attr]


def with_secrets(folder: Path) -> Path:
    log = [
        (1.1, "WARNING", f"cannot fetch https://user:{SECRETS[0]}@data.org/a.tar?sig={SECRETS[0]}"),
        (1.2, "WARNING", f"started with HF_TOKEN={SECRETS[1]} and key {SECRETS[2]}"),
        (1.3, "WARNING", f"headers {{'Authorization': 'Bearer {SECRETS[5]}', 'x-password': '{SECRETS[3]}'}}"),
        (1.4, "WARNING", f"tracker failed for {SECRETS[4]}"),
    ]
    shards = [f"https://user:{SECRETS[0]}@data.org/{{0..9}}.tar"]
    run = plant(folder, log=log, options={"data.shards": shards, "run.project": SECRETS[4]})
    (run / "logs" / "rank-00001.log").write_text(log_line(2, "INFO", f"aws_secret_access_key: {SECRETS[3]}"))
    (run / "logs" / "stacks-rank-1.txt").write_text(f'  File "x.py", line 3\n    api_key="{SECRETS[3]}"\n')
    return run


def test_bundle_holds_what_a_maintainer_needs_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRETS[4])
    run, out = with_secrets(tmp_path / "run"), tmp_path / "out" / "bundle.tar.gz"
    assert doctor.main([str(run), "--bundle", str(out), "--cluster", "none", "--no-data"]) == 0
    assert "bundle:" in capsys.readouterr().out
    members = text_of(out)
    expected = ["doctor.txt", "plan.txt", "config.yaml", "versions.txt", "train.log", "logs/rank-00001.log"]
    expected += ["logs/stacks-rank-1.txt", "metrics.jsonl", "files.txt", "not-included.txt"]
    assert list(members) == [f"bundle/{name}" for name in expected]
    everything = "\n".join(members.values())
    assert [secret for secret in SECRETS if secret in everything] == []
    for harmless in ("max_tokens: 28", "data.org", "step 400/400", '"train/loss"', "torch 2.13", "caption_dropout: 0.1"):
        assert harmless in everything, harmless
    assert everything.count('"step"') == 40


FORMS = [
    "password=12345678",
    "token: 8839201",
    'password: "my secret phrase"',
    "HF_TOKEN='a secret phrase'",
    "secret=a,b12345678",
    "train.py --hf-token abcdefghijk",
    "--api-key abcdef012345 --steps 3",
    "Authorization: token abcdefghi",
    '"pwd": "12345678"',
    "github_pat_11ABCDEFG0123456789abcdef",
    "glpat-abcdefghij0123456789",
    "AIza" + "a1" * 18,
    "AccountKey=abcd1234+/==;x",
    "Cookie: session=abcdefghi",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEabcdef\n-----END RSA PRIVATE KEY-----",
    "{'token': b'abcdefgh'}",
    r'{"token": "abc\"def12345"}',
    r"password='it\'s abcdef'",
    r"{\"token\": \"abcdefgh\"}",
    'token="abcdefgh, cut off',
    "private_key: abcdefgh12345",
    "SIGNING_KEY=abcdefgh12345",
    f"key={'12ab' * 10}",
    f"'key': '{'12ab' * 10}'",
    "passphrase=abcdefgh",
    "WANDB_API_KEY\tabcdefgh",
    "ghr_" + "abcdef" * 4,
    "xoxs-12345678-abcdef",
    "https://hooks.slack.com/services/T1234/B1234/abcdefgh",
]


@pytest.mark.parametrize("text", FORMS)
def test_secret_of_any_form_is_hidden(text: str) -> None:
    shown = scrub(text, {})
    assert HIDDEN in shown
    parts = ("1234", "8839", " phrase", "cdef", "abcdef", "AIza")
    assert not [part for part in parts if part in shown], shown


ORDINARY = [
    "text.max_tokens=28: 3 of 9 captions", "tokens 77", "tokens\t77", "lr 0.1  keys 3", "max_tokens: 28", "unused_keys: 3",
    "'__key__': '000123'", "key: 000123", "keyword=abc", "step 5: keys=[a_b]",
]  # fmt: skip


@pytest.mark.parametrize("text", ORDINARY)
def test_what_is_no_secret_stays(text: str) -> None:
    assert scrub(text, {}) == text


def test_no_option_of_the_configuration_is_hidden() -> None:
    text = yaml.safe_dump(load_config("emoji-tiny").model_dump(mode="json"))
    assert scrub(text, {}) == text


def test_values_of_secret_variables_are_hidden_in_any_notation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = 'it\'s a "long" phrase\\ ' + "of many words " * 9
    monkeypatch.setenv("MY_PASSPHRASE", value)
    log = [(1.1, "WARNING", f"{json.dumps(value)} and {value!r}")]
    run = plant(tmp_path / "run", log=log, options={"run.project": f"a {value} b", "data.shards": [value]})
    out = tmp_path / "bundle.tar.gz"
    assert doctor.main([str(run), "--bundle", str(out), "--cluster", "none", "--no-data"]) == 0
    members = text_of(out)
    assert f"project: a {HIDDEN} b" in members["bundle/config.yaml"]
    assert f'"{HIDDEN}" and ' in members["bundle/train.log"]
    assert [name for name, text in members.items() if "long" in text or "many" in text] == []


def test_file_that_vanishes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = plant(tmp_path / "run"), tmp_path / "bundle.tar.gz"
    read_tail = bundle._tail

    def vanishing(path: Path, limit: int) -> str:
        path.unlink()
        return read_tail(path, limit)

    monkeypatch.setattr(bundle, "_tail", vanishing)
    assert doctor.main([str(run), "--bundle", str(out), "--cluster", "none", "--no-data"]) == 0
    members = text_of(out)
    assert "bundle/train.log" not in members
    lines = members["bundle/not-included.txt"].splitlines()
    assert lines == [f"{name}: No such file or directory" for name in ("train.log", "metrics.jsonl")]


@pytest.mark.parametrize("name", ["samples", "logs", "checkpoints/step-00000400"])
def test_folder_that_vanishes_during_the_listing_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out, scan = plant(tmp_path / "run"), tmp_path / "bundle.tar.gz", os.scandir

    def vanishing(path: str = ".") -> Any:
        if Path(path) == run / name and Path(path).is_dir():
            Path(path).rename(tmp_path / "gone")
        return scan(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert doctor.main([str(run), "--bundle", str(out), "--cluster", "none", "--no-data"]) == 0
    members = text_of(out)
    assert f"{name}/: its files are not in files.txt: No such file or directory" in members["bundle/not-included.txt"]
    assert " train.log\n" in members["bundle/files.txt"]
    assert f" {name}/" not in members["bundle/files.txt"]
    assert "complete: 400 steps" in members["bundle/train.log"]


def test_logs_and_files_over_the_limits_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = plant(tmp_path / "run"), tmp_path / "bundle.tar.gz"
    for rank in range(1, 4):
        (run / "logs" / f"rank-{rank:05d}.log").write_text("")
    monkeypatch.setattr(bundle, "MAX_LOGS", 2)
    monkeypatch.setattr(bundle, "MAX_LISTED", 5)
    doctor.main([str(run), "--bundle", str(out), "--cluster", "none", "--no-data"])
    members = text_of(out)
    assert "bundle/logs/rank-00002.log" in members
    assert members["bundle/files.txt"].count("\n") == 5
    assert members["bundle/not-included.txt"].splitlines() == [
        "logs/rank-00003.log: only 2 such files are included",
        "files.txt has only the first 5 files",
    ]


def test_bundle_has_the_plan_next_to_the_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Planner:
        def __init__(self, *arguments: Any) -> None:
            asked.extend(arguments)

        def evaluate(self, choice: search.Choice) -> Any:
            asked.append(choice)
            step = SimpleNamespace(images_per_s=80.0, seconds=0.2, mfu=lambda peak: 0.25)
            return SimpleNamespace(step=step, memory=SimpleNamespace(total=3 << 30))

    monkeypatch.setattr(search, "Search", Planner)
    run, out = plant(tmp_path / "run"), tmp_path / "bundle.tar.gz"
    assert doctor.main([str(run), "--bundle", str(out), "--no-data"]) == 0
    _, cluster, world, choice = asked
    assert (cluster.name, world) == ("cpu", 2)
    assert (choice.stage, choice.micro_batch_size) == (2, load_config("emoji-tiny").train.micro_batch_size)
    assert text_of(out)["bundle/plan.txt"].splitlines() == [
        "images per second: measured 40, planned 80",
        "seconds per step: measured 0.4, planned 0.2",
        "peak memory of a rank, GiB: measured 1.5, planned 3",
        "share of the device's peak FLOP/s (MFU): measured unknown, planned 0.25",
        "",
    ]
    doctor.main([str(run), "--bundle", str(out), "--no-data", "--cluster", "none"])
    lines = text_of(out)["bundle/plan.txt"].splitlines()
    assert lines[0] == "images per second: measured 40, planned unknown"
    assert lines[-1] == "--cluster none: no prediction was made"


@pytest.mark.parametrize("name", ["taken/bundle.tar.gz", "bundle.zip"])
def test_bundle_that_cannot_be_written_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = plant(tmp_path / "run")
    (tmp_path / "taken").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert doctor.main([str(run), "--bundle", str(tmp_path / name), "--cluster", "none", "--no-data"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --bundle")
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_only_the_end_of_a_long_log_is_included(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = plant(tmp_path / "run"), tmp_path / "bundle.tar.gz"
    monkeypatch.setattr(bundle, "LOG_BYTES", 500)
    doctor.main([str(run), "--bundle", str(out), "--cluster", "none", "--no-data"])
    log = text_of(out)["bundle/train.log"]
    assert len(log) < 500
    assert log.startswith("2026-01-01")
    assert "complete: 400 steps" in log
