"""Speed of reading JPEGs from shards, compared with webdataset, mosaicml-streaming and litdata.

All readers get the same images, decode in the same way and have the same number of workers. Each reader runs in its own
process. The other libraries are optional; a library that is not installed is skipped.
"""

import argparse
import io
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from raphael_dist.data.buckets import resize_and_crop
from raphael_dist.data.fetch.shard_prefetch import ShardPrefetcher
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.shards.decode_sample import ImageDataset
from raphael_dist.data.shards.decode_workers import DecodePool

BATCH = 16
LATENT_BYTES = 32 << 10  # of an image of 512 x 512 pixels, in bfloat16
Batches = Iterator[Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to its parser `parser`."""
    parser.add_argument("--images", type=int, default=3000, help="number of images (default 3000)")
    parser.add_argument("--per-shard", type=int, default=500, help="images per shard (default 500)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(640, 480), metavar=("WIDTH", "HEIGHT"), help="size of the JPEGs"
    )
    parser.add_argument(
        "--bucket", type=int, nargs=2, default=(512, 512), metavar=("HEIGHT", "WIDTH"), help="size after resizing"
    )
    parser.add_argument("--workers", type=int, default=2, help="number of worker processes (default 2)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each reader, of which the fastest counts (default 2)")
    parser.add_argument("--only", nargs="*", choices=READERS, help="measure only these readers")


def make_image(number: int, size: tuple[int, int]) -> bytes:
    """Return a JPEG with random colours and noise, about 90 kB at 640 x 480. `number`: seed. `size`: width, height."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.normal(0, 12, (size[1], size[0], 1))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write(folder: Path, args: argparse.Namespace) -> None:
    """Write the test images into `folder`: as webdataset tars, and in the formats of the other libraries."""
    from webdataset import ShardWriter

    (folder / "tar").mkdir()
    (folder / "latents").mkdir()
    width, height = args.size
    distinct = [make_image(number, (width, height)) for number in range(min(args.images, 200))]
    about = {"caption": "an image", "width": width, "height": height}
    tiny = {"jpg": make_image(0, (64, 64)), "json": json.dumps(about | {"width": 64, "height": 64}).encode()}
    latents = tiny | {"npy": np.random.default_rng(0).bytes(LATENT_BYTES)}
    for kind in ("tar", "latents"):
        pattern = str(folder / kind / "%05d.tar")
        with ShardWriter(pattern, maxcount=args.per_shard, maxsize=1e12, verbose=0) as shards:
            for number in range(args.images):
                image = {"jpg": distinct[number % len(distinct)], "json": json.dumps(about).encode()}
                shards.write({"__key__": f"{number:09d}", **(image if kind == "tar" else latents)})
    for name, (_, writer) in READERS.items():
        if writer is not None and available(name):
            writer(folder / name, distinct, args.images)


def decode(data: bytes, bucket: tuple[int, int]) -> np.ndarray:
    """Decode a JPEG and resize it to `bucket` (height, width), uint8 [3, h, w]. All readers use this function."""
    return resize_and_crop(Image.open(io.BytesIO(data)).convert("RGB"), bucket, False)


def ours(folder: Path, args: argparse.Namespace) -> Batches:
    """Yield batches, uint8 tensors [B, 3, h, w], read by this project's index, sample order and workers."""
    import torch

    names = sorted(map(str, (folder / "tar").glob("*.tar")))
    bucket = tuple(args.bucket)
    data = ImageDataset(build_index(names, folder / "index"), [bucket], "none")
    order = SampleOrder(data.index, [bucket], seed=0)
    pool = DecodePool(data, args.workers) if args.workers else None
    data.set_decoder(pool.load if pool else None)
    shards, ahead = ShardPrefetcher(order), 2 * args.workers
    requests = [[(order.lookup(p).sample_id, 0, False) for p in range(s, s + BATCH)] for s in range(0, args.images, BATCH)]
    if pool is not None:
        for batch in requests[:ahead]:
            pool.prefetch(batch)
    for number, batch in enumerate(requests):
        shards.prefetch_from(number * BATCH)
        if pool is not None and number + ahead < len(requests):
            pool.prefetch(requests[number + ahead])
        yield torch.from_numpy(np.stack([data.load(*request).image for request in batch]))


def _loader(dataset: Any, args: argparse.Namespace, kind: Any = None, **options: Any) -> Batches:
    from torch.utils.data import DataLoader

    options |= {"batch_size": BATCH, "num_workers": args.workers, "prefetch_factor": 2 if args.workers else None}
    return iter((kind or DataLoader)(dataset, **options))


class _Decoding:
    """Decodes an image in the form in which another library yields it: JPEG bytes, or a dict with them.

    It is a class and not a closure, so that it can be pickled for worker processes.
    """

    def __init__(self, bucket: tuple[int, int]) -> None:
        self.bucket = bucket

    def __call__(self, sample: Any) -> np.ndarray:
        return decode(sample["jpg"] if isinstance(sample, dict) else sample, self.bucket)

    def batch(self, samples: list[Any]) -> Any:
        """Decode several samples to one tensor, uint8 [B, 3, h, w]."""
        import torch

        return torch.from_numpy(np.stack([self(sample) for sample in samples]))


def of_webdataset(folder: Path, args: argparse.Namespace) -> Batches:
    """Yield batches, uint8 [B, 3, h, w], read by plain webdataset, shuffled as its documentation shows."""
    import webdataset

    names = sorted(map(str, (folder / "tar").glob("*.tar")))
    dataset = webdataset.WebDataset(names, shardshuffle=100, seed=0).shuffle(1000).map(_Decoding(tuple(args.bucket)))
    return _loader(dataset, args)


def write_streaming(folder: Path, images: list[bytes], count: int) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"jpg": "bytes"}, size_limit=64 << 20) as writer:
        for number in range(count):
            writer.write({"jpg": images[number % len(images)]})


