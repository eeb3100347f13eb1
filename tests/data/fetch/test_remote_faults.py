"""Temporary and permanent server faults: later runs lose nothing, and reads are limited."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import pytest

from raphael_dist.data import stream
from raphael_dist.data.features.feature_source import FeatureSource
from raphael_dist.data.fetch import remote
from raphael_dist.data.fetch.http import _retry_after_seconds
from raphael_dist.data.fetch.remote import RemoteError, RetryPolicy
from raphael_dist.data.fetch.shard_cache import ShardError
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.shards import decode_sample
from raphael_dist.data.shards.build_index import build_index, unindexed
from raphael_dist.data.shards.decode_sample import ImageDataset
from raphael_dist.data.shards.shard_names import expand_shards
from raphael_dist.data.stream import TrainStream
from raphael_dist.errors import UserError
from tests.data.fetch.test_remote import BUCKETS, QUICK, cached_names, local, store_in  # noqa: F401
from tests.data.test_stream import Text, encoders
from tests.lib.servers import Faults, hf_dataset, http_files, s3_bucket


def names(address: str) -> list[str]:
    return [f"{address}/{n:05d}.tar" for n in range(3)]


@pytest.mark.parametrize("status", ["503", "429", "500"])
def test_unreachable_shard_is_rejected_and_read_at_next_start(
    local: list[Path],  # noqa: F811
    tmp_path: Path,
    status: str,
) -> None:
    faults = Faults(of={"00001.tar": [status] * 99}, heads={"00001.tar": [status] * 99})
    retry = RetryPolicy(retries=1, timeout_s=1.0, pause_s=0.01)
    with http_files(local[0].parent, faults) as address:
        with pytest.raises(UserError, match=rf"00001.tar: status {status} .2 attempts.. Start again"):
            build_index(names(address), store=store_in(tmp_path, retry=retry))
        faults.of, faults.heads = {}, {}
        assert build_index(names(address), store=store_in(tmp_path)).num_samples == 15


def test_refused_connection_is_not_a_missing_shard(local: list[Path], tmp_path: Path) -> None:  # noqa: F811
    with http_files(local[0].parent) as address, http_files(local[0].parent) as gone:
        pass
    with http_files(local[0].parent) as address:
        for _ in range(2):
            with pytest.raises(UserError, match=r"00001.tar: ClientConnectorError"):
                build_index([f"{address}/00000.tar", f"{gone}/00001.tar"], store=store_in(tmp_path))


def test_short_failure_is_retried_after_retry_after(local: list[Path], tmp_path: Path) -> None:  # noqa: F811
    faults = Faults(of={"00001.tar": ["429", "503"], "00002.parquet": ["503"]}, heads={"00001.tar": ["429", "503"]})
    with http_files(local[0].parent, faults) as address:
        began = time.monotonic()
        assert build_index(names(address), store=store_in(tmp_path)).num_samples == 15
    assert time.monotonic() - began >= 2.0
    assert faults.injected == 2


def write_parquet(shard: Path) -> None:
    """Write the parquet file of the first local shard, with a column `pwatermark`."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    keys = [f"{n:09d}" for n in range(5)]
    parquet.write_table(pyarrow.table({"key": keys, "pwatermark": [0.5] * 5}), shard.with_suffix(".parquet"))


def test_parquet_without_access_is_asked_for_again(local: list[Path], tmp_path: Path, caplog) -> None:  # noqa: F811
    """S3 answers 403 also if there is no such file and the bucket may not be listed."""
    write_parquet(local[0])
    faults = Faults(of={"00000.parquet": ["403"] * 99}, heads={"00000.parquet": ["403"] * 99})
    with http_files(local[0].parent, faults) as address:
        assert build_index(names(address), store=store_in(tmp_path)).num_samples == 15
        assert not caplog.records, "no filter needs a column"
        build_index(names(address), store=store_in(tmp_path), columns=["pwatermark"])
        assert "denies access to the parquet files of 1 shard" in caplog.text
        faults.of, faults.heads = {}, {}
        index = build_index(names(address), store=store_in(tmp_path), columns=["pwatermark"])
        assert index.arrays["column.pwatermark"][:5].tolist() == [0.5] * 5


