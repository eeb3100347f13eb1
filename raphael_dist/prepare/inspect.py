"""A look into a data set before anything is trained on it: what its samples hold, what is wrong, and a sheet of pictures."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from raphael_dist.data.buckets import nearest_buckets
from raphael_dist.data.captions import read_captions, read_texts
from raphael_dist.data.dataset import BadSampleError, DecodedSample, ImageDataset
from raphael_dist.data.prefetch import Prefetcher
from raphael_dist.data.tar_scan import EXTS
from raphael_dist.data.view import SIZE_COLUMNS, View

_SHOWN = 3
_COLUMNS = 20
_STEP = 4  # grey levels of 255 that count as a difference: less is a JPEG's noise
_NEAR_BITS = 4  # of 64
_NEAR = 6.0  # mean difference of two thumbnails, of 255, below which their pictures count as the same


@dataclass
class Findings:
    """What was seen of the samples that were looked at; counts by name."""

    looked_at: int = 0
    members: Counter[str] = field(default_factory=Counter)
    fields: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    errors: list[tuple[str, str]] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    captions_each: Counter[int] = field(default_factory=Counter)
    thumbnails: list[tuple[str, int, np.ndarray]] = field(default_factory=list)
    sheet: list[tuple[DecodedSample, str]] = field(default_factory=list)


def look(dataset: ImageDataset, buckets: Sequence[int], count: int, num_pictures: int) -> Findings:
    """Read and decode `count` samples, spread evenly over the data set; keep `num_pictures` of them for a sheet.

    buckets: that of each sample id.
    """
    found, total = Findings(), dataset.index.num_samples
    ids = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()
    kept = set(np.array(ids)[np.linspace(0, len(ids) - 1, min(num_pictures, len(ids))).round().astype(int)].tolist())

    def read(sample_id: int) -> tuple[int, dict[str, bytes], DecodedSample | BadSampleError]:
        members = dataset.read(sample_id, EXTS)
        try:
            return sample_id, members, dataset.load(sample_id, buckets[sample_id])
        except BadSampleError as error:
            return sample_id, members, error

    with Prefetcher(read, ids, depth=16, workers=4) as samples:
        for sample_id, members, sample in samples:
            found.looked_at += 1
            found.members.update(members.keys())
            _note_text(found, members, dataset)
            if isinstance(sample, BadSampleError):
                found.errors.append((f"{sample.shard}:{sample.key}", sample.reason))
                continue
            small = _thumbnail(sample.image)
            found.thumbnails.append((sample.key, difference_hash(small), small))
            if sample_id in kept:
                found.sheet.append((sample, sample.captions[0]))
    return found


def _note_text(found: Findings, members: Mapping[str, bytes], dataset: ImageDataset) -> None:
    try:
        meta, _ = read_texts({ext: data for ext, data in members.items() if ext in ("json", "txt")})
        captions, _ = read_captions(members, dataset.captions)
    except ValueError:
        return  # reported as a decoding error
    for name, value in meta.items():
        found.fields[name][type(value).__name__] += 1
    found.captions += captions
    found.captions_each[len(captions)] += 1


def _thumbnail(image: np.ndarray) -> np.ndarray:
    """Return float32 [8, 9, 3] of a picture, uint8 [3, H, W]."""
    small = Image.fromarray(image.transpose(1, 2, 0)).resize((9, 8), Image.Resampling.BOX)
    return np.asarray(small, np.float32)


def difference_hash(thumbnail: np.ndarray) -> int:
    """Return the perceptual hash of a thumbnail [8, 9, 3]: 64 bits, whether it gets darker from each pixel to the next."""
    grey = thumbnail.mean(axis=2)
    return int.from_bytes(np.packbits(grey[:, 1:] < grey[:, :-1] - _STEP).tobytes(), "big")


def duplicates(thumbnails: Sequence[tuple[str, int, np.ndarray]]) -> list[list[str]]:
    """Return groups of keys whose pictures look the same: hashes that differ in a few bits, and colours that hardly do."""
    codes = np.array([code for _, code, _ in thumbnails], np.uint64)
    groups, taken = [], np.zeros(len(codes), bool)
    for number, (key, code, small) in enumerate(thumbnails):
        if taken[number]:
            continue
        near = np.flatnonzero((np.bitwise_count(codes ^ np.uint64(code)) <= _NEAR_BITS) & ~taken)
        same = [n for n in near.tolist() if n > number and np.abs(thumbnails[n][2] - small).mean() < _NEAR]
        if same:
            groups.append([key, *(thumbnails[n][0] for n in same)])
            taken[same] = True
    return groups


def lines(found: Findings, dataset: ImageDataset, view: View) -> Iterator[str]:
    """Yield the report, a line at a time; `view`: what filters and buckets make of the samples."""
    index, n = dataset.index, found.looked_at
    yield f"{index.num_samples} samples in {len(index.shards)} shards; {n} of them were read and decoded"
    yield "members: " + ", ".join(f"{ext} {count / n:.0%}" for ext, count in found.members.most_common())
    for name, kinds in sorted(found.fields.items()):
        yield f"  json {name}: {' or '.join(kinds)}, in {sum(kinds.values()) / n:.0%}"
    refused = [(bad.key, bad.reason) for bad in index.bad]
    yield from _bad_lines("not usable, by the index", refused, index.num_samples + len(refused))
    yield from _bad_lines("not decoded", found.errors, n)
    groups = duplicates(found.thumbnails)
    again = sum(len(group) - 1 for group in groups)
    shown = "; ".join(" = ".join(group[:_SHOWN]) for group in groups[:_SHOWN])
    yield f"look like another picture: {again} of {len(found.thumbnails)}" + (f" ({shown})" if shown else "")
    yield from _caption_lines(found)
    columns = [*index.known_columns[:_COLUMNS], *(["..."] if len(index.known_columns) > _COLUMNS else [])]
    yield f"columns for data.filters: {', '.join([*columns, *SIZE_COLUMNS])}"
    yield from view.describe()[:-1]
    yield "image.buckets [height, width]: samples"
    counts = view.counts.sum(axis=0)
    for (height, width), count in zip(dataset.buckets, counts.tolist(), strict=True):
        yield f"  [{height}, {width}] {count:>9} {'#' * round(40 * count / max(1, counts.max()))}"


def _bad_lines(what: str, bad: Sequence[tuple[str, str]], total: int) -> Iterator[str]:
    yield f"{what}: {len(bad)} of {total}"
    for reason, count in Counter(reason for _, reason in bad).most_common(_SHOWN):
        yield f"  {count} x {reason}, e.g. {next(key for key, why in bad if why == reason)}"


def _caption_lines(found: Findings) -> Iterator[str]:
    if not found.captions:
        return
    words = np.array([len(caption.split()) for caption in found.captions])
    each = ", ".join(f"{count} each in {samples}" for count, samples in sorted(found.captions_each.items())[:5])
    most = np.percentile(words, 95)
    yield f"captions: {len(words)} ({each} samples); words: median {np.median(words):.0f}, 95% have up to {most:.0f}"
    common = [(text, count) for text, count in Counter(found.captions).most_common(_SHOWN) if count > 1]
    if common:
        yield "  most frequent: " + "; ".join(f"{text[:60]!r} {count} times" for text, count in common)


def buckets_of(dataset: ImageDataset) -> np.ndarray:
    """Return the bucket of each sample, int64 [N], by the sizes that the index has."""
    sizes = np.concatenate([shard.sizes for shard in dataset.index.shards])
    return nearest_buckets(sizes[:, 0], sizes[:, 1], dataset.buckets)
