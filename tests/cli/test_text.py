"""Text from outside: files in any encoding, lines that end at line feeds alone, nothing that acts on a terminal."""

import html
import io
import json
import logging
import pickle
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from raphael_dist import train
from raphael_dist.checkpoint.manifest import seal
from raphael_dist.cli import doctor
from raphael_dist.cli import report as cli_report
from raphael_dist.cluster import prove_agent
from raphael_dist.config.schema import load_config
from raphael_dist.convert.conversion import convert
from raphael_dist.convert.layouts.dense import read_object
from raphael_dist.convert.write_plan import Options
from raphael_dist.data.shards.shard_names import expand_shards
from raphael_dist.engine.ds_config import read_deepspeed_json
from raphael_dist.errors import UserError, run_command
from raphael_dist.evaluation.image_features import ClipScore
from raphael_dist.model.latents import latent_factor
from raphael_dist.planning.cluster_spec import load_cluster
from raphael_dist.sampling.prompts import read_requests
from raphael_dist.sampling.sampler import Request
from raphael_dist.storage.torchfile import load_tree
from raphael_dist.text import LineFormat, decode_text, escape_control, parse_json, print_line, read_json, split_lines
from raphael_dist.training.console_summary import end_lines
from tests.cluster.test_slurm_scripts import report
from tests.data.shards.test_shards import png
from tests.lib.checkpoints import DENSE, handmade_canonical, random_state
from tests.lib.launch import ROOT
from tests.lib.planted_run import plant
from tools import check_cluster, inspect_checkpoint, inspect_data

DEFAULT = Request("", (64, 64))
DEEP = "[" * 200_000


READERS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "configuration": ("a.yaml", "base: emoji-tiny\n# größe\n", lambda path: load_config(str(path), []).train.max_steps),
    "DeepSpeed": ("ds.json", '{"größe": 1, "zero_optimization": {"stage": 1}}', lambda path: read_deepspeed_json(str(path))),
    "prompts": ("a.txt", "größe\n", lambda path: [r.prompt for r in read_requests(path, DEFAULT)]),
    "prompts in JSON": ("a.jsonl", '{"prompt": "größe"}', lambda path: [r.prompt for r in read_requests(path, DEFAULT)]),
    "cluster": ("cluster.yaml", (ROOT / "raphael_dist/planning/clusters/h100x8.yaml").read_text() + "# größe\n",
                lambda path: load_cluster(str(path)).name),
    "part of a pipeline": ("model_index.json", '{"größe": 1}', read_object),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_byte_order_mark_is_skipped_and_other_encodings_refused(name: str, tmp_path: Path) -> None:
    file, text, read = READERS[name]
    path = tmp_path / file
    path.write_bytes(text.encode())
    plain = read(path)
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read(path) == plain
    for data in (text.encode("latin-1"), text.encode("utf-16"), text.encode("utf-16-le"), text.encode("utf-32")):
        path.write_bytes(data)
        with pytest.raises(UserError, match="not UTF-8") as error:
            read(path)
        assert "\n" not in str(error.value)
        assert file in str(error.value)


def test_vae_factor_is_read_after_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"block_out_channels": [1] * 5}).encode())
    assert latent_factor(str(tmp_path)) == 16


def test_lines_end_only_at_line_feeds(tmp_path: Path) -> None:
    odd = "a\u2028b\x85c\x0cd\x1de\x0bf"
    assert split_lines(f"{odd}\r\n\nlast") == [odd, "", "last"]
    (tmp_path / "a.txt").write_bytes(f"{odd}\r\nanother\n".encode())
    (tmp_path / "a.jsonl").write_bytes((json.dumps({"prompt": odd}, ensure_ascii=False) + "\n").encode())
    assert [r.prompt for r in read_requests(tmp_path / "a.txt", DEFAULT)] == [odd, "another"]
    assert [r.prompt for r in read_requests(tmp_path / "a.jsonl", DEFAULT)] == [odd]


