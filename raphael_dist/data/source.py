"""What a run trains on: the encoders, the training samples and those that are held out."""

from dataclasses import dataclass
from typing import Any

import torch

from raphael_dist.config import Config
from raphael_dist.data.batches import BatchBuilder
from raphael_dist.data.captions import CLEANING_VERSION
from raphael_dist.data.encoders import ImageEncoder, TextEncoder
from raphael_dist.data.encoding import AheadEncoder, Encoders
from raphael_dist.data.open import open_encoders, open_stream
from raphael_dist.data.stream import TrainStream
from raphael_dist.identity import CLEANING
from raphael_dist.model.device import is_gpu
from raphael_dist.parallel.ranks import Ranks


@dataclass
class DataSource:
    """Opened data; `build` of the trainer takes the function that opens it, so that tests may give another."""

    encoders: Encoders
    training: TrainStream
    held_out: TrainStream | None

    @property
    def text(self) -> TextEncoder:
        return self.encoders.text

    @property
    def image(self) -> ImageEncoder:
        return self.encoders.image

    def fingerprints(self) -> dict[str, str]:
        """Return what a checkpoint notes of the data, by the fields that name them: a run does not go on with others."""
        index = self.training.order.index
        return {
            "data.shards": self.training.order.fingerprint,
            "data.shards (captions)": index.text_digest,
            CLEANING: f"version {CLEANING_VERSION}",
            "text.encoder": self.text.fingerprint,
            "image.encoder": self.image.fingerprint,
        }

    @property
    def replaced(self) -> int:
        """How many bad samples were replaced since the start, on this rank."""
        return self.training.replaced

    def describe(self) -> str:
        """Return the data set's size in words."""
        index = self.training.order.index
        bad = index.num_bad + len(self.training.found_bad)
        return f"{index.num_samples} images" + (f" ({bad} bad samples left out)" if bad else "")

    def key(self, position: int) -> str:
        """Return the name of the sample at a position."""
        return self.training.sample(position).key

    def builder(self, config: Config, num_blocks: int, device: torch.device) -> BatchBuilder:
        """Return what makes training batches for a model with so many transformer blocks."""
        return self.batches_of(self.training, config, num_blocks, device)

    def batches_of(
        self, stream: TrainStream, config: Config, num_blocks: int, device: torch.device, **options: Any
    ) -> BatchBuilder:
        """Return what makes batches of a stream, with options of `BatchBuilder`."""
        ahead = AheadEncoder(self.encoders, wants_edges=config.edge.weight > 0)
        return BatchBuilder(config, stream, ahead, num_blocks, pin=is_gpu(device), **options)

    def close(self) -> None:
        """End what the streams do beside training."""
        for stream in (self.training, self.held_out):
            if stream is not None:
                stream.close()


def open_source(config: Config, ranks: Ranks, device: torch.device) -> DataSource:
    """Open everything the configuration names, with the work divided over the ranks. Collective.

    Raises UserError on all ranks as `open_encoders` and `open_stream` do.
    """
    encoders = open_encoders(config, device)
    training = open_stream(config, ranks, encoders, training=True)
    held_out = None
    if config.data.val_shards:
        held_out = open_stream(config, ranks, encoders, training=False)
    return DataSource(encoders, training, held_out)
