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
    """Lets a data set decode its samples in `data.workers` worker processes, and fetches its shards ahead of time.

    It does so from its creation until it is closed.
    """

    def __init__(
        self, config: Config, dataset: ImageDataset, order: SampleOrder | MixedOrder | None = None, local_rank: int = 0
    ) -> None:
        """Start the reader.

        Args:
            config: The configuration of the run.
            dataset: The data set, whose `load` decodes in the worker processes from now on.
            order: The order in which samples will be read. None: unknown; shards are not fetched ahead.
            local_rank: Number of the rank on its node.
        """
        self._dataset = dataset
        self._pool = DecodePool(dataset, config.data.workers) if config.data.workers else None
        self._shards = None if order is None else ShardPrefetcher(order, local_rank)
        dataset.set_decoder(None if self._pool is None else self._pool.load)

    def prefetch(self, position: int, requests: Sequence[Request]) -> None:
        """Start to read and decode a batch in the background.

        Args:
            position: Number of its first sample in the order of training; the shards from there on are fetched, too.
            requests: Arguments of `ImageDataset.load`, which must be called exactly once for each of them afterwards.
        """
        if self._shards is not None:
            self._shards.prefetch_from(position)
        if self._pool is not None:
            self._pool.prefetch(requests)

    def close(self) -> None:
        """Stop workers and threads. Afterwards the data set decodes samples in the calling process."""
        self._dataset.set_decoder(None)
        if self._pool is not None:
            self._pool.close()
        if self._shards is not None:
            self._shards.close()

    def __enter__(self) -> "SampleReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
