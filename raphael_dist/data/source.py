"""What a run trains on: the encoders, the training samples and those that are held out."""

from dataclasses import dataclass

import torch

from raphael_dist.config import Config
from raphael_dist.data.batches import BatchBuilder
from raphael_dist.data.encoders import ImageEncoder, TextEncoder
from raphael_dist.data.open import open_encoders, open_stream
from raphael_dist.data.stream import TrainStream
from raphael_dist.model.device import is_gpu
from raphael_dist.parallel.ranks import Ranks


@dataclass
class DataSource:
    """Opened data; `build` of the trainer takes the function that opens it, so that tests may give another."""

    text: TextEncoder
    image: ImageEncoder
    training: TrainStream
    held_out: TrainStream | None

    def fingerprints(self) -> dict[str, str]:
        """Return what a checkpoint notes of the data, by the fields that name them: a run does not go on with others."""
        index = self.training.order.index
        return {
            "data.shards": self.training.order.fingerprint,
            "data.shards (captions)": index.text_digest,
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
        bad = index.num_bad + len(self.training.cache.bad)
        return f"{index.num_samples} images" + (f" ({bad} bad samples left out)" if bad else "")

    def key(self, position: int) -> str:
        """Return the name of the sample at a position."""
        return self.training.sample(position).key

    def builder(self, config: Config, num_blocks: int, device: torch.device) -> BatchBuilder:
        """Return what makes training batches for a model with so many transformer blocks."""
        return BatchBuilder(config, self.training, num_blocks, pin=is_gpu(device))


def open_source(config: Config, ranks: Ranks, device: torch.device) -> DataSource:
    """Open everything the configuration names, with the work divided over the ranks. Collective.

    Raises UserError on all ranks as `open_encoders` and `open_stream` do.
    """
    text, image = open_encoders(config, device)
    training = open_stream(config, ranks, text, image, training=True)
    held_out = None
    if config.data.val_shards:
        held_out = open_stream(config, ranks, text, image, training=False)
    return DataSource(text, image, training, held_out)
