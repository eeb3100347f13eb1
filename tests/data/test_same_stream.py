"""The stream has equal keys and randomness for all sources, ranks, workers, storage and resumes; features up to rounding."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from raphael_dist.config.schema import Config
from raphael_dist.data.batches import BatchBuilder
from raphael_dist.data.features.batch_encoder import BatchEncoder
from raphael_dist.data.features.cache import FeatureCache
from raphael_dist.data.fetch.shard_cache import ShardStore
from raphael_dist.data.open_streams import source_of
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.shards.sample_reader import SampleReader
from raphael_dist.data.stream import StreamSample, TrainStream
from raphael_dist.data_prep.build_shards import Preparer
from raphael_dist.data_prep.inputs import parts_of
from raphael_dist.parallel.batch_plan import BatchPlan
from tests.data.fetch.test_remote import QUICK
from tests.data.shards.test_decode_sample import encode
from tests.data.shards.test_shards import write_shard
from tests.data.test_stream import BUCKETS, Text, encoders
from tests.lib.launch import LONG
from tests.lib.servers import Faults, http_files
from tests.lib.synthetic import TREE, tiny_config

SHARDS, STEPS, BATCH, RUN = 6, 5, 24, 6


class Way(NamedTuple):
    """The data settings of a run."""

    features: str
    ranks: int
    workers: int
    is_remote: bool


FIRST = Way("online", 1, 0, False)
SOME = [Way("online", 2, 1, True), Way("cached", 3, 2, False), Way("stored", 4, 3, True), Way("cached", 1, 0, True)]
EVERY = [Way(*each) for each in itertools.product(("online", "cached", "stored"), range(1, 5), range(4), (False, True))]
MANY = EVERY if LONG else EVERY[::7]  # a step that divides none of the numbers


class Read(NamedTuple):
    """The sample at a position: a hash of the key and of all random draws, and the features."""

    drawn: str
    features: tuple[Tensor, ...]


def rows(shard: int) -> list[tuple[str, dict[str, bytes]]]:
    """Return ten samples in two buckets: distinct greys that get darker to the right, with two or three captions."""
    found = []
    for n in range(10 * shard, 10 * shard + 10):
        width = BUCKETS[n % 2][1]
        pixels = np.full((16, width, 3), n, np.uint8) + np.linspace(190, 0, width, dtype=np.uint8)[None, :, None]
        meta = {"captions": ["same", f"caption {n}", f"other {n}"][: 2 + n % 2], "width": width, "height": 16}
        members = {"png": encode(pixels), "edge.png": encode(pixels[..., 0]), "json": json.dumps(meta).encode()}
        found.append((f"{n:09d}", members))
    return found


def config_of(way: Way, folder: Path) -> Config:
    data = {
        "features": way.features,
        "workers": way.workers,
        "cache_dir": str(folder / "cache"),
        "flip": True,
        "bucket_run": RUN,
    }
    return tiny_config(data=data, image={"vae": "none", "buckets": BUCKETS}, model={**TREE["model"], "latent_channels": 3})


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Yield the folder with `plain` shards and `stored` ones with features, and the address of a server with both."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "plain").mkdir()
    (folder / "stored").mkdir()
    plain = [write_shard(folder / "plain" / f"{n:05d}.tar", rows(n)) for n in range(SHARDS)]
    preparer = Preparer(folder / "stored", "stored", None, config_of(FIRST, folder), encoders(Text()))
    assert [preparer.make(part).written for part in parts_of([str(path) for path in plain], 10, 0.0, None)] == [10] * SHARDS
    with http_files(folder, Faults(every=7)) as address:
        yield folder, address


class Seen:
    """A stream that remembers its last samples."""

    def __init__(self, stream: TrainStream) -> None:
        self._stream = stream
        self.last: list[StreamSample] = []

    def samples(self, positions: Sequence[int]) -> list[StreamSample]:
        self.last = self._stream.samples(positions)
        return self.last


def read(way: Way, served: tuple[Path, str], folder: Path, steps: range) -> dict[int, Read]:
    """Return what all ranks read in these steps, each with separate objects."""
    at = served[1] if way.is_remote else str(served[0])
    names = [f"{at}/{'stored' if way.features == 'stored' else 'plain'}/{n:05d}.tar" for n in range(SHARDS)]
    config, found = config_of(way, folder), dict[int, Read]()
    plan = BatchPlan(BATCH, way.ranks, 4, 1, RUN)
    for rank in range(way.ranks):
        index = build_index(names, store=ShardStore(folder / "index", folder / "fetched", retry=QUICK))
        made = encoders(Text())
        source, order = source_of(config, index, made, True), SampleOrder(index, BUCKETS, 0, 2, RUN)
        if isinstance(source, FeatureCache):
            with SampleReader(config, source.dataset):
                source.build(source.missing())
        reading = None if isinstance(source, FeatureCache) else SampleReader(config, source.dataset, order, rank)
        stream = TrainStream(order, source, seed=0, caption_dropout=0.3, flip=True, reader=reading)
        seen = Seen(stream)
        builder = BatchBuilder(config, seen, BatchEncoder(made, with_edges=True), 2, global_batch_size=BATCH)  # type: ignore[arg-type]
        for step, micro_step in itertools.product(steps, range(plan.accumulation)):
            of_batch = read_batch(builder, seen, plan.slots(step * BATCH, rank, micro_step))
            assert not of_batch.keys() & found.keys(), "two ranks read one position"
            found |= of_batch
        stream.close()
    return found


def read_batch(builder: BatchBuilder, seen: Seen, slots: list[tuple[int, float]]) -> dict[int, Read]:
    batch, found = builder.build(slots), {}
    assert batch.gate_noise is not None
    assert batch.edge is not None
    for i, (sample, (position, weight)) in enumerate(zip(seen.last, slots, strict=True)):
        if weight:
            about = (position, sample.key, sample.sample_id, sample.bucket, sample.flipped, sample.dropped)
            drawn = (sample.noise, batch.noise[i], batch.timestep[i], *(noise[i] for noise in batch.gate_noise))
            parts = [repr(about).encode(), *(one.numpy().tobytes() for one in drawn)]
            features = batch.x0[i], batch.text[i], batch.text_mask[i], batch.end[i], batch.edge[i]
            found[position] = Read(hashlib.sha256(b"".join(parts)).hexdigest(), features)
    return found


@pytest.mark.parametrize(
    "ways", [SOME, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])], ids=["some", "many"]
)
def test_stream_is_equal_for_any_features_ranks_workers_and_resume(
    served: tuple[Path, str], tmp_path: Path, ways: list[Way]
) -> None:
    """Each configuration continues the previous one, so that each resume changes everything that may change."""
    expected = read(FIRST, served, tmp_path / "first", range(STEPS))
    assert sorted(expected) == list(range(STEPS * BATCH))
    assert len({one.drawn for one in expected.values()}) == STEPS * BATCH
    for number, (before, after) in enumerate(zip(ways, [*ways[1:], ways[0]], strict=True)):
        stop = 1 + number % (STEPS - 1)
        found = read(before, served, tmp_path / f"{number} a", range(stop))
        found |= read(after, served, tmp_path / f"{number} b", range(stop, STEPS))
        assert {p: one.drawn for p, one in found.items()} == {p: one.drawn for p, one in expected.items()}, (before, after)
        for position, one in found.items():
            for tensor, other in zip(one.features, expected[position].features, strict=True):
                torch.testing.assert_close(tensor, other, rtol=0, atol=2e-3, msg=f"{before} {after} {position}")
