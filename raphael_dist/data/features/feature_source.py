"""The three sources from which training gets a sample's features: the encoded image (latents), caption and edge map.

- online: images and captions are read raw, and encoded before each step (`batch_encoder.py`).
- cached: a file for each shard contains the features (`cache.py`). Without this file, a shard is treated as in online.
- stored: the shard itself contains the features, as a file KEY.features in each sample (tools/prepare_data.py --features).

All three give the same numbers, up to the rounding in `packing.py`.
"""

import time

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from raphael_dist.data.buckets import factor_errors
from raphael_dist.data.features.encoders import ImageEncoder
from raphael_dist.data.features.packing import Pick, SampleFeatures, check_seal, pool_edges, unpack
from raphael_dist.data.features.run_encoders import TextFeatures
from raphael_dist.data.shards.dataset_index import BadSample, BadSampleError
from raphael_dist.data.shards.decode_sample import ImageDataset
from raphael_dist.data.shards.tar_scan import FEATURES_EXT
from raphael_dist.errors import UserError, lacks_memory
from raphael_dist.text import parse_json, reason_unreadable


class FeatureSource:
    """Source of the samples for training. This base class implements data.features=online; its `get` encodes nothing.

    The features of a sample are its image, one of its captions and its edge map. Subclasses return an encoded image and
    caption. `BatchEncoder` later encodes what is still raw. Threads and forked processes may share a source.

    Attributes:
        dataset: Loads and decodes the samples.
        index: A table of all samples of the shards (tar files).
        buckets: (height, width) of each image size (bucket) in pixels.
        latent_factor: Image height divided by latent height (and width by width), such as 8.
        latent_channels: Number of channels of the latents.
        decodes_images: Whether `get` always decodes an image file, because no encoded images are stored.
    """

    decodes_images = True

    def __init__(self, dataset: ImageDataset, image: ImageEncoder) -> None:
        """Create the source. `dataset`: loads and decodes the samples. `image`: the image encoder of the run.

        Raises UserError if an image size is not a multiple of `image.factor` (image size / latent size).
        """
        if errors := factor_errors(dataset.buckets, image.factor):
            raise UserError(*errors)
        self.dataset, self.index, self.buckets = dataset, dataset.index, dataset.buckets
        self.latent_factor, self.latent_channels = image.factor, image.channels

    @property
    def known_bad(self) -> dict[int, BadSample]:
        """The samples that are known to be unusable before they are read, with the reason, by sample id."""
        return {}

    @property
    def null_text(self) -> TextFeatures | None:
        """The encoded empty caption (batch of one), if it is stored; None: it must be encoded."""
        return None

    def close(self) -> None:
        """Stop the threads of this source, if it has any."""

    def get(self, sample_id: int, bucket: int, pick: Pick, flip: bool) -> SampleFeatures:
        """Return a sample with one of its captions. Image and caption are encoded if the source stores them so, else raw.

        Args:
            sample_id: Number of the sample, counted over all shards.
            bucket: Index in `buckets` of the image size of the sample.
            pick: Function that draws the index of a caption, given the weights of the sample's captions.
            flip: Return the mirrored image.

        Raises:
            BadSampleError: The sample cannot be used.
            UserError: The stored features of the sample cannot be used with the settings of this run.
        """
        sample = self.dataset.load(sample_id, bucket, flip)
        began = time.monotonic()
        edge = None if sample.edge is None else pool_edges(torch.from_numpy(sample.edge)[None], self.latent_factor)[0]
        seconds = {**sample.seconds, "decoding": sample.seconds["decoding"] + time.monotonic() - began}
        caption = sample.captions[pick(sample.weights)]
        return SampleFeatures(image=torch.from_numpy(sample.image), caption=caption, edge=edge, seconds=seconds)


class StoredFeatures(FeatureSource):
    """Source of samples for data.features=stored: reads each encoded sample from the file KEY.features in its shard."""

    decodes_images = False

    def __init__(self, dataset: ImageDataset, image: ImageEncoder, provenance: dict[str, object]) -> None:
        """Create the source.

        Args:
            dataset: Reads the files of the samples.
            image: The image encoder of the run.
            provenance: Settings with which the samples must have been encoded (`Encoders.provenance`); `get` checks them.

        Raises:
            UserError: An image size is not a multiple of `image.factor` (image size / latent size).
        """
        super().__init__(dataset, image)
        # Without the edge loss any edge maps are accepted: they are not used.
        self._provenance = {
            name: value for name, value in provenance.items() if name != "data.edge_maps" or dataset.edge != "none"
        }

    def get(self, sample_id: int, bucket: int, pick: Pick, flip: bool) -> SampleFeatures:
        began = time.monotonic()
        members = self.dataset.read(sample_id, [FEATURES_EXT])
        shard = self.index.shard(self.index.locate(sample_id)[0]).name
        if FEATURES_EXT not in members:
            raise UserError(
                f"data.features=stored requires encoded features in every sample, but sample "
                f"{self.index.key(sample_id)!r} of {shard} has none. Add them with tools/prepare_data.py --features, or set "
                "data.features=online."
            )
        try:
            features = self._unpack(members[FEATURES_EXT], pick, flip, shard)
        except UserError:
            raise
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            if lacks_memory(error):
                raise
            reason = f"its features cannot be read ({reason_unreadable(error)})"
            raise BadSampleError(self.index.bad_sample(sample_id, reason)) from error
        features.seconds = {"reading": time.monotonic() - began}
        return features

    def _unpack(self, data: bytes, pick: Pick, flip: bool, shard: str) -> SampleFeatures:
        tensors = load(data)
        check_seal(tensors)
        stored = parse_json(bytes(tensors.pop("provenance").numpy()).decode())
        wrong = [name for name, value in self._provenance.items() if stored.get(name) != value]
        if wrong:
            raise UserError(
                f"data.features=stored requires features that were made with this run's settings, but those in {shard} "
                f"were made with different settings: {', '.join(wrong)}. Restore these settings, prepare the shards again, "
                "or set data.features=online."
            )
        if flip and "mean_flip" not in tensors:
            raise UserError(
                f"data.flip=true requires features of mirrored images, but {shard} has none. Prepare the shards again with "
                "data.flip=true, or set data.flip=false."
            )
        return unpack(tensors, pick, flip)
