"""The stream is the same whoever reads it: any ranks, any workers, local or remote, from any position on."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from raphael_dist.config import Config, load_config
from raphael_dist.data.dataset import ImageDataset
from raphael_dist.data.mixture import MixedOrder
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.reading import Reading
from raphael_dist.data.shard_store import ShardStore
from raphael_dist.data.shards import build_index
from raphael_dist.data.view import open_view
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.rng import Purpose, generator
from tests.servers import Faults, http_files
from tests.test_index import laion_shard
from tests.test_remote import QUICK

BUCKETS = [(24, 24), (24, 32), (24, 40)]
STEPS, BATCH = 5, 24


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("served")
    for n in range(8):
        laion_shard(folder / f"{n:05d}.tar", 20 * n, 20)
    with http_files(folder, Faults(every=7)) as address:
        yield folder, address


def read(config: Config, order: SampleOrder | MixedOrder, data: ImageDataset, ranks: int, steps: range) -> dict[int, str]:
    """Return, for each position of the steps, a hash of what the ranks read there: key, draws, captions and pixels."""
    plan, found = BatchPlan(BATCH, ranks, 4, 1, 6), {}
    for rank in range(ranks):
        with Reading(config, data, order, rank) as reading:
            for step in steps:
                for micro_step in range(plan.accumulation):
                    slots = plan.slots(step * BATCH, rank, micro_step)
                    places = [order.lookup(position) for position, _ in slots]
                    flips = [bool(generator(0, Purpose.FLIP, position).random() < 0.5) for position, _ in slots]
                    requests = [(place.sample_id, place.bucket, flip) for place, flip in zip(places, flips, strict=True)]
                    reading.ahead(slots[0][0], requests)
                    for (position, weight), request in zip(slots, requests, strict=True):
                        sample = data.load(*request)
                        if weight:
                            digest = hashlib.sha256(
                                sample.image.tobytes() + f"{sample.key} {sample.captions} {request}".encode()
                            )
                            assert position not in found, "two ranks read one position"
                            found[position] = digest.hexdigest()
    return found


def opened(tmp_path: Path, names: list[str], mixed: bool) -> tuple[SampleOrder | MixedOrder, ImageDataset]:
    store = ShardStore(tmp_path / "index", tmp_path / "fetched", patience=QUICK)
    index = build_index(names, store=store)
    view = open_view(index, BUCKETS)
    if mixed:
        parts = [SampleOrder(index, BUCKETS, 3, 2, 6, view, part) for part in (range(3), range(3, 8))]
        return MixedOrder(parts, [1.0, 2.0], seed=3), ImageDataset(index, BUCKETS, "none")
    return SampleOrder(index, BUCKETS, 3, 2, 6, view), ImageDataset(index, BUCKETS, "none")


@pytest.mark.parametrize("mixed", [False, True])
def test_the_stream_is_the_same_for_any_ranks_workers_and_places_across_resumes(
    served: tuple[Path, str], tmp_path: Path, mixed: bool
) -> None:
    folder, address = served
    config = load_config("emoji-tiny", [])
    order, data = opened(tmp_path / "local", [str(path) for path in sorted(folder.glob("*.tar"))], mixed)
    want = read(config, order, data, 1, range(STEPS))
    assert sorted(want) == list(range(STEPS * BATCH))
    assert len(set(want.values())) == STEPS * BATCH
    for ranks, workers, remote in ((2, 0, True), (3, 1, False), (4, 2, True), (2, 3, False), (1, 3, True)):
        names = [f"{address}/{n:05d}.tar" for n in range(8)] if remote else [str(p) for p in sorted(folder.glob("*.tar"))]
        config = load_config("emoji-tiny", [f"data.workers={workers}"])
        order, data = opened(tmp_path / f"{ranks}{workers}", names, mixed)
        stop = ranks  # read in two parts, by objects that know nothing of each other
        first = read(config, order, data, ranks, range(stop))
        order, data = opened(tmp_path / f"{ranks}{workers}", names, mixed)
        assert first | read(config, order, data, ranks, range(stop, STEPS)) == want, (ranks, workers, remote)