@pytest.mark.parametrize("status", ["500", "503"])
def test_parquet_that_cannot_be_read_is_not_taken_for_missing(local: list[Path], tmp_path: Path, status: str) -> None:  # noqa: F811
    write_parquet(local[0])
    faults = Faults(of={"00000.parquet": [status] * 99}, heads={"00000.parquet": [status] * 99})
    retry = RetryPolicy(retries=1, timeout_s=1.0, pause_s=0.01)
    with http_files(local[0].parent, faults) as address:
        with pytest.raises(UserError, match=r"00000.tar cannot be used: its parquet file .*00000.parquet: (access|status)"):
            build_index(names(address), store=store_in(tmp_path, retry=retry))
        faults.of, faults.heads = {}, {}
        index = build_index(names(address), store=store_in(tmp_path), columns=["pwatermark"])
        assert index.arrays["column.pwatermark"][:5].tolist() == [0.5] * 5


def test_missing_shard_is_left_out_and_tried_at_next_start(local: list[Path], tmp_path: Path) -> None:  # noqa: F811
    away = local[1].rename(tmp_path / "away")
    with http_files(local[0].parent, faults := Faults()) as address:
        index = build_index(names(address), store=store_in(tmp_path))
        assert (index.num_samples, list(index.damaged)) == (10, [1])
        away.rename(local[1])
        faults.asked.clear()
        assert build_index(names(address), store=store_in(tmp_path)).num_samples == 15
        assert set(faults.asked) == {"00001.tar"} | {name for name in faults.asked if "parquet" in name}


def test_other_bytes_of_the_same_size_are_detected_without_etag(local: list[Path], tmp_path: Path) -> None:  # noqa: F811
    store = store_in(tmp_path)
    with http_files(local[0].parent, marks=False) as address:
        index = build_index(names(address), store=store)
        assert {index.shard(n).stamp.mark[:7] for n in range(index.num_shards)} == {"sha256:"}
        for path in (tmp_path / "fetched").rglob("*.tar"):
            path.unlink()
        data = local[0].read_bytes()
        local[0].write_bytes(data.replace(b"picture 1", b"drawing 1"))
        data_set = ImageDataset(index, BUCKETS, "none")
        with pytest.raises(ShardError, match=r"00000\.tar has changed since it was indexed"):
            data_set.load(0, 0)
        assert data_set.load(5, 0).captions == ["picture 5"]
        assert len(unindexed(names(address), store)) == 3, "indexed again, all are read again"


@pytest.mark.parametrize(
    ("fault", "message", "final"),
    [
        ("endless", "more bytes than its headers", False),
        ("packed", "Content-Encoding: gzip", False),
        ("other bytes", "the server sent bytes from 1, but bytes from 0 were requested", False),
        ("other size", r"the size of the file has changed from \d+ to 10 bytes", False),
        ("to a file", "00000.tar: NonHttpUrlRedirectClientError", True),
        ("in a loop", "00000.tar: TooManyRedirects", True),
    ],
)
def test_other_answer_than_the_file_is_rejected(local: list[Path], fault: str, message: str, final: bool) -> None:  # noqa: F811
    size = local[0].stat().st_size
    faults = Faults(of={"00000.tar": [fault] * 20})
    with (
        http_files(local[0].parent, faults) as address,
        pytest.raises(RemoteError, match=message) as error,
    ):
        b"".join(remote.pieces(f"{address}/00000.tar", size, RetryPolicy(retries=0, timeout_s=5.0)))
    assert error.value.final == final
    assert faults.sent < 32 << 20, "no more than what the buffers between the two hold"


def test_retry_after_may_be_a_date() -> None:
    assert 8 < _retry_after_seconds(formatdate(time.time() + 10, usegmt=True)) <= 10
    assert _retry_after_seconds(formatdate(time.time() - 10, usegmt=True)) == 0
    assert _retry_after_seconds("soon") == 0


def test_server_without_ranges_sends_shard_once(
    local: list[Path],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "PIECE_BYTES", 1000)
    data, faults = local[0].read_bytes(), Faults(of={"00000.tar": ["cut"]})
    with http_files(local[0].parent, faults, knows_ranges=False) as address:
        assert b"".join(remote.pieces(f"{address}/00000.tar", len(data), QUICK)) == data
    assert faults.asked == ["00000.tar"] * 2, "and once more after the fault"


