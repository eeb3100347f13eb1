"""The stream of samples does not depend on ranks, workers, storage or the first position."""

import hashlib
import json
import multiprocessing
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raphael_dist.config.schema import Config, load_config
from raphael_dist.data.fetch.shard_cache import ShardStore
from raphael_dist.data.mixture import MixedOrder
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.shards.decode_sample import ImageDataset
from raphael_dist.data.shards.sample_reader import SampleReader
from raphael_dist.data.shards.view import open_view
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.rng import Purpose, generator
from tests.data.fetch.test_remote import QUICK
from tests.data.shards.test_index import laion_shard
from tests.lib.launch import LONG
from tests.lib.servers import Faults, http_files, s3_bucket

BUCKETS = [(24, 24), (24, 32), (24, 40)]
STEPS, BATCH = 5, 24


TWENTY_THOUSAND = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not LONG, reason="20,000 images take long: RAPHAEL_LONG=1 runs them"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("served")
    for n in range(8):
        laion_shard(folder / f"{n:05d}.tar", 20 * n, 20)
    with http_files(folder, Faults(every=7)) as address:
        yield folder, address


def read_rank(
    config: Config, order: SampleOrder | MixedOrder, data: ImageDataset, plan: BatchPlan, rank: int, steps: range
) -> Iterator[dict[int, str]]:
    """Yield, for each step, a hash of what a rank reads at each of its positions: key, draws, captions and pixels."""
    with SampleReader(config, data, order, rank) as reading:
        for step in steps:
            found: dict[int, str] = {}
            for micro_step in range(plan.accumulation):
                slots = plan.slots(step * plan.global_batch_size, rank, micro_step)
                places = [order.lookup(position) for position, _ in slots]
                flips = [bool(generator(0, Purpose.FLIP, position).random() < 0.5) for position, _ in slots]
                requests = [(place.sample_id, place.bucket, flip) for place, flip in zip(places, flips, strict=True)]
                reading.prefetch(slots[0][0], requests)
                for (position, weight), request in zip(slots, requests, strict=True):
                    sample = data.load(*request)
                    if weight:
                        about = f"{sample.key} {sample.captions} {request}".encode()
                        found[position] = hashlib.sha256(sample.image.tobytes() + about).hexdigest()
            yield found


def read(config: Config, order: SampleOrder | MixedOrder, data: ImageDataset, ranks: int, steps: range) -> dict[int, str]:
    """Return what all ranks read in these steps."""
    plan, found = BatchPlan(BATCH, ranks, 4, 1, 6), dict[int, str]()
    for rank in range(ranks):
        for of_step in read_rank(config, order, data, plan, rank, steps):
            assert not of_step.keys() & found.keys(), "two ranks read one position"
            found |= of_step
    return found


def opened(
    tmp_path: Path, names: list[str], mixed: bool, max_bytes: int = 1 << 30
) -> tuple[SampleOrder | MixedOrder, ImageDataset]:
    store = ShardStore(tmp_path / "index", tmp_path / "fetched", max_bytes, QUICK)
    index = build_index(names, store=store)
    view = open_view(index, BUCKETS)
    if mixed:
        parts = [SampleOrder(index, BUCKETS, 3, 2, 6, view, part) for part in (range(3), range(3, 8))]
        return MixedOrder(parts, [1.0, 2.0], seed=3), ImageDataset(index, BUCKETS, "none")
    return SampleOrder(index, BUCKETS, 3, 2, 6, view), ImageDataset(index, BUCKETS, "none")


