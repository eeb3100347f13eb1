"""The encoders of a run (text encoder, VAE, edge detector), and the encoding of a batch of samples with them."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from raphael_dist.config.upscale import COLOURS
from raphael_dist.data.captions import CLEANING_VERSION
from raphael_dist.data.features.encoders import ImageEncoder, TextEncoder
from raphael_dist.data.features.hed import EdgeEncoder
from raphael_dist.data.features.packing import PACKING_VERSION, Text, pool_edges
from raphael_dist.data.features.run_encoders import TextFeatures
from raphael_dist.data.shards.decode_sample import ImageDataset
from raphael_dist.data.stream import StreamSample
from raphael_dist.model.device import is_gpu
from raphael_dist.model.super_resolution import downscale

T = TypeVar("T")
IMAGE_BATCH = 16
TEXT_BATCH = 64
_thread = threading.local()


@dataclass
class Encoders:
    """The encoders of a run.

    Attributes:
        text: The text encoder.
        image: The image encoder (VAE).
        edges: The edge detector HED; None if the run does not compute edge maps.
        device: Device on which the encoders run.
        upscale: Factor per side by which the model enlarges small images (super-resolution); 0: no super-resolution.
        null: The encoded empty caption (batch of one), on the device; None until `null_text` is called.
    """

    text: TextEncoder
    image: ImageEncoder
    edges: EdgeEncoder | None
    device: torch.device
    upscale: int = 0
    null: TextFeatures | None = None

    def load_weights(self) -> None:
        """Load the weights of all encoders now, in the calling thread. Raises UserError if they cannot be read."""
        for encoder in (self.text, self.image, self.edges):
            if encoder is not None:
                encoder.load_weights()

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """Return a context manager that runs its block on a separate CUDA stream, one per thread. Without a GPU: no effect.

        The training stream does not wait for the block. At the end of the block, the calling thread waits for the separate
        stream.
        """
        if not is_gpu(self.device):
            yield
            return
        if not hasattr(_thread, "stream"):  # for all calls: a stream cannot reuse memory that another one has freed
            _thread.stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(_thread.stream):
            yield
        _thread.stream.synchronize()  # in the encoding thread, so that the training stream never waits for it

    def latents(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mean, standard deviation) of the latents of images uint8 [B, 3, H, W]; each float32 [B, C, h, w].

        Both are on the encoders' device.
        """
        parts = [self.image.encode(_signed(part.to(self.device))) for part in images.split(IMAGE_BATCH)]
        return torch.cat([mean for mean, _ in parts]), torch.cat([std for _, std in parts])

    def edge_maps(self, images: Tensor) -> Tensor:
        """Return the edge maps of images uint8 [B, 3, H, W], reduced to the latents' size: float32 [B, h, w] in 0..1.

        They are computed with HED, and are on the encoders' device.
        """
        assert self.edges is not None
        parts = [self.edges.encode(_signed(part.to(self.device))) for part in images.split(IMAGE_BATCH)]
        return pool_edges(torch.cat(parts), self.image.factor)

    def provenance(self, dataset: ImageDataset) -> dict[str, object]:
        """Return everything on which the encoded samples of `dataset` depend: a JSON value for each setting's name.

        For a setting that selects an encoder, such as "image.vae", the value contains a hash of the encoder's files. Stored
        features (encoded samples) are only used if they were made with the same values.
        """
        edges = dataset.edge if self.edges is None else f"{dataset.edge} {self.edges.fingerprint}"
        return {
            "upscale.factor": self.upscale,
            "text.encoder": self.text.fingerprint,
            "image.vae": self.image.fingerprint,
            "image.buckets": [list(bucket) for bucket in dataset.buckets],
            "data.edge_maps": edges,
            "data.caption_from": [CLEANING_VERSION, dataset.captions.source],
            "data.caption_weights": [list(pair) for pair in dataset.captions.weights],
            "format": [PACKING_VERSION, dataset.max_pixels],
        }

    def null_text(self) -> TextFeatures:
        """Return the encoded empty caption (batch of one), on the device. It is encoded in the first call and then kept."""
        if self.null is None:
            self.null = self.text.encode([""])
        return self.null


