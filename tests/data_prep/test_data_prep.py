"""Data preparation of folders, tables and shards, and data inspection."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data_prep.inspect_data import find_duplicates
from raphael_dist.training.metrics_files import read_metrics
from tests.data.shards.test_index import laion_shard
from tests.data.shards.test_shards import write_shard
from tests.lib.documents import DOCUMENTS, blocks_of
from tests.lib.launch import ROOT
from tools import inspect_data, prepare_data

SMALL_MODEL = [
    "model.channels=[16,24]", "model.attention=[true,false]", "model.expert_width=[16,24]", "model.layers_per_block=1",
    "model.head_dim=8", "model.norm_groups=8", "model.gate_width=8",
]  # fmt: skip
COLOURS, SHAPES = ("red", "green", "blue", "orange"), ("circle", "square", "triangle")


def draw(n: int, size: tuple[int, int] = (80, 64)) -> tuple[Image.Image, str]:
    """Return an image of a coloured shape, and its caption."""
    rng, colour, shape = np.random.default_rng(n), COLOURS[n % 4], SHAPES[n % 3]
    image = Image.new("RGB", size, "white")
    x, y, r = (int(v) for v in (rng.integers(4, size[0] - 40), rng.integers(4, size[1] - 40), rng.integers(20, 36)))
    pen = ImageDraw.Draw(image)
    if shape == "triangle":
        pen.polygon([(x, y + r), (x + r, y + r), (x + r // 2, y)], fill=colour)
    else:
        (pen.ellipse if shape == "circle" else pen.rectangle)((x, y, x + r, y + r), fill=colour)
    return image, f"a {colour} {shape}"


def read_shard(path: Path) -> dict[str, dict[str, bytes]]:
    """Return the members of each sample of a tar, by key and extension, in order."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            folder, slash, base = member.name.rpartition("/")
            stem, _, ext = base.partition(".")
            found.setdefault(folder + slash + stem, {})[ext] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return found


