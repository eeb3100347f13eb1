"""Computes the features of one shard's samples, as the tensors of one file; `packing.py` says how they are written down.

Of n samples with U distinct captions, n_b of them good and in bucket b:

| tensor | type and shape | holds |
|---|---|---|
| bucket | int16 [n] | the bucket of each sample; -1: it is bad |
| row | int32 [n] | its row in the tensors of that bucket |
| mean.b, std.b, mean_flip.b, std_flip.b, edge.b, small.b | [n_b, ...] | as in `packing.py` |
| sum.b | int64 [n_b] | CRC-32 of a row of these, as far as they are there |
| caption_offsets | int64 [n + 1] | where its captions begin in the next two, and end |
| caption_rows, weights | int64, float32 [captions] | the row of each caption in what follows; how likely it is drawn |
| captions, caption_ends or tokens, mask, end | of U captions | as in `packing.py` |
| text_sum | int64 [U] | CRC-32 of each |
"""

import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from raphael_dist.data.dataset import BadSampleError, DecodedSample, ImageDataset
from raphael_dist.data.encoders import TextEncoder, TextFeatures
from raphael_dist.data.encoding import IMAGE_BATCH, TEXT_BATCH, Encoders
from raphael_dist.data.packing import pack_captions, pack_std, pool_edges
from raphael_dist.data.prefetch import Prefetcher
from raphael_dist.errors import UserError
from raphael_dist.model.upscale import shrink
from raphael_dist.parallel.long_work import Tell, quiet

IMAGE_TENSORS = ("mean", "std", "mean_flip", "std_flip", "edge", "small")
TABLES = ("bucket", "row", "caption_offsets", "caption_rows", "weights")
TEXT_TENSORS = ("tokens", "mask", "end")


@dataclass
class _Rows:
    """What has been gathered of a shard so far; `stacks` holds batches of the tensors above that have a row per image."""

    bucket: list[int]
    row: list[int]
    captions: list[list[str]]
    weights: list[list[float]]
    stacks: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    bad: list[tuple[int, str]] = field(default_factory=list)


class ShardBuilder:
    """Computes the tensors of a shard (table above)."""

    def __init__(self, dataset: ImageDataset, encoders: Encoders, flip: bool, with_text: bool) -> None:
        """With `flip` the latents of mirrored images too; `with_text`: captions as tokens, else as text."""
        self.dataset, self.encoders, self.flip, self.with_text = dataset, encoders, flip, with_text

    def build(
        self, first_id: int, buckets: Sequence[int], tell: Tell = quiet
    ) -> tuple[dict[str, Tensor], list[tuple[int, str]]]:
        """Return a shard's tensors, and (number in the shard, reason) of its bad samples.

        `first_id` is the shard's first sample id, `buckets` has the bucket of each of its samples; `tell` is told of every
        batch. UserError: encoded captions that float16 cannot hold.
        """
        count = len(buckets)
        rows = _Rows([-1] * count, [0] * count, [[] for _ in range(count)], [[] for _ in range(count)])
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
        for suffix in sorted({name.partition(".")[2] for name in tensors}):
            of_bucket = {name: tensors[f"{name}.{suffix}"] for name in IMAGE_TENSORS if f"{name}.{suffix}" in tensors}
            tensors[f"sum.{suffix}"] = _checksums(of_bucket)
        return {**tensors, **self._tables(rows, tell)}, sorted(rows.bad)

    def _add_images(self, rows: _Rows, bucket: int, batch: list[tuple[int, DecodedSample]]) -> None:
        """Encode one batch of a bucket and add its samples, those with latents beyond float16 as bad ones."""
        if not batch:
            return
        images = torch.from_numpy(np.stack([sample.image for _, sample in batch]))
        stacks = self._latents(images, "")
        if self.flip:
            stacks |= self._latents(images.flip(-1), "_flip")
        if self.dataset.edge != "none":
            stacks["edge"] = self._edges(images, [sample.edge for _, sample in batch]).half()
        if self.encoders.upscale:
            stacks["small"] = shrink(images, self.encoders.upscale)
        finite = torch.stack([stack.float().flatten(1).isfinite().all(dim=1) for stack in stacks.values()]).all(dim=0)
        next_row = sum(len(part) for part in rows.stacks[f"mean.{bucket}"])
        for (number, sample), is_good in zip(batch, finite.tolist(), strict=True):
            if not is_good:
                rows.bad.append((number, "latents are not finite in float16"))
                continue
            rows.bucket[number], rows.row[number] = bucket, next_row
            rows.captions[number], rows.weights[number] = sample.captions, sample.weights
            next_row += 1
        for name, stack in stacks.items():
            rows.stacks[f"{name}.{bucket}"].append(stack[finite])

    def _latents(self, images: Tensor, suffix: str) -> dict[str, Tensor]:
        mean, std = self.encoders.latents(images)
        latents = {f"mean{suffix}": mean.half().cpu()}
        if not self.encoders.image.deterministic:
            latents[f"std{suffix}"] = pack_std(std.cpu())
        return latents

    def _edges(self, images: Tensor, stored: Sequence[np.ndarray | None]) -> Tensor:
        factor = self.encoders.image.factor
        maps = [None if one is None else pool_edges(torch.from_numpy(one)[None], factor)[0] for one in stored]
        missing = [i for i, one in enumerate(maps) if one is None]
        made = iter(self.encoders.edge_maps(images[missing]).cpu()) if missing else iter(())
        return torch.stack([next(made) if one is None else one for one in maps])

    def _tables(self, rows: _Rows, tell: Tell) -> dict[str, Tensor]:
        row_of = {caption: row for row, caption in enumerate(dict.fromkeys(c for cs in rows.captions for c in cs))}
        return {
            "bucket": torch.tensor(rows.bucket, dtype=torch.int16),
            "row": torch.tensor(rows.row, dtype=torch.int32),
            "caption_offsets": torch.tensor(np.cumsum([0, *map(len, rows.captions)]), dtype=torch.int64),
            "caption_rows": torch.tensor([row_of[c] for cs in rows.captions for c in cs], dtype=torch.int64),
            "weights": torch.tensor([w for ws in rows.weights for w in ws], dtype=torch.float32),
            **self._texts(list(row_of), tell),
        }

    def _texts(self, captions: list[str], tell: Tell) -> dict[str, Tensor]:
        if not captions:
            return {}
        if not self.with_text:
            texts = pack_captions(captions)
            pieces = texts["captions"].tensor_split(texts["caption_ends"][:-1])
            return {**texts, "text_sum": torch.tensor([checksum([piece]) for piece in pieces])}
        features = vars(encode_half(self.encoders.text, captions, tell))
        return {**features, "text_sum": _checksums(features)}


