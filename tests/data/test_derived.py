"""Derived files that affect numbers: a flipped byte is detected, and the file is written again."""

import gzip
import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from raphael_dist.config.data_sections import Filter
from raphael_dist.config.schema import Config
from raphael_dist.data.features import feature_source
from raphael_dist.data.features.batch_encoder import Encoders
from raphael_dist.data.features.cache import FeatureCache
from raphael_dist.data.features.feature_source import StoredFeatures
from raphael_dist.data.features.packing import SampleFeatures, seal
from raphael_dist.data.fetch.shard_cache import ShardStore
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.shards.dataset_index import BadSampleError
from raphael_dist.data.shards.decode_sample import ImageDataset
from raphael_dist.data.shards.tar_scan import FEATURES_EXT
from raphael_dist.data.shards.view import open_view
from raphael_dist.data_prep.build_shards import Preparer
from raphael_dist.data_prep.inputs import parts_of
from raphael_dist.errors import UserError
from raphael_dist.storage import checksummed
from raphael_dist.storage.checksummed import read_sealed, write_sealed
from tests.data.features.test_features import config, encoders, samples, stream_of, with_data, write_shard  # noqa: F401
from tests.data.shards.test_index import laion_shard
from tests.data.test_order import BUCKETS
from tests.lib.servers import http_files


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 0x41
    path.unlink()  # not into what is mapped
    path.write_bytes(data)


def numbers(shards: list[Path], folder: Path) -> list:
    """Return everything that training uses of the index: samples by position, keys and fingerprints."""
    index = build_index(shards, folder, columns=["score"])
    order = SampleOrder(index, BUCKETS, 0, 2, 2, open_view(index, BUCKETS, [Filter(column="score", min=2)]))
    places = [order.lookup(position) for position in range(40)]
    spans = [index.span(p.sample_id) for p in places]
    bad = [str(one) for one in index.iter_bad()]
    return [order.fingerprint, index.text_digest, places, spans, [index.key(p.sample_id) for p in places], bad]


def test_flipped_byte_in_index_files_changes_no_number(tmp_path: Path) -> None:
    shards = [laion_shard(tmp_path / f"{n}.tar", 6 * n, 6, score=[1, 2, 3, 4, 5, 6]) for n in range(2)]
    folder = tmp_path / "index"
    expected = numbers(shards, folder)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert {path.name for path in files} >= {"counts.npy", "bucket_of.npy", "place.npy", "keys.bin", "sums.json"}
    for name in files:
        for at in (-1, 150):
            flip(folder / name, at)
            assert numbers(shards, folder) == expected, (name, at)
    for record in (folder / "shards").rglob("*.safetensors"):  # the table is joined again, from damaged records
        flip(record, 700)
    for table in (folder / "tables").glob("*/place.npy"):
        flip(table, 140)
    assert numbers(shards, folder) == expected


def test_flipped_byte_in_null_text_or_a_cache_header_is_computed_again(
    tmp_path: Path,
    config: Config,  # noqa: F811
    encoders: Encoders,  # noqa: F811
) -> None:
    shard = write_shard(tmp_path / "a.tar", samples(3))
    config = with_data(config, cache_dir=str(tmp_path / "cache"), cached_text="stored")
    _, cache = stream_of(config, encoders, shard)
    assert isinstance(cache, FeatureCache)
    text, path = cache.null_text, cache.folder / "null_text.safetensors"
    assert text is not None
    tokens = text.tokens
    for at in (-40, -1, 60):
        flip(path, at)
        _, again = stream_of(config, encoders, shard)
        assert again.null_text is not None
        assert torch.equal(again.null_text.tokens, tokens)
    [file] = [path for path in cache.folder.glob("*.safetensors") if path.name.startswith("a-")]
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header = file.read_bytes()[8 : 8 + size]
    assert set(json.loads(header)) > {"mean.0", "tokens"}
    # The same bytes read as another type are other numbers, under the same checksum of the bytes.
    data = bytearray(file.read_bytes())
    at = data.index(b'"F16"')
    data[at : at + 5] = b'"I16"'
    file.unlink()
    file.write_bytes(data)
    _, again = stream_of(config, encoders, shard)
    assert isinstance(again, FeatureCache)
    again.verify(range(1))
    assert again.missing() == [0], "discarded, and computed again by the next build"


