"""The index of a data set: table, records, filters and buckets."""

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from raphael_dist.config.data_sections import Filter
from raphael_dist.config.schema import load_config
from raphael_dist.data.fetch.shard_cache import ShardStore
from raphael_dist.data.mixture import BLOCK, MixedOrder, apportion
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.shards.build_index import MAX_BYTES_IN_RUN, build_index, check_index_in_run, open_index
from raphael_dist.data.shards.columns import word_code
from raphael_dist.data.shards.dataset_index import DatasetIndex, open_table
from raphael_dist.data.shards.decode_sample import ImageDataset
from raphael_dist.data.shards.open_index import check_damage
from raphael_dist.data.shards.shard_record import load_record, pack_keys, unpack_keys
from raphael_dist.data.shards.view import open_view
from raphael_dist.errors import UserError
from tests.data.shards.test_shards import good, png, write_raw, write_shard
from tests.data.test_order import BUCKETS, index_of, make_index, record_of
from tests.lib.launch import ROOT


def laion_shard(path: Path, first: int, count: int, **columns: list) -> Path:
    """Write a shard like img2dataset: keys of nine digits, jpg, json and txt, and a parquet file next to it."""
    rows = []
    for n in range(first, first + count):
        image = io.BytesIO()
        Image.new("RGB", (24 + n % 3 * 8, 24), (n % 256, 0, 0)).save(image, "JPEG")
        meta = {
            "caption": f"picture {n}",
            "key": f"{n:09d}",
            "width": 24 + n % 3 * 8,
            "height": 24,
            "original_width": 999,
            "NSFW": "UNLIKELY",
        }
        meta |= {name: values[n - first] for name, values in columns.items() if values[n - first] is not None}
        rows.append(
            (f"{n:09d}", {"jpg": image.getvalue(), "json": json.dumps(meta).encode(), "txt": meta["caption"].encode()})
        )
    return write_shard(path, rows)


def views(index: DatasetIndex, *filters: Filter):
    return open_view(index, BUCKETS, filters)


def test_table_has_all_samples_and_pickles_as_path(tmp_path: Path) -> None:
    records = [
        record_of(f"{n}.tar", np.full((n * 3, 2), 50 + n, np.int32), score=np.arange(3.0 * n, dtype=np.float32))
        for n in range(5)
    ]
    records[2].bad.append(("x/1", "no image"))
    table = index_of(tmp_path, records, ["score"])
    again = pickle.loads(pickle.dumps(table))
    assert len(pickle.dumps(table)) < 1000
    for index in (table, again):
        assert (index.num_samples, index.num_bad, index.fingerprint) == (30, 1, table.fingerprint)
        assert index.starts.tolist() == [0, 0, 3, 9, 18, 30]
        assert [index.key(n) for n in range(30)] == [f"{i}" for n in range(5) for i in range(3 * n)]
        assert [str(bad) for bad in index.iter_bad()] == ["2.tar:'x/1': no image"]
        assert (np.asarray(index.arrays["size"][9:18]) == 53).all()
        assert np.asarray(index.arrays["column.score"])[18:22].tolist() == [0, 1, 2, 3]
        assert [len(index.keys(n)) for n in range(index.num_shards)] == [0, 3, 6, 9, 12]
    with pytest.raises(IndexError):
        table.locate(30)
    (table.folder / "size.npy").write_bytes(b"")
    with pytest.raises(UserError, match="Delete this folder"):
        open_table(table.folder, table.store)


def test_any_key_is_stored_and_long_sides_keep_their_ratio(tmp_path: Path) -> None:
    keys = ["000000001", "a b/ü", "line\nbreak", "\udcff"]
    assert unpack_keys(pack_keys(keys)) == keys
    index = index_of(tmp_path, [record_of("a.tar", np.array([[70_000, 7_000], [5, 6]], np.int32))])
    assert index.arrays["size"].tolist() == [[65_535, 6_553], [5, 6]]


