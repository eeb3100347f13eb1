"""Checks some samples of a run's data: edge maps without edges, and images that occur several times."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from raphael_dist.config.schema import Config
from raphael_dist.data.fetch.remote import is_remote
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.shards.decode_sample import ImageDataset
from raphael_dist.data.shards.shard_names import expand_shards
from raphael_dist.data_prep.inspect_data import buckets_of, find_duplicates, inspect
from raphael_dist.errors import UserError

COUNT, SHARDS = 256, 2
EDGE_LEVEL = 16  # of 255; a map without a brighter pixel is empty


@dataclass(frozen=True)
class DataSample:
    """Result of checking some samples of a run's data.

    Attributes:
        samples: number of checked samples.
        edges: number of samples with an edge map.
        empty_edges: number of samples whose edge map has no edges.
        duplicates: number of images that look like an image before them.
    """

    samples: int
    edges: int
    empty_edges: int
    duplicates: int


def sample_data(config: Config) -> DataSample:
    """Check 256 samples of a run's data for edge maps without edges and for images that occur several times.

    They are evenly distributed over the first two local shards of data.shards. Raises UserError if there are no local
    shards, or they cannot be read.
    """
    local = [pattern for pattern in config.data.shards if not is_remote(pattern)]
    if not local:
        shards = list(config.data.shards)
        raise UserError(f"data.shards={shards} has only remote addresses, and only local files are examined")
    names = expand_shards(local)[:SHARDS]
    with TemporaryDirectory() as folder:
        dataset = ImageDataset(build_index(names, Path(folder)), config.image.buckets, "auto")
        findings = inspect(dataset, buckets_of(dataset).tolist(), COUNT, COUNT)
    edges = [sample.edge for sample, _ in findings.sheet if sample.edge is not None]
    groups = find_duplicates(findings.thumbnails)
    empty = sum(bool(edge.max() < EDGE_LEVEL) for edge in edges)
    return DataSample(len(findings.thumbnails), len(edges), empty, sum(len(group) - 1 for group in groups))
