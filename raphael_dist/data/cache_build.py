"""Computes what is cached of one shard: latents, encoded captions and edge maps, as the tensors of one file.

Of n samples with U distinct captions, n_b of them good and in bucket b:

| tensor | type and shape | holds |
|---|---|---|
| bucket | int16 [n] | the bucket of each sample; -1: it is bad |
| row | int32 [n] | its row in the tensors of that bucket |
| mean.b, std.b | float16 [n_b, C, h, w] | its latents' distribution; no std where the encoder is deterministic |
| mean_flip.b, std_flip.b | the same | that of the mirrored image, with data.flip |
| edge.b | uint8 [n_b, H, W] | its edge map |
| caption_offsets | int64 [n + 1] | where its captions begin in caption_rows, and end |
| caption_rows | int64 [captions] | the row of each caption in the next three |
| tokens, mask, end | float16 [U, Y, D], bool [U, Y], int64 [U] | encoded captions |
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from raphael_dist.data.dataset import BadSampleError, DecodedSample, ImageDataset
from raphael_dist.data.encoders import ImageEncoder, TextEncoder, TextFeatures
from raphael_dist.data.prefetch import Prefetcher
from raphael_dist.errors import UserError
from raphael_dist.parallel.long_work import Tell, quiet

IMAGE_BATCH = 16
TEXT_BATCH = 64


@dataclass
class _Rows:
    """What has been gathered of a shard so far; `stacks` holds batches of the tensors above that have a row per image."""

    bucket: list[int]
    row: list[int]
    captions: list[list[str]]
    stacks: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    bad: list[tuple[int, str]] = field(default_factory=list)


class ShardBuilder:
    """Computes the tensors of a shard (table above) with both encoders."""

    def __init__(self, dataset: ImageDataset, text: TextEncoder, image: ImageEncoder, flip: bool) -> None:
        self.dataset, self.text, self.image, self.flip = dataset, text, image, flip

    def build(
        self, first_id: int, buckets: Sequence[int], tell: Tell = quiet
    ) -> tuple[dict[str, Tensor], list[tuple[int, str]]]:
        """Return a shard's tensors, and (number in the shard, reason) of its bad samples.

        `first_id` is the shard's first sample id, `buckets` has the bucket of each of its samples; `tell` is told of every
        batch. UserError: encoded captions that float16 cannot hold.
        """
        count = len(buckets)
        rows = _Rows([-1] * count, [0] * count, [[] for _ in range(count)])
        pending: dict[int, list[tuple[int, DecodedSample]]] = defaultdict(list)

        def load(number: int) -> DecodedSample | BadSampleError:
            try:
                return self.dataset.load(first_id + number, buckets[number])
            except BadSampleError as error:
                return error

        with Prefetcher(load, range(count), depth=2 * IMAGE_BATCH, workers=4) as samples:
            for number, sample in enumerate(samples):
                if isinstance(sample, BadSampleError):
                    rows.bad.append((number, sample.reason))
                    continue
                batch = pending[buckets[number]]
                batch.append((number, sample))
                if len(batch) == IMAGE_BATCH:
                    tell(f"image {number + 1} of {count}")
                    self._add_images(rows, buckets[number], batch)
                    batch.clear()
        for bucket, batch in pending.items():
            self._add_images(rows, bucket, batch)
        tensors = {name: torch.cat(parts) for name, parts in rows.stacks.items()}
        return {**tensors, **self._tables(rows, tell)}, sorted(rows.bad)

    def _add_images(self, rows: _Rows, bucket: int, batch: list[tuple[int, DecodedSample]]) -> None:
        """Encode one batch of a bucket and add its samples, those with latents beyond float16 as bad ones."""
        if not batch:
            return
        images = torch.from_numpy(np.stack([sample.image for _, sample in batch])).float() / 127.5 - 1
        stacks = self._latents(images, "")
        if self.flip:
            stacks |= self._latents(images.flip(-1), "_flip")
        if self.dataset.has_edges:
            stacks["edge"] = torch.from_numpy(np.stack([sample.edge for _, sample in batch if sample.edge is not None]))
        finite = torch.stack([stack.float().flatten(1).isfinite().all(dim=1) for stack in stacks.values()]).all(dim=0)
        next_row = sum(len(part) for part in rows.stacks[f"mean.{bucket}"])
        for (number, sample), is_good in zip(batch, finite.tolist(), strict=True):
            if not is_good:
                rows.bad.append((number, "latents are not finite in float16"))
                continue
            rows.bucket[number], rows.row[number], rows.captions[number] = bucket, next_row, sample.captions
            next_row += 1
        for name, stack in stacks.items():
            rows.stacks[f"{name}.{bucket}"].append(stack[finite])

    def _latents(self, images: Tensor, suffix: str) -> dict[str, Tensor]:
        mean, std = self.image.encode(images)
        latents = {f"mean{suffix}": mean.half().cpu()}
        if not self.image.deterministic:
            latents[f"std{suffix}"] = std.half().cpu()
        return latents

    def _tables(self, rows: _Rows, tell: Tell) -> dict[str, Tensor]:
        row_of = {caption: row for row, caption in enumerate(dict.fromkeys(c for cs in rows.captions for c in cs))}
        features = encode_half(self.text, list(row_of), tell)
        return {
            "bucket": torch.tensor(rows.bucket, dtype=torch.int16),
            "row": torch.tensor(rows.row, dtype=torch.int32),
            "caption_offsets": torch.tensor(np.cumsum([0, *map(len, rows.captions)]), dtype=torch.int64),
            "caption_rows": torch.tensor([row_of[c] for cs in rows.captions for c in cs], dtype=torch.int64),
            **vars(features),
        }


def encode_half(text: TextEncoder, captions: Sequence[str], tell: Tell = quiet) -> TextFeatures:
    """Return the encoded captions on the CPU, with tokens in float16. UserError: they do not fit into float16."""
    tokens = torch.zeros(len(captions), text.max_tokens, text.width, dtype=torch.float16)
    mask = torch.zeros(len(captions), text.max_tokens, dtype=torch.bool)
    end = torch.zeros(len(captions), dtype=torch.int64)
    for first in range(0, len(captions), TEXT_BATCH):
        some = slice(first, first + TEXT_BATCH)
        tell(f"caption {first + 1} of {len(captions)}")
        features = text.encode(captions[some])
        tokens[some], mask[some], end[some] = features.tokens.half().cpu(), features.mask.cpu(), features.end.cpu()
        if not tokens[some].isfinite().all():
            raise UserError("text.encoder: its features are not finite in float16; use another encoder or dtype")
    return TextFeatures(tokens, mask, end)