@pytest.mark.parametrize("mixed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stream_is_equal_for_any_ranks_workers_storage_and_resume(
    served: tuple[Path, str], tmp_path: Path, mixed: bool
) -> None:
    folder, address = served
    config = load_config("emoji-tiny", [])
    order, data = opened(tmp_path / "local", [str(path) for path in sorted(folder.glob("*.tar"))], mixed)
    expected = read(config, order, data, 1, range(STEPS))
    assert sorted(expected) == list(range(STEPS * BATCH))
    assert len(set(expected.values())) == STEPS * BATCH
    for ranks, workers, remote in ((2, 0, True), (3, 1, False), (4, 2, True), (2, 3, False), (1, 3, True)):
        names = [f"{address}/{n:05d}.tar" for n in range(8)] if remote else [str(p) for p in sorted(folder.glob("*.tar"))]
        config = load_config("emoji-tiny", [f"data.workers={workers}"])
        order, data = opened(tmp_path / f"{ranks}{workers}", names, mixed)
        stop = ranks  # read in two parts, by objects that know nothing of each other
        first = read(config, order, data, ranks, range(stop))
        order, data = opened(tmp_path / f"{ranks}{workers}", names, mixed)
        assert first | read(config, order, data, ranks, range(stop, STEPS)) == expected, (ranks, workers, remote)


def rank_process(folder: Path, names: list[str], rank: int, first: int, last: int, batch: int, room: int) -> None:
    """Run as a rank: record each step that was read, until the process is killed."""
    config = load_config("emoji-tiny", ["data.workers=1"])
    order, data = opened(folder / "node", names, False, room)
    plan = BatchPlan(batch, 2, 60, 1, 6)
    with open(folder / f"rank-{rank}.jsonl", "a") as file:
        for step, found in zip(
            range(first, last), read_rank(config, order, data, plan, rank, range(first, last)), strict=True
        ):
            file.write(json.dumps([step, found]) + "\n")
            file.flush()


def steps_of(folder: Path, rank: int) -> dict[int, dict[str, str]]:
    path = folder / f"rank-{rank}.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return dict(json.loads(line) for line in lines if line.endswith("\n"))


@pytest.mark.slow
@pytest.mark.parametrize(("count", "per_shard"), [(240, 40), pytest.param(20_000, 1000, marks=TWENTY_THOUSAND)])
def test_killed_ranks_over_faulty_s3_resume_exactly(tmp_path: Path, count: int, per_shard: int) -> None:
    """Ranks are processes with workers. The shard cache is smaller than the data, and every third answer is a fault."""
    (tmp_path / "served").mkdir()
    shards = range(count // per_shard)
    paths = [laion_shard(tmp_path / "served" / f"{n:05d}.tar", per_shard * n, per_shard) for n in shards]
    batch, steps, room = count // 10 // 6 * 6, 10, 4 * paths[0].stat().st_size
    order, data = opened(tmp_path / "local", [str(path) for path in paths], False)
    plan = BatchPlan(batch, 1, 60, 1, 6)
    expected = {
        str(p): h
        for one in read_rank(load_config("emoji-tiny", []), order, data, plan, 0, range(steps))
        for p, h in one.items()
    }
    context, faults, timeout_s = multiprocessing.get_context("spawn"), Faults(every=3), 250 + count / 20
    with s3_bucket(paths, faults=faults):
        names, first = [f"s3://laion/{path.name}" for path in paths], 0
        opened(tmp_path / "node", names, False, room)  # the index is made before
        for is_last in (False, True):
            ranks = [
                context.Process(target=rank_process, args=(tmp_path, names, r, first, steps, batch, room)) for r in range(2)
            ]
            for rank in ranks:
                rank.start()
            deadline = time.monotonic() + timeout_s
            while not is_last and time.monotonic() < deadline and min(len(steps_of(tmp_path, r)) for r in range(2)) < 3:
                time.sleep(0.01)
            for rank in ranks:
                rank.join(timeout_s) if is_last else rank.kill()
                rank.kill()
                rank.join()
            codes = [rank.exitcode for rank in ranks]
            assert codes == [0, 0] if is_last else -signal.SIGKILL in codes, codes
            done = [steps_of(tmp_path, r) for r in range(2)]
            first = min(max(one) for one in done)  # the last step that both have read is read again
        assert faults.injected > 0
    found = [{p: h for one in steps_of(tmp_path, r).values() for p, h in one.items()} for r in range(2)]
    assert not found[0].keys() & found[1].keys()
    assert found[0] | found[1] == expected
    assert len(expected) == batch * steps
