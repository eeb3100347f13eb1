"""External images: all entry points read them alike, and skipped files are counted."""

import io
import json
import re
import struct
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from raphael_dist.config.data_sections import Filter
from raphael_dist.config.model_sections import Control
from raphael_dist.config.schema import load_config
from raphael_dist.config.upscale import Upscale
from raphael_dist.data.fonts import drawable
from raphael_dist.data.image import _without_damaged_chunks, decode_image, upright_size
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.run_data import DataSource
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.shards.dataset_index import BadSampleError
from raphael_dist.data.shards.decode_sample import ImageDataset
from raphael_dist.data.shards.open_index import describe
from raphael_dist.data.shards.shard_names import expand_shards
from raphael_dist.data.shards.skipped import most_common_reasons
from raphael_dist.data.shards.view import open_view
from raphael_dist.errors import UserError
from raphael_dist.evaluation.draw import read_image as read_drawn
from raphael_dist.sampling.pipeline_variants import small_images
from raphael_dist.sampling.prompts import fit_image, read_edges, read_fitted_image, read_small, sample_requests
from tests.data.features.test_edges import needs_weights
from tests.data.shards.test_shards import good, png, write_raw, write_shard
from tests.data_prep.test_data_prep import captions_in, draw, folder_of, prepare, read_shard
from tools import inspect_data


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def shape(size: tuple[int, int] = (48, 32)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).polygon([(4, 4), (40, 8), (10, 28)], fill=(200, 40, 60))
    return image


def transparent() -> tuple[bytes, Image.Image]:
    flat = shape()
    alpha = Image.fromarray(np.where((np.asarray(flat) == 255).all(axis=2), 0, 255).astype(np.uint8))
    clear = Image.composite(flat, Image.new("RGB", flat.size, "black"), alpha)
    clear.putalpha(alpha)
    return encoded(clear), flat


def turned() -> tuple[bytes, Image.Image]:
    upright = shape()
    return encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif(6)), upright


def deep() -> tuple[bytes, Image.Image]:
    values = np.linspace(0, 65535, 48 * 32).reshape(32, 48).astype(np.uint16)
    return encoded(Image.fromarray(values)), Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize("make", [transparent, turned, deep])