def test_damaged_stored_features_are_a_bad_sample_and_faults_are_not(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: Config,  # noqa: F811
    encoders: Encoders,  # noqa: F811
) -> None:
    shard, out = write_shard(tmp_path / "a.tar", samples(1)), tmp_path / "out"
    out.mkdir()
    Preparer(out, "stored", None, config, encoders).make(parts_of([str(shard)], 10, 0.0, None)[0])
    _, source = stream_of(with_data(config, features="stored"), encoders, out / "a.tar")
    assert isinstance(source, StoredFeatures)
    [(ext, data)] = source.dataset.read(0, [FEATURES_EXT]).items()
    mean = source.get(0, 0, lambda weights: 0, False).mean

    def get_from(content: bytes, mirrored: bool = False) -> SampleFeatures:
        monkeypatch.setattr(source.dataset, "read", lambda *args: {ext: content})
        return source.get(0, 0, lambda weights: 0, mirrored)

    header = 8 + int.from_bytes(data[:8], "little")
    for at in (*range(header, len(data), 997), len(data) - 1, data.index(b"data.caption_from"), data.index(b'"F16"') + 1):
        changed = bytearray(data)
        changed[at] = ord("I") if at < header else changed[at] ^ 4
        with pytest.raises(BadSampleError, match="features cannot be read"):
            get_from(bytes(changed))
    tensors = load(data)
    assert tensors.pop("crc") is not None
    with pytest.raises(BadSampleError, match="features cannot be read"):
        get_from(save(tensors))
    found = get_from(save(seal(tensors))).mean
    assert found is not None
    assert mean is not None
    assert torch.equal(found, mean)
    del tensors["mean_flip"]
    with pytest.raises(UserError, match=r"^data\.flip=true requires features of mirrored images"):
        get_from(save(seal(tensors)), mirrored=True)
    no_memory = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    monkeypatch.setattr(feature_source, "unpack", lambda *args: (_ for _ in ()).throw(no_memory))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        get_from(data)


@pytest.mark.parametrize("kind", ["expanded", "fetched"])
def test_flipped_byte_in_copy_of_a_shard_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """A copy is compared with its checksum at its first use after the start of a process, and is written again."""
    packed = tmp_path / "served" / "a.tar.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(laion_shard(tmp_path / "a.tar", 0, 6).read_bytes()))
    compared = []
    crc = checksummed._crc
    monkeypatch.setattr(checksummed, "_crc", lambda path: compared.append(path) or crc(path))

    def samples_of_new_process(address: str) -> list[tuple[list[str], bytes]]:
        monkeypatch.setattr(checksummed, "_START_TIME", time.time())
        monkeypatch.setattr(checksummed, "_verified", set())
        compared.clear()
        index = build_index([address], store=ShardStore(tmp_path / "index", tmp_path / "fetched"))
        data = ImageDataset(index, BUCKETS, "none")
        found = [data.load(n, 0) for n in (*range(6), *range(6))]
        return [(sample.captions, sample.image.tobytes()) for sample in found]

    with http_files(packed.parent) as server:
        address = str(packed) if kind == "expanded" else f"{server}/{packed.name}"
        expected = samples_of_new_process(address)
        [copy] = (tmp_path / ("index" if kind == "expanded" else "fetched")).rglob("a.tar")
        content = copy.read_bytes()
        assert samples_of_new_process(address) == expected
        assert compared == [copy], "once"
        caplog.clear()
        for damage in ("caption", "size", "checksum", "no checksum"):
            if damage == "caption":
                flip(copy, content.index(b"picture 3") + 8)
            elif damage == "size":
                copy.write_bytes(content[:-512])
            elif damage == "checksum":
                flip(checksummed.crc_path(copy), 1)
            else:
                checksummed.crc_path(copy).unlink()
            assert samples_of_new_process(address) == expected, damage
            assert copy.read_bytes() == content
            [warning] = [record.message for record in caplog.records if record.levelname == "WARNING"]
            assert f"{copy} does not match its checksum" in warning
            caplog.clear()


def test_changed_sealed_file_is_rejected(tmp_path: Path) -> None:
    write_sealed(tmp_path / "a", b"data")
    assert read_sealed(tmp_path / "a") == b"data"
    for wrong in (b"", b"data", (tmp_path / "a").read_bytes()[:-1], (tmp_path / "a").read_bytes() + b"x"):
        (tmp_path / "a").write_bytes(wrong)
        with pytest.raises(ValueError, match="does not match its checksum"):
            read_sealed(tmp_path / "a")
