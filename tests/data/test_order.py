"""The sample order: each sample once per epoch, any start position, runs of one bucket."""

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raphael_dist.config.data_sections import PAPERS_BUCKETS, generate_buckets
from raphael_dist.config.schema import load_config
from raphael_dist.data.buckets import nearest_buckets, resize_and_crop
from raphael_dist.data.fetch.shard_cache import ShardStore, Stamp
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.shards.dataset_index import DatasetIndex, open_table
from raphael_dist.data.shards.shard_record import ShardRecord
from raphael_dist.data.shards.write_index import write_table
from raphael_dist.errors import UserError

BUCKETS = [(64, 64), (48, 80), (80, 48)]


def make_index(folder: Path, shard_sizes: list[int], shapes: int = 3, seed: int = 0) -> DatasetIndex:
    """Return an index of shards without files, with these numbers of samples of `shapes` random shapes."""
    rng = np.random.default_rng(seed)
    records = []
    for number, count in enumerate(shard_sizes):
        sizes = np.array(BUCKETS, np.int32)[rng.integers(0, shapes, count), ::-1]
        records.append(record_of(f"{number}.tar", sizes))
    return index_of(folder, records)


def index_of(folder: Path, records: Sequence[ShardRecord], columns: Sequence[str] = ()) -> DatasetIndex:
    """Write an index of shards with these records into a new folder in `folder`, and open it."""
    table = Path(tempfile.mkdtemp(dir=folder)) / "tables" / "table"
    write_table(table, records, columns)
    return open_table(table, ShardStore(folder, folder))


def record_of(name: str, sizes: np.ndarray, **columns: np.ndarray) -> ShardRecord:
    """Return the record of a shard without a file, with samples of these sizes."""
    keys, places = [f"{i}" for i in range(len(sizes))], np.zeros((len(sizes), 2), np.uint32)
    return ShardRecord(name, Stamp(1, ""), 1, places, sizes, keys, [], "", name, name, "", columns)


def epoch_of(order: SampleOrder, epoch: int) -> list[int]:
    first = epoch * order.samples_per_epoch
    return [order.lookup(first + offset).sample_id for offset in range(order.samples_per_epoch)]


def test_epoch_has_each_sample_once_and_drops_under_a_run_per_bucket(tmp_path):
    for shapes, window, run in itertools.product((1, 3), (1, 3, 16), (1, 4)):
        index = make_index(tmp_path, [7, 0, 12, 1, 9, 30, 2], shapes)
        order = SampleOrder(index, BUCKETS, seed=3, window_shards=window, run_length=run)
        for epoch in (0, 1, 5):
            ids = epoch_of(order, epoch)
            assert len(set(ids)) == len(ids) == index.num_samples - order.dropped_per_epoch
        assert order.dropped_per_epoch < (1 if 1 in (shapes, run) else shapes * run)


def test_aligned_runs_share_a_bucket(tmp_path):
    for window in (1, 2, 16):
        order = SampleOrder(make_index(tmp_path, [5, 9, 2, 3, 11, 8]), BUCKETS, seed=1, window_shards=window, run_length=4)
        places = [order.lookup(position) for position in range(3 * order.samples_per_epoch)]
        for first in range(0, len(places), 4):
            assert len({place.bucket for place in places[first : first + 4]}) == 1
        assert all(place.bucket == order.bucket_of[place.sample_id] for place in places)
        assert {place.epoch for place in places} == {0, 1, 2}


def test_epochs_and_seeds_differ_and_epochs_cover_all_samples(tmp_path):
    index = make_index(tmp_path, [20, 20, 20])
    order = SampleOrder(index, BUCKETS, seed=1, run_length=8)
    epochs = [epoch_of(order, epoch) for epoch in range(12)]
    assert len({tuple(ids) for ids in epochs}) == 12
    assert set().union(*epochs) == set(range(60))
    assert epoch_of(SampleOrder(index, BUCKETS, seed=2, run_length=8), 0) != epochs[0]