def test_index_takes_under_32_bytes_per_sample_and_constant_memory(tmp_path: Path) -> None:
    from benchmarks.index import records

    index = index_of(tmp_path, list(records(50_000, 5_000)), ["aesthetic"])
    view = open_view(index, BUCKETS)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 32 * 50_000
    order = SampleOrder(index, BUCKETS, seed=0, run_length=24, view=view)
    for array in (index.arrays["place"], index.arrays["size"], order.bucket_of):
        assert isinstance(array, np.memmap)


def test_records_are_written_once_and_again_for_changed_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [laion_shard(tmp_path / f"{n:05d}.tar", 10 * n, 10) for n in range(3)]
    cache, reports = tmp_path / "cache", list[str]()
    first = build_index(paths, cache, lambda text, done=None, total=None: reports.append(text))
    assert [words for words in reports if words.startswith("shard")] == ["shard 1 of 3", "shard 2 of 3", "shard 3 of 3"]
    with monkeypatch.context() as patch:
        patch.setattr("raphael_dist.data.shards.build_index.scan_shard", None)
        assert build_index(paths, cache).fingerprint == first.fingerprint
        for pointer in cache.glob("tables/*.json"):  # the records are enough
            pointer.unlink()
        assert build_index(paths, cache).fingerprint == first.fingerprint
    laion_shard(paths[1], 10, 7)
    reports.clear()
    assert build_index(paths, cache, lambda text, done=None, total=None: reports.append(text)).num_samples == 27
    assert "shard 1 of 1" in reports


