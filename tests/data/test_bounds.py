"""Limits for compressed files that expand to much more than their size."""

import io
import resource
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from raphael_dist.data.shards import tar_scan
from raphael_dist.data.shards.columns import parquet_columns, word_code
from raphael_dist.data_prep.arrow_size import expanded_bytes
from raphael_dist.data_prep.caption_tables import _arrow_rows, _parquet_rows
from raphael_dist.errors import UserError
from tests.lib.launch import ROOT

pyarrow = pytest.importorskip("pyarrow")


def parquet_of(compression: str = "zstd", **columns: list) -> bytes:
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer, compression=compression)
    return buffer.getvalue()


def peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def test_repeated_parquet_string_is_in_memory_once() -> None:
    rows = 1500
    keys = [f"{n:09d}" for n in range(rows)]
    data = parquet_of(key=keys, url=["x" * (1 << 19)] * rows, style=["oil"] * rows, score=[0.5] * rows)
    assert len(data) < 1 << 18
    before = peak_mb()
    columns = parquet_columns(data, ["a/000000003", "000001499", "absent"])
    assert peak_mb() - before < 300, "all of it would be 0.8 GB"
    assert columns["score"][:2].tolist() == [0.5, 0.5]
    assert columns["style"][:2].tolist() == [word_code("oil")] * 2
    assert "url" not in columns


def test_parquet_columns_of_other_writers_are_read() -> None:
    words, kinds = ["oil", "ink", None], [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()]
    for kind in [*kinds, pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]:  # pandas 3, polars, categories
        columns = {
            "key": pyarrow.array(["a", "b", "c"]).cast(kind),
            "style": pyarrow.array(words).cast(kind),
            "url": pyarrow.array(["x" * 100, None, "x"]).cast(kind),
            "score": pyarrow.array([Decimal("0.5"), None, Decimal("2.25")]),
        }
        read = parquet_columns(parquet_of(**columns), ["c", "a", "b"])
        assert np.array_equal(read["style"], [np.nan, word_code("oil"), word_code("ink")], equal_nan=True), kind
        assert np.array_equal(read["score"], [2.25, 0.5, np.nan], equal_nan=True)
        assert np.array_equal(read["url"], [word_code("x"), np.nan, np.nan], equal_nan=True)
    assert parquet_columns(parquet_of(key=[7], score=[1.5]), ["7"])["score"].tolist() == [1.5]
    for key, kind in [([1.5], "double"), ([b"a"], "binary"), ([["a"]], "list<element: string>")]:
        with pytest.raises(ValueError, match=rf"the column 'key' must have the type string or integer, but it has {kind}"):
            parquet_columns(parquet_of(key=key), ["a"])


def test_parquet_beyond_limits_is_rejected_before_reading(tmp_path: Path) -> None:
    words = [f"{n:07d}" * 1000 for n in range(12_000)]  # compresses to less than a fiftieth
    data = parquet_of(key=[str(n) for n in range(12_000)], text=words)
    before = peak_mb()
    with pytest.raises(ValueError, match=r"the file's \d+ bytes expand to \d+ bytes, but at most 67108864 are allowed"):
        parquet_columns(data, ["1"])
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"a.parquet cannot be read as parquet .the file's \d+ bytes expand to"):
        list(_parquet_rows([tmp_path / "a.parquet"]))
    assert peak_mb() - before < 100
    with pytest.raises(ValueError, match="the file has 1000021 rows for 2 samples, but at most 1000020 are allowed"):
        parquet_columns(parquet_of(key=["a"] * 1_000_021), ["a", "b"])


def arrow_file(path: Path, compression: str | None, batch_rows: int = 1000, **columns: object) -> Path:
    table = pyarrow.table(columns)
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with pyarrow.ipc.new_stream(str(path), table.schema, options=options) as stream:
        stream.write_table(table, max_chunksize=batch_rows)
    return path


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_arrow_rows_are_read_and_their_size_is_known(tmp_path: Path, compression: str | None) -> None:
    words = pyarrow.array([f"caption {n % 9} " * 40 for n in range(3000)]).dictionary_encode()
    columns = {"text": words, "number": list(range(3000)), "empty": [None] * 3000, "image": [{"bytes": b"x" * 50}] * 3000}
    path = arrow_file(tmp_path / "a.arrow", compression, **columns)
    assert list(_arrow_rows([path])) == pyarrow.table(columns).to_pylist()
    plain = arrow_file(tmp_path / "b.arrow", None, **columns)
    sizes = [expanded_bytes(pyarrow, pyarrow.memory_map(str(name))) for name in (path, plain)]
    # In an uncompressed stream, each buffer is padded to 8 or 64 bytes.
    assert sizes[0] <= sizes[1] < plain.stat().st_size
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_arrow_beyond_limits_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"{n:07d}" * 1000 for n in range(12_000)]  # compresses to less than a fiftieth
    packed = arrow_file(tmp_path / "a.arrow", "zstd", file_name=["a.png"] * 12_000, text=words)
    del words
    before = peak_mb()
    with pytest.raises(UserError, match=r"a\.arrow cannot be read as an Arrow stream .the file's \d+ bytes expand to more"):
        list(_arrow_rows([packed]))
    one_word = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000), pyarrow.array(["x" * (1 << 20)]))
    with pytest.raises(UserError, match="expand to too many rows or too long strings"):
        for _ in _arrow_rows([arrow_file(tmp_path / "b.arrow", None, text=one_word)]):
            pass
    monkeypatch.setattr(tar_scan, "SMALL_BYTES", 1 << 16)
    rows = pyarrow.nulls(1 << 20)
    with pytest.raises(UserError, match="expand to too many rows or too long strings"):
        for _ in _arrow_rows([arrow_file(tmp_path / "c.arrow", None, 1 << 20, text=rows)]):
            pass
    assert peak_mb() - before < 100
    data = packed.read_bytes()
    for end in (100, 1000, len(data) // 2):
        packed.write_bytes(data[:end])
        with pytest.raises(UserError, match="cannot be read as an Arrow stream"):
            list(_arrow_rows([packed]))


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_closed_standard_streams_neither_abort_nor_receive_files(tmp_path: Path, closed: tuple[int, ...]) -> None:
    """An opened file must not get the descriptor of a closed stream: output would go into it."""
    code = f"""
import os
from pathlib import Path
from raphael_dist.errors import run_command
def work():
    file = os.open({str(tmp_path / "file")!r}, os.O_WRONLY | os.O_CREAT)
    assert file > 2, file
    os.write(1, b"output of a library")
    print("output", flush=True)
    import sys
    from raphael_dist.training.console import Console, ignore_output_errors
    ignore_output_errors()
    Console(True, 0, 1).line("a line")
    sys.stderr.flush()
exit(run_command(work))
"""
    redirections = " ".join(f"{number}{'<' if number == 0 else '>'}&-" for number in closed)
    command = ["bash", "-c", f'exec "$0" -c "$1" {redirections}', sys.executable, code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_bytes() == b""
