"""Builds micro-batches in processes of their own, for features that come encoded: one thread of a rank reads and draws some
800 samples a second while the rank's own Python runs, and a GPU may train a small model faster.

torch's DataLoader has the processes. They are forks of the rank, touch no device, and leave signals to it.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from raphael_dist.data.batches import BatchBuilder
from raphael_dist.data.cache import FeatureCache
from raphael_dist.data.encoding import HostEncoder, NotEncodedError, raw
from raphael_dist.data.features import OnlineFeatures
from raphael_dist.data.prefetch import Prefetcher
from raphael_dist.data.workers import leave_signals
from raphael_dist.errors import UserError
from raphael_dist.model.batch import Batch

Slots = Sequence[tuple[int, float]]
_LOOKED_AT = 4  # samples, one of which has a caption that was not dropped


class BatchesAhead(Prefetcher[Any, Batch]):
    """As `Prefetcher` over `builder.build`, with the batches built by `workers` processes; 0: by a thread of the rank.

    A batch with a sample that is not encoded is built by that thread as well.
    """

    def __init__(self, builder: BatchBuilder, slots: Iterable[Slots], depth: int, workers: int) -> None:
        self._builder, self._loader = builder, None
        if not workers or not _encoded(builder):
            super().__init__(builder.build, slots, depth)
            return
        loader: DataLoader[Any] = DataLoader(
            _Build(builder),  # type: ignore[arg-type]  # a data set is what has an item for each index
            batch_size=None,
            sampler=slots,
            num_workers=workers,
            prefetch_factor=max(1, -(-depth // workers)),
            worker_init_fn=leave_signals,
            multiprocessing_context="fork",
        )
        self._loader = iter(loader)
        super().__init__(self._finish, self._loader, depth)

    def _finish(self, built: "_Built") -> Batch:
        self._builder.stream.replaced += built.replaced
        if built.error is not None:
            raise UserError(built.error)
        return self._builder.build(built.slots) if built.batch is None else self._builder.packed(built.batch)

    def close(self) -> None:
        super().close()
        loader, self._loader = self._loader, None
        if loader is not None:
            loader._shutdown_workers()  # type: ignore[attr-defined]  # else whenever it is collected


@dataclass
class _Built:
    """batch: None where it has a sample that is not encoded, or could not be built; replaced: bad samples in it."""

    slots: Slots
    batch: Batch | None = None
    replaced: int = 0
    error: str | None = None


class _Build:
    """What a worker has: the builder, with what a device is needed for left out."""

    def __init__(self, builder: BatchBuilder) -> None:
        self._builder = copy.copy(builder)
        self._builder.pin = False
        self._builder.encoder = HostEncoder(builder.encoder, builder.stream.source.null_text)

    def __getitem__(self, slots: Slots) -> _Built:
        stream = self._builder.stream
        before = stream.replaced
        try:
            batch = self._builder.build(slots)
        except NotEncodedError:
            stream.replaced = before  # they are counted where it is built
            return _Built(slots)
        except UserError as error:
            return _Built(slots, error=str(error))
        return _Built(slots, batch, stream.replaced - before)


def _encoded(builder: BatchBuilder) -> bool:
    """Return whether samples come encoded, and nothing is being encoded by another thread, which a fork would not have."""
    stream, source = builder.stream, builder.stream.source
    if type(source) is OnlineFeatures or (isinstance(source, FeatureCache) and source.filling):
        return False
    return not any(raw(stream.sample(position)) for position in range(_LOOKED_AT))
