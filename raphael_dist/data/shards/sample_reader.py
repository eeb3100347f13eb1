"""Reads and decodes the samples of a rank: in worker processes, with shards prefetched one window ahead."""

from collections.abc import Sequence
from types import TracebackType

from raphael_dist.config.schema import Config
from raphael_dist.data.fetch.shard_prefetch import ShardPrefetcher
from raphael_dist.data.mixture import MixedOrder
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.shards.decode_sample import ImageDataset, Request
from raphael_dist.data.shards.decode_workers import DecodePool


class SampleReader:
    """Decodes a data set's samples in `data.workers` processes and prefetches its shards, until it is closed."""

    def __init__(
        self, config: Config, dataset: ImageDataset, order: SampleOrder | MixedOrder | None = None, local_rank: int = 0
    ) -> None:
        """`order`: the order in which samples will be read; None: shard by shard, without prefetching shards."""
        self._dataset = dataset
        self._pool = DecodePool(dataset, config.data.workers) if config.data.workers else None
        self._shards = None if order is None else ShardPrefetcher(order, local_rank)
        dataset.set_decoder(None if self._pool is None else self._pool.load)

    def prefetch(self, position: int, requests: Sequence[Request]) -> None:
        """Start reading a batch whose first position is `position`.

        `ImageDataset.load` must then be called once for each of its requests.
        """
        if self._shards is not None:
            self._shards.prefetch_from(position)
        if self._pool is not None:
            self._pool.prefetch(requests)

    def close(self) -> None:
        """Stop workers and threads; the data set decodes in its own process from then on."""
        self._dataset.set_decoder(None)
        if self._pool is not None:
            self._pool.close()
        if self._shards is not None:
            self._shards.close()

    def __enter__(self) -> "SampleReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
