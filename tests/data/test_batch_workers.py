"""Batches of worker processes equal those of the rank's thread, and their errors reach the rank."""

import itertools
import multiprocessing
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from raphael_dist.config.schema import Config
from raphael_dist.data import batch_workers
from raphael_dist.data.batch_workers import BatchPrefetcher
from raphael_dist.data.batches import BatchBuilder
from raphael_dist.data.features.batch_encoder import BatchEncoder, Encoders
from raphael_dist.data.shards.dataset_index import BadSample
from raphael_dist.data_prep.build_shards import Preparer
from raphael_dist.data_prep.inputs import parts_of
from raphael_dist.errors import UserError
from raphael_dist.model.batch import Batch
from tests.data.features.test_features import config, encoders, samples, stream_of, with_data  # noqa: F401  (fixtures)
from tests.data.shards.test_shards import write_shard

SLOTS = [[(position, 1.0) for position in range(first, first + 4)] for first in range(0, 40, 4)]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shard(tmp_path / "0000.tar", samples(12))


def builder_of(config: Config, encoders: Encoders, shard: Path) -> BatchBuilder:  # noqa: F811
    stream, _ = stream_of(config, encoders, shard)
    return BatchBuilder(config, stream, BatchEncoder(encoders, with_edges=True), 2)


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    named = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return named | (batch.gate_noise._asdict() if batch.gate_noise else {})


def read(builder: BatchBuilder, workers: int, slots: list = SLOTS) -> list[dict[str, torch.Tensor]]:
    with BatchPrefetcher(builder, slots, 2, workers) as batches:
        return [tensors(batch) for batch in batches]