def sample_of(tensors: Mapping[str, Tensor], number: int) -> dict[str, Tensor] | None:
    """Return one sample's tensors, as `packing.py` has them, of a shard's; None for a bad sample."""
    bucket, row = int(tensors["bucket"][number]), int(tensors["row"][number])
    if bucket < 0:
        return None
    found = {name: tensors[f"{name}.{bucket}"][row] for name in IMAGE_TENSORS if f"{name}.{bucket}" in tensors}
    mine = slice(int(tensors["caption_offsets"][number]), int(tensors["caption_offsets"][number + 1]))
    rows = tensors["caption_rows"][mine]
    found["weights"] = tensors["weights"][mine]
    if "tokens" in tensors:
        return found | {name: tensors[name][rows] for name in TEXT_TENSORS}
    pieces = tensors["captions"].tensor_split(tensors["caption_ends"][:-1])
    return found | pack_captions([bytes(pieces[row].numpy()).decode() for row in rows.tolist()])


def _checksums(stacks: Mapping[str, Tensor]) -> Tensor:
    """Return int64 [rows]: of each row the CRC-32 over these tensors, in this order."""
    count = len(next(iter(stacks.values())))
    return torch.tensor([checksum(stack[row] for stack in stacks.values()) for row in range(count)], dtype=torch.int64)


def checksum(rows: Iterable[Tensor]) -> int:
    """Return the CRC-32 over the bytes of tensors, one after the other."""
    value = 0
    for row in rows:
        value = zlib.crc32(row.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), value)
    return value


def encode_half(text: TextEncoder, captions: Sequence[str], tell: Tell = quiet) -> TextFeatures:
    """Return the encoded captions on the CPU, tokens in 16 bits: bfloat16 where the encoder computes in it, else float16.

    UserError: they do not fit into float16.
    """
    dtype = torch.bfloat16 if text.dtype == torch.bfloat16 else torch.float16
    tokens = torch.zeros(len(captions), text.max_tokens, text.width, dtype=dtype)
    mask = torch.zeros(len(captions), text.max_tokens, dtype=torch.bool)
    end = torch.zeros(len(captions), dtype=torch.int64)
    for first in range(0, len(captions), TEXT_BATCH):
        some = slice(first, first + TEXT_BATCH)
        tell(f"caption {first + 1} of {len(captions)}")
        features = text.encode(captions[some])
        tokens[some], mask[some], end[some] = features.tokens.to(dtype).cpu(), features.mask.cpu(), features.end.cpu()
        if not tokens[some].isfinite().all():
            raise UserError("text.encoder: its features are not finite in float16; use another encoder or dtype")
    return TextFeatures(tokens, mask, end)
