"""The encoders of a run together, and what they make of the samples of a batch that are not encoded yet."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from raphael_dist.config_upscale import COLOURS
from raphael_dist.data.captions import CLEANING_VERSION
from raphael_dist.data.dataset import ImageDataset
from raphael_dist.data.encoders import ImageEncoder, TextEncoder, TextFeatures
from raphael_dist.data.hed import EdgeEncoder
from raphael_dist.data.packing import PACKING_VERSION, Text, pool_edges
from raphael_dist.data.stream import StreamSample
from raphael_dist.model.device import is_gpu
from raphael_dist.model.upscale import shrink

IMAGE_BATCH = 16
TEXT_BATCH = 64
_own = threading.local()


@dataclass
class Encoders:
    """What a run encodes with; `edges` is None where HED makes no edge maps, `upscale` the small pictures' factor, or 0."""

    text: TextEncoder
    image: ImageEncoder
    edges: EdgeEncoder | None
    device: torch.device
    upscale: int = 0

    def ready(self) -> None:
        """Load the weights of all, in the thread that calls. UserError: they cannot be read."""
        for encoder in (self.text, self.image, self.edges):
            if encoder is not None:
                encoder.ready()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let what is encoded in the block run on a stream of this thread's own on a GPU; at its end it is done."""
        if not is_gpu(self.device):
            yield
            return
        if not hasattr(_own, "stream"):  # one for good: memory that one stream frees is not another's to take
            _own.stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(_own.stream):
            yield
        _own.stream.synchronize()  # here, in the thread that encodes, so that the step's stream never waits for it

    def latents(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std, float32 [B, C, h, w] on the device, of images, uint8 [B, 3, H, W]."""
        parts = [self.image.encode(_signed(some.to(self.device))) for some in images.split(IMAGE_BATCH)]
        return torch.cat([mean for mean, _ in parts]), torch.cat([std for _, std in parts])

    def edge_maps(self, images: Tensor) -> Tensor:
        """Return edge maps at the latents' size, float32 [B, h, w] on the device, of images, uint8 [B, 3, H, W]."""
        assert self.edges is not None
        parts = [self.edges.encode(_signed(some.to(self.device))) for some in images.split(IMAGE_BATCH)]
        return pool_edges(torch.cat(parts), self.image.factor)

    def made_of(self, dataset: ImageDataset) -> dict[str, object]:
        """Return all that features depend on beside the sample, by the field of the configuration that decides it."""
        edges = dataset.edge if self.edges is None else f"{dataset.edge} {self.edges.fingerprint}"
        return self._made_small() | {
            "text.encoder": self.text.fingerprint,
            "image.encoder": self.image.fingerprint,
            "image.buckets": [list(bucket) for bucket in dataset.buckets],
            "data.edges": edges,
            "data.caption_from": [CLEANING_VERSION, dataset.captions.source],
            "data.caption_weights": [list(pair) for pair in dataset.captions.weights],
            "format": [PACKING_VERSION, dataset.max_pixels],
        }

    def _made_small(self) -> dict[str, object]:
        # Without small pictures nothing of them is named: features that were made before there were any stay good.
        return {"upscale.factor": self.upscale} if self.upscale else {}

    @cached_property
    def null(self) -> TextFeatures:
        """The features of the empty caption, B = 1, on the device."""
        return self.text.encode([""])


def _signed(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


@dataclass
class Encoded:
    """A batch's features: x0 float32 [B, C, h, w]; text float32 [B, Y, D]; mask bool [B, Y]; end int64 [B]; edge float32
    [B, h, w] or None; small uint8 [B, 3, Hs, Ws] or None. seconds: what it took to get there, by kind of work.
    """

    x0: Tensor
    text: Tensor
    mask: Tensor
    end: Tensor
    edge: Tensor | None
    seconds: dict[str, float]
    small: Tensor | None = None


class AheadEncoder:
    """Encodes what is raw in the samples of a batch, on the device, and leaves on the host what came encoded."""

    def __init__(self, encoders: Encoders, wants_edges: bool) -> None:
        self._encoders, self._wants_edges = encoders, wants_edges

    def encode(self, samples: Sequence[StreamSample]) -> Encoded:
        """Return the features of samples of one bucket. On a GPU this has a stream of its own, and is done on return."""
        began = time.monotonic()
        if any(s.image is not None or s.text is None for s in samples):
            with self._encoders.aside():
                encoded = self._encode(samples)
        else:
            encoded = self._encode(samples)
        encoded.seconds["encoding"] = time.monotonic() - began
        for sample in samples:
            for kind, seconds in sample.seconds.items():
                encoded.seconds[kind] = encoded.seconds.get(kind, 0.0) + seconds
        return encoded

    def zeros(self, count: int, shape: tuple[int, int, int]) -> Encoded:
        """Return what `encode` would of `count` samples whose latents have this shape [C, h, w], with nothing in it."""
        text = self._encoders.text
        tokens, ends = torch.zeros(count, text.max_tokens, text.width), torch.zeros(count, dtype=torch.int64)
        edge = torch.zeros(count, *shape[1:]) if self._wants_edges else None
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
        return Encoded(torch.zeros(count, *shape), tokens, mask, ends, edge, {}, self._no_small(count, shape[1:]))

    def _encode(self, samples: Sequence[StreamSample]) -> Encoded:
        raw = [sample.image for sample in samples if sample.image is not None]
        images = torch.stack(raw) if raw else None
        return Encoded(self._x0(samples, images), *self._text(samples), self._edges(samples), {}, self._small(samples))

    def _x0(self, samples: Sequence[StreamSample], images: Tensor | None) -> Tensor:
        rows: dict[int, Tensor] = {i: s.latents for i, s in enumerate(samples) if s.latents is not None}
        if images is not None:
            raw = [i for i, sample in enumerate(samples) if sample.image is not None]
            noise = torch.stack([samples[i].noise for i in raw]).to(self._encoders.device)
            mean, std = self._encoders.latents(images)
            rows |= dict(zip(raw, mean + std * noise, strict=True))
        return _stacked([rows[i] for i in range(len(samples))])

    def _text(self, samples: Sequence[StreamSample]) -> tuple[Tensor, Tensor, Tensor]:
        rows: dict[int, Text] = {i: s.text for i, s in enumerate(samples) if s.text is not None}
        captions = list(dict.fromkeys(s.caption for s in samples if s.text is None and s.caption))
        of = {"": self._encoders.null} if any(s.text is None and not s.caption for s in samples) else {}
        for first in range(0, len(captions), TEXT_BATCH):
            some = captions[first : first + TEXT_BATCH]
            f = self._encoders.text.encode(some)
            of |= {c: TextFeatures(f.tokens[i : i + 1], f.mask[i : i + 1], f.end[i : i + 1]) for i, c in enumerate(some)}
        for i, sample in enumerate(samples):
            if sample.text is None:
                features = of[sample.caption]
                rows[i] = features.tokens[0], features.mask[0], features.end[0]
        tokens, masks, ends = zip(*(rows[i] for i in range(len(samples))), strict=True)
        return _stacked(tokens), _stacked(masks), _stacked([torch.as_tensor(end) for end in ends])

    def _edges(self, samples: Sequence[StreamSample]) -> Tensor | None:
        if not self._wants_edges:
            return None
        rows = {i: s.edge for i, s in enumerate(samples) if s.edge is not None}
        missing = [i for i in range(len(samples)) if i not in rows]
        if missing:
            # Of the image as it lies in the shard: HED of a mirrored one is not quite the mirrored map.
            plain = [s.image.flip(-1) if s.flipped else s.image for s in (samples[i] for i in missing)]  # type: ignore[union-attr]
            maps = self._encoders.edge_maps(torch.stack(plain))  # type: ignore[arg-type]
            rows |= {i: one.flip(-1) if samples[i].flipped else one for i, one in zip(missing, maps, strict=True)}
        return _stacked([rows[i] for i in range(len(samples))])

    def _small(self, samples: Sequence[StreamSample]) -> Tensor | None:
        if not self._encoders.upscale:
            return None
        rows = {i: s.small for i, s in enumerate(samples) if s.small is not None}
        raw = [i for i in range(len(samples)) if i not in rows]
        if raw:
            images = torch.stack([samples[i].image for i in raw])  # type: ignore[misc]
            rows |= dict(zip(raw, shrink(images, self._encoders.upscale), strict=True))
        return torch.stack([rows[i] for i in range(len(samples))])

    def _no_small(self, count: int, latent_hw: tuple[int, int]) -> Tensor | None:
        if not self._encoders.upscale:
            return None
        sides = (side * self._encoders.image.factor // self._encoders.upscale for side in latent_hw)
        return torch.zeros(count, COLOURS, *sides, dtype=torch.uint8)


class NotEncodedError(Exception):
    """A sample does not come encoded."""


def raw(sample: StreamSample) -> bool:
    """Return whether a sample needs an encoder for more than the empty caption."""
    return sample.image is not None or (sample.text is None and bool(sample.caption))


class HostEncoder(AheadEncoder):
    """For processes without a device: it puts together samples that come encoded. NotEncodedError: one does not."""

    def __init__(self, of: AheadEncoder, null: TextFeatures | None) -> None:
        """`null`: the features of the empty caption; None: they are encoded here and now, where `of` encodes."""
        null = of._encoders.null if null is None else null
        super().__init__(replace(of._encoders, device=torch.device("cpu")), of._wants_edges)
        vars(self._encoders)["null"] = TextFeatures(null.tokens.cpu().float(), null.mask.cpu(), null.end.cpu())

    def _encode(self, samples: Sequence[StreamSample]) -> Encoded:
        if any(map(raw, samples)):
            raise NotEncodedError
        return super()._encode(samples)


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    """Stack rows that may lie on the host and on the device: there, if one does."""
    device = next((row.device for row in rows if row.device.type != "cpu"), rows[0].device)
    return torch.stack([row.to(device) for row in rows])
