"""Shards on HTTP and S3 servers: equal to local ones in spite of faults; the limited shard cache."""

import errno
import fcntl
import os
import threading
import time
from pathlib import Path

import fsspec
import pytest

from raphael_dist.data.fetch import remote
from raphael_dist.data.fetch.remote import RemoteError, RetryPolicy
from raphael_dist.data.fetch.shard_cache import ShardError, ShardStore
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.shards.decode_sample import ImageDataset
from raphael_dist.data.shards.shard_names import expand_shards
from raphael_dist.errors import UserError
from raphael_dist.storage.files import free_bytes
from tests.data.shards.test_index import laion_shard
from tests.lib.servers import Faults, gcs_bucket, hf_dataset, http_files, s3_bucket
from tests.lib.small_disk import small_disk

BUCKETS = [(16, 16)]
QUICK = RetryPolicy(retries=3, timeout_s=1.0, pause_s=0.01)


@pytest.fixture
def local(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "served"
    folder.mkdir()
    return [laion_shard(folder / f"{n:05d}.tar", 5 * n, 5) for n in range(3)]


def store_in(folder: Path, **options) -> ShardStore:
    return ShardStore(folder / "index", folder / "fetched", **{"retry": QUICK, **options})


def loaded(store: ShardStore, names: list[str]) -> list[tuple[str, list[str], bytes]]:
    index = build_index(names, store=store)
    data = ImageDataset(index, BUCKETS, "none")
    samples = [data.load(n, 0) for n in range(index.num_samples)]
    return [(sample.key, sample.captions, sample.image.tobytes()) for sample in samples]


def cached_names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "fetched").rglob("*.tar"))


def test_http_and_s3_give_samples_of_local_shards(local: list[Path], tmp_path: Path) -> None:
    expected = loaded(store_in(tmp_path / "a"), [str(path) for path in local])
    with http_files(local[0].parent) as address:
        names = expand_shards([f"{address}/{{00000..00002}}.tar"])
        assert loaded(store_in(tmp_path / "b"), names) == expected
        fingerprint = build_index(names, store=store_in(tmp_path / "b")).fingerprint
    with s3_bucket(local):
        names = expand_shards(["s3://laion/*.tar"])
        assert names == [f"s3://laion/{path.name}" for path in local]
        assert loaded(store_in(tmp_path / "c"), names) == expected
        assert build_index(names, store=store_in(tmp_path / "c")).fingerprint == fingerprint
    assert fingerprint == build_index([str(path) for path in local], tmp_path / "d").fingerprint