def test_lookup_does_not_depend_on_access_order(tmp_path):
    index = make_index(tmp_path, [13, 5, 8, 21, 3, 3, 9])
    first, second = (SampleOrder(index, BUCKETS, seed=9, window_shards=2, run_length=3) for _ in range(2))
    positions = np.random.default_rng(0).permutation(4 * first.samples_per_epoch)
    shuffled = {int(p): first.lookup(int(p)) for p in positions}
    assert [shuffled[p] for p in sorted(shuffled)] == [second.lookup(p) for p in sorted(shuffled)]
    assert first.lookup(10**12).epoch == 10**12 // first.samples_per_epoch


def test_order_equals_recorded_order(tmp_path):
    order = SampleOrder(make_index(tmp_path, [4, 4, 4]), BUCKETS, seed=0, window_shards=2, run_length=2)
    assert epoch_of(order, 0) == [5, 3, 7, 4, 2, 1, 6, 8, 0, 9]


def test_window_reads_only_its_shards(tmp_path):
    order = SampleOrder(make_index(tmp_path, [10] * 8, shapes=1), BUCKETS, seed=0, window_shards=2)
    for first in range(0, 80, 20):
        shards = {order.index.locate(order.lookup(p).sample_id)[0] for p in range(first, first + 20)}
        assert len(shards) == 2


def test_invalid_options_and_too_small_data_are_rejected(tmp_path):
    index = make_index(tmp_path, [3, 3])
    with pytest.raises(UserError, match="size with at least 100 samples"):
        SampleOrder(index, BUCKETS, seed=0, run_length=100)
    with pytest.raises(UserError, match="at least one size"):
        SampleOrder(index, [], seed=0)
    for options in ({"run_length": 0}, {"window_shards": 0}):
        with pytest.raises(AssertionError):
            SampleOrder(index, BUCKETS, seed=0, **options)
    with pytest.raises(ValueError, match="negative"):
        SampleOrder(index, BUCKETS, seed=0).lookup(-1)


def test_nearest_bucket_is_by_ratio_then_by_area():
    paper = [(448, 832), (512, 768), (512, 704), (640, 640), (576, 640), (640, 576), (704, 512), (768, 512), (832, 448)]
    heights, widths = np.array([*paper, (100, 4000)]).T
    assert nearest_buckets(widths, heights, paper).tolist() == [*range(9), 0]
    assert nearest_buckets(np.array([30]), np.array([30]), [(16, 16), (32, 32)]).tolist() == [1]


def test_buckets_follow_from_a_resolution_by_rule() -> None:
    found = generate_buckets(512)
    assert {(512, 512), (448, 576), (576, 448), (384, 640)} <= set(found)
    assert all(h % 64 == w % 64 == 0 and h * w <= 512 * 512 and max(h, w) <= 2 * min(h, w) for h, w in found)
    assert all((w, h) in found for h, w in found)
    assert load_config("emoji-tiny", ["image.buckets=512", "data.bucket_run=32"]).image.buckets == found
    assert load_config("emoji-tiny", ["image.buckets=paper", "data.bucket_run=32"]).image.buckets == PAPERS_BUCKETS
    assert load_config("emoji-tiny", ["image.buckets=[[64, 32]]"]).image.buckets == ((64, 32),)
    with pytest.raises(UserError, match=r"image\.buckets=8 must be a number of pixels per side from 64"):
        load_config("emoji-tiny", ["image.buckets=8"])


def test_fit_covers_crops_the_centre_and_mirrors():
    stripes = np.zeros((8, 24, 3), np.uint8)
    stripes[:, 8:16] = (255, 0, 0)
    stripes[:, 12:16] = (0, 255, 0)
    image = Image.fromarray(stripes)
    cut = resize_and_crop(image, (8, 8), flip=False)
    assert (cut == stripes[:, 8:16].transpose(2, 0, 1)).all()
    assert (resize_and_crop(image, (8, 8), flip=True) == cut[:, :, ::-1]).all()
    assert (resize_and_crop(image, (8, 24), flip=False) == stripes.transpose(2, 0, 1)).all()
    for size in ((7, 5), (33, 90), (3, 1)):
        assert resize_and_crop(image, size, flip=False).shape == (3, *size)
