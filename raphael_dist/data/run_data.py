"""The data of a run: encoders, training samples and validation samples."""

from dataclasses import dataclass
from typing import Any

import torch

from raphael_dist.config.resume_check import CLEANING
from raphael_dist.config.schema import Config
from raphael_dist.data.batches import BatchBuilder
from raphael_dist.data.captions import CLEANING_VERSION
from raphael_dist.data.features.batch_encoder import BatchEncoder, Encoders
from raphael_dist.data.features.encoders import ImageEncoder, TextEncoder
from raphael_dist.data.open_streams import open_encoders, open_stream
from raphael_dist.data.stream import TrainStream
from raphael_dist.model.device import is_gpu
from raphael_dist.runtime.ranks import Ranks
from raphael_dist.text import counted


@dataclass
class DataSource:
    """The opened data of a run: encoders, training samples and validation samples.

    `open_source` creates it.

    Attributes:
        encoders: Text encoder, image encoder and edge detector.
        training: Stream of training samples: returns the sample at any position of the endless order of training.
        held_out: Stream of validation samples; None if data.val_shards is empty.
    """

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
        """Return hashes that identify the training data and the encoders, by the setting they belong to ("image.vae", ...).

        Checkpoints store them. A run that resumes from a checkpoint must have the same hashes.
        """
        index = self.training.order.index
        return {
            "data.shards": self.training.order.fingerprint,
            "data.shards (captions)": index.text_digest,
            CLEANING: f"version {CLEANING_VERSION}",
            "text.encoder": self.text.fingerprint,
            "image.vae": self.image.fingerprint,
        }

    @property
    def replaced(self) -> int:
        """Number of training samples that this rank could not use and has replaced by others since the process started."""
        return self.training.replaced

    def describe(self) -> str:
        """Return a log line: the number of training images per epoch, and how many samples are left out for which reason."""
        order = self.training.order
        trained, short = order.samples_per_epoch, order.dropped_per_epoch
        left_out = [
            (order.index.num_samples - trained - short, "dropped by data.filters"),
            (short, f"that do not fill a run of {order.run_length} of one size"),
            (order.index.num_bad + len(self.training.bad_samples), "bad samples"),
        ]
        details = ", ".join(f"{count} {reason}" for count, reason in left_out if count)
        return counted(trained, "image") + (f" (left out: {details})" if details else "")

    def key(self, position: int) -> str:
        """Return the name of a training sample in its shard (tar file).

        `position`: number of the sample in the endless order of training, from 0.
        """
        return self.training.sample(position).key

    def builder(
        self, config: Config, num_blocks: int, device: torch.device, stream: TrainStream | None = None, **options: Any
    ) -> BatchBuilder:
        """Return a builder of batches.

        Args:
            config: Configuration of the run.
            num_blocks: Number of the model's transformer blocks. A batch contains noise for the gates of each block.
            device: Device of the model; batches for a GPU are put into pinned memory.
            stream: The stream that returns the samples: `training` (the default) or `held_out`.
            options: Further keyword arguments of `BatchBuilder`.
        """
        encoder = BatchEncoder(self.encoders, with_edges=config.edge.weight > 0)
        return BatchBuilder(config, stream or self.training, encoder, num_blocks, pin=is_gpu(device), **options)

    def close(self) -> None:
        """Stop the threads and processes that read or encode samples."""
        for stream in (self.training, self.held_out):
            if stream is not None:
                stream.close()


def open_source(config: Config, ranks: Ranks, device: torch.device) -> DataSource:
    """Open the encoders and the data that a configuration names.

    Collective: all ranks call it, and divide the work of indexing and encoding the data. `device`: the device on which this
    rank's encoders run. Raises UserError on all ranks if the encoders or the data cannot be used with the configuration.
    """
    encoders = open_encoders(config, device)
    training = open_stream(config, ranks, encoders, training=True)
    held_out = open_stream(config, ranks, encoders, training=False) if config.data.val_shards else None
    return DataSource(encoders, training, held_out)