@pytest.mark.parametrize(
    "read", [read_object, lambda path: read_deepspeed_json(str(path)), lambda p: read_requests(p, DEFAULT)]
)
def test_deeply_nested_json_is_one_line(read: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(DEEP)
    with pytest.raises(UserError, match="nested too deeply"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(DEEP)


@pytest.mark.parametrize("shape", ["deep", "shared"])
def test_small_pickle_that_expands_without_end_is_refused(shape: str, tmp_path: Path) -> None:
    tree: Any = []
    for _ in range(40):
        tree = [tree] * 8
    data = b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b"." if shape == "deep" else pickle.dumps(tree, protocol=2)
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    with pytest.raises(UserError, match=r"recursion|contains more than"):
        load_tree(tmp_path / "a.pt")


EVIL = "\x1b[2Kkey\nnot usable: 0\r\u202e\u2028\x9b1A"


def test_foreign_text_is_one_line_without_control_characters() -> None:
    assert escape_control("größe 東京 a b") == "größe 東京 a b"
    assert escape_control(EVIL) == r"\x1b[2Kkey\nnot usable: 0\r\u202e\u2028\x9b1A"
    assert escape_control("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert escape_control("\ud800").isprintable()


def is_clean(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text)


def test_inspect_data_escapes_keys_captions_and_json_names(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    meta = json.dumps({"captions": ["a dog"], EVIL: 1}).encode()
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (("0.png", png()), ("0.json", meta), (f"{EVIL}.png", b"no image"), (f"{EVIL}.txt", EVIL.encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert inspect_data.main([str(tmp_path / "a.tar"), "data.max_bad_fraction=1", "text.max_tokens=4"]) == 0
    output = capsys.readouterr().out
    assert "key\\nnot usable" in output
    assert is_clean(output)
    assert "text.max_tokens=4: longer captions are truncated (0 of 1)" in output


def inspect_planted(folder: Path) -> None:
    handmade_canonical(folder / "source", DENSE, random_state(DENSE, ("master",)))
    convert("canonical", folder / "source", "raphael", folder / "run", Options())
    (path,) = (folder / "run").rglob("manifest.json")
    path.write_bytes(seal({**read_json(path), "world_size": EVIL}))
    assert inspect_checkpoint.main([str(folder / "run")]) == 0


def diagnose_planted(folder: Path) -> None:
    (plant(folder / "run") / "checkpoints" / f"damaged-{EVIL}").mkdir(parents=True)
    assert doctor.main([str(folder / "run"), "--no-data"]) == doctor.FOUND


def judge_planted(folder: Path) -> None:
    (folder / "rank-00000.json").write_text(json.dumps(report(0, node=EVIL)))
    assert check_cluster.main(["--judge", str(folder), "--ranks", "2"]) == 2


def prove_planted(folder: Path) -> None:
    run = prove_agent._Run(MagicMock(), MagicMock(), folder, [EVIL])
    run.report.environment = {"ranks": [], "commit": ""}
    run._record("sums", [prove_agent.Outcome(0, EVIL, why="died")])


@pytest.mark.parametrize("show", [inspect_planted, diagnose_planted, judge_planted, prove_planted])
def test_value_in_a_file_cannot_forge_a_line(
    show: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show(tmp_path)
    output = capsys.readouterr().out
    assert escape_control(EVIL) in output
    assert is_clean(output)


def test_error_and_log_record_are_one_line_each(capsys: pytest.CaptureFixture) -> None:
    def fail() -> None:
        raise UserError(f"--prompts: {EVIL}")

    assert run_command(fail) == 2
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert is_clean(output)
    record = logging.LogRecord("raphael_dist", logging.WARNING, "", 1, "bad sample %s", (EVIL,), None)
    assert LineFormat("%(message)s").format(record) == f"bad sample {escape_control(EVIL)}"
    try:
        raise ValueError(EVIL)
    except ValueError:
        record.exc_info = sys.exc_info()
    assert is_clean(LineFormat("%(message)s").format(record).replace("\t", ""))


def test_ascii_output_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert run_command(lambda: print_line("größe 東京")) == 0
    assert train.main(["--config", "emoji-tiny", "--plan", "run.dir=runs/größe"]) == 0
    out.flush()
    assert b"gr\\xf6\\xdfe" in out.buffer.getvalue()  # type: ignore[attr-defined]


def test_existing_path_is_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["[x] set/a.tar", "{y,z} set/b[1].tar", "x set/a.tar", "y set/what?.tar", "plain-0.tar", "plain-1.tar"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    for name in names:
        assert expand_shards([name]) == [name]
        assert expand_shards([str(tmp_path / name)]) == [str(tmp_path / name)]
    assert expand_shards(["[x] set/*.tar"]) == ["[x] set/a.tar"]
    assert expand_shards(["{y,z} set/b*.tar"]) == ["{y,z} set/b[1].tar"]
    assert expand_shards(["plain-{0..1}.tar", "plain-[01].tar"]) == ["plain-0.tar", "plain-1.tar"]
    assert expand_shards(["{plain-0,x set/a}.tar"]) == ["plain-0.tar", "x set/a.tar"]
    assert expand_shards(["https://host/a[1].tar"]) == ["https://host/a[1].tar"]


MANY = "{a,b}" * 36
TOO_MANY = [MANY, f"{{{MANY},c}}", f"{{x{MANY}}}", "{0..999}{0..999}{a,b}", "{a..z}" * 5, "{-999999..999999}"]


@pytest.mark.parametrize("pattern", TOO_MANY)
def test_braces_with_too_many_names_are_refused_before_expansion(pattern: str) -> None:
    with pytest.raises(UserError, match="at most 1000000 files"):
        expand_shards([f"{pattern}.tar"])


@pytest.mark.parametrize("pattern", ["{a," * 5000 + "}" * 5000, f"{{0..{'9' * 5000}}}", "{" * 5000])
def test_invalid_braces_are_refused_in_a_short_line(pattern: str) -> None:
    with pytest.raises(UserError, match=r"data\.shards=.* braces, .*its braces cannot be parsed") as error:
        expand_shards([f"{pattern}.tar"])
    assert len(str(error.value)) < 500


def test_commands_at_end_of_run_are_quoted_for_a_shell(tmp_path: Path) -> None:
    config = load_config("emoji-tiny", [f"run.dir={tmp_path}/my run's $HOME"])
    output = "\n".join(end_lines(config, 10, 100, 1.0))
    quoted = f"'{tmp_path}/my run'\"'\"'s $HOME'"
    assert f"--checkpoint {quoted} --prompt" in output
    assert f"tensorboard --logdir {quoted}/tensorboard" in output
    assert f"convert --from auto {quoted} --to diffusers {quoted}/exported" in output


def test_commands_in_messages_and_reports_are_quoted_for_a_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my run"
    quoted = f"'{folder}'"
    run, page = plant(folder), tmp_path / "page.html"
    for routes in run.glob("samples/*.routes.json"):
        routes.unlink()
    arguments = [str(run), "--out", str(page), "--cluster", "none"]
    assert cli_report.main(arguments) == 0
    assert f"routes --checkpoint {quoted} --out paths" in html.unescape(page.read_text())
    (run / "metrics.jsonl").unlink()
    assert cli_report.main(arguments) == 2
    assert f"doctor {quoted}`" in capsys.readouterr().err
    with pytest.raises(UserError, match=re.escape(f"prepare_data.py {quoted} --out SHARDS`")):
        expand_shards([str(folder)])
    with pytest.raises(UserError, match=re.escape(f"--local-dir '{folder} clip'`")):
        ClipScore(tmp_path / "my run clip", torch.device("cpu"))


DECODE = """
import sys
from pathlib import Path
from raphael_dist.data.shards.decode_sample import ImageDataset
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.shards.decode_workers import DecodePool
if __name__ == "__main__":
    pool = DecodePool(ImageDataset(build_index([Path(sys.argv[1])], Path(sys.argv[2])), [(16, 16)], "none"), 1)
    print(pool.load((0, 0, False)).captions)
    pool.close()
"""


def test_workers_start_with_long_temporary_folder(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("0.png", png()), ("0.txt", b"a dog")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "decode.py").write_text(DECODE)
    command = [sys.executable, str(tmp_path / "decode.py"), str(tmp_path / "a.tar"), str(tmp_path / "index")]
    env = {"TMPDIR": str(long), "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "['a dog']\n", done.stderr


def test_bytes_are_read_as_utf8_or_refused() -> None:
    assert decode_text(b"\xef\xbb\xbfa\r\n") == "a\r\n"
    for data, where in ((b"\xff\xfea\0", "UTF-16"), (b"a\0b\0", "NUL"), (b"gr\xf6", "byte 2")):
        with pytest.raises(ValueError, match=f"not UTF-8 .*{where}"):
            decode_text(data)


def test_json_file_is_read_after_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
