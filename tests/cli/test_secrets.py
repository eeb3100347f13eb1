"""Secrets in addresses, planted: no file and no stream of a run or a tool holds them."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from raphael_dist import train
from raphael_dist.config.schema import load_config, stored_tree, to_yaml
from raphael_dist.data.fetch.remote import RetryPolicy
from raphael_dist.data.fetch.shard_cache import ShardStore, base_name
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.shards.shard_names import expand_shards
from raphael_dist.errors import UserError, run_command
from raphael_dist.evaluation.draw import record_protocol
from raphael_dist.text import LineFormat, hide_secrets, hide_secrets_in_text, hide_secrets_in_tree
from raphael_dist.training.wandb_mlflow import flat
from tests.lib.launch import ROOT, run_ranks
from tests.lib.servers import http_files

USER, SECRET = "us3r", "hunter2"
QUERY = "X-Amz-Signature=SECRETSIG"


def leaks(text: str | bytes) -> list[str]:
    data = text.encode() if isinstance(text, str) else text
    return [secret for secret in (USER, SECRET, "SECRETSIG") if secret.encode() in data]


def planted(address: str) -> str:
    return address.replace("//", f"//{USER}:{SECRET}@") + f"?{QUERY}"


@pytest.mark.parametrize(
    ("address", "expected", "name"),
    [
        (f"https://{USER}:{SECRET}@h:80/d/x.tar?{QUERY}#SECRETSIG", "https://(hidden)@h:80/d/x.tar?(hidden)", "x.tar"),
        (f"https://{USER}:{SECRET}/SECRETSIG@h/x.tar", "https://(hidden)@h/x.tar", "x.tar"),
        (f"http://{USER}:{SECRET}?SECRETSIG@h/x.tar", "http://(hidden)@h/x.tar", "x.tar"),
        (f"https://{SECRET}@h/x{{0..2}}.tar", "https://(hidden)@h/x{0..2}.tar", "x{0..2}.tar"),
        ("http://h/a.tar#sig=SECRETSIG", "http://h/a.tar#(hidden)", "a.tar"),
        ("https://h/x.tar?sig='SIG&b=SECRETSIG", "https://h/x.tar?(hidden)", "x.tar"),
        (f"https://{USER}:\"SIG'{SECRET}@h/x.tar", "https://(hidden)@h/x.tar", "x.tar"),
        ("https://h/v;a=SECRETSIG/x.tar;b=SECRETSIG;c", "https://h/v;a=(hidden)/x.tar;b=(hidden);c", "x.tar;c"),
        ("https://h/a;b.tar", "https://h/a;b.tar", "a;b.tar"),
        (f"s3://{USER}:{SECRET}@bucket/x#1.tar", "s3://(hidden)@bucket/x#1.tar", "x#1.tar"),
        (f"ftp://{USER}:{SECRET}@h/x.tar", "ftp://(hidden)@h/x.tar", "x.tar"),
        ("abfs://container@account/x.tar", "abfs://container@account/x.tar", "x.tar"),
        ("hf://datasets/a/b@main/x.tar", "hf://datasets/a/b@main/x.tar", "x.tar"),
        ("https://[::1]:80/x.tar", "https://[::1]:80/x.tar", "x.tar"),
        ("/data/a@b?c.tar", "/data/a@b?c.tar", "a@b?c.tar"),
    ],
)
def test_address_is_shown_without_secrets(address: str, expected: str, name: str) -> None:
    assert hide_secrets(address) == expected
    assert hide_secrets(expected) == expected, "hidden once, it stays as it is"
    assert base_name(address) == base_name(expected) == name
    line = hide_secrets_in_text(f"error: '{address}': [{address}, {address}]; {address}: gone")
    assert not leaks(line)
    assert hide_secrets_in_text(line) == line
    assert line.endswith(": gone")
    quoted = f"{[address, address]} {json.dumps([address])} "
    assert hide_secrets_in_text(quoted).count(expected) == 3
    assert hide_secrets_in_text(f"no '{address}', \"{address}\"") == f"no '{expected}', \"{expected}\""


def test_stored_configuration_has_no_secrets_and_reports_that() -> None:
    url = planted("https://h/x.tar")
    config = load_config(
        "emoji-tiny",
        [f"data.sources=[{{shards: ['{url}'], weight: 2}}]", f"data.val_shards=['{url}']", "data.shards=[]"],
    )
    for text in (to_yaml(config), str(stored_tree(config)), str(flat(config))):
        assert not leaks(text)
        assert "https://(hidden)@h/x.tar?(hidden)" in text
    with pytest.raises(UserError, match=r"data.shards='https://\(hidden\).* stands for a user, password or query"):
        expand_shards([hide_secrets(url)])
    plain = load_config("emoji-tiny")
    assert hide_secrets_in_tree(plain.model_dump(mode="json")) == plain.model_dump(mode="json")


def test_index_and_its_errors_have_no_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with http_files(ROOT / "data/emoji-demo") as address:
        names = [planted(f"{address}/val-0000.tar")]
        store = ShardStore(tmp_path / "index", tmp_path / "fetched", retry=RetryPolicy(0, 5.0, 0.1))
        for _ in range(2):
            index = build_index(names, store=store)
            assert index.shard(0).source == names[0], "the next run fetches by the address that it was given"
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert len(files) > 5
        assert not [path for path in files if leaks(path.read_bytes()) or leaks(str(path))]
        for wrong in ("gone.tar", "x.tar", "*.tar", "{2..1}.tar"):
            bad = planted(f"{address}/{wrong}")
            assert run_command(lambda bad=bad: build_index(expand_shards([bad]), store=store)) == 2
    streams = capsys.readouterr()
    assert streams.err.count("error: ") == 4
    assert not leaks(streams.err + streams.out)
    try:
        raise OSError(names[0])
    except OSError:
        record = logging.LogRecord("a", 40, "b", 1, "at %s", (names[0],), sys.exc_info())
    assert not leaks(LineFormat().format(record))


def test_command_line_that_trackers_store_has_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train.py", "--config", "emoji-tiny", "--plan", f"data.shards=['{planted('https://h/x.tar')}']"]
    monkeypatch.setattr(sys, "argv", words)
    assert train.main() == 0
    assert sys.argv == [*words[:-1], "data.shards=['https://(hidden)@h/x.tar?(hidden)']"]


def test_unforeseen_error_shows_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise OSError(planted("https://h/x.tar"))
    except OSError as error:
        train._fail_unforeseen(error)
    output = capsys.readouterr().err
    assert "Traceback" in output
    assert not leaks(output)


def test_run_leaves_no_secret_in_any_file_or_stream(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["raphael_dist/train.py", "--config", "tests/fixtures/small.yaml", f"run.dir={run}", "data.val_shards=[]"]
    command += [f"data.cache_dir={tmp_path}/cache", "data.retries=0"]
    with http_files(ROOT / "data/emoji-demo") as address:
        shards = f"data.shards=['{planted(f'{address}/train-0000.tar')}']"
        output = "".join(run_ranks([*command, shards, "train.max_steps=2"], 1))
        output += "".join(run_ranks([*command, shards, "train.max_steps=4"], 1))  # the same command resumes
    output += "".join(run_ranks([*command[:1], "--config", str(run / "config.yaml"), "train.max_steps=6"], 1, exit_code=2))
    assert "stands for a user, password or query" in output
    assert "Traceback" not in output
    assert not leaks(output)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "manifest.json", "train.log", "shards.json"} <= {path.name for path in files}
    assert not [path for path in files if leaks(path.read_bytes()) or leaks(str(path))]


@pytest.mark.slow
@pytest.mark.parametrize("command", [["raphael_dist/train.py", "--plan"], ["raphael_dist/train.py", "--dry-run"]])
def test_command_lines_show_no_secret(tmp_path: Path, command: list[str]) -> None:
    words = [f"data.shards=['{planted('http://127.0.0.1:1/x.tar')}']", f"run.dir={tmp_path}", "data.retries=0"]
    words = [*command, "--config", "emoji-tiny", *words, f"data.cache_dir={tmp_path}/cache"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert "(hidden)" in done.stdout
    assert not leaks(done.stdout + done.stderr)
    tool = [sys.executable, "tools/index_shards.py", planted("http://127.0.0.1:1/x.tar"), "--cache-dir", str(tmp_path)]
    done = subprocess.run(tool, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 2
    assert not leaks(done.stdout + done.stderr)


LOCAL_PATHS = ["run.dir", "run.init_from", "data.cache_dir", "data.shard_cache", "data.hed_weights", "text.encoder",
               "image.vae", "sample.images"]  # fmt: skip


@pytest.mark.parametrize("scheme", ["s3", "https", "file"])
@pytest.mark.parametrize("key", LOCAL_PATHS)
def test_address_as_local_path_is_refused_without_its_secrets(key: str, scheme: str) -> None:
    """`Path` would make it a local folder whose name has the secrets in the clear."""
    with pytest.raises(UserError) as caught:
        load_config("emoji-tiny", [f"{key}={scheme}://{USER}:{SECRET}@b/c"])
    line = str(caught.value)
    assert line.startswith(f"{key}=")
    assert f"{scheme}://(hidden)@b/c" in line
    assert "must be a local path" in line
    assert not leaks(line)
    assert "\n" not in line


def test_protocol_of_an_evaluation_has_no_secrets(tmp_path: Path) -> None:
    options = {
        "captions": f"shards=https://{SECRET}@h/x.tar",
        "reference": f"shards=https://h/x.tar;sig={SECRET}",
        "clip": f"shards=s3://{USER}:{SECRET}@b/x.tar?{QUERY}",
        "list": [planted("https://h/a b.tar")],
    }
    for _ in range(2):  # the second time it is compared with the file
        record_protocol(tmp_path, options)
    text = (tmp_path / "protocol.json").read_text()
    assert not leaks(text)
    assert json.loads(text)["captions"] == "shards=https://(hidden)@h/x.tar"