def folder_of(folder: Path, count: int, captions: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        image, caption = draw(n)
        image.save(folder / f"my picture {n:03d}.{'jpg' if n % 2 else 'png'}")
        if captions:
            (folder / f"my picture {n:03d}.txt").write_text(caption)
    return folder


def names(count: int) -> list[str]:
    return [f"my picture {n:03d}.{'jpg' if n % 2 else 'png'}" for n in range(count)]


def prepare(*words: object) -> int:
    return prepare_data.main([str(word) for word in words])


def captions_in(out: Path) -> list[list[str]]:
    rows = [read_shard(path) for path in sorted(out.glob("*.tar"))]
    return [json.loads(members["json"])["captions"] for row in rows for members in row.values()]


def test_folder_with_txt_per_image_becomes_shards(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("skimage", reason="needs scikit-image (the extra `edges`)")
    folder, out = folder_of(tmp_path / "in", 10), tmp_path / "out"
    (folder / "broken.jpg").write_bytes(b"broken")
    (folder / "broken.txt").write_text("x")
    draw(1)[0].save(folder / "silent.png")
    assert prepare(folder, "--out", out, "--edges", "canny", "--per-shard", 6, "--held-out", 0.25) == 0
    output = capsys.readouterr().out
    assert "10 samples in 3 shards, 2 left out: 1 x image header cannot be read" in output
    assert "1 x no caption" in output
    assert "2 of them for validation" in output
    assert [path.name for path in sorted(out.iterdir())] == [
        f"{name}.{ext}" for name in ("train-00000", "train-00001", "val-00000") for ext in ("json", "tar")
    ]
    index = build_index(sorted(out.glob("*.tar")), tmp_path / "index")
    assert (index.num_samples, index.bad) == (10, [])
    for members in read_shard(out / "train-00000.tar").values():
        edge = np.asarray(Image.open(io.BytesIO(members["edge.png"])))
        assert edge.shape == (64, 80)
        assert 0 < (edge > 127).mean() < 0.3
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare(folder, "--out", out, "--edges", "canny", "--per-shard", 6, "--held-out", 0.25) == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert prepare(folder, "--out", out, "--edges", "none", "--per-shard", 6) == 2
    assert "has different edge maps" in capsys.readouterr().err


def test_interrupted_part_is_written_again_and_parts_divide_work(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", 9)
    for part in range(2):
        assert (
            prepare(folder, "--out", tmp_path / "parts", "--edges", "none", "--per-shard", 3, "--part", part, "--parts", 2)
            == 0
        )
    assert prepare(folder, "--out", tmp_path / "one", "--edges", "none", "--per-shard", 3) == 0
    tars = {path.name: path.read_bytes() for path in (tmp_path / "one").glob("*.tar")}
    assert {path.name: path.read_bytes() for path in (tmp_path / "parts").glob("*.tar")} == tars
    (tmp_path / "one" / "train-00001.tar").write_bytes(b"half")
    (tmp_path / "one" / "train-00001.json").unlink()  # a report comes last: without one a shard does not count
    assert prepare(folder, "--out", tmp_path / "one", "--edges", "none", "--per-shard", 3) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "one").glob("*.tar")} == tars


def as_jsonl(folder: Path) -> None:
    lines = [json.dumps({"file_name": name, "text": draw(n)[1], "score": n}) for n, name in enumerate(names(4))]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def as_csv(folder: Path) -> None:
    lines = ["filename,caption", *(f'"{name}","{draw(n)[1]}"' for n, name in enumerate(names(4)))]
    (folder / "list.csv").write_text("\n".join(lines), encoding="utf-8-sig")


def as_parquet(folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow (the extra `parquet`)")
    from pyarrow import parquet

    rows = [
        {"image": {"bytes": (folder / n).read_bytes(), "path": None}, "text": draw(i)[1]} for i, n in enumerate(names(4))
    ]
    for name in names(4):
        (folder / name).unlink()
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")


def as_saved_dataset(folder: Path) -> None:
    """Write a data set like `datasets.Dataset.save_to_disk`."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow (the extra `parquet`)")
    rows = [{"image": {"bytes": (folder / n).read_bytes(), "path": n}, "text": draw(i)[1]} for i, n in enumerate(names(4))]
    for name in names(4):
        (folder / name).unlink()
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text("{}")


@pytest.mark.parametrize("table", [as_jsonl, as_csv, as_parquet, as_saved_dataset])
def test_captions_are_read_from_tables(tmp_path: Path, table) -> None:
    folder = folder_of(tmp_path / "in", 4, captions=False)
    table(folder)
    assert prepare(folder, "--out", tmp_path / "out", "--edges", "none") == 0
    assert captions_in(tmp_path / "out") == [[draw(n)[1]] for n in range(4)]


def test_shards_are_prepared_under_their_names_and_keys(tmp_path: Path) -> None:
    rows = []
    for n in range(4):
        buffer = io.BytesIO()
        draw(n)[0].save(buffer, "PNG")
        rows.append((f"x/{n:09d}", {"png": buffer.getvalue(), "txt": draw(n)[1].encode()}))
    rows[2][1]["png"] = rows[2][1]["png"][:60]
    (tmp_path / "in").mkdir()
    write_shard(tmp_path / "in" / "00007.tar", rows)
    assert prepare(tmp_path / "in", "--out", tmp_path / "out", "--edges", "none") == 0
    found = read_shard(tmp_path / "out" / "00007.tar")
    assert list(found) == ["x/000000000", "x/000000001", "x/000000003"]
    assert found["x/000000001"] == {"png": rows[1][1]["png"], "txt": b"a green square"}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_bytes(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def jsonl(folder: Path, captions: list, name: str = "text") -> Path:
    """Write images 0.png, 1.png, ... and a metadata.jsonl with a caption for each."""
    folder.mkdir(parents=True)
    rows = [{"file_name": f"{n}.png", name: caption} for n, caption in enumerate(captions)]
    for row in rows:
        draw(0)[0].save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


LABELS = "filename,label\na.png,x\n"
MISTAKES = {
    "gone": (lambda d: None, [], "error: SOURCE="),
    "nothing there": (lambda d: d.mkdir(), [], "must contain images in .jpg, .jpeg, .jpe, .jfif, .png, .webp"),
    "no captions": (lambda d: folder_of(d, 2, captions=False), [], "none of its images (2)"),
    "other pictures": (lambda d: write(d / "a.gif", "x"), [], "Convert the images in .gif"),
    "no column": (lambda d: write(d / "a.csv", LABELS), [], "it has only filename, label. Select a column with --caption"),
    "another column": (lambda d: write(d / "a.csv", LABELS), ["--caption", "lable"], "did you mean 'label'"),
    "outside": (lambda d: write(d / "metadata.jsonl", '{"file_name": "../a.png", "text": "x"}'), [], "must name an image"),
    "outside, of Windows": (lambda d: write(d / "a.csv", "file_name,text\n..\\a.png,x\n"), [], r"but it has '..\\a.png'"),
    "drive": (lambda d: write(d / "a.csv", "file_name,text\nC:\\in\\a.png,x\n"), [], "Write a path relative to this folder"),
    "short": (lambda d: write(d / "a.csv", "text,file_name\na dog\n"), [], "row 1 must name an image"),
    "surplus": (lambda d: write(d / "metadata.csv", "file_name,text\n0.png,a\n1.png,a dog, a cat\n"), [],
                "row 2 (line 3) must have as many fields as the header (2)"),
    "a dead link": (lambda d: (d.mkdir(), (d / "metadata.csv").symlink_to(d / "none")), [], "metadata.csv cannot be read"),
    "latin-1": (lambda d: write_bytes(d / "metadata.jsonl", "größe".encode("latin-1")), [], "not UTF-8"),
    "UTF-16": (lambda d: write_bytes(d / "metadata.csv", "file_name,text".encode("utf-16")), [], "not UTF-8"),
    "nested": (lambda d: write(d / "metadata.jsonl", "[" * 100_000), [], "cannot be parsed (nested too deeply)"),
    "no text": (lambda d: jsonl(d, [7, 8]), [], "has one (caption is a number, not a string)"),
    "no JSON": (lambda d: write(d / "metadata.jsonl", "{"), [], "line 1 must be JSON"),
    "splits": (lambda d: write(d / "dataset_dict.json", "{}"), [], "must be one split"),
    "edges": (lambda d: folder_of(d, 1), ["--edges", "sobel"], "must be one of auto, hed, canny, stored, none"),
    "part": (lambda d: folder_of(d, 1), ["--part", "3", "--parts", "2"], "from 0 to 1"),
    "a share": (lambda d: folder_of(d, 1), ["--held-out", "0.9"], "from 0 to 0.5"),
    "a share of one": (lambda d: folder_of(d, 1), ["--held-out", "0.1"], "0.1 requires at least 2 images"),
}  # fmt: skip


def test_captions_of_other_types_are_reported_with_type(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    captions = ["a", {"en": "b", "de": "c"}, float("nan"), 7, True, ["d", None], None, ["e", "f"], [[1]]]
    folder, out = jsonl(tmp_path / "in", captions), tmp_path / "out"
    assert prepare(folder, "--out", out, "--edges", "none") == 0
    assert captions_in(out) == [["a"], ["d"], ["e", "f"]]
    bad = dict(json.loads((out / "train-00000.json").read_text())["bad"])
    kinds = {1: "an object", 2: "a number", 3: "a number", 4: "true or false", 8: "a list"}
    assert bad == {f"{n}.png": f"caption is {kind}, not a string" for n, kind in kinds.items()} | {"6.png": "no caption"}
    assert "3 samples in 1 shard, 6 left out" in capsys.readouterr().out


def test_first_line_without_caption_is_left_out_alone(tmp_path: Path) -> None:
    folder, out = jsonl(tmp_path / "in", ["a", "b", "c"]), tmp_path / "out"
    first, *rest = (folder / "metadata.jsonl").read_text().splitlines()
    bare = json.dumps({"file_name": json.loads(first)["file_name"]})
    (folder / "metadata.jsonl").write_text("\n".join([bare, *rest]))
    assert prepare(folder, "--out", out, "--edges", "none") == 0
    assert captions_in(out) == [["b"], ["c"]]


def test_nested_caption_field_is_named_with_dot(tmp_path: Path) -> None:
    folder = jsonl(tmp_path / "in", [{"en": "a", "de": "b"}, {"de": "c"}, None])
    assert prepare(folder, "--out", tmp_path / "out", "--edges", "none", "--caption", "text.en") == 0
    assert captions_in(tmp_path / "out") == [["a"]]


def test_caption_files_have_usual_names_and_reported_errors(tmp_path: Path) -> None:
    folder, mark = tmp_path / "in", b"\xef\xbb\xbf"
    texts = {
        "0.TXT": b"zero", "1.png.txt": b"one", "2.txt": mark + b"two", "3.JSON": mark + b'{"caption": "three"}',
        "4.txt": b" \n", "4.json": b'{"caption": "four"}', "5.txt": "größe".encode("latin-1"),
        "6.txt": "größe".encode("utf-16"), "7.json": b"{", "8.json": b"[" * 100_000, "9.json": b"[]",
    }  # fmt: skip
    folder.mkdir()
    for n in range(10):
        draw(n)[0].save(folder / f"{n}.png")
    for name, data in texts.items():
        (folder / name).write_bytes(data)
    assert prepare(folder, "--out", tmp_path / "out", "--edges", "none") == 0
    assert captions_in(tmp_path / "out") == [["zero"], ["one"], ["two"], ["three"], ["four"]]
    bad = dict(json.loads((tmp_path / "out" / "train-00000.json").read_text())["bad"])
    assert bad == {
        "5.png": "txt is not UTF-8", "6.png": "txt is not UTF-8", "7.png": "json cannot be parsed",
        "8.png": "json is nested too deeply", "9.png": "json is not an object",
    }  # fmt: skip


def test_spreadsheet_csv_with_mark_and_empty_rows_is_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", 2, captions=False)
    rows = ["file_name,text", f'{names(2)[0]},"a dog, a cat"', f"{names(2)[1]},größe", ",", ","]
    (folder / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    assert prepare(folder, "--out", tmp_path / "out", "--edges", "none") == 0
    assert captions_in(tmp_path / "out") == [["a dog, a cat"], ["größe"]]


def test_csv_row_without_caption_is_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = folder_of(tmp_path / "in", 2, captions=False)
    (folder / "metadata.csv").write_text(f"file_name,text\n{names(2)[0]}\n{names(2)[1]},a dog\n")
    assert prepare(folder, "--out", tmp_path / "out", "--edges", "none") == 0
    assert captions_in(tmp_path / "out") == [["a dog"]]
    assert "1 sample in 1 shard, 1 left out: 1 x no caption" in capsys.readouterr().out


@pytest.mark.parametrize("table", ["metadata.csv", "metadata.jsonl"])
def test_windows_paths_in_table_name_the_same_images(tmp_path: Path, capsys: pytest.CaptureFixture, table: str) -> None:
    folder = folder_of(tmp_path / "in", 2, captions=False)
    folder_of(folder / "sub", 1, captions=False)
    draw(3)[0].save(folder / "with\\backslash.png")
    rows = [(f".\\{names(2)[0]}", "a"), (names(2)[1], "b"), (f"sub\\{names(1)[0]}", "c"), ("with\\backslash.png", "d")]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    if table == "metadata.csv":
        lines = ["file_name,text", *(f"{name},{text}" for name, text in rows)]
    (folder / table).write_text("\n".join(lines))
    assert prepare(folder, "--out", tmp_path / "out", "--edges", "none") == 0
    output = capsys.readouterr().out
    assert "4 samples in 1 shard" in output
    assert "skipped" not in output
    assert captions_in(tmp_path / "out") == [["a"], ["b"], ["c"], ["d"]]


@pytest.mark.parametrize("name", MISTAKES)
def test_user_mistake_is_one_line_with_remedy(tmp_path: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    make, options, text = MISTAKES[name]
    make(tmp_path / "in")
    assert prepare(tmp_path / "in", "--out", tmp_path / "out", *(options or ["--edges", "none"])) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert text in error


def test_every_file_with_a_caption_is_used_or_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = folder_of(tmp_path / "in", 1)
    jpeg = io.BytesIO()
    draw(1)[0].save(jpeg, "JPEG")
    others = ["d.heif", "e.jp2", "g.psd", "h.jpeg2000", "i.JPG.download", "j", "k.npy", "l.img"]
    for name in ("b.jfif", "c.JPE", *others):
        (folder / name).write_bytes(jpeg.getvalue())
        text = f"{name.partition('.')[0]}.txt" if name != "l.img" else "l.img.txt"
        (folder / text).write_text(name)
    (folder / "m.jpg.crdownload").write_bytes(b"half")
    (folder / "README.md").write_text("about")
    assert prepare(folder, "--out", tmp_path / "out", "--edges", "none") == 0
    assert [caption for [caption] in captions_in(tmp_path / "out")] == ["b.jfif", "c.JPE", draw(0)[1]]
    output = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "3 samples in 1 shard" in output
    assert re.search(r"skipped: 4 x image in another format .* the first 'd.heif'", output)
    assert re.search(r"skipped: 5 x file with a caption or an image's suffix, .* the first 'i.JPG.download'", output)


def test_missing_out_option_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert prepare(tmp_path) == 2
    assert "--out is required" in capsys.readouterr().err


def test_inspect_data_reports_contents_and_draws_sheet(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = folder_of(tmp_path / "in", 8)
    draw(3)[0].save(folder / "again.png")
    (folder / "again.txt").write_text("a red circle")
    assert prepare(folder, "--out", tmp_path / "out", "--edges", "none") == 0
    capsys.readouterr()
    sheet = tmp_path / "sheets" / "look.png"
    sizes = ["image.buckets=[[64,64],[64,80]]", "data.bucket_run=16"]
    assert inspect_data.main([str(tmp_path / "out"), "--out", str(sheet), "--images", "9", *sizes]) == 0
    output = capsys.readouterr().out
    expected_texts = [
        "9 samples in 1 shard",
        "png 56%, jpg 44%",
        "json captions: a list, in 100%",
        "cannot be decoded: 0 of 9",
    ]
    expected_texts += ["look like another one: 1 of 9", "9 (1 each in 9 samples); words: median 3", "[64, 80]         9"]
    assert [text for text in expected_texts if text not in output.replace("json 100%, ", "")] == []
    with Image.open(sheet) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or []}
        assert image.width > 700
    assert {(255, 0, 0), (0, 0, 255)} <= colours
    assert inspect_data.main([str(tmp_path / "none.tar")]) == 2


def test_inspect_data_counts_filter_drops_and_names_columns(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shard = laion_shard(tmp_path / "00000.tar", 0, 6, aesthetic=[4.0, 4.7, 5.5, None, 6.0, 4.69])
    sizes = ["image.buckets=[[24,24],[24,32],[24,40]]", "data.bucket_run=16"]
    rules = "{column: aesthetic, min: 4.7, on_missing: drop}, {column: width, min: 32}"
    assert inspect_data.main([str(shard), *sizes, f"data.filters=[{rules}]"]) == 0
    output = capsys.readouterr().out
    [columns] = re.findall("columns for data.filters: (.*)", output)
    assert {"aesthetic", "NSFW", "original_width", "short_side", "ratio"} <= set(columns.split(", "))
    assert "filter aesthetic >= 4.7: 3 samples dropped (1 without a value)" in output
    assert "filter width >= 32: 0 samples dropped" in output
    assert re.findall(r"\[24, \d+\] +(\d+) ", output) == ["0", "2", "1"], "of 1, 2 and 4, which are 32, 40 and 32 wide"
    assert inspect_data.main([str(shard), *sizes, "data.filters=[{column: aesthetic, min: 4.7}]"]) == 2
    assert "'aesthetic' must have a value in every sample, but sample '000000003' has none" in capsys.readouterr().err


def test_similar_images_need_equal_shape_and_colour() -> None:
    grey = np.linspace(0, 200, 72, dtype=np.float32).reshape(8, 9, 1) * np.ones(3, np.float32)
    red = grey * np.float32([1.2, 0.9, 0.9])
    assert find_duplicates([("a", 1, grey), ("b", 1, red), ("c", 3, grey + 1), ("d", 0xFF, grey)]) == [["a", "c"]]


def documented_commands_from_folder_to_training() -> list[str]:
    """Return the first documented commands that prepare a folder and train on it."""
    for document in DOCUMENTS:
        for block in blocks_of(document):
            commands = [line for line in block.lines if block.is_shell()]
            if any("prepare_data.py" in c for c in commands) and any("train.py" in c for c in commands):
                return commands
    raise AssertionError("no block of commands prepares data and trains on it")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_documented_commands_train_from_a_folder_of_images(tmp_path: Path) -> None:
    """Runs in an empty copy of the repository, with 100 images of 64 pixels and a small model.

    `photos` needs Stable Diffusion 2's weights: tests/training/test_photos.py trains it with random ones.
    """
    for name in ("raphael_dist", "tools", "data", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = documented_commands_from_folder_to_training()
    _, _, folder, *_ = shlex.split(commands[0])  # python tools/prepare_data.py FOLDER
    folder_of(tmp_path / folder, 100)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    for command in commands:
        words = shlex.split(command.replace("--config photos", "--config emoji-tiny"), comments=True)
        more = [*SMALL_MODEL, "train.max_steps=80", "optim.warmup_steps=5"] if "train.py" in command else []
        done = subprocess.run([*words, *more], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    losses = [value for _, value in read_metrics(next(tmp_path.glob("runs/*/metrics.jsonl")))["train/loss"]]
    assert np.mean(losses[-2:]) < 0.8 * losses[0]
