"""Feature cache and sample stream: caching, draws by position, replacement of bad samples."""

import errno
import hashlib
import json
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raphael_dist.data.batches import BatchBuilder
from raphael_dist.data.features import cached_shard
from raphael_dist.data.features.batch_encoder import BatchEncoder, Encoders
from raphael_dist.data.features.cache import FeatureCache
from raphael_dist.data.features.feature_source import FeatureSource
from raphael_dist.data.features.packing import pack_std, pool_edges, unpack_std
from raphael_dist.data.features.run_encoders import TextFeatures
from raphael_dist.data.features.tokens import TruncationCounter
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.prefetch import Prefetcher
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.shards.dataset_index import BadSampleError
from raphael_dist.data.shards.decode_sample import ImageDataset
from raphael_dist.data.stream import TrainStream
from raphael_dist.errors import UserError
from raphael_dist.training.lr_schedule import gate_noise_deviation
from tests.data.shards.test_decode_sample import encode
from tests.data.shards.test_shards import png, write_shard
from tests.lib.synthetic import TREE, tiny_config

BUCKETS = [(16, 16), (16, 32)]
SEED = 5


class Text:
    """A dummy text encoder: each caption's tokens hold a number computed from its text."""

    width, max_tokens, fingerprint, dtype = 4, 3, "text", torch.float32

    def __init__(self):
        self.calls: list[str] = []
        self.counter = TruncationCounter(self.max_tokens)

    def encode(self, captions):
        self.calls += captions
        values = torch.tensor([self.value(caption) for caption in captions])
        tokens = values[:, None, None].expand(-1, 3, 4).clone()
        return TextFeatures(tokens, torch.ones(len(captions), 3).bool(), torch.full((len(captions),), 2))

    @staticmethod
    def value(caption: str) -> float:
        return hashlib.sha256(caption.encode()).digest()[0] / 256 if caption else -1.0


class Pixels:
    """A dummy image encoder: pooled pixels as the mean, 0.5 as the std."""

    factor, channels, fingerprint, deterministic = 4, 3, "pixels", False

    def encode(self, images):
        mean = torch.nn.functional.avg_pool2d(images, 4)
        return mean, torch.full_like(mean, 0.5)


def encoders(text: Text) -> Encoders:
    image: Any = Pixels()
    return Encoders(text, image, None, torch.device("cpu"))  # type: ignore[arg-type]


class World:
    """Three shards of ten samples in two buckets. Sample n is grey n, darker to the right, with two or three captions."""

    def __init__(self, tmp_path: Path, corrupt: tuple[int, ...] = (), flip: bool = True, edge: str = "stored"):
        self.corrupt = corrupt
        paths = []
        for shard in range(3):
            rows = [self.members(n) for n in range(10 * shard, 10 * shard + 10)]
            paths.append(write_shard(tmp_path / f"s{shard}.tar", rows))
        self.index = build_index(paths, tmp_path / "index")
        self.text = Text()
        self.dataset = ImageDataset(self.index, BUCKETS, edge)
        self.cache = FeatureCache(tmp_path / "cache", self.dataset, encoders(self.text), flip)
        self.order = SampleOrder(self.index, BUCKETS, SEED, window_shards=2)

    def members(self, n: int):
        width = BUCKETS[n % 2][1]
        pixels = np.full((16, width, 3), n, np.uint8) + np.linspace(200, 0, width, dtype=np.uint8)[None, :, None]
        captions = ["same", f"caption {n}", f"other {n}"][: 2 + n % 2]
        meta = json.dumps({"captions": captions, "width": width, "height": 16}).encode()
        image = encode(pixels)[:-40] if n in self.corrupt else encode(pixels)
        return f"{n:03d}", {"png": image, "json": meta, "edge.png": encode(pixels[..., 0])}

    def stream(self, **options):
        return TrainStream(self.order, self.cache, **{"seed": SEED, "caption_dropout": 0.25, "flip": True, **options})


@pytest.fixture
def world(tmp_path) -> World:
    world = World(tmp_path)
    world.cache.build(world.cache.missing())
    return world


def first(weights) -> int:
    return 0


def cached(world: World, sample_id: int, caption: int = 0, flip: bool = False):
    return world.cache.get(sample_id, sample_id % 2, lambda weights: caption, flip)


