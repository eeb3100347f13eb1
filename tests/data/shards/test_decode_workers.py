"""Decode workers return the same samples as the rank, are replaced when killed, and end with the rank."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from raphael_dist.data.fetch.remote import RetryPolicy
from raphael_dist.data.fetch.shard_cache import ShardError, ShardStore
from raphael_dist.data.fetch.shard_prefetch import ShardPrefetcher
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.shards import decode_workers
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.shards.dataset_index import BadSampleError
from raphael_dist.data.shards.decode_sample import ImageDataset
from raphael_dist.data.shards.decode_workers import DecodePool
from tests.data.fetch.test_remote import QUICK
from tests.data.shards.test_decode_sample import encode
from tests.data.shards.test_index import laion_shard
from tests.data.shards.test_shards import write_raw
from tests.lib.launch import ROOT
from tests.lib.servers import Faults, http_files
from tests.workers.harmful import Harmful

BUCKETS = [(24, 24), (24, 32)]


def shard(tmp_path: Path, count: int = 30) -> ImageDataset:
    rng = np.random.default_rng(0)
    members = []
    for n in range(count):
        image = encode(rng.integers(0, 256, (40, 40, 3), np.uint8))
        image = image if n % 7 else image[:-40]  # its header is right, so that only decoding finds it bad
        sized = b'{"caption": "picture %d", "width": 40, "height": 40}' % n
        members += [(f"{n:09d}.png", image), (f"{n:09d}.json", sized)]
    return ImageDataset(build_index([write_raw(tmp_path / "a.tar", members)], tmp_path / "cache"), BUCKETS, "none")


def outcome(data: ImageDataset, request: tuple[int, int, bool]) -> object:
    try:
        sample = data.load(*request)
    except BadSampleError as error:
        return str(error)
    sample.image[0, 0, 0] ^= 1  # whoever got it may write to it
    return sample.key, sample.captions, sample.image.tobytes()


@pytest.fixture
def pool(tmp_path: Path):
    data = shard(tmp_path)
    pool = DecodePool(data, 2)
    yield data, pool
    data.set_decoder(None)
    pool.close()


def test_workers_return_same_samples_as_rank(pool) -> None:
    data, decode_workers = pool
    requests = [(n, n % 2, n % 3 == 0) for n in range(30)] * 2
    expected = [outcome(data, request) for request in requests]
    data.set_decoder(decode_workers.load)
    decode_workers.prefetch(requests[:20])
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda request: outcome(data, request), requests)) == expected
    assert sum(isinstance(one, str) for one in expected) == 10


def workers_of(rank: psutil.Process) -> list[psutil.Process]:
    """Return the worker processes: children of the fork server."""
    return [one for one in rank.children(recursive=True) if one.ppid() != rank.pid]


@pytest.mark.parametrize("kind", [signal.SIGSTOP, signal.SIGKILL])
def test_stopped_or_killed_worker_loses_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: int
) -> None:
    data = shard(tmp_path)
    expected = [outcome(data, (n, 0, False)) for n in (1, 1, 2, 3)]
    decoders = DecodePool(data, 1)
    data.set_decoder(decoders.load)
    before = workers_of(psutil.Process())
    assert data.load(1, 0).key == "000000001"
    (worker,) = set(workers_of(psutil.Process())) - set(before)
    worker.send_signal(kind)
    monkeypatch.setattr(decode_workers, "LIMIT_S", 2.0)
    found = [outcome(data, (n, 0, False)) for n in (1, 1, 2, 3)]
    assert found == expected
    assert ("made no progress for 2 s" if kind == signal.SIGSTOP else "was killed") in caplog.text
    decoders.close()


def test_sample_is_bad_only_for_decoding_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_workers, "LIMIT_S", 2.0)
    good = shard(tmp_path)
    data = Harmful(good.index, BUCKETS, "none")
    decoders = DecodePool(data, 1)
    try:
        for n, fault in enumerate(Harmful.faults):
            if fault in ("crash", "endless"):
                with pytest.raises(BadSampleError, match="exit code -11" if fault == "crash" else "longer than 2 s"):
                    decoders.load((n, 0, False))
            elif n:
                assert decoders.load((n, 0, False)).image.tobytes() == good.load(n, 0).image.tobytes(), fault
    finally:
        decoders.close()


@pytest.mark.parametrize("windows", [2, 3])
def test_shards_are_prefetched_and_failed_one_is_not_repeated(tmp_path: Path, windows: int) -> None:
    (tmp_path / "served").mkdir()
    paths = [laion_shard(tmp_path / "served" / f"{n:05d}.tar", 5 * n, 5) for n in range(8)]
    room = 2 * (windows + 1) * max(path.stat().st_size for path in paths)  # one window more than those to fetch
    with http_files(tmp_path / "served", faults := Faults()) as address:
        store = ShardStore(tmp_path / "index", tmp_path / "fetched", max_bytes=room, retry=QUICK)
        index = build_index([f"{address}/{path.name}" for path in paths], store=store)
        for path in (tmp_path / "fetched").rglob("*.tar"):
            path.unlink()
        order = SampleOrder(index, [(24, 24)], seed=0, window_shards=2)
        ahead = ShardPrefetcher(order, first=1)
        faults.asked.clear()
        ahead.prefetch_from(0)
        ahead.prefetch_from(1)
        deadline = time.monotonic() + 20
        while len(list((tmp_path / "fetched").rglob("*.tar"))) < 2 * windows and time.monotonic() < deadline:
            time.sleep(0.02)
        shard_names = [f"{n:05d}.tar" for window in order.windows_from(0, windows) for n in window]
        assert sorted(faults.asked) == sorted(shard_names)
        ahead.close()
        last = next(n for n in range(8) if f"{n:05d}.tar" not in shard_names)
        faults.of[f"{last:05d}.tar"] = ["403"] * 9
        faults.asked.clear()
        data = ImageDataset(index, [(24, 24)], "none")
        for row in range(3):
            with pytest.raises(ShardError, match="access is denied"):
                data.load(int(index.starts[last]) + row, 0)
        assert len(faults.asked) == 1


def test_next_window_is_fetched_after_the_current_one(tmp_path: Path) -> None:
    """On a slow link its shards would delay those that the next steps wait for."""
    (tmp_path / "served").mkdir()
    paths = [laion_shard(tmp_path / "served" / f"{n:05d}.tar", 5 * n, 5) for n in range(6)]
    with http_files(tmp_path / "served", faults := Faults()) as address:
        store = ShardStore(tmp_path / "index", tmp_path / "fetched", retry=RetryPolicy(timeout_s=20.0))
        index = build_index([f"{address}/{path.name}" for path in paths], store=store)
        for path in (tmp_path / "fetched").rglob("*.tar"):
            path.unlink()
        order = SampleOrder(index, [(24, 24)], seed=0, window_shards=2)
        now, following = ([f"{n:05d}.tar" for n in window] for window in order.windows_from(0, 2))
        faults.asked.clear()
        faults.of[now[1]] = ["slow"]
        ahead = ShardPrefetcher(order)
        ahead.prefetch_from(0)
        deadline = time.monotonic() + 20
        while not set(following) & set(faults.asked) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert set(now) <= {path.name for path in (tmp_path / "fetched").rglob("*.tar")}
        ahead.close()


@pytest.mark.parametrize("kill", [True, False])
def test_workers_end_with_killed_or_exited_rank(tmp_path: Path, kill: bool) -> None:
    shard(tmp_path)
    code = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from raphael_dist.data.shards.decode_sample import ImageDataset
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.shards.decode_workers import DecodePool
if __name__ == "__main__":
    data = ImageDataset(build_index([sys.argv[1] + "/a.tar"], Path(sys.argv[1]) / "cache"), [(24, 24)], "none")
    pool = DecodePool(data, 2)
    data.set_decoder(pool.load)
    pool.prefetch([(n, 0, False) for n in (1, 2, 3)])
    print(data.load(1, 0, False).key, "torch" in sys.modules, flush=True)
    time.sleep(float(sys.argv[2]))
"""
    script = tmp_path / "rank.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, script, str(tmp_path), "60" if kill else "3"], stdout=subprocess.PIPE, text=True, env=environment
    ) as rank:
        assert rank.stdout is not None
        assert rank.stdout.readline().split() == ["000000001", "False"]
        children = psutil.Process(rank.pid).children(recursive=True)
        assert workers_of(psutil.Process(rank.pid))
        if kill:
            rank.kill()
        assert rank.wait(20) == (-signal.SIGKILL if kill else 0)
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive


def test_many_threads_share_one_decode_pool(pool) -> None:
    data, decoders = pool
    data.set_decoder(decoders.load)
    found: list[object] = []
    threads = [threading.Thread(target=lambda n=n: found.append(outcome(data, (n, 0, False)))) for n in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 6


def test_local_shards_of_a_short_epoch_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each epoch is one window, so that the next windows list the same shards, which need memory only once."""
    index = build_index([str(laion_shard(tmp_path / f"{n:05d}.tar", 5 * n, 5)) for n in range(4)], tmp_path / "cache")
    total = int(index.num_bytes.sum())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * total + 2))
    read: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: read.append(args[0]))
    ahead = ShardPrefetcher(SampleOrder(index, [(24, 24)], seed=0), first=0)
    ahead.prefetch_from(0)
    deadline = time.monotonic() + 20
    while len(read) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    ahead.close()
    assert len(read) == 4
