"""`tools/bench.py network-data`: images per second of training from remote shards over links of a given bandwidth.

Nodes are simulated by network namespaces of this machine (tests/lib/netns.py). Another node serves the shards by HTTP or S3.
Ranks train the first epoch. On their disks they have the index (list of all samples) but no shard. A step waits for the
batches of all ranks and then sleeps, so that the computation of several nodes does not compete for the cores of one machine.

A window is a group of shards whose samples are shuffled together, over all ranks. Therefore every node needs every shard.
The measured speed is compared with a limit: the speed of an epoch in which the links are always busy, and in which a step
takes as long as with local shards and waits only for the shards of its window. Requires root.
"""

import argparse
import importlib
import io
import json
import logging
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from benchmarks.simulated_nodes import finish, import_netns
from raphael_dist.config.schema import Config, load_config
from raphael_dist.data.batch_workers import BatchPrefetcher
from raphael_dist.data.mixture import MixedOrder
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.run_data import open_source
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.runtime.ranks import Ranks, discover, initialise
from raphael_dist.storage.files import replace_bytes

SIDE, MICRO_BATCH, WINDOW = 96, 8, 4  # pixels of an image (30 kB); images of a rank in a step; shards of a window
LOCAL_STEPS = 12  # that are timed with local shards
TCP_SHARE = 1448 / 1514  # of the bytes of a full frame that are data
# Nothing but data: no text encoder, no VAE and no edge maps.
OVERRIDES = (
    "image.vae=none",
    "image.buckets=[[32,32]]",
    "model.latent_channels=3",
    "text.encoder=characters",
    "model.text_width=256",
    "edge.weight=0",
    "data.edge_maps=none",
    "data.val_shards=[]",
    "data.features=online",
    f"data.window_shards={WINDOW}",
    f"train.micro_batch_size={MICRO_BATCH}",
)


@dataclass(frozen=True)
class Case:
    """One measurement of an epoch.

    Attributes:
        mbit_s: bandwidth of the link of each node with ranks.
        step_s: seconds that a step sleeps.
        nodes, per_node: number of nodes with ranks, and of ranks on each.
        kind: the server's protocol, "http" or "s3"; "local": the shards are local files, without a limit.
        uneven: whether the shards have from a tenth to nineteen tenths of the average number of images.
        prefetch: data.prefetch, the number of batches that a rank builds ahead.
    """

    mbit_s: float
    step_s: float
    nodes: int = 2
    per_node: int = 1
    kind: str = "http"
    uneven: bool = False
    prefetch: int = 2

    @property
    def batch(self) -> int:
        """Images of a step on all ranks."""
        return MICRO_BATCH * self.nodes * self.per_node

    @property
    def link_limit(self) -> float:
        """Images per second, counted over all ranks together, that the links allow at most.

        Every node receives the images of all ranks over its own link, so the number of nodes does not change this limit.
        """
        return self.mbit_s * 1e6 / 8 * TCP_SHARE / len(make_sample(0))

    def config(self, shards: Sequence[str], folder: str, cache: str) -> Config:
        """Return the configuration of the ranks. FOLDER/index has the index of `shards`, FOLDER/CACHE the fetched shards."""
        own = [
            f"data.shards={json.dumps(list(shards))}",
            f"data.cache_dir={folder}/index",
            f"data.shard_cache={folder}/{cache}",
            f"data.prefetch={self.prefetch}",
            f"train.global_batch_size={self.batch}",
        ]
        return load_config("emoji-tiny", [*OVERRIDES, *own])


@dataclass(frozen=True)
class Row:
    """Images per second of an epoch that starts without any shard on the nodes' disks.

    Attributes:
        case: the measurement.
        steps: images per second of the same steps if all shards are local.
        measured: images per second from the start of reading to the end of the last step.
        limit: images per second of an epoch in which the links are always busy.
    """

    case: Case
    steps: float
    measured: float
    limit: float


def make_sample(number: int) -> bytes:
    """Return the tar members of a sample: an incompressible image of SIDE x SIDE pixels, and a caption."""
    noise = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    image, tar = io.BytesIO(), io.BytesIO()
    Image.fromarray(noise).save(image, "PNG", compress_level=1)
    with tarfile.open(fileobj=tar, mode="w") as members:
        for ext, data in (("png", image.getvalue()), ("txt", b'a "word"')):
            about = tarfile.TarInfo(f"{number:08d}.{ext}")
            about.size = len(data)
            members.addfile(about, io.BytesIO(data))
        return tar.getvalue()[: members.offset]


