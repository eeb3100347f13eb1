"""The shard index: webdataset naming, bad samples, hostile tars."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import resource
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset import TarWriter

from raphael_dist.data.captions import MAX_CAPTION_CHARS, clean_caption, read_texts
from raphael_dist.data.shards import tar_scan
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.shards.dataset_index import DatasetIndex
from raphael_dist.data.shards.decode_sample import ImageDataset
from raphael_dist.data.shards.shard_names import expand_shards
from raphael_dist.data.shards.tar_scan import members_of
from raphael_dist.errors import UserError


def png(width: int = 16, height: int = 16, value: int = 7) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """Return a PNG whose header states width x height pixels, with one byte of data."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0"))]
    body = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in [*chunks, (b"IEND", b"")]]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def write_shard(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    with TarWriter(str(path), encoder=False) as tar:
        for key, members in samples:
            tar.write({"__key__": key, **members})
    return path


def write_raw(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def good(number: int, **more: bytes) -> tuple[str, dict[str, bytes]]:
    return f"{number:04d}", {"png": png(), "txt": f"caption {number}".encode(), **more}


def reasons(index: DatasetIndex) -> dict[str, str]:
    return {bad.key: bad.reason for bad in index.bad}


def test_patterns_expand_to_sorted_unique_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(9, 12):
        Path(f"a-{number:03d}.tar").touch()
    names = ["a-009.tar", "a-010.tar", "a-011.tar"]
    for patterns in (["a-{009..011}.tar"], ["*.tar", "a-010.tar"], ["a-{011,0{09..10}}.tar"], [f"{tmp_path}/a-*.tar"]):
        assert [Path(name).name for name in expand_shards(patterns)] == names


def test_wildcards_pass_over_hidden_and_system_files(tmp_path, caplog):
    folder = tmp_path / ".mine"  # the user names this folder
    for name in ("a.tar", "._a.tar", ".Trash-1000/files/old.tar", "@eaDir/b.tar", "sub/c.tar"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert expand_shards([f"{folder}/*.tar"]) == [f"{folder}/a.tar"]
    assert "skipped: 1 x hidden file or folder of the system, the first '._a.tar'" in caplog.text
    assert expand_shards([f"{folder}/**/*.tar"]) == [f"{folder}/a.tar", f"{folder}/sub/c.tar"]
    assert "skipped: 3 x hidden" in caplog.text
    assert expand_shards([f"{folder}/._a.tar"]) == [f"{folder}/._a.tar"]


def test_pattern_without_local_file_is_rejected_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    missing = ("a-{0..3}.tar", "*.tar", "{x}")
    for pattern in ("pipe:touch canary", "ftp://host/a.tar", "file:a.tar", "{0..99999999}", "{2..1}", "{x", *missing):
        with pytest.raises(UserError, match=r"data\.shards") as caught:
            expand_shards([pattern])
        assert pattern in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_index_has_offsets_of_members_and_sizes_of_images(tmp_path):
    meta = json.dumps({"captions": ["a", "b"], "width": 30, "height": 20}).encode()
    path = write_raw(
        tmp_path / "a.tar",
        [
            ("x/1.png", png(24, 16)),
            ("x/1.edge.png", b"e"),
            ("x/1.TXT", b"one"),
            ("x/2.png", png(30, 20)),
            ("x/2.json", meta),
        ],
    )
    index = build_index([path], tmp_path / "cache")
    assert index.keys(0) == ["x/1", "x/2"]
    assert index.arrays["size"].tolist() == [[24, 16], [30, 20]]
    offset, size = index.span(0)
    found = members_of(path.read_bytes()[offset : offset + size], "x/1")
    assert found == {"png": png(24, 16), "edge.png": b"e", "txt": b"one"}
    assert index.locate(1) == (0, 1)


def test_bad_samples_have_reasons_and_others_are_kept(tmp_path):
    path = write_raw(
        tmp_path / "a.tar",
        [
            ("ok.png", png()), ("ok.txt", b"fine"),
            ("mute.png", png()),
            ("blank.png", png()), ("blank.txt", b" <b></b> "),
            ("blind.txt", b"no image"),
            ("latin.png", png()), ("latin.txt", b"caf\xe9"),
            ("json.png", png()), ("json.json", b"[" * 100_000),
            ("huge.png", png_header(30_000, 30_000)), ("huge.txt", b"a bomb"),
            ("noise.png", b"not a png"), ("noise.txt", b"noise"),
            ("ok.png", png(value=9)), ("ok.txt", b"again"),
        ],
    )  # fmt: skip
    index = build_index([path], tmp_path / "cache")
    assert index.keys(0) == ["ok"]
    found = reasons(index)
    assert found.pop("ok") == "duplicate key"
    assert found["mute"] == found["blank"] == "no caption"
    assert found["blind"] == "no image"
    assert "UTF-8" in found["latin"]
    assert "nested" in found["json"] or "parsed" in found["json"]
    assert "header" in found["huge"]
    assert "header" in found["noise"]


def test_other_members_are_ignored_and_never_executed(tmp_path):
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (canary,)

    bomb = pickle.dumps(Bomb())
    path = write_shard(tmp_path / "a.tar", [good(0, pkl=bomb, pyd=bomb, pickle=bomb), good(1)])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("0002.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    index = build_index([path], tmp_path / "cache")
    assert index.keys(0) == ["0000", "0001"]
    assert set(ImageDataset(index, [(8, 8)], "none").read(0)) == {"png", "txt"}
    assert not canary.exists()


def test_incomplete_or_compressed_tar_is_reported_by_name(tmp_path):
    data = write_shard(tmp_path / "a.tar", [good(0), good(1)]).read_bytes()
    damaged = bytearray(data)
    damaged[1024:1536] = b"\xff" * 512  # the second header, which tarfile takes for the end
    cases = {
        "gz.tar": gzip.compress(data), "bz2.tar": bz2.compress(data), "xz.tar": lzma.compress(data),
        "cut.tar": data[:1300], "block.tar": data[:1024], "zero.tar": b"",
        "text.tar": b"hello " * 500, "mid.tar": bytes(damaged),
    }  # fmt: skip
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            build_index([tmp_path / name], tmp_path / "cache")


def extended_headers(kind: bytes, count: int, num_bytes: int = 1) -> bytes:
    """Return headers that a reader of tars must read before it knows the name of the next file."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, num_bytes
    return (info.tobuf() + bytes(num_bytes + -num_bytes % tarfile.BLOCKSIZE)) * count


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize(("count", "num_bytes"), [(2000, 1), (1, (1 << 20) + 1)])
def test_endless_extended_headers_are_damage(tmp_path, kind, count, num_bytes):
    path = write_shard(tmp_path / "a.tar", [good(0), good(1)])
    headers = extended_headers(kind, count, num_bytes)
    data = path.read_bytes()
    end = len(data.rstrip(b"\0")) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE + tarfile.BLOCKSIZE
    path.write_bytes(data[:end] + headers + data)
    index = build_index([path], tmp_path / "cache")
    assert index.num_samples == 1
    assert "is not a complete tar file (" in index.damaged[0]
    with pytest.raises(ValueError, match="the tar headers of the sample cannot be read"):
        members_of(headers + data, "0000")


def test_empty_shard_is_allowed_and_empty_data_set_is_error(tmp_path):
    empty = write_raw(tmp_path / "empty.tar", [])
    full = write_shard(tmp_path / "full.tar", [good(0)])
    index = build_index([empty, full], tmp_path / "cache")
    assert index.num_samples == 1
    assert index.locate(0) == (1, 0)
    with pytest.raises(UserError, match="must contain samples that can be used"):
        build_index([empty], tmp_path / "cache")


def test_index_cache_is_used_for_unchanged_files_and_repaired(tmp_path, monkeypatch):
    path, cache = write_shard(tmp_path / "a.tar", [good(0), ("mute", {"png": png()})]), tmp_path / "cache"
    first = build_index([path], cache)
    with monkeypatch.context() as patch:
        patch.setattr("raphael_dist.data.shards.build_index.scan_shard", None)
        again = build_index([path], cache)
    assert again.fingerprint == first.fingerprint
    assert (again.arrays["place"] == first.arrays["place"]).all()
    assert again.bad == first.bad
    (pointer,) = cache.glob("tables/*.json")
    (record,) = cache.glob("shards/*/*")
    pointer.write_text('{"table": ')
    record.write_bytes(record.read_bytes()[:100])
    assert build_index([path], cache).fingerprint == first.fingerprint
    write_shard(path, [good(0), good(1)])
    assert build_index([path], cache).num_samples == 2


def test_fingerprint_depends_on_content_not_on_folder(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
    one, two = (build_index([write_shard(tmp_path / f / "a.tar", [good(0)])], tmp_path / "cache") for f in ("x", "y"))
    other = build_index([write_shard(tmp_path / "y" / "a.tar", [good(1)])], tmp_path / "cache")
    assert one.fingerprint == two.fingerprint != other.fingerprint


def test_gzipped_shard_gives_samples_of_plain_one(tmp_path):
    plain = write_shard(tmp_path / "a.tar", [good(0), good(1), ("mute", {"png": png()})])
    one = build_index([plain], tmp_path / "cache")
    for suffix in (".tar.gz", ".tgz"):
        packed, cache = tmp_path / f"a{suffix}", tmp_path / suffix
        packed.write_bytes(gzip.compress(plain.read_bytes()))
        two = build_index([packed], cache)
        assert (two.fingerprint, two.shard(0).content, two.bad) == (one.fingerprint, one.shard(0).content, one.bad)
        (expanded,) = cache.rglob("*.tar")
        assert two.store.path(two.shard(0).source, two.shard(0).stamp) == expanded
        assert expanded.read_bytes() == plain.read_bytes()


def test_gzipped_shard_is_expanded_once_and_after_changes(tmp_path, monkeypatch):
    plain, packed, cache = tmp_path / "a.tar", tmp_path / "a.tar.gz", tmp_path / "cache"
    packed.write_bytes(gzip.compress(write_shard(plain, [good(0)]).read_bytes()))
    first = build_index([packed], cache)
    with monkeypatch.context() as patch:
        patch.setattr("raphael_dist.data.fetch.shard_cache.gunzip", None)
        assert build_index([packed], cache).fingerprint == first.fingerprint
    before = packed.stat()
    packed.write_bytes(gzip.compress(write_shard(plain, [good(1)]).read_bytes()).ljust(before.st_size, b"\0"))
    os.utime(packed, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert build_index([packed], cache).keys(0) == ["0001"]


def test_gzip_bomb_is_rejected_before_it_fills_the_disk(tmp_path, monkeypatch):
    limit = 1 << 20
    monkeypatch.setattr(tar_scan, "SMALL_BYTES", limit)
    bomb = tmp_path / "bomb.tar.gz"
    bomb.write_bytes(gzip.compress(bytes(8 * limit)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # a byte more is another error
    try:
        with pytest.raises(UserError, match=rf"bomb\.tar\.gz.*expands to more than {limit} bytes") as caught:
            build_index([bomb], tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "cache").rglob("*.tar*") if path.suffix != ".lock"]
    monkeypatch.setattr(tar_scan, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match="more than 1000 bytes"):
        build_index([bomb], tmp_path / "another cache")


def test_damaged_gzipped_shard_is_reported_by_name(tmp_path):
    plain = write_shard(tmp_path / "a.tar", [good(0)]).read_bytes()
    whole = gzip.compress(plain)
    wrong_sum = whole[:-8] + bytes(4) + whole[-4:]
    cases = {
        "cut": whole[:-20], "sum": wrong_sum, "plain": plain, "empty": b"", "text": gzip.compress(b"hello " * 500),
        "twice": gzip.compress(whole), "tail": gzip.compress(plain[:1024]),
    }  # fmt: skip
    for name, content in cases.items():
        path = tmp_path / f"{name}.tar.gz"
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}\.tar\.gz"):
            build_index([path], tmp_path / "cache")


def test_captions_lose_markup_addresses_and_control_characters():
    text = "A&nbsp;<b>red</b> fox\x00\n see https://x.io/y?z or www.a.b, mail a.b@c.org &lt;i&gt;now"
    assert clean_caption(text) == "A red fox see or mail now"
    assert len(clean_caption("x" * 10_000)) == MAX_CAPTION_CHARS
    assert clean_caption("2 < 3 and 5 > 4") == "2 < 3 and 5 > 4"
    assert read_texts({"json": b'{"captions": ["a", " ", "b"], "x": 1}', "txt": b"c"})[1] == ["a", "b"]
    assert read_texts({"json": b'{"caption": "a"}'}) == ({"caption": "a"}, ["a"])
    assert read_texts({"json": b"{}", "txt": "zwölf\nBoxkämpfer".encode()}) == ({}, ["zwölf Boxkämpfer"])
    for data in (b"\xff", b'{"captions": [1]}', b"[]", b"{}"):
        with pytest.raises(ValueError, match=r"caption|json"):
            read_texts({"json": data})