def test_parquet_that_is_changed_added_or_removed_is_read_again(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = laion_shard(tmp_path / "00000.tar", 0, 2)

    def scores() -> list[float]:
        index = build_index([path], tmp_path / "cache", columns=["pwatermark"])
        return np.asarray(index.arrays["column.pwatermark"]).tolist() if "pwatermark" in index.known_columns else []

    assert scores() == []
    for values in ([0.5, 0.25], [0.75, 1.0]):
        table = pyarrow.table({"key": ["000000000", "000000001"], "pwatermark": values})
        parquet.write_table(table, tmp_path / "00000.parquet")
        assert scores() == values
    (tmp_path / "00000.parquet").unlink()
    assert scores() == []


def test_short_json_field_with_lone_surrogate_is_a_word(tmp_path: Path) -> None:
    meta = json.dumps({"caption": "b", "lang": "\ud800"}).encode()
    path = write_shard(tmp_path / "a.tar", [("a", {"png": png(), "json": meta})])
    index = build_index([path], tmp_path / "cache", columns=["lang"])
    assert np.asarray(index.arrays["column.lang"]).tolist() == [word_code("\ud800")]


def test_filters_use_columns_of_json_and_parquet_and_count(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    scores = [4.0, 4.7, 5.5, None, 6.0, 4.69]
    path = laion_shard(tmp_path / "00000.tar", 0, 6, AESTHETIC_SCORE=scores, NSFW=["UNLIKELY"] * 4 + ["NSFW", "UNSURE"])
    table = {"key": [f"{n:09d}" for n in (5, 4, 3, 2, 0)], "pwatermark": [0.9, 0.1, 0.2, 0.3, 0.4], "url": ["x"] * 5}
    parquet.write_table(pyarrow.table(table), tmp_path / "00000.parquet")
    index = build_index([path], tmp_path / "cache", columns=["AESTHETIC_SCORE", "NSFW", "pwatermark"])
    assert {"AESTHETIC_SCORE", "NSFW", "pwatermark", "original_width"} <= set(index.known_columns)

    def passing(*filters: Filter) -> list[int]:
        return np.flatnonzero(np.asarray(views(index, *filters).bucket_of) >= 0).tolist()

    aesthetic = Filter(column="AESTHETIC_SCORE", min=4.7, on_missing="drop")
    assert passing(aesthetic) == [1, 2, 4]
    assert passing(aesthetic.model_copy(update={"on_missing": "keep"})) == [1, 2, 3, 4]
    assert passing(aesthetic, Filter(column="NSFW", words=["UNLIKELY", "UNSURE"])) == [1, 2]
    assert passing(Filter(column="pwatermark", max=0.3, on_missing="drop")) == [2, 3, 4]
    assert passing(Filter(column="width", min=32), Filter(column="ratio", max=1.5)) == [1, 4]
    view = views(index, aesthetic, Filter(column="width", min=32))
    assert view.dropped == {"AESTHETIC_SCORE >= 4.7": (3, 1), "width >= 32": (0, 0)}
    assert view.describe()[0] == "filter AESTHETIC_SCORE >= 4.7: 3 samples dropped (1 without a value)"
    assert "3 samples in buckets" in view.describe()[-1]
    with pytest.raises(UserError, match=r"'AESTHETIC_SCORE' must have a value .* '000000003' has none.*on_missing"):
        passing(Filter(column="AESTHETIC_SCORE", min=4.7))
    with pytest.raises(UserError, match=r"the column 'aesthetic' must exist.* Use one of .*AESTHETIC_SCORE"):
        passing(Filter(column="aesthetic", min=4.7))
    with pytest.raises(UserError, match="drop all 6"):
        passing(Filter(column="width", min=5000))
    order = SampleOrder(index, BUCKETS, seed=0, view=views(index, aesthetic))
    assert {order.lookup(p).sample_id for p in range(30)} == {1, 2, 4}
    wide = SampleOrder(index, BUCKETS, seed=0, view=views(index, Filter(column="width", min=32)))
    assert len({order.fingerprint, wide.fingerprint, index.fingerprint}) == 3
    assert SampleOrder(index, BUCKETS, seed=0).fingerprint == index.fingerprint


def test_filter_on_quoted_text_of_captions(tmp_path: Path) -> None:
    captions = ["a dog", 'a sign "OPEN"', "a mug, “I love tea”", 'a 24" screen and a 30" screen', "ein Schild „HALT“"]
    captions += ['the "B" and the "C"', "it's 'so'", 'an unclosed "quote']
    rows = [(f"{n}", {"png": png(), "txt": caption.encode()}) for n, caption in enumerate(captions)]
    rows.append(("8", {"png": png(), "json": json.dumps({"captions": ['"STOP"', "a sign"], "quoted_text": 9}).encode()}))
    index = build_index([write_shard(tmp_path / "00000.tar", rows)], tmp_path / "cache", columns=["quoted_text"])
    assert np.asarray(index.arrays["column.quoted_text"]).tolist() == [0, 4, 10, 0, 4, 2, 0, 0, 0]
    kept = views(index, Filter(column="quoted_text", min=1, max=4))
    assert np.flatnonzero(np.asarray(kept.bucket_of) >= 0).tolist() == [1, 4, 5]


def test_invalid_filters_are_rejected_in_one_line() -> None:
    config = load_config("emoji-tiny", ["data.filters=[{column: aesthetic, min: 4.7, on_missing: drop}]"])
    assert config.data.filters[0].describe() == "aesthetic >= 4.7"
    for text, message in (
        ("[{colum: aesthetic, min: 1}]", r"data\.filters\.0\.colum: unknown key .*'column'"),
        ("[{column: aesthetic}]", "requires min, max or words"),
        ("[{column: ../x, min: 1}]", "column"),
        ("[{column: x, min: 1, on_missing: no}]", "on_missing"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_config("emoji-tiny", [f"data.filters={text}"])
        assert "\n" not in str(caught.value)
    with pytest.raises(ValidationError):
        Filter(column="x", min=float("nan"))
    with pytest.raises(UserError, match=r"data\.shards=.* requires data\.sources="):
        load_config("emoji-tiny", ["data.shards=a.tar", "data.sources=[{shards: b.tar}]"])


def test_truncated_shard_keeps_its_complete_samples(tmp_path: Path) -> None:
    paths = [write_shard(tmp_path / f"{n}.tar", [good(10 * n + i) for i in range(4)]) for n in range(4)]
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[: len(whole) // 2])
    index = build_index(paths, tmp_path / "cache")
    assert 0 < index.shard(1).num_samples < 4
    assert index.keys(1) == [f"{10 + i:04d}" for i in range(index.shard(1).num_samples)]
    assert list(index.damaged) == [1]
    check_damage(index, "skip", 0.05)
    with pytest.raises(
        UserError, match=r"on_error=stop requires that every shard can be read, but 1 of 4 shards cannot be read.*1\.tar"
    ):
        check_damage(index, "stop", 0.05)
    mute = build_index([write_shard(tmp_path / "mute.tar", [good(1), ("mute", {"png": png()})])], tmp_path / "cache")
    with pytest.raises(
        UserError, match=r"on_error=stop .* but 1 of 2 samples cannot be used: the first one is mute\.tar:'mute': no caption"
    ):
        check_damage(mute, "stop", 0.05)
    paths[2].write_bytes(b"no tar at all" * 99)
    index = build_index(paths, tmp_path / "cache")
    with pytest.raises(UserError, match=r"2 of 4 shards cannot be read: the first one is .*1\.tar"):
        check_damage(index, "skip", 0.05)
    check_damage(index, "skip", 0.5)


def test_shard_changed_after_indexing_is_reported_by_name(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", [good(0), good(1)])
    for change in ("same size", "other samples"):
        index = build_index([path], tmp_path / "cache")
        data = ImageDataset(index, [(8, 8)], "none")
        if change == "same size":
            path.write_bytes(path.read_bytes()[::-1])
        else:
            write_shard(path, [good(5)])
        with pytest.raises(UserError, match=r"a\.tar.*changed since it was indexed"):
            data.load(0, 0)
        write_shard(path, [good(0), good(1)])


def test_links_and_parent_paths_in_tars_are_never_followed(tmp_path: Path) -> None:
    """Names with .. are only keys. Links and devices are skipped, and samples around them stay readable."""
    import tarfile

    path = write_raw(tmp_path / "a.tar", [("../../etc/x.png", png()), ("../../etc/x.txt", b"up"), ("/abs/y.png", png())])
    with tarfile.open(path, "a") as tar:
        for name, kind, target in (("/abs/y.jpg", tarfile.SYMTYPE, "/etc/passwd"), ("z.png", tarfile.LNKTYPE, "etc/x.png"),
                                   ("z.txt", tarfile.CHRTYPE, ""), ("pipe.txt", tarfile.FIFOTYPE, "")):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
        info = tarfile.TarInfo("/abs/y.txt")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"here"))
        long = tarfile.TarInfo("deep/" * 40 + "n.txt")  # a name that takes headers of its own
        long.size = 4
        tar.addfile(long, io.BytesIO(b"long"))
        image = tarfile.TarInfo("deep/" * 40 + "n.png")
        image.size = len(png())
        tar.addfile(image, io.BytesIO(png()))
    before = set(tmp_path.iterdir())
    index = build_index([path], tmp_path / "cache")
    data = ImageDataset(index, [(8, 8)], "none")
    assert index.keys(0) == ["../../etc/x", "/abs/y", "deep/" * 40 + "n"]
    assert [data.load(n, 0).captions for n in range(3)] == [["up"], ["here"], ["long"]]
    assert set(tmp_path.iterdir()) == {*before, tmp_path / "cache"}


def test_run_rejects_indexing_too_much_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    check_index_in_run([("a.tar", MAX_BYTES_IN_RUN)], "x")
    with pytest.raises(UserError, match=r"without an index: 2 .*first one is a\.tar.*Run: python tools/index_shards\.py"):
        check_index_in_run([("a.tar", 1), ("b.tar", MAX_BYTES_IN_RUN)], "python tools/index_shards.py")


def tool(tmp_path: Path, *arguments: str, **environment: str) -> str:
    command = [
        sys.executable,
        "tools/index_shards.py",
        f"{tmp_path}/*.tar",
        "--cache-dir",
        str(tmp_path / "cache"),
        *arguments,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_last_of_parallel_parts_joins_the_index(tmp_path: Path) -> None:
    paths = [laion_shard(tmp_path / f"{n:05d}.tar", 4 * n, 4, score=[1, 2, 3, 4]) for n in range(3)]
    (tmp_path / "00002.tar").write_bytes(paths[2].read_bytes()[:-6000])
    first = tool(tmp_path, "--columns", "score", OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_SIZE="2")
    assert "part 1 of 2: 1 of 1 shard to read" in first
    assert "2 shards without an index record" in first
    second = tool(tmp_path, "--columns", "score", "--part", "0", "--parts", "2", "--processes", "2")
    assert "damaged:" in second
    index = open_index([str(path) for path in paths], ShardStore(tmp_path / "cache" / "index", tmp_path), ["score"])
    assert index is not None
    assert 8 < index.num_samples < 12
    assert views(index, Filter(column="score", min=3)).counts.sum() < index.num_samples
    record = load_record(tmp_path / "cache" / "index", str(paths[0]))
    assert record is not None
    assert record.num_samples == 4


def test_sources_are_mixed_exactly_by_weight_at_any_position(tmp_path: Path) -> None:
    index = make_index(tmp_path, [40, 40, 40, 200], shapes=1)
    view = open_view(index, BUCKETS)
    parts = [SampleOrder(index, BUCKETS, 0, 16, 1, view, range(a, b)) for a, b in ((0, 3), (3, 4))]
    mixed = MixedOrder(parts, [3.0, 1.0], seed=0)
    of_shard = np.array([index.locate(mixed.lookup(p).sample_id)[0] for p in range(4 * BLOCK)])
    assert (np.bincount((of_shard == 3).reshape(4, BLOCK).sum(axis=1)) > 0).nonzero()[0].tolist() == [BLOCK // 4]
    assert 0.1 < (of_shard[:200] == 3).mean() < 0.4, "mixed, not one after the other"
    ids = [mixed.lookup(p).sample_id for p in range(2 * BLOCK)]
    counts = np.bincount(ids, minlength=320)
    assert np.ptp(counts[:120]) <= 1, "each source goes through its own epochs"
    assert np.ptp(counts[120:]) <= 1
    again = MixedOrder(parts, [3.0, 1.0], seed=0)
    assert [again.lookup(p).sample_id for p in (5000, 17, 10**12)] == [mixed.lookup(p).sample_id for p in (5000, 17, 10**12)]
    assert again.fingerprint == mixed.fingerprint != MixedOrder(parts, [2.0, 1.0], seed=0).fingerprint
    assert apportion([1, 1, 1], 1024) == [342, 341, 341]
    with pytest.raises(UserError, match="but 1e-05 is smaller"):
        MixedOrder(parts, [1.0, 1e-5], seed=0)


def test_mixing_sources_keeps_runs_of_one_size(tmp_path: Path) -> None:
    index = make_index(tmp_path, [90, 90, 90, 90])
    view = open_view(index, BUCKETS)
    mixed = MixedOrder(
        [SampleOrder(index, BUCKETS, 1, 2, 6, view, part) for part in (range(2), range(2, 4))], [1, 2], seed=1
    )
    for first in range(0, 3000, 6):
        places = [mixed.lookup(p) for p in range(first, first + 6)]
        assert len({place.bucket for place in places}) == 1
        assert len({index.locate(place.sample_id)[0] // 2 for place in places}) == 1
    # The current windows of all sources before the next one of any.
    assert [set(window) for window in mixed.windows_from(3000, 2)] == [{0, 1, 2, 3}] * 2
