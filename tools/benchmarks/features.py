"""`tools/bench.py features`: time and bytes per sample of each way to provide features, and the error of rounding them.

Features are what the model reads of a sample: latents of its image and tokens of its caption.
"""

import argparse
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from raphael_dist.config.schema import Config, config_from_tree, load_config
from raphael_dist.data.batches import BatchBuilder
from raphael_dist.data.features.batch_encoder import BatchEncoder, Encoders
from raphael_dist.data.features.cache import FeatureCache
from raphael_dist.data.features.packing import pack_std, unpack_std
from raphael_dist.data.open_streams import edge_encoder, load_encoders, source_of
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.shards.shard_names import expand_shards
from raphael_dist.data.stream import TrainStream
from raphael_dist.data_prep.build_shards import Preparer
from raphael_dist.data_prep.inputs import parts_of

WAYS = ("online", "cached", "cached, text encoded ahead", "stored")
KINDS = ("reading", "decoding", "encoding")


@dataclass(frozen=True)
class FeatureRow:
    """The cost of one way to provide features (latents and text tokens): computed in the step, cached, or stored in shards.

    Attributes:
        way: one of WAYS, such as "online" (computed in the step).
        num_bytes: bytes per sample on disk.
        fill_s: seconds per sample to create the features beforehand.
        read_s: seconds per sample to build batches from them.
        parts: for each kind of work (reading, decoding, encoding), its share of `read_s` in seconds.
    """

    way: str
    num_bytes: float
    fill_s: float
    read_s: float
    parts: dict[str, float]


def bench_features(config: Config, shards: list[Path], encoders: Encoders, folder: Path, batches: int) -> list[FeatureRow]:
    """Measure each way to provide features (WAYS) on the samples of `shards`; return a row for each.

    `batches`: number of batches that one thread builds. `folder`: an empty folder for caches and shards.
    """
    return [_measure(way, config, shards, encoders, folder, batches) for way in WAYS]


def _measure(way: str, config: Config, shards: list[Path], encoders: Encoders, folder: Path, batches: int) -> FeatureRow:
    features, _, ahead = way.partition(",")
    data = {"features": features, "cache_dir": str(folder / way), "cached_text": "encoded" if ahead else "stored"}
    tree = config.model_dump(mode="json")
    config = config_from_tree({**tree, "data": {**tree["data"], **data}})
    began, before = time.perf_counter(), sum(path.stat().st_size for path in shards)
    if features == "stored":
        (folder / way).mkdir()
        preparer = Preparer(folder / way, "stored", None, config, encoders)
        for part in parts_of([str(path) for path in shards], 1000, 0.0, None):
            preparer.make(part)
        shards = sorted((folder / way).glob("*.tar"))
    index = build_index(shards, folder / way / "index")
    source = source_of(config, index, encoders, training=True)
    if isinstance(source, FeatureCache):
        source.build(source.missing())
    filled = time.perf_counter() - began if features != "online" else 0.0
    size = {"online": 0, "stored": sum(path.stat().st_size for path in shards) - before}.get(
        features, sum(path.stat().st_size for path in (folder / way).rglob("*.safetensors"))
    )
    order = SampleOrder(index, config.image.buckets, config.run.seed)
    stream = TrainStream(order, source, seed=0, caption_dropout=0.1, flip=config.data.flip)
    builder = BatchBuilder(config, stream, BatchEncoder(encoders, config.edge.weight > 0), num_blocks=16)
    each, parts = config.train.micro_batch_size, Counter[str]()
    builder.build([(position, 1.0) for position in range(each)])  # not timed: loads weights and opens files
    began = time.perf_counter()
    for number in range(1, batches + 1):
        parts.update(builder.build([(position, 1.0) for position in range(number * each, (number + 1) * each)]).seconds)
    took, count = time.perf_counter() - began, batches * each
    return FeatureRow(
        way, size / index.num_samples, filled / index.num_samples, took / count, {k: parts[k] / count for k in KINDS}
    )


def rounding(config: Config, shards: list[Path], encoders: Encoders, folder: Path) -> dict[str, float]:
    """Return the relative error (RMS) of the features in each storage format, by name of the format.

    The error is measured on up to 64 samples. `config` must have data.features=online. `folder`: for the index of `shards`.
    """
    index = build_index(shards, folder)
    source = source_of(config, index, encoders, training=True)
    features = [source.get(n, 0, lambda weights: 0, False) for n in range(min(64, index.num_samples))]
    mean, std = encoders.latents(torch.stack([feature.image for feature in features if feature.image is not None]))
    tokens = encoders.text.encode([feature.caption for feature in features]).tokens
    errors = {"std uint8": _error(unpack_std(pack_std(std)), std)} if not encoders.image.deterministic else {}
    for name, values in (("mean", mean), ("tokens", tokens)):
        for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
            errors[f"{name} {str(dtype).removeprefix('torch.')}"] = _error(values.to(dtype).float(), values)
    edges = [feature.edge for feature in features if feature.edge is not None]
    if edges:
        errors["edge float16"] = _error(torch.stack(edges).half().float(), torch.stack(edges))
    if not encoders.image.deterministic:
        errors["latents without their std"] = float(std.square().mean().sqrt() / mean.square().mean().sqrt())
    return errors


def _error(values: Tensor, exact: Tensor) -> float:
    return float((values - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to its parser `command`."""
    command.add_argument("--config", default="emoji-tiny", help="preset or YAML file of the run (default emoji-tiny)")
    command.add_argument("--batches", type=int, default=10, help="batches to build in each way (default 10)")
    command.add_argument("--threads", type=int, default=2, help="CPU threads of torch (default 2)")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the run, as for train.py")


def run(args: argparse.Namespace) -> None:
    """Print time and bytes of computing, caching and storing the features of data.shards, and the error of rounding them."""
    torch.set_num_threads(args.threads)
    config, device = load_config(args.config, args.overrides), torch.device("cpu")
    text, image = load_encoders(config, device, getattr(torch, config.train.dtype))
    encoders = Encoders(text, image, edge_encoder(config, device), device)
    shards = [Path(path) for path in expand_shards(config.data.shards)]
    with TemporaryDirectory() as folder:
        rows = bench_features(config, shards, encoders, Path(folder), args.batches)
        config = load_config(args.config, [*args.overrides, "data.features=online"])
        errors = rounding(config, shards, encoders, Path(folder))
    print(f"{'ms per sample':28} {'bytes':>8} {'to fill':>8} {'to read':>8}   " + "  ".join(f"{kind:>8}" for kind in KINDS))
    for row in rows:
        parts = "  ".join(f"{1e3 * row.parts[kind]:8.2f}" for kind in KINDS)
        print(f"{row.way:28} {row.num_bytes:8.0f} {1e3 * row.fill_s:8.1f} {1e3 * row.read_s:8.2f}   {parts}")
    for name, error in errors.items():
        print(f"{name:28} {error:.1e}")