def write_shards(folder: Path, num_shards: int, images: int, uneven: bool) -> list[str]:
    """Write `num_shards` tar files with `images` images each (if `uneven`: on average); return their names."""
    shares = np.random.default_rng(0).uniform(0.1, 1.9, num_shards) if uneven else np.ones(num_shards)
    numbers, names = count(), [f"{'uneven' if uneven else 'even'}-{i:03d}.tar" for i in range(num_shards)]
    for name, share in zip(names, shares, strict=True):
        samples = [make_sample(next(numbers)) for _ in range(max(1, round(images * share)))]
        (folder / name).write_bytes(b"".join(samples) + bytes(1024))
    return names


# ---- on a rank ------------------------------------------------------------------------------


def measure(todo: list[tuple[Case, list[str], list[str]]], folder: str) -> None:
    """Take measurements on this rank, and write the results to FOLDER/out. Collective.

    First the ranks index all shards and measure steps with local shards, over links without a limit. Then they create the
    file FOLDER/ready. The starting process (`run_cases`) limits the bandwidth of the links and creates FOLDER/limited. Then
    the ranks measure epochs with remote shards.

    `todo`: (measurement, URLs of its shards, paths of local copies of these shards).
    """
    ranks = discover()
    device = initialise(ranks)
    # A file, because a message over a link would wait behind the shards that the link carries.
    store = dist.FileStore(f"{folder}/store", ranks.world_size)
    steps: dict[float, float] = {}
    for case, shards, local in todo:
        open_source(case.config(shards, folder, "fetched"), ranks, device).close()
        if case.step_s not in steps:
            config, keys = case.config(local, folder, "fetched"), dist.PrefixStore(f"local {case.step_s}", store)
            steps[case.step_s], _ = train_epoch(replace(case, kind="local"), config, ranks, device, keys)
    dist.barrier()
    Path(folder, "ready").touch()
    while not Path(folder, "limited").exists():
        time.sleep(0.05)
    rows = []
    for number, (case, shards, _) in enumerate(todo):
        cache, speed = f"{ranks.rank // case.per_node}-{number}", steps[case.step_s]
        keys = dist.PrefixStore(str(number), store)
        measured, windows = train_epoch(case, case.config(shards, folder, cache), ranks, device, keys)
        images = sum(images for images, _ in windows) // case.batch * case.batch
        rows.append((speed, measured, images / ideal_seconds(case, windows, speed)))
        shutil.rmtree(Path(folder, cache), ignore_errors=True)
    if ranks.rank == 0:
        Path(folder, "out").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def train_epoch(
    case: Case, config: Config, ranks: Ranks, device: torch.device, store: dist.Store
) -> tuple[float, list[tuple[int, int]]]:
    """Read the data of the first epoch, with steps that only sleep; with local shards only a few steps. Collective.

    `store`: an empty store, in which a step waits for the batches of all ranks.

    Returns:
        (images per second, (images, bytes) of each window).
    """
    source, plan = open_source(config, ranks, device), BatchPlan.of(config, ranks.world_size)
    order = source.training.order
    slots = (plan.slots(first, ranks.rank, 0) for first in count(0, case.batch))
    steps = LOCAL_STEPS if case.kind == "local" else order.samples_per_epoch // case.batch
    dist.barrier()
    began = time.monotonic()
    with closing(source), BatchPrefetcher(source.builder(config, 1, device), slots, case.prefetch, 0) as batches:
        for step in range(steps):
            if case.kind == "local" and step == 1:  # the first one of the process imports decoders
                began = time.monotonic()
            next(batches)
            store.set(f"{step} {ranks.rank}", "")
            store.wait([f"{step} {rank}" for rank in range(ranks.world_size)])
            time.sleep(case.step_s)
        seconds = time.monotonic() - began
    return (steps - (case.kind == "local")) * case.batch / seconds, list(windows_of(order))


def windows_of(order: SampleOrder | MixedOrder) -> Iterator[tuple[int, int]]:
    """Yield (number of images, bytes) of each window of shards in the first epoch."""
    position = 0
    while position < order.samples_per_epoch:
        (shards,) = order.windows_from(position, 1)
        images = sum(int(order.index.starts[shard + 1] - order.index.starts[shard]) for shard in shards)
        yield images, sum(int(order.index.num_bytes[shard]) for shard in shards)
        position += images


def ideal_seconds(case: Case, windows: list[tuple[int, int]], steps: float) -> float:
    """Return the shortest possible time of an epoch: links are always busy, steps wait only for the shards of their window.

    `windows`: (number of images, bytes) of each window of shards. `steps`: images per second of steps with local shards.
    """
    arrived = trained = 0.0
    for images, num_bytes in windows:
        arrived += num_bytes * 8e-6 / (case.mbit_s * TCP_SHARE)
        trained = max(trained, arrived) + images / steps
    return trained


# ---- on the host ----------------------------------------------------------------------------