def test_cache_returns_encoder_outputs(world):
    for sample_id in range(30):
        for flip in (False, True):
            sample = world.dataset.load(sample_id, sample_id % 2, flip)
            mean, std = Pixels().encode(torch.from_numpy(sample.image[None]).float() / 127.5 - 1)
            for caption, text in enumerate(sample.captions):
                found = cached(world, sample_id, caption, flip)
                torch.testing.assert_close(found.mean, mean[0], atol=1e-3, rtol=0)
                assert torch.equal(found.std, std[0])
                tokens, mask, end = found.text
                assert tokens.unique().tolist() == [Text.value(text)]
                assert (end, mask.tolist()) == (2, [True] * 3)
                torch.testing.assert_close(
                    found.edge, pool_edges(torch.from_numpy(sample.edge[None]), 4)[0], atol=3e-4, rtol=0
                )
        assert len(world.dataset.load(sample_id, sample_id % 2).captions) == 2 + sample_id % 2
    assert world.cache.null_text.tokens.unique().tolist() == [-1]


def test_packed_std_has_error_below_five_percent():
    std = torch.cat([torch.zeros(3), torch.logspace(-7, 1.7, 5000)])
    assert pack_std(std).dtype == torch.uint8
    torch.testing.assert_close(unpack_std(pack_std(std)), std, rtol=0.0443, atol=0)


def test_caption_is_encoded_once_per_shard(tmp_path):
    world = World(tmp_path)
    assert world.cache.missing() == [0, 1, 2]
    reports: list[str] = []
    world.cache.build([2, 0], lambda text, done=None, total=None: reports.append(text))
    assert {words.partition(",")[0] for words in reports} == {"shard 1 of 2", "shard 2 of 2"}
    assert world.text.calls.count("same") == 2
    assert world.cache.missing() == [1]
    again = World(tmp_path)
    assert again.cache.missing() == [1]
    assert World(tmp_path, flip=False).cache.missing() == [0, 1, 2]
    assert World(tmp_path, edge="none").cache.fingerprint != again.cache.fingerprint
    assert not list(tmp_path.rglob("*.tmp"))


def test_changed_caption_of_equal_length_is_encoded_again(tmp_path):
    first = World(tmp_path)
    first.cache.build([0, 1, 2])
    path = tmp_path / "s1.tar"
    path.write_bytes(path.read_bytes().replace(b"caption 12", b"CAPTION 12"))
    index = build_index([tmp_path / f"s{n}.tar" for n in range(3)], tmp_path / "index")
    dataset = ImageDataset(index, BUCKETS, "stored")
    cache = FeatureCache(tmp_path / "cache", dataset, encoders(first.text), True)
    assert index.fingerprint == first.index.fingerprint
    assert cache.missing() == [1]


def test_bucket_not_divisible_by_encoder_factor_raises_user_error(world):
    with pytest.raises(UserError, match=r"\[18, 16\] must be multiples of 4"):
        FeatureCache(Path(), ImageDataset(world.index, [(18, 16)], "none"), encoders(world.text), False)


def damage_row(path: Path, name: str) -> None:
    """Flip a bit of one of a file's tensors."""
    data = bytearray(path.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    data[8 + int.from_bytes(data[:8], "little") + header[name]["data_offsets"][0]] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["cut", "row", "mean.0", "tokens", "edge.0"])
def test_damaged_cache_file_is_quarantined_and_computed_again(tmp_path, caplog, damage):
    world = World(tmp_path, flip=False)
    world.cache.build([0, 1, 2])
    stream, path = world.stream(flip=False), world.cache.path(0)
    before = [encode_all(world, stream, n) for n in range(30)]
    good = path.read_bytes()
    path.write_bytes(good[:100]) if damage == "cut" else damage_row(path, damage)
    world = World(tmp_path, flip=False)
    stream = world.stream(flip=False)
    with caplog.at_level(logging.WARNING):
        for now, then in zip((encode_all(world, stream, n) for n in range(30)), before, strict=True):
            for one, other in zip(now, then, strict=True):
                torch.testing.assert_close(one, other, atol=2e-3, rtol=0)
    assert ["is damaged" in record.getMessage() for record in caplog.records] == [True]
    assert world.cache.missing() == [0]
    world.cache.build([0])
    assert path.read_bytes() == good


@pytest.mark.parametrize(("code", "remedy"), [(errno.EACCES, "Make it readable"), (errno.EMFILE, "ulimit -n")])
def test_cache_file_that_cannot_be_opened_is_reported(world, monkeypatch, code, remedy):
    path = world.cache.path(0)

    def deny(name, *args, **options):
        if name == path:
            raise OSError(code, os.strerror(code), str(name))
        return real(name, *args, **options)

    real = os.open
    monkeypatch.setattr(cached_shard.os, "open", deny)
    for use in (lambda: cached(world, 0), lambda: world.cache.verify([0]), lambda: world.cache.known_bad):
        with pytest.raises(UserError, match=rf"data\.cache_dir: {path} cannot be opened .*{remedy}"):
            use()
    assert path.is_file(), "not quarantined"