def test_temporary_errors_are_retried_without_corrupting_data(
    local: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = loaded(store_in(tmp_path / "a"), [str(path) for path in local])
    monkeypatch.setattr(remote, "PIECE_BYTES", 8192)
    faults = Faults(of={"00001.tar": ["slow", "cut", "503"]}, every=3)
    with http_files(local[0].parent, faults) as address:
        assert loaded(store_in(tmp_path / "b"), [f"{address}/{path.name}" for path in local]) == expected
    assert faults.injected > 5
    faults = Faults(every=3)
    with s3_bucket(local, faults=faults):
        assert loaded(store_in(tmp_path / "c"), [f"s3://laion/{path.name}" for path in local]) == expected
    assert faults.injected > 2
    with http_files(local[0].parent, knows_ranges=False) as address:
        assert loaded(store_in(tmp_path / "d"), [f"{address}/{path.name}" for path in local]) == expected


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_first_bytes_of_a_remote_shard_are_those_of_its_file(local: list[Path], tmp_path: Path, knows_ranges: bool) -> None:
    with http_files(local[0].parent, knows_ranges=knows_ranges) as address:
        for num_bytes in (1000, local[0].stat().st_size, 10**9):
            head = store_in(tmp_path).head(f"{address}/{local[0].name}", num_bytes)
            assert head == local[0].read_bytes()[:num_bytes]


def test_permanent_errors_are_reported_without_secrets(local: list[Path], tmp_path: Path) -> None:
    cases = {"403": "access is denied", "404": "it does not exist", "500": "status 500 .4 attempts."}
    for status, message in cases.items():
        faults = Faults(of={"00000.tar": [status] * 9})
        with http_files(local[0].parent, faults) as address:
            secret = address.replace("//", "//user:passw0rd@")
            with pytest.raises(RemoteError, match=rf"00000\.tar\?.hidden.: {message}") as caught:
                next(remote.pieces(f"{secret}/00000.tar?signature=s3cret", 10, QUICK))
        assert "s3cret" not in str(caught.value)
        assert "passw0rd" not in str(caught.value)
        assert len(faults.asked) == (4 if status == "500" else 1), "what asking again does not change is asked once"
    with pytest.raises(UserError, match="requires a server that lists its files"):
        expand_shards(["https://x.org/*.tar"])
    with pytest.raises(UserError, match="matches no file"), s3_bucket(local):
        expand_shards(["s3://laion/val-*.tar"])


def test_missing_or_changed_remote_shard_raises_error(local: list[Path], tmp_path: Path) -> None:
    with http_files(local[0].parent) as address:
        names, store = [f"{address}/{path.name}" for path in local], store_in(tmp_path / "a")
        index = build_index(names, store=store)
        for path in (tmp_path / "a" / "fetched").rglob("*.tar"):
            path.unlink()
        laion_shard(local[0], 50, 5)
        local[1].unlink()
        data = ImageDataset(index, BUCKETS, "none")
        with pytest.raises(ShardError, match=r"00000\.tar has changed since it was indexed"):
            data.load(0, 0)
        with pytest.raises(ShardError, match=r"00001\.tar: it does not exist"):
            data.load(5, 0)
        assert data.load(10, 0).key == "000000010"
    assert cached_names(tmp_path / "a") == ["00002.tar"]


def test_shard_cache_evicts_least_recently_used_within_its_limit(local: list[Path], tmp_path: Path) -> None:
    size = local[0].stat().st_size
    with http_files(local[0].parent, faults := Faults()) as address:
        names = [f"{address}/{path.name}" for path in local]
        store = store_in(tmp_path / "a", max_bytes=2 * size + size // 2)
        data = ImageDataset(build_index(names, store=store), BUCKETS, "none")
        assert cached_names(tmp_path / "a") == ["00001.tar", "00002.tar"]
        for path in (tmp_path / "a" / "fetched").rglob("00001.tar"):
            os.utime(path, (time.time() + 100, time.time() + 100))  # used last
        data.load(0, 0)
        assert cached_names(tmp_path / "a") == ["00000.tar", "00001.tar"]
        faults.asked.clear()
        data.load(6, 0)
        assert faults.asked == []
        for path in (tmp_path / "a" / "fetched").rglob("*.tar"):  # another process makes room at any moment
            path.unlink()
        assert data.load(6, 0).key == "000000006"
        small = store_in(tmp_path / "b", max_bytes=size // 2)
        with pytest.raises(
            UserError, match=r"data\.shard_cache_gb=.* must be large enough for each shard, but .*00000\.tar"
        ):
            build_index(names[:1], store=small)


def test_shard_is_fetched_once_for_many_processes(local: list[Path], tmp_path: Path) -> None:
    with http_files(local[0].parent, faults := Faults()) as address:
        name, store = f"{address}/00000.tar", store_in(tmp_path)
        stamp = store.stamp(name)
        threads = [threading.Thread(target=store.fetch, args=(name, stamp)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert faults.asked == ["00000.tar"]


def test_shards_are_fetched_where_no_lock_is_possible(
    local: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    expected = loaded(store_in(tmp_path / "a"), [str(path) for path in local])
    with http_files(local[0].parent) as address:
        assert loaded(store_in(tmp_path / "b"), [f"{address}/{path.name}" for path in local]) == expected


def test_full_disk_evicts_once_and_is_reported(local: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses a separate small file system that really fills up."""
    size = local[0].stat().st_size
    with small_disk(tmp_path / "disk", 2 * size) as disk, http_files(local[0].parent) as address:
        names, store = [f"{address}/{path.name}" for path in local], ShardStore(tmp_path / "index", disk, retry=QUICK)
        index = build_index(names, store=store)
        assert index.num_samples == 15, "each shard was read in turn: the one before made room"
        (disk / "filled").write_bytes(bytes(free_bytes(disk)))
        for path in disk.rglob("*.tar"):
            path.unlink()
        (disk / "filled more").write_bytes(bytes(size // 2))
        with pytest.raises(ShardError, match=r"00000\.tar: .*No space left"):
            ImageDataset(index, BUCKETS, "none").load(0, 0)


def assert_read_as_local_and_a_change_is_told(local: list[Path], folder: Path, address: str) -> None:
    expected = loaded(store_in(folder / "a"), [str(path) for path in local])
    names = expand_shards([f"{address}/*.tar"])
    assert names == [f"{address}/{path.name}" for path in local]
    store = store_in(folder / "b")
    assert loaded(store, names) == expected
    index = build_index(names, store=store)
    for path in (folder / "b" / "fetched").rglob("*.tar"):
        path.unlink()
    laion_shard(local[0], 50, 5)
    with pytest.raises(ShardError, match=r"00000\.tar has changed since it was indexed"):
        ImageDataset(index, BUCKETS, "none").load(0, 0)


def test_hf_url_gives_local_samples_and_detects_changes(local: list[Path], tmp_path: Path) -> None:
    faults = Faults(of={"00001.tar": ["503"]})
    with hf_dataset(local[0].parent, faults=faults) as address:
        assert_read_as_local_and_a_change_is_told(local, tmp_path, address)
        assert expand_shards([f"{address}/{{00000..00002}}.tar"]) == expand_shards([f"{address}/*.tar"])
        with pytest.raises(RemoteError, match=r"00009\.tar: it does not exist"):
            next(remote.pieces(f"{address}/00009.tar", 10, QUICK))
    assert faults.injected == 1


def test_gs_url_gives_local_samples_and_detects_changes(local: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("gcsfs", reason="gcsfs is pinned to an fsspec of its own: pip install gcsfs")
    faults = Faults(of={"00001.tar": ["503"]})
    with gcs_bucket(local[0].parent, faults=faults) as address:
        assert_read_as_local_and_a_change_is_told(local, tmp_path, address)
        with pytest.raises(RemoteError, match=r"00009\.tar: it does not exist"):
            remote.stat(f"{address}/00009.tar", QUICK)
    assert faults.injected == 1


def test_time_limit_holds_for_each_mib_of_a_slow_answer(tmp_path: Path) -> None:
    path, size = tmp_path / "00000.tar", 3 << 20
    path.write_bytes(os.urandom(size))
    retry = RetryPolicy(retries=3, timeout_s=1.0, pause_s=0.01)  # the answer takes 2 s, so each attempt would fail
    faults = Faults(of={path.name: ["trickle"] * 12})
    with http_files(tmp_path, faults) as address, s3_bucket([path], faults=faults):
        for url in (f"{address}/{path.name}", f"s3://laion/{path.name}"):
            assert b"".join(remote.pieces(url, size, retry)) == path.read_bytes()
        with pytest.raises(RemoteError, match="no answer in time"):
            b"".join(remote.pieces(f"{address}/{path.name}", size, RetryPolicy(retries=0, timeout_s=0.3)))
    assert faults.injected >= 3


def test_missing_library_of_a_service_is_reported() -> None:
    for scheme in ("gs", "az"):
        with pytest.raises((UserError, RemoteError), match=r"pip install|://b/x"):
            next(remote.pieces(f"{scheme}://b/x.tar", 10, RetryPolicy(retries=0, timeout_s=0.5)))
    assert fsspec.get_filesystem_class("hf").__name__ == "HfFileSystem"