def run_cases(todo: list[Case], files: Path, names: dict[bool, list[str]]) -> list[Row]:
    """Take measurements that have the same nodes and bandwidth; return their results.

    `files`: folder of the shards. `names`: names of the shards of uneven size (True) and of equal size (False). Raises
    SystemExit if nodes cannot be simulated, or a rank fails.
    """
    netns, servers = import_netns(), importlib.import_module("tests.lib.servers")
    nodes, kinds, env = todo[0].nodes, {case.kind for case in todo}, {}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        network = stack.enter_context(netns.Network([netns.Link(whole=True)] * (nodes + 1)))
        base = {"local": str(files), "s3": "s3://laion"}
        if "http" in kinds:
            base["http"] = stack.enter_context(servers.http_files(files, listener=network.socket(nodes)))
        if "s3" in kinds:
            paths = [files / name for case in todo if case.kind == "s3" for name in names[case.uneven]]
            logging.getLogger("werkzeug").setLevel(logging.ERROR)  # which prints every request
            env = stack.enter_context(servers.s3_bucket(paths, listener=network.socket(nodes)))
        base, env = (
            {key: url.replace("127.0.0.1", network.names[nodes]) for key, url in urls.items()} for urls in (base, env)
        )
        spec = [
            (asdict(case), *([f"{base[kind]}/{name}" for name in names[case.uneven]] for kind in (case.kind, "local")))
            for case in todo
        ]
        Path(folder, "spec").write_text(json.dumps(spec))
        ranks = network.start_ranks(["tools/bench.py", "network-data", "--measure", folder], todo[0].per_node, nodes, **env)
        while not Path(folder, "ready").exists() and all(rank.poll() is None for rank in ranks):
            time.sleep(0.1)
        for node in range(nodes):
            network.set_rate(node, todo[0].mbit_s)
        Path(folder, "limited").touch()
        finish(ranks, 1800)
        results = json.loads(Path(folder, "out").read_text())
    return [Row(case, *result) for case, result in zip(todo, results, strict=True)]


def cases(mbit_s: float) -> Iterator[Case]:
    """Yield the measurements: steps that are faster than the link, about as fast, and slower, each with variations."""
    base = Case(mbit_s, 0.0)
    feeding = base.batch / base.link_limit
    link, even, step = (replace(base, step_s=round(feeding * share, 4)) for share in (0.25, 1.0, 2.0))
    yield from (link, even, step)
    for one in (link, even, step):
        yield replace(one, kind="s3")
        yield replace(one, uneven=True)
        yield replace(one, prefetch=1)
        yield replace(one, nodes=1, per_node=2)


def bench(todo: Sequence[Case], num_shards: int, images: int) -> Iterator[Row]:
    """Take the measurements `todo` with `num_shards` shards of `images` images on average; yield a row for each."""
    with tempfile.TemporaryDirectory() as folder:
        names = {uneven: write_shards(Path(folder), num_shards, images, uneven) for uneven in (False, True)}
        groups: dict[tuple[float, int, int], list[Case]] = {}
        for case in todo:
            groups.setdefault((case.mbit_s, case.nodes, case.per_node), []).append(case)
        for group in groups.values():
            yield from run_cases(group, Path(folder), names)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to its parser `command`."""
    command.add_argument("--mbit", type=float, nargs="+", default=[10], help="Mbit/s of the links")
    command.add_argument("--shards", type=int, default=16, help=f"number of shards; {WINDOW} are shuffled together")
    command.add_argument("--images", type=int, default=64, help="images of a shard, on average")
    command.add_argument("--out", type=Path, help="also write the rows to this JSON file")
    command.add_argument("--measure", help=argparse.SUPPRESS)  # on a rank


def run(args: argparse.Namespace) -> None:
    """Print images per second of an epoch from remote shards, measured, and the limit that link and steps set."""
    if args.measure:
        spec = json.loads(Path(args.measure, "spec").read_text())
        measure([(Case(**case), shards, local) for case, shards, local in spec], args.measure)
        return
    rows: list[Any] = []
    print(
        "Link, steps, limit, measured: images per second\n\n| Mbit/s | step, ms | nodes x ranks | shards | prefetch "
        "| link | steps | limit | measured | measured / limit |\n" + 10 * "|---" + "|"
    )
    for row in bench([case for mbit_s in args.mbit for case in cases(mbit_s)], args.shards, args.images):
        rows.append(asdict(row))
        print(describe(row), flush=True)
    if args.out:
        replace_bytes(args.out, json.dumps(rows, indent=1).encode())


def describe(row: Row) -> str:
    """Return a result as a row of the Markdown table."""
    case = row.case
    shards = f"{case.kind}, uneven" if case.uneven else case.kind
    speeds = " | ".join(f"{n:.0f}" for n in (case.link_limit, row.steps, row.limit, row.measured))
    settings = f"{case.mbit_s:g} | {1e3 * case.step_s:.0f} | {case.nodes} x {case.per_node} | {shards} | {case.prefetch}"
    return f"| {settings} | {speeds} | {row.measured / row.limit:.1%} |"