def encode_all(world: World, stream: TrainStream, position: int):
    encoded = BatchEncoder(encoders(world.text), with_edges=True).encode([stream.sample(position)])
    return encoded.x0, encoded.text, encoded.end, encoded.edge


@pytest.mark.parametrize("with_text", [True, False])
def test_online_and_cached_samples_are_equal_to_rounding(tmp_path, with_text):
    world = World(tmp_path)
    world.cache = FeatureCache(tmp_path / "other", world.dataset, encoders(world.text), True, with_text=with_text)
    world.cache.build([0, 1])  # and what is missing is read as online
    online = FeatureSource(world.dataset, encoders(world.text).image)
    raw = TrainStream(world.order, online, seed=SEED, caption_dropout=0.25, flip=True)
    stream = world.stream()
    for position in range(60):
        for one, other in zip(encode_all(world, raw, position), encode_all(world, stream, position), strict=True):
            torch.testing.assert_close(one, other, atol=2e-3, rtol=0)
        assert raw.sample(position).key == stream.sample(position).key


def test_missing_files_are_filled_during_training_until_close(tmp_path):
    world = World(tmp_path)
    world.cache.fill_in_background([0, 1, 2])
    stream = world.stream()
    for position in range(5):
        stream.sample(position)
    for _ in range(500):
        if not world.cache.missing():
            break
        time.sleep(0.01)
    assert world.cache.missing() == []
    assert stream.sample(0).image is None
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "cache"]


def same(one, two) -> bool:
    def equal(a, b) -> bool:
        if isinstance(a, tuple):
            return all(equal(x, y) for x, y in zip(a, b, strict=True))
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return all(equal(value, vars(two)[name]) for name, value in vars(one).items() if name != "seconds")


def test_sample_does_not_depend_on_access_order_or_thread(world):
    positions = np.random.default_rng(0).permutation(70).tolist()
    with ThreadPoolExecutor(4) as pool:
        shuffled = dict(zip(positions, pool.map(world.stream().sample, positions), strict=True))
    stream = world.stream()
    assert all(same(shuffled[position], stream.sample(position)) for position in range(70))
    other = world.stream(seed=SEED + 1)
    assert not same(other.sample(0), stream.sample(0))


def test_draws_follow_rates_and_latents_follow_posterior(world):
    stream = world.stream()
    samples = [stream.sample(position) for position in range(600)]
    assert 0.2 < np.mean([sample.dropped for sample in samples]) < 0.3
    assert 0.44 < np.mean([sample.flipped for sample in samples]) < 0.56
    assert all((sample.text[0] == -1).all() == sample.dropped for sample in samples)
    undropped = [sample for sample in samples if sample.sample_id == 7 and not sample.dropped]
    assert {float(s.text[0][0, 0]) for s in undropped} == {Text.value(c) for c in ("same", "caption 7", "other 7")}
    noise = torch.cat([((s.latents - cached(world, s.sample_id, 0, s.flipped).mean) / 0.5).flatten() for s in samples])
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    for sample in samples[:50]:
        assert sample.latents.shape == (3, 4, 4 * (1 + sample.bucket))
        assert sample.edge.shape == sample.latents.shape[1:]
        assert 0 <= float(sample.edge.min()) < float(sample.edge.max()) <= 1
        assert bool(sample.edge[0, 0] < sample.edge[0, -1]) == sample.flipped
        assert sample.key == f"{sample.sample_id:03d}"
    plain = world.stream(flip=False, caption_dropout=0.0)
    assert not any(plain.sample(p).flipped or plain.sample(p).dropped for p in range(50))


def test_corrupt_image_is_replaced_in_bucket_and_reported_once(tmp_path, caplog):
    world = World(tmp_path, corrupt=(4, 28))
    world.cache.build([0, 1, 2])
    known = world.cache.known_bad
    assert [(bad.shard, bad.key) for bad in known.values()] == [("s0.tar", "004"), ("s2.tar", "028")]
    assert list(known) == [4, 28]
    with pytest.raises(BadSampleError, match="could not be used"):
        cached(world, 4)
    stream = world.stream(max_bad_fraction=0.1)
    with caplog.at_level(logging.WARNING):
        ids = [stream.sample(position).sample_id for position in range(60)]
    counts = np.bincount(ids, minlength=30)
    assert counts[[4, 28]].tolist() == [0, 0]
    assert counts[[6, 0]].tolist() == [4, 4]  # the next of the even bucket; after the last, the first
    assert stream.replaced == 4
    assert sorted(record.getMessage().split(":")[1] for record in caplog.records) == ["'004'", "'028'"]