def of_streaming(folder: Path, args: argparse.Namespace) -> Batches:
    """Yield batches, uint8 [B, 3, h, w], read by mosaicml-streaming, shuffled."""
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(folder / "streaming"), shuffle=True, batch_size=BATCH)
    return _loader(dataset, args, collate_fn=_Decoding(tuple(args.bucket)).batch)


class _Bytes:
    """A function that litdata's writer calls with the number of an image, and that returns the image as JPEG bytes.

    It is a class and not a closure, so that it can be pickled for worker processes.
    """

    def __init__(self, images: list[bytes]) -> None:
        self.images = images

    def __call__(self, number: int) -> bytes:
        return self.images[number % len(self.images)]


def write_litdata(folder: Path, images: list[bytes], count: int) -> None:
    import litdata

    litdata.optimize(
        _Bytes(images), list(range(count)), output_dir=str(folder), chunk_bytes="64MB", num_workers=1, verbose=False
    )


def of_litdata(folder: Path, args: argparse.Namespace) -> Batches:
    """Yield batches, uint8 [B, 3, h, w], read by litdata, shuffled."""
    import litdata

    dataset = litdata.StreamingDataset(str(folder / "litdata"), shuffle=True, transform=_Decoding(tuple(args.bucket)))
    return _loader(dataset, args, litdata.StreamingDataLoader)


Reader = Callable[[Path, argparse.Namespace], Batches]
Writer = Callable[[Path, list[bytes], int], None]
READERS: dict[str, tuple[Reader, Writer | None]] = {
    "raphael_dist": (ours, None),
    "webdataset": (of_webdataset, None),
    "streaming": (of_streaming, write_streaming),
    "litdata": (of_litdata, write_litdata),
}


def available(name: str) -> bool:
    """Return whether the Python package `name` can be imported."""
    try:
        __import__(name)
    except Exception:
        return False
    return True


def _tree() -> tuple[float, list[psutil.Process]]:
    """Return the processor seconds used so far by this process and its children, and the children that decode images.

    A child that uses more than 20 MiB of memory counts as decoding.
    """
    below = psutil.Process().children(recursive=True)
    seconds = sum(os.times()[:4]) + sum(sum(process.cpu_times()[:4]) for process in below)
    return seconds, [row for row in below if row.memory_info().rss > 20 << 20]


def _measure(name: str, folder: Path, args: argparse.Namespace, queue: Any) -> None:
    import torch

    torch.set_num_threads(1)
    before, began = _tree()[0], time.perf_counter()
    batches = READERS[name][0](folder, args)
    count = len(next(batches))
    first = time.perf_counter() - began
    if name == "raphael_dist":  # the index is built before, as a tool does it for a run
        batches.close()  # type: ignore[attr-defined]
        before, began = _tree()[0], time.perf_counter()
        batches = READERS[name][0](folder, args)
        count, first = len(next(batches)), time.perf_counter() - began
    started = time.perf_counter()
    seen, memory = 0, 0.0
    for batch in batches:
        seen += len(batch)
        if seen > args.images // 2 and not memory:
            workers = _tree()[1]
            memory = sum(row.memory_full_info().uss for row in workers) / max(1, len(workers)) / 1e6
    seconds = time.perf_counter() - started
    del batches  # waits for the workers of a DataLoader
    cpu = _tree()[0] - before
    queue.put((first, seen / seconds, (seen + count) / cpu, memory))


