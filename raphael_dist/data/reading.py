"""How a rank reads what it decodes: in worker processes, with shards brought a window ahead."""

from collections.abc import Sequence
from types import TracebackType

from raphael_dist.config import Config
from raphael_dist.data.dataset import ImageDataset, Request
from raphael_dist.data.mixture import MixedOrder
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.shard_ahead import ShardAhead
from raphael_dist.data.workers import DecodePool


class Reading:
    """Has a data set's samples decoded by `data.workers` processes, and its shards brought ahead, until it is closed."""

    def __init__(
        self, config: Config, dataset: ImageDataset, order: SampleOrder | MixedOrder | None = None, local_rank: int = 0
    ) -> None:
        """`order`: in which samples will be read; None: shard by shard."""
        self._dataset = dataset
        self._pool = DecodePool(dataset, config.data.workers) if config.data.workers else None
        self._shards = None if order is None else ShardAhead(order, local_rank)
        dataset.use(self._pool)

    def ahead(self, position: int, requests: Sequence[Request]) -> None:
        """Begin a batch: `ImageDataset.load` is to be called once for each of its requests. `position`: its first."""
        if self._shards is not None:
            self._shards.at(position)
        self._dataset.ahead(requests)

    def close(self) -> None:
        """End workers and threads; the data set decodes by itself from then on."""
        self._dataset.use(None)
        if self._pool is not None:
            self._pool.close()
        if self._shards is not None:
            self._shards.close()

    def __enter__(self) -> "Reading":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