def test_too_many_bad_samples_stop_run_with_first_three(tmp_path):
    world = World(tmp_path, corrupt=(1, 3, 5, 7))
    world.cache.build([0, 1, 2])
    with pytest.raises(UserError, match=r"4 of 30 samples cannot be used.*'001'.*'003'.*'005'") as caught:
        world.stream()
    assert "007" not in str(caught.value)
    world = World(tmp_path, corrupt=tuple(range(0, 30, 2)))
    world.cache.build([0, 1, 2])
    with pytest.raises(UserError, match="all of its samples are unusable"):
        world.stream(max_bad_fraction=1.0)


def test_sample_found_bad_on_reading_is_replaced_like_known_ones(tmp_path):
    world = World(tmp_path, corrupt=(4, 28))
    online = TrainStream(
        world.order, FeatureSource(world.dataset, encoders(world.text).image), seed=SEED, caption_dropout=0.0, flip=False,
        max_bad_fraction=0.1,
    )  # fmt: skip
    world.cache.build([0, 1, 2])
    known = world.stream(max_bad_fraction=0.1)
    keys = [[stream.sample(position).key for position in range(60)] for stream in (online, known)]
    assert keys[0] == keys[1]
    assert (online.replaced, online.bad_samples) == (4, {n: online.bad_samples[n] for n in (4, 28)})


def test_on_error_stop_names_shard_and_key_of_bad_sample(tmp_path):
    world, options = World(tmp_path, corrupt=(4,)), {"seed": SEED, "caption_dropout": 0.0, "flip": False, "on_error": "stop"}
    online = TrainStream(world.order, FeatureSource(world.dataset, encoders(world.text).image), **options)
    at = next(position for position in range(30) if world.order.lookup(position).sample_id == 4)
    assert all(online.sample(position).sample_id != 4 for position in range(30) if position != at)
    message = r"data\.on_error=stop ends the run, .*: s0\.tar:'004': .*. Replace it, or set data\.on_error=skip"
    with pytest.raises(UserError, match=message):
        online.sample(at)
    assert online.replaced == 0
    world.cache.build([0, 1, 2])
    with pytest.raises(UserError, match=message):
        TrainStream(world.order, world.cache, **options)


def test_prefetcher_keeps_order_within_its_depth():
    started = []
    gate = threading.Event()

    def fn(key: int) -> int:
        started.append(key)
        if key < 3:
            gate.wait(5)
        return key * key

    with Prefetcher(fn, range(20), depth=3, workers=4) as ahead:
        threading.Timer(0.05, gate.set).start()
        assert next(ahead) == 0
        assert max(started) <= 2
        assert list(ahead) == [n * n for n in range(1, 20)]


def test_prefetcher_raises_at_failed_key_and_stops():
    def keys():
        yield from range(3)
        raise OSError("no more keys")

    for fn, source, error, before in (
        (lambda key: 1 // (2 - key), range(9), ZeroDivisionError, 2),
        (lambda key: key, keys(), OSError, 3),
    ):
        ahead, values = Prefetcher(fn, source), []
        with pytest.raises(error):
            values.extend(ahead)
        assert len(values) == before
        assert list(ahead) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_image_is_fitted_to_its_bucket(tmp_path):
    path = write_shard(tmp_path / "a.tar", [("a", {"png": png(90, 40), "txt": b"x"})])
    index = build_index([path], tmp_path / "index")
    cache = FeatureCache(tmp_path, ImageDataset(index, BUCKETS, "none"), encoders(Text()), False)
    cache.build([0])
    assert cache.get(0, 1, first, False).mean.shape == (3, 4, 8)
    assert cache.get(0, 1, first, False).edge is None


def test_gate_noise_is_annealed_by_step() -> None:
    config = tiny_config(model={**TREE["model"], "gate_noise": 0.5, "gate_noise_steps": 4})
    builder = BatchBuilder(config, None, None, num_blocks=2)  # type: ignore[arg-type]
    deviations = [gate_noise_deviation(config, step) for step in (1, 2, 4, 5, 99)]
    assert deviations == [0.5, 0.375, 0.125, 0.0, 0.0]
    assert float(builder._gate_noise([0], 7).space_BLYK.std()) == pytest.approx(1, rel=0.3)