def test_folder_whose_listing_fails_is_not_taken_for_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # of botocore, which would repeat the request itself
    pattern, faults = "s3://laion/d/*/t-*.tar", Faults()
    with s3_bucket([], faults=faults) as environment:
        client = boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"])
        for key in ("a/t-0.tar", "b/t-1.tar", "b/x.tar", "b/c/t-2.tar", "t-3.tar", ".trash/t-4.tar", "a/t-.json"):
            client.put_object(Bucket="laion", Key=f"d/{key}", Body=b"")
        faults.of = {"laion": ["", "503", "", "503"]}  # the folder d can be listed
        assert expand_shards([pattern], QUICK) == ["s3://laion/d/a/t-0.tar", "s3://laion/d/b/t-1.tar"]
        assert faults.injected >= 2
        faults.of = {"laion": ["", *["503"] * 99]}
        with pytest.raises(UserError, match=r"d/\*/t-\*\.tar' cannot be listed: .*attempts"):
            expand_shards([pattern], RetryPolicy(1, 5.0, 0.01))
        faults.of = {}
        assert [name.rpartition("-")[2] for name in expand_shards(["s3://laion/d/**/t-*.tar"], QUICK)] == [
            "0.tar", "2.tar", "1.tar", "3.tar",
        ]  # fmt: skip


@contextmanager
def service(kind: str, local: list[Path], faults: Faults, knows_ranges: bool = True) -> Iterator[str]:  # noqa: F811
    if kind == "s3":
        with s3_bucket(local, faults=faults, knows_ranges=knows_ranges):
            yield f"s3://laion/{local[0].name}"
    else:
        with hf_dataset(local[0].parent, faults=faults, knows_ranges=knows_ranges) as address:
            yield f"{address}/{local[0].name}"


@pytest.mark.parametrize("kind", ["s3", "hf"])
def test_service_without_ranges_or_end_is_not_read_whole(
    local: list[Path],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    data, faults = local[0].read_bytes(), Faults()
    with service(kind, local, faults, knows_ranges=False) as address:
        assert b"".join(remote.pieces(address, len(data), QUICK)) == data, "in one piece"
        monkeypatch.setattr(remote, "PIECE_BYTES", 1000)
        faults.asked.clear()
        pieces = remote.pieces(address, len(data), QUICK)
        assert next(pieces) == data[:1000]
        with pytest.raises(RemoteError, match=f"{local[0].name}: the server ignores byte ranges"):
            next(pieces)
    assert faults.asked == [local[0].name] * 2, "not repeated"
    faults = Faults(of={local[0].name: ["endless"] * 2})
    with service(kind, local, faults) as address:
        pieces = remote.pieces(address, len(data), QUICK)
        assert next(pieces) == bytes(1000)
        with pytest.raises(RemoteError, match="the server ignores byte ranges"):
            next(pieces)
    assert faults.sent < 32 << 20, "no more than what the buffers between the two hold"


def test_other_library_that_ignores_ranges_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    def cat_file(*_: object, **__: object) -> bytes:
        reads.append(1)
        return bytes(2500)

    fs = SimpleNamespace(protocol=("gs", "gcs"), async_impl=True, cat_file=cat_file)
    monkeypatch.setattr(remote.fsspec.core, "url_to_fs", lambda url, **_: (fs, url))
    monkeypatch.setattr(remote, "PIECE_BYTES", 1000)
    with pytest.raises(RemoteError, match=r"a\.tar: the server ignores byte ranges"):
        next(remote.pieces("gs://b/a.tar", 2500, QUICK))
    assert reads == [1]


def test_sample_of_unreachable_shard_becomes_good_again(
    local: list[Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream, "RETRY_AFTER_S", 0.2)
    monkeypatch.setattr(decode_sample, "RETRY_AFTER_S", 0.2)
    faults = Faults()
    with http_files(local[0].parent, faults) as address:
        index = build_index(names(address), store=store_in(tmp_path, retry=RetryPolicy(0, 5.0, 0.01)))
        source = FeatureSource(ImageDataset(index, BUCKETS, "none"), encoders(Text()).image)
        samples = TrainStream(
            SampleOrder(index, BUCKETS, 0), source, seed=0, caption_dropout=0.0, flip=False, max_bad_fraction=1.0
        )
        keys = [samples.sample(position).key for position in range(15)]
        for path in (tmp_path / "fetched").rglob("*.tar"):
            path.unlink()
        faults.of = {"00001.tar": ["503"] * 99}
        assert [samples.sample(position).key for position in range(15)] != keys
        assert samples.replaced > 0
        time.sleep(0.3)
        faults.of = {}
        assert [samples.sample(position).key for position in range(15)] == keys
        assert samples.bad_samples == {}
