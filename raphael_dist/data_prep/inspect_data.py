"""Inspects a data set before training: decodes some samples, and reports statistics and problems."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from raphael_dist.data.captions import read_captions, read_texts
from raphael_dist.data.features.tokens import truncation_line
from raphael_dist.data.prefetch import Prefetcher
from raphael_dist.data.shards.dataset_index import BadSampleError
from raphael_dist.data.shards.decode_sample import DecodedSample, ImageDataset
from raphael_dist.data.shards.skipped import most_common_reasons
from raphael_dist.data.shards.tar_scan import EXTS
from raphael_dist.data.shards.view import View, filter_columns
from raphael_dist.errors import UserError
from raphael_dist.text import counted, json_type

_SHOWN = 3
_STEP = 4  # grey levels (of 255) that count as a difference; smaller ones are JPEG noise
_NEAR_BITS = 4  # of 64
_NEAR = 6.0  # mean difference (of 255) of two thumbnails below which their images count as the same


@dataclass
class Findings:
    """Statistics of the samples that `inspect` has decoded, and images for a contact sheet.

    Attributes:
        num_inspected: Number of samples that `inspect` has read, including those that cannot be decoded.
        members: For each file extension, such as "json", the number of samples that have a file with this extension.
        fields: For each json field, by name, the types of its values, and how often each type occurs.
        errors: ("SHARD:KEY", reason) of each sample that cannot be decoded.
        captions: The captions of all inspected samples.
        captions_each: Number of samples with n captions, by n.
        thumbnails: (key, difference hash, thumbnail float32 [8, 9, 3] in 0..255) of each image. A key is a sample's name.
        sheet: (decoded sample, caption) of the samples for the contact sheet.
    """

    num_inspected: int = 0
    members: Counter[str] = field(default_factory=Counter)
    fields: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    errors: list[tuple[str, str]] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    captions_each: Counter[int] = field(default_factory=Counter)
    thumbnails: list[tuple[str, int, np.ndarray]] = field(default_factory=list)
    sheet: list[tuple[DecodedSample, str]] = field(default_factory=list)


def inspect(dataset: ImageDataset, count: int, num_images: int) -> Findings:
    """Decode `count` samples, evenly spaced over the whole data set, and return statistics about them.

    Args:
        dataset: Loads the samples by id.
        count: Number of samples to decode; if there are fewer, all are decoded.
        num_images: Largest number of samples to keep for the contact sheet.
    """
    findings, total = Findings(), dataset.index.num_samples
    ids = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()
    on_sheet = set(np.array(ids)[np.linspace(0, len(ids) - 1, min(num_images, len(ids))).round().astype(int)].tolist())

    def read(sample_id: int) -> tuple[int, dict[str, bytes], DecodedSample | BadSampleError]:
        members = dataset.read(sample_id, EXTS)
        try:
            return sample_id, members, dataset.load(sample_id, dataset.buckets_of(sample_id, sample_id + 1)[0])
        except BadSampleError as error:
            return sample_id, members, error

    with Prefetcher(read, ids, depth=16, workers=4) as samples:
        for sample_id, members, sample in samples:
            findings.num_inspected += 1
            findings.members.update(members.keys())
            _add_text(findings, members, dataset)
            if isinstance(sample, BadSampleError):
                bad = sample.sample
                findings.errors.append((f"{bad.shard}:{bad.key}", bad.reason))
                continue
            small = _thumbnail(sample.image)
            findings.thumbnails.append((sample.key, difference_hash(small), small))
            if sample_id in on_sheet:
                findings.sheet.append((sample, sample.captions[0]))
    return findings


def _add_text(findings: Findings, members: Mapping[str, bytes], dataset: ImageDataset) -> None:
    try:
        meta, _ = read_texts({ext: data for ext, data in members.items() if ext in ("json", "txt")})
        captions, _ = read_captions(members, dataset.captions)
    except ValueError:
        return  # reported as a decoding error
    for name, value in meta.items():
        findings.fields[name][json_type(value)] += 1
    findings.captions += captions
    findings.captions_each[len(captions)] += 1


def _thumbnail(image: np.ndarray) -> np.ndarray:
    """Return a thumbnail, float32 [8, 9, 3] in 0..255, of an image, uint8 [3, H, W]."""
    small = Image.fromarray(image.transpose(1, 2, 0)).resize((9, 8), Image.Resampling.BOX)
    return np.asarray(small, np.float32)


def difference_hash(thumbnail: np.ndarray) -> int:
    """Return the difference hash of a thumbnail: an integer of 64 bits. The hashes of similar images differ in few bits.

    A bit belongs to a pixel and its right neighbour: it is 1 if the neighbour is darker by more than 4 grey levels
    (of 255), which exceeds JPEG noise. `thumbnail`: float32 [8, 9, 3] (height, width, RGB) in 0..255.
    """
    grey = thumbnail.mean(axis=2)
    return int.from_bytes(np.packbits(grey[:, 1:] < grey[:, :-1] - _STEP).tobytes(), "big")


def find_duplicates(thumbnails: Sequence[tuple[str, int, np.ndarray]]) -> list[list[str]]:
    """Return groups of images that look the same. Each group is the list of the keys (names) of its images.

    Each image of a group is compared with the first image of the group, and fulfils two conditions:

    - The hashes of the two images differ in at most 4 of 64 bits.
    - The mean absolute difference of their thumbnails is below 6, for values in 0..255.

    Images without a duplicate are in no group.

    Args:
        thumbnails: For each image a tuple (key, hash, thumbnail). The hash is the `difference_hash` of the thumbnail. The
            thumbnail is float32 [8, 9, 3] in 0..255.
    """
    codes = np.array([code for _, code, _ in thumbnails], np.uint64)
    groups, is_grouped = [], np.zeros(len(codes), bool)
    for number, (key, code, small) in enumerate(thumbnails):
        if is_grouped[number]:
            continue
        near = np.flatnonzero((np.bitwise_count(codes ^ np.uint64(code)) <= _NEAR_BITS) & ~is_grouped)
        same = [n for n in near.tolist() if n > number and np.abs(thumbnails[n][2] - small).mean() < _NEAR]
        if same:
            groups.append([key, *(thumbnails[n][0] for n in same)])
            is_grouped[same] = True
    return groups


def report_lines(findings: Findings, dataset: ImageDataset, view: View) -> Iterator[str]:
    """Yield the lines of the report about a data set: its numbers of samples, problems, captions and image sizes.

    Args:
        findings: Statistics of some decoded samples, from `inspect`.
        dataset: The data set from which they come.
        view: Which samples pass data.filters, and how many have which bucket (image size).
    """
    index, n = dataset.index, findings.num_inspected
    yield f"{counted(index.num_samples, 'sample')} in {counted(index.num_shards, 'shard')}; {n} of them were decoded"
    yield "members: " + ", ".join(f"{ext} {count / n:.0%}" for ext, count in findings.members.most_common())
    for name, kinds in sorted(findings.fields.items()):
        yield f"  json {name}: {' or '.join(kinds)}, in {sum(kinds.values()) / n:.0%}"
    rejected = [(bad.key, bad.reason) for bad in index.bad]
    yield from _bad_lines("bad samples in the index", rejected, index.num_samples + len(rejected))
    yield from (f"skipped: {line}" for line in index.skipped.lines())
    yield from (f"{index.shard(number).name} {why}" for number, why in list(index.damaged.items())[:_SHOWN])
    yield from _bad_lines("samples that cannot be decoded", findings.errors, n)
    groups = find_duplicates(findings.thumbnails)
    num_duplicates = sum(len(group) - 1 for group in groups)
    shown = "; ".join(" = ".join(group[:_SHOWN]) for group in groups[:_SHOWN])
    yield f"images that look like another one: {num_duplicates} of {len(findings.thumbnails)}" + (
        f" ({shown})" if shown else ""
    )
    yield from _caption_lines(findings)
    yield f"columns for data.filters: {', '.join(filter_columns(index))}"
    yield from view.describe()[:-1]
    yield "image.buckets [height, width]: samples"
    counts = view.counts.sum(axis=0)
    for (height, width), count in zip(dataset.buckets, counts.tolist(), strict=True):
        yield f"  [{height}, {width}] {count:>9} {'#' * round(40 * count / max(1, counts.max()))}"


def truncated_captions(captions: Sequence[str], spec: str, max_tokens: int) -> str:
    """Return a line for the report: how many captions have more than `max_tokens` tokens, or why this is unknown.

    `spec`: value of the setting text.encoder; the tokenizer of this text encoder counts the tokens.
    """
    from raphael_dist.data.features.encoder_models import tokenizer_of
    from raphael_dist.data.features.encoders import count_longer

    try:
        return truncation_line("captions", count_longer(tokenizer_of(spec), captions, max_tokens), len(captions), max_tokens)
    except UserError as error:
        return f"captions longer than text.max_tokens were not counted: {error}"


def _bad_lines(what: str, bad: Sequence[tuple[str, str]], total: int) -> Iterator[str]:
    yield f"{what}: {len(bad)} of {total}"
    for reason, count, first in most_common_reasons(bad)[:_SHOWN]:
        yield f"  {count} x {reason}, e.g. {first}"


def _caption_lines(findings: Findings) -> Iterator[str]:
    if not findings.captions:
        return
    words = np.array([len(caption.split()) for caption in findings.captions])
    each = ", ".join(f"{count} each in {samples}" for count, samples in sorted(findings.captions_each.items())[:5])
    median, percentile_95 = np.percentile(words, [50, 95])
    yield f"captions: {len(words)} ({each} samples); words: median {median:.0f}, 95% have up to {percentile_95:.0f}"
    common = [(text, count) for text, count in Counter(findings.captions).most_common(_SHOWN) if count > 1]
    if common:
        yield "  most frequent: " + "; ".join(f"{text[:60]!r} {count} times" for text, count in common)