def test_user_images_are_read_as_training_images(tmp_path: Path, make) -> None:
    data, expected = make()
    pixels, path = np.asarray(expected), tmp_path / "a.png"
    path.write_bytes(data)
    index = build_index([write_raw(tmp_path / "a.tar", [("a.png", data), ("a.txt", b"x")])], tmp_path / "cache")
    assert index.arrays["size"].tolist() == [[48, 32]]
    upscale = Upscale(factor=2)
    small = small_images([Image.open(path)], (64, 96), 2)[0]
    ways = {
        "training": ImageDataset(index, [(32, 48)], "none").load(0, 0).image.transpose(1, 2, 0),
        "--image": read_fitted_image(path, (32, 48)),
        "--upscale": read_small(path, upscale, (64, 96)),
        "pipeline": fit_image(Image.open(path), (32, 48)),
        "pipeline, super-resolution": ((small + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy(),
        "evaluation": read_drawn(path),
    }
    assert [name for name, found in ways.items() if found is None or not np.array_equal(found, pixels)] == []
    expected.save(tmp_path / "flat.png")
    pytest.importorskip("skimage", reason="needs scikit-image (the extra `edges`)")
    for kind in ("map", "canny"):
        edges = [read_edges(tmp_path / name, (32, 48), kind) for name in ("a.png", "flat.png")]
        assert edges[0].any() or make is deep
        assert np.array_equal(*edges) == (make is not transparent or kind == "canny"), "transparent: black in a map"


@pytest.mark.parametrize("make", [transparent, turned, deep])
@pytest.mark.parametrize("section", [pytest.param("control", marks=needs_weights), "upscale"])
def test_sample_images_are_read_as_other_images(tmp_path: Path, make, section: str) -> None:
    data, expected = make()
    (tmp_path / "a.png").write_bytes(data)
    expected.save(tmp_path / "flat.png")
    config = load_config("emoji-tiny", [])
    names = tuple(tmp_path / name for name in ("a.png", "flat.png"))
    is_control = section == "control"
    parts = {
        section: Control(enabled=True) if is_control else Upscale(factor=2),
        "image": config.image.model_copy(update={"buckets": [(32, 48) if is_control else (64, 96)]}),
        "sample": config.sample.model_copy(update={"prompts": ["a", "b"], "images": names}),
    }
    requests = sample_requests(config.model_copy(update=parts))
    one, other = (request.edges if is_control else request.small for request in requests)
    assert one is not None
    assert other is not None
    assert np.array_equal(one, other)


def test_transparent_edge_map_has_no_edges_where_transparent(tmp_path: Path) -> None:
    lines = Image.new("RGBA", (48, 32), (255, 255, 255, 0))
    ImageDraw.Draw(lines).line((4, 4, 40, 4), fill=(255, 255, 255, 255))
    lines.save(tmp_path / "map.png")
    stored = [("a.png", png(48, 32)), ("a.edge.png", (tmp_path / "map.png").read_bytes()), ("a.txt", b"x")]
    data = ImageDataset(build_index([write_raw(tmp_path / "a.tar", stored)], tmp_path / "cache"), [(32, 48)], "stored")
    for found in (read_edges(tmp_path / "map.png", (32, 48), "map"), data.load(0, 0).edge):
        assert found is not None
        assert np.flatnonzero(found.any(axis=1)).tolist() == [4]


def test_unreadable_user_image_is_reported_in_one_line(tmp_path: Path) -> None:
    for name, data in (("none.png", b""), ("page.png", b"<html>"), ("noise.png", b"noise")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"--image=.*{name} cannot be read as an image: ") as caught:
            read_fitted_image(tmp_path / name, (32, 32))
        assert "0x" not in str(caught.value)
    shape().save(tmp_path / "a.gif")
    assert read_fitted_image(tmp_path / "a.gif", (32, 48)).shape == (32, 48, 3)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return uint8 RGB [H, W, 3] for colours [H, W, 3] with opacity `alpha` [H, W] in 0..255, on white."""
    opacity = alpha[..., None] / 255
    return (colour * opacity + 255 * (1 - opacity)).round().astype(np.uint8)


def cmyk_jpeg() -> tuple[bytes, np.ndarray]:
    inks = np.zeros((32, 48, 4), np.uint8)
    inks[:16, :, 1:3], inks[16:, :, 3], inks[:, 24:, 0] = (200, 100), 128, 60
    cyan_magenta_yellow, black = inks[..., :3].astype(int), inks[..., 3:].astype(int)
    rgb = ((255 - cyan_magenta_yellow) * (255 - black) / 255).round().astype(np.uint8)
    return encoded(Image.frombytes("CMYK", (48, 32), inks.tobytes()), "JPEG", quality=100), rgb


PALETTE = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (10, 20, 30)], np.uint8)
INDEX = np.arange(32 * 48, dtype=np.uint8).reshape(32, 48) % 4


def palette_image() -> Image.Image:
    image = Image.frombytes("P", (48, 32), INDEX.tobytes())
    image.putpalette(PALETTE.tobytes())
    return image


def palette_with_clear_colour() -> tuple[bytes, np.ndarray]:
    return encoded(palette_image(), transparency=2), on_white(PALETTE[INDEX], np.where(INDEX == 2, 0, 255))


def palette_with_alpha() -> tuple[bytes, np.ndarray]:
    alpha = np.array([255, 128, 0, 64])
    return encoded(palette_image(), transparency=bytes(alpha.tolist())), on_white(PALETTE[INDEX], alpha[INDEX])


def grey_with_alpha() -> tuple[bytes, np.ndarray]:
    grey, alpha = (INDEX * 50).astype(np.uint8), (255 - INDEX * 60).astype(np.uint8)
    layers = [Image.frombytes("L", (48, 32), values.tobytes()) for values in (grey, alpha)]
    return encoded(Image.merge("LA", layers)), on_white(np.repeat(grey[..., None], 3, axis=2), alpha)


def one_bit() -> tuple[bytes, np.ndarray]:
    bits = INDEX % 2 * 255
    image = Image.frombytes("L", (48, 32), bits.tobytes()).convert("1", dither=Image.Dither.NONE)
    return encoded(image), np.repeat(bits[..., None], 3, axis=2)


def animated(kind: str, **options: Any) -> tuple[bytes, np.ndarray]:
    data = encoded(shape(), kind, save_all=True, append_images=[Image.new("RGB", (48, 32), "blue")], duration=100, **options)
    return data, np.asarray(shape())


def one_pixel() -> tuple[bytes, np.ndarray]:
    return encoded(Image.new("RGB", (1, 1), (1, 2, 3))), np.array([[[1, 2, 3]]], np.uint8)


KINDS = {
    "CMYK JPEG": cmyk_jpeg, "palette, clear colour": palette_with_clear_colour, "palette, alpha": palette_with_alpha,
    "LA": grey_with_alpha, "1 bit": one_bit, "APNG": lambda: animated("PNG"),
    "animated WebP": lambda: animated("WEBP", lossless=True), "1 pixel": one_pixel,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kind_of_image_has_the_expected_pixels(kind: str) -> None:
    data, expected = KINDS[kind]()
    found = np.asarray(decode_image(data))
    assert found.shape == expected.shape
    assert upright_size(data) == (expected.shape[1], expected.shape[0])
    difference = np.abs(found.astype(int) - expected)
    if kind == "CMYK JPEG":  # compression blurs the borders between the colours
        assert difference.mean() < 2
        assert np.median(difference) <= 1
    else:
        assert difference.max() <= 1


def exif_block(kind: int, count: int, value: bytes) -> bytes:
    """Return an EXIF block with the orientation as one entry: its type, number of values, and 4 bytes."""
    return b"II*\0" + struct.pack("<IHHHI4sI", 8, 1, 0x0112, kind, count, value, 0)


SIX = exif_block(3, 1, b"\6\0\0\0")
BLOCKS = {
    "upright": (exif_block(3, 1, b"\1\0\0\0"), False),
    "turned": (SIX, True),
    "LONG": (exif_block(4, 1, b"\6\0\0\0"), True),
    "text": (exif_block(2, 2, b"6\0\0\0"), False),
    "two values": (exif_block(3, 2, b"\6\0\6\0"), True),
    "no orientation": (exif_block(3, 1, b"\x09\0\0\0"), False),
    "unknown type": (exif_block(99, 1, b"\6\0\0\0"), False),
    "65535 entries": (b"II*\0" + struct.pack("<IH", 8, 65535), False),
    "beyond the end": (b"II*\0" + struct.pack("<I", 60_000), False),
    "truncated": (SIX[:15], False),
    "empty": (b"", False),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about the EXIF block
@pytest.mark.parametrize("name", BLOCKS)
def test_jpeg_with_unusual_exif_is_turned_or_decoded_as_stored(name: str) -> None:
    block, is_turned = BLOCKS[name]
    upright = shape()
    stored = upright.transpose(Image.Transpose.ROTATE_90) if is_turned else upright
    jpeg, segment = encoded(stored, "JPEG", quality=95), b"Exif\0\0" + block
    data = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]
    assert upright_size(data) == (48, 32)
    assert np.abs(np.asarray(decode_image(data)).astype(int) - np.asarray(upright)).mean() < 5


def chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def test_image_with_damaged_metadata_is_used() -> None:
    plain, jpeg = encoded(shape()), encoded(shape(), "JPEG", quality=95)
    garbage = b"Exif\0\0garbagegarbage"
    late = chunk(b"eXIf", exif(6).tobytes()[6:])
    images = {
        "garbage": plain[:33] + chunk(b"eXIf", b"\xde\xad\xbe\xef") + plain[33:],
        "checksum": plain[:33] + chunk(b"eXIf", b"II*\0", checksum=7) + plain[33:],
        "text": plain[:33] + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0\xa8\xff") + plain[33:],
        "webp": encoded(shape(), "WEBP", lossless=True, exif=garbage),
        "jpeg": jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(garbage) + 2) + garbage + jpeg[2:],
    }
    for name, data in images.items():
        assert upright_size(data) == (48, 32), name
        assert np.abs(np.asarray(decode_image(data)).astype(int) - np.asarray(shape())).mean() < 5, name
    several = chunk(b"eXIf", b"II*\0", checksum=7) + chunk(b"tEXt", b"a\0b") + chunk(b"iCCP", b"x", checksum=7)
    assert _without_damaged_chunks(plain[:33] + several + plain[33:]) == plain[:33] + chunk(b"tEXt", b"a\0b") + plain[33:]
    behind = plain[:-12] + late + plain[-12:]
    assert upright_size(behind) == decode_image(behind).size == (32, 48)


def test_many_damaged_chunks_take_linear_time() -> None:
    plain = encoded(shape())
    data = plain[:33] + chunk(b"tEXt", b"", checksum=7) * ((2 << 20) // 12) + plain[33:]
    began = time.process_time()
    assert _without_damaged_chunks(data) == plain
    assert time.process_time() - began < 2


def test_multi_image_jpeg_is_read_and_other_formats_are_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", 1)
    several = encoded(draw(3)[0], "MPO", save_all=True, append_images=[draw(4)[0]])
    files = {"phone.jpg": several, "gif.jpg": encoded(shape(), "GIF"), "cut.png": encoded(draw(5)[0])[:200]}
    files |= {"avif.png": b"\0\0\0\x1cftypavif" + bytes(40), "late.jpg": encoded(shape(), "JPEG")[:-200]}
    for name, data in files.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text(f"a {name}")
    assert prepare(folder, "--out", tmp_path / "out", "--edges", "none") == 0
    assert ["a phone.jpg"] in captions_in(tmp_path / "out")
    bad = dict(json.loads((tmp_path / "out" / "train-00000.json").read_text())["bad"])
    assert set(bad) == {"gif.jpg", "avif.png", "cut.png", "late.jpg"}, "by their files"
    assert "image has the format GIF, but it must be one of WEBP, PNG, JPEG" in bad["gif.jpg"]
    assert "AVIF" in bad["avif.png"]


def test_size_comes_from_upright_header_and_other_json_is_counted(tmp_path: Path) -> None:
    photo = encoded(Image.new("RGB", (60, 30)), "JPEG", exif=exif(6))
    rows = [(60, 30), (30, 60), (4096, 4096)]
    members = [
        (f"{n}.{ext}", data)
        for n, (width, height) in enumerate(rows)
        for ext, data in (("jpg", photo), ("json", json.dumps({"caption": "c", "width": width, "height": height}).encode()))
    ]
    write_raw(tmp_path / "a.tar", members)
    for _ in range(2):
        index = build_index([tmp_path / "a.tar"], tmp_path / "cache")
        assert index.arrays["size"].tolist() == [[30, 60]] * 3
        [(reason, (count, first))] = index.skipped.counts.items()
        assert ("width and height" in reason, count, first) == (True, 2, "a.tar:0")


def test_skipped_members_are_counted_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    members = [("1.png", png()), ("1.txt", b"one"), ("img.v2.png", png()), ("img.v2.txt", b"two"), ("1.cls", b"3")]
    members += [("__MACOSX/2.png", png()), ("__MACOSX/2.txt", b"mac"), (".thumbnails/3.png", png())]
    members += [("4.png", png()), ("4.jpg", png()), ("4.txt", b"four"), ("./5.png", png()), ("./5.txt", b"five")]
    path = write_raw(tmp_path / "a.tar", members)
    index = build_index([path], tmp_path / "cache")
    assert index.keys(0) == ["1", "4", "./5"]
    counts = {reason.split(":")[0]: value for reason, value in index.skipped.counts.items()}
    assert counts == {
        "member with a dot in its key": (2, "a.tar:img.v2.png"),
        "member that is not an image, a text or an edge map": (1, "a.tar:1.cls"),
        "hidden file or folder of the system": (3, "a.tar:__MACOSX/2.png"),
        "further image of the same key": (1, "a.tar:4"),
    }
    assert inspect_data.main([str(path)]) == 0
    output = capsys.readouterr().out
    assert "skipped: 2 x member with a dot in its key" in output
    assert "columns for data.filters: quoted_text, width, height, short_side, pixels, ratio" in output
    assert prepare(path, "--out", tmp_path / "out", "--edges", "none") == 0
    assert "skipped: 3 x hidden file or folder of the system, the first 'a.tar:__MACOSX/2.png'" in capsys.readouterr().out


def test_concatenated_tars_are_read_and_trailing_data_is_damage(tmp_path: Path) -> None:
    one, two = (write_shard(tmp_path / f"{n}.tar", [good(3 * n + i) for i in range(3)]).read_bytes() for n in (0, 1))
    joined = tmp_path / "joined.tar"
    joined.write_bytes(one + two)
    index = build_index([joined], tmp_path / "cache")
    assert (index.keys(0), index.damaged) == ([f"{n:04d}" for n in range(6)], {})
    data = ImageDataset(index, [(16, 16)], "none")
    assert [data.load(n, 0).captions for n in range(6)] == [[f"caption {n}"] for n in range(6)]
    joined.write_bytes(one + b"\xff" * 700)
    index = build_index([joined], tmp_path / "cache")
    assert index.num_samples == 3
    assert f"is damaged or cut short at byte {len(one)}" in index.damaged[0]


def test_all_files_of_a_real_folder_are_used_or_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = folder_of(tmp_path / "in", 3)
    for where in (".ipynb_checkpoints", ".thumbnails", "__MACOSX", "@eaDir"):
        folder_of(folder / where, 1)
    draw(1)[0].save(folder / "other.gif")
    folder_of(tmp_path / "elsewhere", 1)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert prepare(folder, "--out", tmp_path / "out", "--edges", "none") == 0
    output = capsys.readouterr().out
    assert "3 samples in 1 shard" in output
    hidden = "'.ipynb_checkpoints/my picture 000.png'"
    for line in (f"4 x hidden file or folder of the system, the first {hidden}", "1 x broken link", "1 x linked folder"):
        assert f"skipped: {line}" in output
    assert "1 x image in another format" in output
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "my picture 001.jpg", "text": "a"}))
    assert prepare(folder, "--out", tmp_path / "table", "--edges", "none") == 0
    assert "2 x image that is not in metadata.jsonl, the first 'my picture 000.png'" in capsys.readouterr().out


def test_stored_edge_maps_of_folder_are_used(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", 1)
    edge = encoded(Image.new("L", (80, 64), 9))
    (folder / "my picture 000.edge.png").write_bytes(edge)
    assert prepare(folder, "--out", tmp_path / "out", "--edges", "stored") == 0
    [members] = read_shard(tmp_path / "out" / "train-00000.tar").values()
    assert members["edge.png"] == edge


def test_columns_of_user_table_are_kept(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", 1, captions=False)
    row = {"file_name": "my picture 000.png", "text": "a dog", "caption": "another", "source": "archive"}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    assert prepare(folder, "--out", tmp_path / "out", "--edges", "none", "--caption", "text") == 0
    [members] = read_shard(tmp_path / "out" / "train-00000.tar").values()
    meta = json.loads(members["json"])
    assert (meta["source"], meta["source_file"], meta["caption"]) == ("archive", "my picture 000.png", "another")
    assert meta["captions"] == ["a dog"]


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_small_held_out_share_has_at_least_one_sample(tmp_path: Path, capsys: pytest.CaptureFixture, kind: str) -> None:
    source = folder_of(tmp_path / "in", 12)
    if kind == "tars":
        assert prepare(source, "--out", tmp_path / "tars", "--edges", "none", "--per-shard", 6) == 0
        source = tmp_path / "tars"
    assert prepare(source, "--out", tmp_path / "out", "--edges", "none", "--held-out", 0.05) == 0
    held_out = 1 if kind == "folder" else 2  # of each tar
    assert f"{held_out} of them for validation" in capsys.readouterr().out
    patterns = (str(tmp_path / "out" / f"{name}-*.tar") for name in ("train", "val"))
    train, val = (build_index(expand_shards([pattern]), tmp_path / "cache") for pattern in patterns)
    keys = [{index.key(n) for n in range(index.num_samples)} for index in (train, val)]
    assert (train.num_samples, val.num_samples, keys[0] & keys[1]) == (12 - held_out, held_out, set())


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_output_folder_must_not_be_the_source(tmp_path: Path, capsys: pytest.CaptureFixture, kind: str) -> None:
    source = folder_of(tmp_path / "in", 2)
    if kind == "tars":
        source = tmp_path / "tars"
        assert prepare(tmp_path / "in", "--out", source, "--edges", "none") == 0
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    (tmp_path / "link").symlink_to(source)
    assert prepare(source, "--out", tmp_path / "link", "--edges", "none") == 2
    assert "must differ from SOURCE" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_existing_paths_with_brackets_and_braces_are_literal(tmp_path: Path) -> None:
    for name in ("[x] set", "{a,b} set"):
        (tmp_path / name).mkdir()
        path = write_shard(tmp_path / name / "a[0].tar", [good(0)])
        assert expand_shards([str(path)]) == [str(path)]
        assert inspect_data.main([str(tmp_path / name)]) == 0
        assert prepare(tmp_path / name, "--out", tmp_path / f"out of {name}", "--edges", "none") == 0


def test_reasons_that_differ_in_numbers_are_grouped(tmp_path: Path) -> None:
    members = [(f"{n}.{ext}", data) for n in range(4) for ext, data in (("png", png()), ("txt", b"x"))]
    for n, size in ((1, 50), (2, 52), (3, 54)):
        members[2 * n] = (f"{n}.png", png()[:size])
    data = ImageDataset(build_index([write_raw(tmp_path / "a.tar", members)], tmp_path / "cache"), [(16, 16)], "none")
    bad = []
    for n in range(1, 4):
        with pytest.raises(BadSampleError) as caught:
            data.load(n, 0)
        bad.append((caught.value.sample.key, caught.value.sample.reason))
    assert "0x" not in str(bad)
    [(_, count, first)] = most_common_reasons(bad)
    assert (count, first) == (3, "1")


def test_captions_of_any_script_are_drawn_or_escaped() -> None:
    for caption in ("a dog", "красный круг", "دائرة", "赤い丸", "\U0001f525", "\U000f0000"):
        text, font = drawable(caption, 12)
        blank = font.getmask("\U0010ffff")
        letters = [font.getmask(char) for char in set(text) - {" "}]
        assert not [letter for letter in letters if (letter.size, bytes(letter)) == (blank.size, bytes(blank))], caption
    assert drawable("\U000f0000", 12)[0] == r"\U000f0000"


def test_run_start_reports_skipped_members(tmp_path: Path) -> None:
    index = build_index(
        [write_raw(tmp_path / "a.tar", [("1.png", png()), ("1.txt", b"one"), ("a.b.png", png())])], tmp_path / "cache"
    )
    order = SampleOrder(index, [(16, 16)], seed=0)
    assert any("skipped: 1 x member with a dot in its key" in line for line in describe(index, order.view, order))


def test_start_counts_the_training_images(tmp_path: Path) -> None:
    sizes = [(32, 32)] * 5 + [(16, 32)] * 3 + [(8, 8)] * 2
    samples = [(f"{n}.png", encoded(Image.new("RGB", size))) for n, size in enumerate(sizes)]
    texts = [(f"{n}.txt", b"a caption") for n in range(len(sizes))]
    index = build_index(
        [write_raw(tmp_path / "a.tar", [*sorted([*samples, *texts]), ("bad.png", b""), ("bad.txt", b"x")])],
        tmp_path / "cache",
    )
    view = open_view(index, [(32, 32), (32, 16)], [Filter(column="short_side", min=16)])
    order = SampleOrder(index, view.buckets, seed=0, run_length=2, view=view)
    data: Any = SimpleNamespace(order=order, bad_samples=[])
    words = DataSource(cast(Any, None), data, None).describe()
    assert words.startswith("6 images ")
    assert [int(number) for number in re.findall(r"(\d+) (?:dropped|that do not fill|bad)", words)] == [2, 2, 1]
