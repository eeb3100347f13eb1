"""The committed emoji shards and their builder, which is deterministic."""

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webdataset import WebDataset

import make_emoji_dataset
from emoji_data import dataset as emoji
from emoji_data.names import clean_name, slug, with_article

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"emoji": 12_000_000, "emoji-demo": 500_000}
each_folder = pytest.mark.parametrize("folder", FOLDERS)


@cache
def samples(folder: str, split: str) -> dict[str, dict[str, bytes]]:
    """Return {key: {suffix: bytes}} of a split; fails on duplicate or split keys."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted((ROOT / "data" / folder).glob(f"{split}-*.tar*")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                assert suffix not in found.setdefault(key, {})
                assert key == list(found)[-1]
                file = tar.extractfile(member)
                assert file is not None
                found[key][suffix] = file.read()
    return found


def records(folder: str, split: str) -> dict[str, dict[str, Any]]:
    return {key: json.loads(members["json"]) for key, members in samples(folder, split).items()}


@each_folder
def test_shards_are_the_ones_in_the_manifest(folder: str) -> None:
    path = ROOT / "data" / folder
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    shards = sorted(path.glob("*.tar*"))
    assert [s.name for s in shards] == sorted(manifest["shards"])
    for shard in shards:
        assert hashlib.sha256(shard.read_bytes()).hexdigest() == manifest["shards"][shard.name]["sha256"]
    assert sorted(samples(folder, "val")) == manifest["held_out"]
    for split in ("train", "val"):
        rows = [row["samples"] for name, row in manifest["shards"].items() if name.startswith(split)]
        assert len(samples(folder, split)) == sum(rows)


def test_counts() -> None:
    train, val = records("emoji", "train"), records("emoji", "val")
    concepts = {row["concept"] for row in (train | val).values()}
    assert len(concepts) == 1906
    assert Counter(row["style"] for row in (train | val).values()) == {"noto": 1905, "twemoji": 1906, "fluent 3d": 1607}
    assert len(val) == pytest.approx(0.05 * len(concepts), rel=0.3)
    assert len(records("emoji-demo", "val")) >= 3
    assert 24 <= len({row["concept"] for row in records("emoji-demo", "train").values()}) <= 32


@pytest.mark.parametrize("name", ["emoji-demo/train-0000.tar", "emoji/val-0000.tar.gz"])
def test_writer_reproduces_committed_shards(name: str, tmp_path: Path) -> None:
    committed = ROOT / "data" / name
    again = [
        emoji.Sample(sample["__key__"], False, {suffix: data for suffix, data in sample.items() if suffix[0] != "_"})
        for sample in WebDataset([str(committed)], shardshuffle=False)
    ]
    emoji.write_tar(tmp_path / committed.name, again)
    one, two = ((gzip.decompress if path.suffix == ".gz" else bytes)(path.read_bytes())
                for path in (committed, tmp_path / committed.name))  # fmt: skip
    assert one == two


def test_folders_stay_small() -> None:
    for folder, limit in FOLDERS.items():
        assert sum(f.stat().st_size for f in (ROOT / "data" / folder).rglob("*") if f.is_file()) <= limit


@each_folder
def test_held_out_style_follows_from_hash_of_name(folder: str) -> None:
    share = json.loads((ROOT / "data" / folder / "manifest.json").read_text(encoding="utf-8"))["held_out_share"]
    styles: dict[str, dict[str, str]] = defaultdict(dict)
    for split in ("train", "val"):
        for row in records(folder, split).values():
            styles[row["concept"]][row["style"]] = split
    for concept, split_of in styles.items():
        h = hashlib.sha256(concept.encode()).hexdigest()
        expected = dict.fromkeys(split_of, "train")
        if int(h[:8], 16) < share * 2**32:
            expected[sorted(split_of)[int(h[8:16], 16) % len(split_of)]] = "val"
        assert split_of == expected
        assert "train" in split_of.values()  # a held-out concept is known from its other styles


@each_folder
@pytest.mark.parametrize("split", ["train", "val"])
def test_samples_decode(folder: str, split: str) -> None:
    white = []
    for key, members in samples(folder, split).items():
        assert set(members) == {"webp", "json", "edge.png"}
        image, edge = Image.open(io.BytesIO(members["webp"])), Image.open(io.BytesIO(members["edge.png"]))
        assert (image.format, image.mode, image.size) == ("WEBP", "RGB", (64, 64))
        assert (edge.format, edge.mode, edge.size) == ("PNG", "L", (64, 64))
        corners = np.asarray(image)[[0, 0, -1, -1], [0, -1, 0, -1]]
        white.append(corners.min() > 245)
        row = json.loads(members["json"])
        assert key == f"{slug(row['concept'])}__{slug(row['style'])}"
        assert row["captions"][0] == f"{with_article(row['concept'])}, {row['style']} style"
        assert 2 <= len(set(row["captions"])) <= 5
        assert all(row["concept"] in caption and caption.strip() == caption for caption in row["captions"])
        assert (row["width"], row["height"]) == (64, 64)
        assert row["source"].startswith(f"{emoji.STYLES[row['style']].name}@{emoji.STYLES[row['style']].version}/")
    assert np.mean(white) > 0.8


def test_most_edge_maps_have_edges() -> None:
    shares = [np.mean(np.asarray(Image.open(io.BytesIO(m["edge.png"]))) > 127) for m in samples("emoji", "val").values()]
    assert 0.05 < np.median(shares) < 0.4
    assert np.mean(np.array(shares) > 0.01) > 0.95


def test_every_shard_mixes_styles() -> None:
    for path in (ROOT / "data/emoji").glob("train-*.tar.gz"):
        with tarfile.open(path) as tar:
            styles = [name.split("__")[1].partition(".")[0] for name in tar.getnames() if name.endswith(".webp")]
        assert min(styles.count(slug(style)) for style in emoji.STYLES) > len(styles) / 4


NAMES = [
    ("red heart", "smileys and emotion", "a red heart"),
    ("flag France", "flags", "the flag of france"),
    ("flag Myanmar (Burma)", "flags", "the flag of myanmar"),
    ("pirate flag", "flags", "a pirate flag"),
    ("orange circle", "symbols", "an orange circle"),
    ("unicorn", "animals and nature", "a unicorn"),
    ("flag United States", "flags", "the flag of the united states"),
    ("person in tuxedo", "people and body", "a person in a tuxedo"),
    ("man pilot", "people and body", "a male pilot"),
    ("man mountain biking", "people and body", "a man mountain biking"),
    ("face with hand over mouth", "smileys and emotion", "a face with a hand over its mouth"),
    ("twelve o’clock", "travel and places", "a clock at twelve o'clock"),  # noqa: RUF001
    ("Leo", "symbols", "a leo zodiac sign"),
    ("no entry", "symbols", "a no entry sign"),
    ("black medium-small square", "symbols", "a medium-small black square"),
    ("A button (blood type)", "symbols", "a button with the letter a"),
    ("hourglass done", "travel and places", "a finished hourglass"),
    ("glasses", "objects", "glasses"),
    ("cat with tears of joy", "smileys and emotion", "a cat with tears of joy"),
    ("octopus", "animals and nature", "an octopus"),
    ("cooked rice", "food and drink", "cooked rice"),
    ("person bald", "people and body", "a bald person"),
    ("person red hair", "people and body", "a person with red hair"),
    ("woman’s hat", "objects", "a woman's hat"),  # noqa: RUF001
    ("Japanese “here” button", "symbols", "a japanese button meaning here"),
    ("keycap #", "symbols", "a keycap with a hash"),
    ("keycap 7", "symbols", "a keycap with the number 7"),
    ("family adult, child", "people and body", "a family of an adult and a child"),
    ("family man, man, girl, boy", "people and body", "a family of two men, a girl and a boy"),
]


def test_names_become_phrases() -> None:
    made = [(cldr, category, with_article(clean_name(cldr, category))) for cldr, category, _ in NAMES]
    assert made == NAMES


def test_invisible_colour_does_not_change_the_outline() -> None:
    pixels = np.zeros((128, 128, 4), np.uint8)
    pixels[..., 0] = 255  # invisible red everywhere
    pixels[:, :64] = (0, 0, 255, 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "png")
    rgb = np.asarray(emoji.on_white(buffer.getvalue())).astype(int)
    assert (rgb[:, 0] == (0, 0, 255)).all()
    assert (rgb[:, -1] == 255).all()
    assert (rgb[..., 0] - rgb[..., 1] <= 1).all()  # blue to white has equal red and green; red would stand out


def test_webp_uses_most_accurate_encoding_within_size() -> None:
    flat = np.zeros((64, 64, 3), np.uint8)
    flat[::2] = (200, 16, 46)  # one-pixel lines of colour, which lossy WebP smears
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for pixels, exact in ((flat, True), (noise, False)):
        decoded = np.asarray(Image.open(io.BytesIO(emoji.encode_webp(Image.fromarray(pixels)))).convert("RGB"))
        assert (decoded == pixels).all() == exact


def tiny_packages(folder: Path) -> None:
    """Write packages of two concepts: "red heart" in three styles, "sun" in two."""
    rows = {"2764-fe0f": ("red heart", "❤️", "Smileys & Emotion", "heart"), "2600": ("sun", "☀", "Travel & Places", "sky")}
    source = [
        {"unified": points.upper(), "subcategory": sub, "category": category, "sort_order": i}
        for i, (points, (_, _, category, sub)) in enumerate(rows.items())
    ]
    for i, package in enumerate((*emoji.STYLES.values(), emoji.NAMES)):
        files = {"emoji.json": json.dumps(source).encode()}
        if package is emoji.NAMES:
            files = {"data-by-emoji.json": json.dumps({e: {"name": name} for name, e, _, _ in rows.values()}).encode()}
        for points in list(rows)[: 1 if package.suffix == ".webp" else 2]:
            buffer = io.BytesIO()
            Image.new("RGBA", (72, 72), (40 * i, 90, 200, 255)).save(buffer, package.suffix[1:], lossless=True)
            files[f"{package.images}{points}{package.suffix}"] = buffer.getvalue()
        with tarfile.open(folder / package.tarball, "w:gz") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(f"package/{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def build(*args: str) -> int:
    return make_emoji_dataset.main(["--edges", "canny", *args])


def test_rebuild_is_byte_identical(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("skimage", reason="needs scikit-image (the extra `edges`)")
    tiny_packages(tmp_path)
    assert build("--packages", str(tmp_path), "--out", str(tmp_path / "a")) == 0
    assert "2 concepts, 5 samples" in capsys.readouterr().out
    command = [sys.executable, str(ROOT / "tools/make_emoji_dataset.py"), "--edges", "canny"]
    # Another process, in which strings have other hashes.
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    subprocess.run([*command, "--packages", str(tmp_path), "--out", str(tmp_path / "b")], env=env, check=True)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["manifest.json", "train-0000.tar.gz", "val-0000.tar.gz"]
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


def test_mistakes_are_one_line_and_exit_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build("--cache", str(tmp_path / "c"), "--out", out) == 2
    assert build("--packages", str(tmp_path), "--out", out) == 2
    tiny_packages(tmp_path)
    assert build("--packages", str(tmp_path), "--subset", "dem", "--out", out) == 2
    lines = capsys.readouterr().err.splitlines()
    for line, text in zip(lines, ("npm is required", "is missing", "did you mean 'demo'"), strict=True):
        assert text in line