def _signed(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


@dataclass
class Encoded:
    """The encoded images and captions of a batch.

    B samples with latents [C, h, w] and captions of Y tokens of D numbers each.

    Attributes:
        x0: Latents, float32 [B, C, h, w].
        text: Tokens of the captions, float32 [B, Y, D].
        mask: True at tokens that the text encoder attends to, False at padding, bool [B, Y].
        end: Index of the end-of-text token of each caption, int64 [B].
        edge: Edge maps, float32 [B, h, w], or None.
        seconds: Seconds spent, by kind of work ("reading", "decoding", "encoding").
        small: The downscaled images for super-resolution, uint8 [B, 3, Hs, Ws], or None.
    """

    x0: Tensor
    text: Tensor
    mask: Tensor
    end: Tensor
    edge: Tensor | None
    seconds: dict[str, float]
    small: Tensor | None = None


class BatchEncoder:
    """Encodes those images and captions of a batch that are not encoded yet, on the device of the encoders.

    If all samples of a batch are already encoded, the result is in host memory. `with_edges`: also return edge maps.
    """

    def __init__(self, encoders: Encoders, with_edges: bool) -> None:
        self._encoders, self._with_edges = encoders, with_edges

    def encode(self, samples: Sequence[StreamSample]) -> Encoded:
        """Return the encoded samples as one batch; all must have one image size.

        On a GPU, the samples are encoded on a separate CUDA stream. The method returns when this stream has finished.
        """
        began = time.monotonic()
        uses_device = any(s.image is not None or s.text is None for s in samples)
        with self._encoders.side_stream() if uses_device else nullcontext():
            encoded = self._encode(samples)
        encoded.seconds["encoding"] = time.monotonic() - began
        for sample in samples:
            for kind, seconds in sample.seconds.items():
                encoded.seconds[kind] = encoded.seconds.get(kind, 0.0) + seconds
        return encoded

    def zeros(self, count: int, shape: tuple[int, int, int]) -> Encoded:
        """Return zeros with the shapes of an encoded batch of `count` samples. `shape`: [C, h, w] of a sample's latents."""
        text, upscale = self._encoders.text, self._encoders.upscale
        tokens, ends = torch.zeros(count, text.max_tokens, text.width), torch.zeros(count, dtype=torch.int64)
        edge = torch.zeros(count, *shape[1:]) if self._with_edges else None
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
        sides = [side * self._encoders.image.factor // upscale for side in shape[1:]] if upscale else []
        small = torch.zeros(count, COLOURS, *sides, dtype=torch.uint8) if upscale else None
        return Encoded(torch.zeros(count, *shape), tokens, mask, ends, edge, {}, small)

    def _encode(self, samples: Sequence[StreamSample]) -> Encoded:
        x0 = fill_rows([sample.latents for sample in samples], samples, self._draw_latents)
        edge = fill_rows([sample.edge for sample in samples], samples, self._edge_maps) if self._with_edges else None
        has_small = self._encoders.upscale > 0
        small = fill_rows([sample.small for sample in samples], samples, self._downscaled) if has_small else None
        return Encoded(x0, *self._text(samples), edge, {}, small)

    def _draw_latents(self, samples: Sequence[StreamSample]) -> Tensor:
        mean, std = self._encoders.latents(_images_of(samples))
        return mean + std * torch.stack([sample.noise for sample in samples]).to(self._encoders.device)

    def _edge_maps(self, samples: Sequence[StreamSample]) -> list[Tensor]:
        # From the unmirrored image: HED of a mirrored image differs slightly from the mirrored map.
        plain = [image.flip(-1) if s.flipped else image for s, image in zip(samples, _images_of(samples), strict=True)]
        maps = self._encoders.edge_maps(torch.stack(plain))
        return [edge.flip(-1) if sample.flipped else edge for sample, edge in zip(samples, maps, strict=True)]

    def _downscaled(self, samples: Sequence[StreamSample]) -> Tensor:
        return downscale(_images_of(samples), self._encoders.upscale)

    def _text(self, samples: Sequence[StreamSample]) -> tuple[Tensor, Tensor, Tensor]:
        captions = list(dict.fromkeys(s.caption for s in samples if s.text is None and s.caption))
        encoded: dict[str, Text] = {}
        if any(s.text is None and not s.caption for s in samples):
            null = self._encoders.null_text()
            encoded[""] = null.tokens[0], null.mask[0], null.end[0]
        for first in range(0, len(captions), TEXT_BATCH):
            part = captions[first : first + TEXT_BATCH]
            features = self._encoders.text.encode(part)
            self._encoders.text.counter.warn()
            encoded |= dict(zip(part, zip(features.tokens, features.mask, features.end, strict=True), strict=True))
        texts = [encoded[sample.caption] if sample.text is None else sample.text for sample in samples]
        tokens, masks, ends = zip(*texts, strict=True)
        return _stack(tokens), _stack(masks), _stack([torch.as_tensor(end) for end in ends])


class NotEncodedError(Exception):
    """Raised in a process without encoders if a sample of a batch is not encoded yet, so that the batch cannot be built."""


def needs_encoding(sample: StreamSample) -> bool:
    """Return whether the image or the caption of a sample must still be encoded.

    An empty caption counts as encoded, because the encoders encode it only once and keep the result.
    """
    return sample.image is not None or (sample.text is None and bool(sample.caption))


class HostEncoder(BatchEncoder):
    """A `BatchEncoder` for processes without a device: it only stacks samples that are already encoded.

    Raises:
        NotEncodedError: From `encode`, if a sample is not encoded yet.
    """

    def __init__(self, encoder: BatchEncoder, null: TextFeatures | None) -> None:
        """Create a host encoder with the shapes and settings of `encoder`.

        Args:
            encoder: The `BatchEncoder` of the rank, which has a device.
            null: The encoded empty caption (batch of one). None: `encoder` computes it now.
        """
        null = encoder._encoders.null_text() if null is None else null
        null = TextFeatures(null.tokens.cpu().float(), null.mask.cpu(), null.end.cpu())
        super().__init__(replace(encoder._encoders, device=torch.device("cpu"), null=null), encoder._with_edges)

    def _encode(self, samples: Sequence[StreamSample]) -> Encoded:
        if any(map(needs_encoding, samples)):
            raise NotEncodedError
        return super()._encode(samples)


def _images_of(samples: Sequence[StreamSample]) -> Tensor:
    return torch.stack([sample.image for sample in samples if sample.image is not None])


def fill_rows(rows: Sequence[Tensor | None], inputs: Sequence[T], compute: Callable[[list[T]], Iterable[Tensor]]) -> Tensor:
    """Stack the rows of a batch, a tensor for each sample. Rows that are None are computed first.

    `inputs`: for each row, the value from which it can be computed. `compute`: returns the missing rows; its argument is the
    list of their inputs.
    """
    missing = [value for row, value in zip(rows, inputs, strict=True) if row is None]
    computed = iter(compute(missing) if missing else ())
    return _stack([next(computed) if row is None else row for row in rows])


def _stack(rows: Sequence[Tensor]) -> Tensor:
    """Stack tensors that are in host memory or on the device. The result is on the device if at least one tensor is."""
    device = next((row.device for row in rows if row.device.type != "cpu"), rows[0].device)
    return torch.stack([row.to(device) for row in rows])