def assert_equal(found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> None:
    assert len(found) == len(expected) == len(SLOTS)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("mode", ["online", "cached", "stored", "cached without tokens"])
def test_workers_build_same_batches_as_rank(config, encoders, shard, tmp_path, mode) -> None:  # noqa: F811
    text_setting = {"cached_text": "encoded"} if mode.endswith("tokens") else {}
    chosen = with_data(config, features=mode.split()[0], cache_dir=str(tmp_path / "cache"), **text_setting)
    if mode == "stored":
        shard = stored(config, encoders, shard, tmp_path)
    builder = builder_of(chosen, encoders, shard)
    expected = read(builder, 0)
    children = set(psutil.Process().children())
    with BatchPrefetcher(builder, SLOTS, 2, 3) as batches:
        found = [tensors(next(batches))]
        begun = len(set(psutil.Process().children()) - children)
        found += [tensors(batch) for batch in batches]
    assert_equal(found, expected)
    assert begun == (3 if mode in ("cached", "stored") else 0), "only where samples come encoded"
    assert not set(psutil.Process().children()) - children, "a worker was left behind"


def stored(config: Config, encoders: Encoders, shard: Path, folder: Path) -> Path:  # noqa: F811
    (folder / "stored").mkdir()
    Preparer(folder / "stored", "stored", None, config, encoders).make(parts_of([str(shard)], 12, 0.0, None)[0])
    return folder / "stored" / shard.name


def test_rank_builds_batches_that_are_not_cached(config, encoders, shard, tmp_path) -> None:  # noqa: F811
    builder = builder_of(with_data(config, features="cached", cache_dir=str(tmp_path / "cache")), encoders, shard)
    expected = read(builder, 0)
    lacking = {builder.stream.order.lookup(position).sample_id for position, _ in SLOTS[2]}
    get, pid = builder.stream.source.get, os.getpid()

    def lacks(sample_id: int, *how):
        found = get(sample_id, *how)
        if os.getpid() != pid and sample_id in lacking:  # as a worker finds it that met a damaged file
            found.text, found.caption = None, "a b"
        return found

    builder.stream.source.get = lacks  # type: ignore[method-assign]
    assert_equal(read(builder, 2), expected)


def test_closing_stops_workers_in_the_middle(config, encoders, shard, tmp_path) -> None:  # noqa: F811
    builder = builder_of(with_data(config, features="cached", cache_dir=str(tmp_path / "cache")), encoders, shard)
    children = set(psutil.Process().children())
    endless = ([(position, 1.0)] for position in itertools.count())
    with BatchPrefetcher(builder, endless, 2, 2) as batches:
        assert next(batches).position.tolist() == [0]
        workers = set(psutil.Process().children()) - children
        for worker in workers:
            os.kill(worker.pid, signal.SIGTERM)  # Slurm tells all processes of a job
        assert [next(batches).position.tolist() for _ in range(10)] == [[n] for n in range(1, 11)]
    assert len(workers) == 2
    assert not psutil.wait_procs(list(workers), timeout=10)[1]


@pytest.mark.parametrize("often", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_batches_of_killed_workers_are_built_again(config, encoders, shard, tmp_path, caplog, monkeypatch, often):  # noqa: F811
    builder = builder_of(with_data(config, features="cached", cache_dir=str(tmp_path / "cache")), encoders, shard)
    expected, children = read(builder, 0), set(psutil.Process().children())
    rank, sample = os.getpid(), builder.stream.sample

    def killed(position: int):
        if position == 22 and os.getpid() != rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return sample(position)

    if often:  # whoever builds that batch
        monkeypatch.setattr(builder.stream, "sample", killed)
    with BatchPrefetcher(builder, SLOTS, 2, 2) as batches:
        found = [tensors(next(batches))]
        if not often:
            for worker in set(psutil.Process().children()) - children:
                worker.kill()
        found += [tensors(batch) for batch in batches]
    assert_equal(found, expected)
    assert caplog.text.count("a data worker process was lost") == (3 if often else 1)
    assert not set(psutil.Process().children()) - children


class DyingWorker:
    """A loader whose worker has closed its connections and exits a moment later."""

    def __init__(self) -> None:
        self._workers = [multiprocessing.get_context("fork").Process(target=time.sleep, args=(0.3,))]
        self._workers[0].start()

    def __iter__(self) -> "DyingWorker":
        return self

    def __next__(self) -> None:
        raise ConnectionResetError("connection reset by peer")

    def _shutdown_workers(self) -> None:
        self._workers[0].join()


def test_worker_that_exits_after_its_connection_was_lost(config, encoders, shard, tmp_path, monkeypatch) -> None:  # noqa: F811
    builder = builder_of(with_data(config, features="cached", cache_dir=str(tmp_path / "cache")), encoders, shard)
    expected, create, loaders = read(builder, 0), BatchPrefetcher._create_loader, [DyingWorker]
    monkeypatch.setattr(
        BatchPrefetcher, "_create_loader", lambda self, slots: loaders.pop()() if loaders else create(self, slots)
    )
    assert_equal(read(builder, 2), expected)


def test_too_little_shared_memory_disables_workers(config, encoders, shard, tmp_path, caplog, monkeypatch):  # noqa: F811
    builder = builder_of(with_data(config, features="cached", cache_dir=str(tmp_path / "cache")), encoders, shard)
    expected, children = read(builder, 0), set(psutil.Process().children())
    monkeypatch.setattr(batch_workers, "free_bytes", lambda _: 64 << 10)
    with BatchPrefetcher(builder, SLOTS, 2, 2, 8) as batches:
        found = [tensors(next(batches))]
        assert not set(psutil.Process().children()) - children
        found += [tensors(batch) for batch in batches]
    assert_equal(found, expected)
    assert "data.workers=2 requires" in caplog.text
    assert "/dev/shm has 0.1 MiB free" in caplog.text


def test_user_error_in_worker_is_raised_by_rank(config, encoders, shard, tmp_path, monkeypatch) -> None:  # noqa: F811
    builder = builder_of(with_data(config, features="cached", cache_dir=str(tmp_path / "cache")), encoders, shard)
    sample = builder.stream.sample

    def fail(position: int):
        if position == 22:
            raise UserError("data.on_error=stop: the bad sample")
        return sample(position)

    monkeypatch.setattr(builder.stream, "sample", fail)
    with BatchPrefetcher(builder, SLOTS, 2, 2) as batches:
        assert [next(batches).position.tolist() for _ in range(5)] == [[p for p, _ in slots] for slots in SLOTS[:5]]
        with pytest.raises(UserError, match=r"^data\.on_error=stop: the bad sample$"):
            next(batches)


def test_replaced_samples_are_counted_once(config, encoders, shard, tmp_path) -> None:  # noqa: F811
    chosen = with_data(config, features="cached", cache_dir=str(tmp_path / "cache"))
    counts = []
    for workers in (0, 2):
        builder = builder_of(chosen, encoders, shard)
        stream = builder.stream
        bad = stream.order.lookup(6).sample_id
        where = stream.order.index.locate(bad)
        stream.bad_samples[bad] = BadSample("0000.tar", str(where), "spoiled")
        read(builder, workers)
        counts.append(stream.replaced)
    assert counts[0] == counts[1] > 0
