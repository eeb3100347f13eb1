"""Encodes the samples of one shard into the tensors of one file of the feature cache.

A shard has n samples with U distinct captions. n_b of its usable samples are in bucket (image size) number b. Tensors of
images exist once for each bucket, with the number b in the name:

| tensor | type and shape | content |
|---|---|---|
| bucket | int16 [n] | the bucket of each sample; -1 if the sample cannot be used |
| row | int32 [n] | index of the sample in the tensors of its bucket |
| mean.b, std.b, mean_flip.b, std_flip.b, edge.b, small.b | [n_b, ...] | as in `packing.py` |
| sum.b | int64 [n_b] | CRC-32 of each sample's rows in the tensors of the line above |
| caption_offsets | int64 [n + 1] | sample i has the captions number caption_offsets[i] to caption_offsets[i + 1] - 1 |
| caption_rows | int64 [captions] | index of each caption in the tensors of distinct captions below |
| weights | float32 [captions] | relative probability of each caption |
| captions, caption_ends or tokens, mask, end | for U captions | as in `packing.py` |
| text_sum | int64 [U] | CRC-32 of each row of the line above |
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from raphael_dist.data.features.batch_encoder import IMAGE_BATCH, TEXT_BATCH, Encoders, fill_rows
from raphael_dist.data.features.encoders import TextEncoder
from raphael_dist.data.features.packing import checksum, pack_captions, pack_std, pool_edges
from raphael_dist.data.features.run_encoders import TextFeatures
from raphael_dist.data.prefetch import Prefetcher
from raphael_dist.data.shards.dataset_index import BadSampleError
from raphael_dist.data.shards.decode_sample import DecodedSample, ImageDataset
from raphael_dist.errors import UserError
from raphael_dist.model.super_resolution import downscale
from raphael_dist.runtime.progress_bar import no_report

IMAGE_TENSORS = ("mean", "std", "mean_flip", "std_flip", "edge", "small")
TABLES = ("bucket", "row", "caption_offsets", "caption_rows", "weights")
TEXT_TENSORS = ("tokens", "mask", "end")


@dataclass
class _Rows:
    """The results for the samples of one shard so far, while they are encoded.

    Attributes:
        bucket: number of each sample's bucket (image size); -1 until the sample is encoded.
        row: index of each sample in the tensors of its bucket.
        captions: captions of each sample.
        weights: relative probability of each of these captions.
        stacks: for each tensor to write, by name such as "mean.0", a list with one tensor [samples, ...] per encoded batch.
        bad: (number in the shard, reason) of each sample that cannot be used.
    """

    bucket: list[int]
    row: list[int]
    captions: list[list[str]]
    weights: list[list[float]]
    stacks: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    bad: list[tuple[int, str]] = field(default_factory=list)


class ShardBuilder:
    """Encodes the samples of a shard (tar file) into the tensors of the shard's file in the feature cache."""

    def __init__(self, dataset: ImageDataset, encoders: Encoders, flip: bool, with_text: bool) -> None:
        """Create the builder. `dataset`: loads the samples. `encoders`: encode them.

        `flip`: also compute latents of mirrored images. `with_text`: store captions as tokens; False: as strings.
        """
        self.dataset, self.encoders, self.flip, self.with_text = dataset, encoders, flip, with_text

    def build(
        self, shard: int, report: Callable[[str], None] = no_report
    ) -> tuple[dict[str, Tensor], list[tuple[int, str]]]:
        """Encode all samples of a shard, each at the bucket (image size) nearest to its own size.

        Args:
            shard: Number of the shard in the index of the data set.
            report: Called with a line of progress for each batch.

        Returns:
            The tensors by name (listed at the top of cache_build.py), and (number in the shard, reason) of each sample that
            cannot be used.

        Raises:
            UserError: Encoded captions exceed the range of float16.
        """
        first_id, end_id = self.dataset.index.starts[shard : shard + 2].tolist()
        buckets = self.dataset.buckets_of(first_id, end_id)
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
                    rows.bad.append((number, sample.sample.reason))
                    continue
                batch = pending[buckets[number]]
                batch.append((number, sample))
                if len(batch) == IMAGE_BATCH:
                    report(f"image {number + 1} of {count}")
                    self._add_images(rows, buckets[number], batch)
                    batch.clear()
        for bucket, batch in pending.items():
            self._add_images(rows, bucket, batch)
        tensors = {name: torch.cat(parts) for name, parts in rows.stacks.items()}
        for suffix in sorted({name.partition(".")[2] for name in tensors}):
            of_bucket = {name: tensors[f"{name}.{suffix}"] for name in IMAGE_TENSORS if f"{name}.{suffix}" in tensors}
            tensors[f"sum.{suffix}"] = _checksums(of_bucket)
        return {**tensors, **self._tables(rows, report)}, sorted(rows.bad)

    def _add_images(self, rows: _Rows, bucket: int, batch: list[tuple[int, DecodedSample]]) -> None:
        """Encode a batch of samples, (number in the shard, sample) each, of one bucket (image size), and add it to `rows`.

        A sample whose latents exceed the range of float16 is added to `rows.bad` instead.
        """
        if not batch:
            return
        images = torch.from_numpy(np.stack([sample.image for _, sample in batch]))
        stacks = self._latents(images, "")
        if self.flip:
            stacks |= self._latents(images.flip(-1), "_flip")
        if self.dataset.edge != "none":
            stacks["edge"] = self._edges(images, [sample.edge for _, sample in batch]).half()
        if self.encoders.upscale:
            stacks["small"] = downscale(images, self.encoders.upscale)
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
        maps = [None if edge is None else pool_edges(torch.from_numpy(edge)[None], factor)[0] for edge in stored]
        return fill_rows(maps, list(images), lambda missing: self.encoders.edge_maps(torch.stack(missing))).cpu()

    def _tables(self, rows: _Rows, report: Callable[[str], None]) -> dict[str, Tensor]:
        row_of = {caption: row for row, caption in enumerate(dict.fromkeys(c for cs in rows.captions for c in cs))}
        return {
            "bucket": torch.tensor(rows.bucket, dtype=torch.int16),
            "row": torch.tensor(rows.row, dtype=torch.int32),
            "caption_offsets": torch.tensor(np.cumsum([0, *map(len, rows.captions)]), dtype=torch.int64),
            "caption_rows": torch.tensor([row_of[c] for cs in rows.captions for c in cs], dtype=torch.int64),
            "weights": torch.tensor([w for ws in rows.weights for w in ws], dtype=torch.float32),
            **self._texts(list(row_of), report),
        }

    def _texts(self, captions: list[str], report: Callable[[str], None]) -> dict[str, Tensor]:
        if not captions:
            return {}
        if not self.with_text:
            texts = pack_captions(captions)
            pieces = texts["captions"].tensor_split(texts["caption_ends"][:-1])
            return {**texts, "text_sum": torch.tensor([checksum([piece]) for piece in pieces])}
        features = encode_half(self.encoders.text, captions, report).tensors()
        return {**features, "text_sum": _checksums(features)}