def compare_decoding(folder: Path, args: argparse.Namespace) -> None:
    """Measure and print how fast each library of READERS reads and decodes images, with worker processes.

    In each of `args.rounds` rounds, the libraries run one after another. So other work on the machine affects all of them
    equally. The best values of all rounds are printed.

    `folder`: folder with the test images of all libraries, from `write`. `args`: options of the benchmark.
    """
    context = multiprocessing.get_context("spawn")
    results: dict[str, list[tuple[float, ...]]] = {name: [] for name in args.only or READERS}
    there = {name for name in results if available(name)}
    for name in [name for _ in range(args.rounds) for name in results if name in there]:
        queue = context.SimpleQueue()
        process = context.Process(target=_measure, args=(name, folder, args, queue))
        process.start()
        process.join(120)
        if process.exitcode == 0:
            results[name].append(queue.get())
        process.kill()
    for name, rounds in results.items():
        if name not in there:
            print(f"{name:14} is not installed")
            continue
        if not rounds:
            print(f"{name:14} failed")
            continue
        first, rate, per_core, memory = (
            pick(row) for pick, row in zip((min, max, max, min), zip(*rounds, strict=True), strict=True)
        )
        print(
            f"{name:14} {rate:7.0f} images/s  {per_core:6.0f} images per second of processor time  "
            f"first batch {first:6.2f} s  {memory:5.0f} MB per worker",
            flush=True,
        )


def compare_raw(folder: Path, args: argparse.Namespace) -> None:
    """Measure and print how fast one process reads samples that need no decoding.

    This project reads them shuffled, webdataset in order.
    """
    import webdataset

    names = sorted(map(str, (folder / "latents").glob("*.tar")))
    data = ImageDataset(build_index(names, folder / "index"), [(64, 64)], "none")
    order = SampleOrder(data.index, [(64, 64)], seed=0)

    def shuffled() -> Iterator[Any]:
        return (data.read(order.lookup(position).sample_id) for position in range(args.images))

    def plain() -> Iterator[Any]:
        return iter(webdataset.WebDataset(names, shardshuffle=False))

    for name, start in (("raphael_dist, shuffled", shuffled), ("webdataset, in order", plain)):
        best = min(_seconds(start) for _ in range(args.rounds + 1))
        print(f"{name:24} {args.images / best:8.0f} samples/s of {LATENT_BYTES} bytes, one process")


def _seconds(start: Callable[[], Iterator[Any]]) -> float:
    began = time.perf_counter()
    for _ in start():
        pass
    return time.perf_counter() - began


def compare_resume(folder: Path, args: argparse.Namespace) -> None:
    """Print how long it takes to read the sample at nine tenths of the data: with the index, and by skipping samples."""
    import webdataset

    names, place = sorted(map(str, (folder / "tar").glob("*.tar"))), args.images * 9 // 10
    began = time.perf_counter()
    index = build_index(names, folder / "index")
    opened = time.perf_counter() - began
    began = time.perf_counter()
    data = ImageDataset(index, [tuple(args.bucket)], "none")
    data.read(SampleOrder(index, data.buckets, seed=0).lookup(place).sample_id)
    direct = time.perf_counter() - began
    began = time.perf_counter()
    next(itertools.islice(iter(webdataset.WebDataset(names, shardshuffle=False)), place, None))
    skipped = time.perf_counter() - began
    print(
        f"reading the sample at position {place}: {1e3 * direct:.2f} ms with the index (opened in {1e3 * opened:.1f} ms), "
        f"{1e3 * skipped:.0f} ms by skipping the samples before it undecoded, which is {skipped / direct:.0f} times as long"
    )


def run(args: argparse.Namespace) -> None:
    """Print the speed of each reader with decoding, the speed without decoding, and the time to resume at a sample."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder, args)
        compare_decoding(folder, args)
        compare_raw(folder, args)
        compare_resume(folder, args)
