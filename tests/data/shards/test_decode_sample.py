"""Sample decoding: limits, equal geometry of image and edge map, thread safety."""

import errno
import io
import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from raphael_dist.data.fetch.shard_cache import ShardError
from raphael_dist.data.image import decode_image, upright_size
from raphael_dist.data.shards import decode_sample
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.shards.dataset_index import BadSampleError
from raphael_dist.data.shards.decode_sample import ImageDataset
from raphael_dist.errors import UserError
from tests.data.shards.test_shards import png, png_header, write_raw

SIZED = b'{"caption": "sized", "width": 16, "height": 16}'


def encode(array: np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def dataset_of(tmp_path, members, edge="none", bucket=(16, 16), **options) -> ImageDataset:
    index = build_index([write_raw(tmp_path / "a.tar", members)], tmp_path / "cache")
    return ImageDataset(index, [bucket], edge, **options)


def test_image_of_bucket_size_is_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    members = [("a.png", encode(pixels)), ("a.txt", b"one"), ("b.webp", encode(pixels, "WEBP", lossless=True))]
    data = dataset_of(tmp_path, [*members, ("b.json", b'{"captions": ["x", "y"]}'), ("b.txt", b"not this")])
    first, second = data.load(0, 0), data.load(1, 0, flip=True)
    assert first.image.dtype == np.uint8
    assert (first.image == pixels.transpose(2, 0, 1)).all()
    assert (second.image == pixels[:, ::-1].transpose(2, 0, 1)).all()
    assert (first.captions, second.captions) == (["one"], ["x", "y"])
    assert (first.key, first.edge) == ("a", None)


def test_edge_map_has_geometry_of_its_image(tmp_path):
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:, 30:] = 255
    edge = pixels[..., 0]
    members = [("a.png", encode(pixels)), ("a.edge.png", encode(edge)), ("a.txt", b"x")]
    data = dataset_of(tmp_path, members, "stored")
    for flip in (False, True):
        sample = data.load(0, 0, flip)
        assert sample.edge is not None
        assert sample.edge.shape == (16, 16)
        assert np.abs(sample.image[0].astype(int) - sample.edge).max() < 40
        assert (sample.edge.mean(axis=0).argmax() == 0) == flip


def test_transparency_becomes_white_and_other_modes_become_rgb(tmp_path):
    clear = np.zeros((16, 16, 4), np.uint8)
    grey = np.full((16, 16), 90, np.uint8)
    members = [("a.png", encode(clear)), ("a.txt", b"x"), ("b.jpg", encode(grey, "JPEG")), ("b.txt", b"x")]
    data = dataset_of(tmp_path, members)
    assert (data.load(0, 0).image == 255).all()
    assert (data.load(1, 0).image == 90).all()


def test_undecodable_sample_is_reported_with_shard_key_and_reason(tmp_path):
    noise = encode(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    cases = {"cut": noise[:400], "bomb": png_header(9_000, 9_000), "wide": png(65, 64), "few": png_header(60, 60)}
    members = [(f"{key}.{ext}", data) for key, image in cases.items() for ext, data in (("png", image), ("json", SIZED))]
    data = dataset_of(tmp_path, members, max_pixels=64 * 64)
    found = {}
    tracemalloc.start()
    for sample_id in range(len(cases)):
        with pytest.raises(BadSampleError, match=r"a\.tar") as caught:
            data.load(sample_id, 0)
        found[caught.value.sample.key] = caught.value.sample.reason
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert set(found) == set(cases)
    assert "65 x 64 pixels, but at most 4096" in found["wide"]
    assert peak < 16 << 20


def test_missing_edge_map_makes_sample_bad_if_edges_are_used(tmp_path):
    data = dataset_of(tmp_path, [("a.png", png()), ("a.txt", b"x")], "stored")
    with pytest.raises(BadSampleError, match=r"no edge\.png"):
        data.load(0, 0)


def test_changed_or_missing_shard_raises_user_error(tmp_path):
    for change in (lambda path: path.unlink(), lambda path: path.write_bytes(b"short")):
        data = dataset_of(tmp_path, [("a.png", png()), ("a.txt", b"x")])
        change(tmp_path / "a.tar")
        with pytest.raises(UserError, match="indexed"):
            data.load(0, 0)


def test_failed_read_is_a_shard_error_and_opens_the_file_again(tmp_path, monkeypatch):
    data = dataset_of(tmp_path, [("a.png", png()), ("a.txt", b"x")])
    data.load(0, 0)
    stale, pread = data._file(0), os.pread

    def fail_on_stale(fd, size, offset):
        if fd == stale._fd:
            raise OSError(errno.ESTALE, "Stale file handle")
        return pread(fd, size, offset)

    monkeypatch.setattr(decode_sample.os, "pread", fail_on_stale)
    with pytest.raises(ShardError, match=r"a\.tar cannot be read at byte \d+: Stale file handle"):
        data.load(0, 0)
    monkeypatch.setattr(decode_sample, "RETRY_AFTER_S", 0.0)
    assert data.load(0, 0).captions == ["x"]


def test_lack_of_memory_is_not_a_bad_image(monkeypatch):
    turned = encode(np.zeros((8, 16, 3), np.uint8), "JPEG", exif=b"Exif\0\0II*\0" + bytes(30))
    for owner, name in ((Image, "open"), (Image.Image, "getexif")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *args, **options: (_ for _ in ()).throw(MemoryError))
            data = encode(np.zeros((8, 16, 3), np.uint8)) if name == "open" else turned
            for use in (decode_image, upright_size):
                with pytest.raises(MemoryError):
                    use(data)


def test_many_threads_read_the_same_as_one_thread(tmp_path):
    members = [m for i in range(20) for m in ((f"{i}.png", png(value=i)), (f"{i}.txt", b"x"))]
    data = dataset_of(tmp_path, members)
    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(lambda i: int(data.load(i % 20, 0).image.max()), range(200)))
    assert values == [i % 20 for i in range(200)]