def sample_of(tensors: Mapping[str, Tensor], number: int) -> dict[str, Tensor] | None:
    """Return the encoded sample with this number as tensors by name; None if it cannot be used.

    The names ("mean", "tokens", ...) and formats are those of the table at the top of packing.py.

    Args:
        tensors: The tensors of all samples of a shard, as `ShardBuilder.build` returns them.
        number: Number of the sample in the shard.
    """
    bucket, row = int(tensors["bucket"][number]), int(tensors["row"][number])
    if bucket < 0:
        return None
    sample = {name: tensors[f"{name}.{bucket}"][row] for name in IMAGE_TENSORS if f"{name}.{bucket}" in tensors}
    captions = slice(int(tensors["caption_offsets"][number]), int(tensors["caption_offsets"][number + 1]))
    rows = tensors["caption_rows"][captions]
    sample["weights"] = tensors["weights"][captions]
    if "tokens" in tensors:
        return sample | {name: tensors[name][rows] for name in TEXT_TENSORS}
    pieces = tensors["captions"].tensor_split(tensors["caption_ends"][:-1])
    return sample | pack_captions([bytes(pieces[row].numpy()).decode() for row in rows.tolist()])


def _checksums(stacks: Mapping[str, Tensor]) -> Tensor:
    """Return, for each index i, the CRC-32 of the bytes of `tensor[i]` of all tensors in `stacks`, int64 [length].

    All tensors have the same length.
    """
    count = len(next(iter(stacks.values())))
    return torch.tensor([checksum(stack[row] for stack in stacks.values()) for row in range(count)], dtype=torch.int64)


def encode_half(text: TextEncoder, captions: Sequence[str], report: Callable[[str], None] = no_report) -> TextFeatures:
    """Encode captions with `text` on its device, and return the results on the CPU, with tokens in 16 bits.

    Tokens are bfloat16 if the encoder computes in bfloat16, otherwise float16. `report`: called with a line of progress for
    each batch. Raises UserError if the tokens exceed the range of float16.
    """
    dtype = torch.bfloat16 if text.dtype == torch.bfloat16 else torch.float16
    tokens = torch.zeros(len(captions), text.max_tokens, text.width, dtype=dtype)
    mask = torch.zeros(len(captions), text.max_tokens, dtype=torch.bool)
    end = torch.zeros(len(captions), dtype=torch.int64)
    for first in range(0, len(captions), TEXT_BATCH):
        part = slice(first, first + TEXT_BATCH)
        report(f"caption {first + 1} of {len(captions)}")
        features = text.encode(captions[part])
        tokens[part] = features.tokens.to(dtype).cpu()
        mask[part] = features.mask.cpu()
        end[part] = features.end.cpu()
        if not tokens[part].isfinite().all():
            raise UserError(
                "text.encoder must return numbers within the range of float16, in which they are cached, but it returns "
                "larger ones. Use another encoder."
            )
    return TextFeatures(tokens, mask, end)
