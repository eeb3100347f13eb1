"""Reads and decodes the samples of a rank in worker processes, and fetches shards (tar files) before they are needed."""

from collections.abc import Sequence

from raphael_dist.config.schema import Config
from raphael_dist.data.fetch.shard_prefetch import ShardPrefetcher
from raphael_dist.data.mixture import MixedOrder
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.shards.decode_sample import ImageDataset, Request
from raphael_dist.data.shards.decode_workers import DecodePool


class SampleReader:
    """Makes a data set decode samples in worker processes (data.workers), and fetches shards (tar files) ahead of time.

    This lasts from the creation of the reader until its method `close` or the end of a `with` block.
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
            position: Number of the batch's first sample in the endless order of training. The shards of the samples from
                this position on are fetched, too.
            requests: For each sample of the batch, the arguments of `ImageDataset.load` (sample id, number of the image
                size, whether to mirror). `load` must afterwards be called exactly once for each sample.
        """
        if self._shards is not None:
            self._shards.prefetch_from(position)
        if self._pool is not None:
            self._pool.prefetch(requests)

    def close(self) -> None:
        """Stop the worker processes and threads. Afterwards the data set decodes samples in the calling process."""
        self._dataset.set_decoder(None)
        if self._pool is not None:
            self._pool.close()
        if self._shards is not None:
            self._shards.close()

    def __enter__(self) -> "SampleReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
