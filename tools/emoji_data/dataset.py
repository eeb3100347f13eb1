"""The captioned emoji data set: all 1,906 emoji in up to three drawing styles, as webdataset shards.

One sample is one concept (thing, e.g. a red heart) in one style: `<concept>__<style>.{webp,json,edge.png}`. A concept may
be held out in exactly one of its styles: the validation shards combine a known concept with a known style in a way that
training has not seen.
"""

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from webdataset import TarWriter

from emoji_data.names import captions, clean_name, slug
from raphael_dist.errors import UserError, did_you_mean

SIZE = 64
EDGE_LEVELS = 6
WEBP_QUALITY = 90
PALETTES = (64, 128, 256)
WORTH = 1.4
HELD_OUT_SHARE = {"all": 0.05, "demo": 0.16}
SUFFIX = {"all": ".tar.gz", "demo": ".tar"}  # the demo is small enough not to be compressed
SHARD_BYTES = 3_600_000  # before compression
TAR_BLOCK = 512


@dataclass(frozen=True)
class Package:
    """An npm package with emoji. `images`: folder of the image files in the package. `suffix`: end of their names."""

    name: str
    version: str
    images: str = ""
    suffix: str = ".png"

    @property
    def tarball(self) -> str:
        """The name of the file that `npm pack` writes for the package."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


STYLES = {
    "noto": Package("emoji-datasource-google", "16.0.0", "img/google/64/"),
    "twemoji": Package("emoji-datasource-twitter", "16.0.0", "img/twitter/64/"),
    "fluent 3d": Package("@lobehub/fluent-emoji-3d", "1.1.0", "assets/", ".webp"),
}
NAMES = Package("unicode-emoji-json", "0.9.0")  # the CLDR short names; emoji-datasource has the older Unicode names

MISDRAWN = {("noto", "1f1e8-1f1f6")}  # the package has the flag of Saudi Arabia for Sark
DEMO_CONCEPTS = [
    *(f"{colour} heart" for colour in ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")),
    *(f"{colour} circle" for colour in ("red", "orange", "yellow", "green", "blue", "purple")),
    *(f"{colour} square" for colour in ("red", "orange", "yellow", "green", "blue", "purple")),
    *("star", "sun", "full moon", "cloud", "red apple", "green apple", "lemon", "tomato", "slightly smiling face"),
    "soccer ball",
]


@dataclass(frozen=True)
class Concept:
    """One thing that emoji show: its name, its category, and by style the path of its image in the style's npm package."""

    name: str
    category: str
    files: dict[str, str]


@dataclass(frozen=True)
class Sample:
    """One emoji in one drawing style.

    Attributes:
        key: its name in the shard.
        held_out: whether it is held out from training.
        members: its encoded files by suffix, such as "webp".
    """

    key: str
    held_out: bool
    members: dict[str, bytes]

    def tar_bytes(self) -> int:
        """Return the bytes of the sample in an uncompressed shard, with the headers and padding of its members."""
        return sum(TAR_BLOCK * (1 - (-len(data) // TAR_BLOCK)) for data in self.members.values())


def fetch_packages(folder: Path) -> None:
    """Download the npm packages that are not in `folder`, with `npm pack`. UserError: npm is missing or fails."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in (*STYLES.values(), NAMES):
        if (folder / package.tarball).is_file():
            continue
        spec = f"{package.name}@{package.version}"
        try:
            done = subprocess.run(["npm", "pack", spec, "--silent"], cwd=folder, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise UserError(
                "npm is required to download the emoji packages, but it is not installed. Install Node.js, or use "
                "--packages DIR with the downloaded tarballs."
            ) from error
        if done.returncode:
            raise UserError(
                f"npm pack {spec} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}. Check the network, or "
                "use --packages DIR with the downloaded tarballs."
            )


def read_package(folder: Path, package: Package) -> dict[str, bytes]:
    """Return the content of the JSON and image files of `package`, by path inside the package.

    `folder`: folder with the tarball of the package. Raises UserError if the tarball is missing.
    """
    path = folder / package.tarball
    if not path.is_file():
        raise UserError(f"{path} is missing. Run `npm pack {package.name}@{package.version}` in {folder}.")
    files: dict[str, bytes] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            name = member.name.removeprefix("package/")
            is_used = name.endswith(".json") or (package.images and name.startswith(package.images))
            if is_used and (file := tar.extractfile(member)):
                files[name] = file.read()
    return files


def code_points(text: str) -> str:
    """Return the code points of an emoji in one canonical form, e.g. "2764" for "2764-FE0F" or "❤️".

    Code points are in lower case with at least four digits, and variation selectors are left out.
    """
    points = text.split("-") if text.isascii() and len(text) > 3 else [f"{ord(c):x}" for c in text]
    return "-".join(p.lower().zfill(4) for p in points if p.lower() != "fe0f")


def read_concepts(packages: dict[str, dict[str, bytes]]) -> list[Concept]:
    """Return every emoji, in Unicode's order, from the packages' files ({package name: {path: content}}).

    Skin tones, drawings in `MISDRAWN` and national flags of "fluent 3d" are left out: Fluent has no flags, and that package
    uses those of Noto.
    """
    by_points = {code_points(e): row for e, row in json.loads(packages[NAMES.name]["data-by-emoji.json"]).items()}
    entries = json.loads(packages[STYLES["noto"].name]["emoji.json"])
    images = {
        style: {code_points(Path(f).stem): f for f in packages[p.name] if p.images and f.startswith(p.images)}
        for style, p in STYLES.items()
    }
    concepts = []
    for entry in sorted(entries, key=lambda e: int(e["sort_order"])):
        points, subcategory = code_points(entry["unified"]), entry["subcategory"]
        if points not in by_points or entry["category"] == "Component":
            continue
        category = entry["category"].lower().replace("&", "and")
        wrong = {style for style, misdrawn in MISDRAWN if misdrawn == points}
        wrong |= {"fluent 3d"} if subcategory in ("country-flag", "subdivision-flag") else set()
        files = {style: paths[points] for style, paths in images.items() if points in paths and style not in wrong}
        name = clean_name(by_points[points]["name"], category)
        concepts.append(Concept(name, category, files))
    return concepts


def select(concepts: Iterable[Concept], subset: str) -> list[Concept]:
    """Return the emoji of a subset: "all" or "demo". Raises UserError for another subset."""
    if subset not in HELD_OUT_SHARE:
        raise UserError(
            f"--subset={subset} must be one of {', '.join(HELD_OUT_SHARE)}{did_you_mean(subset, HELD_OUT_SHARE)}. Use e.g. "
            "--subset=all."
        )
    return [c for c in concepts if subset == "all" or c.name in DEMO_CONCEPTS]


def held_out_style(name: str, styles: Iterable[str], share: float) -> str | None:
    """Return the style in which the emoji `name` is held out from training, or None for most emoji.

    This is decided by the sha256 of the name. Its first four bytes, as a fraction of 2**32, must be below `share`; its next
    four bytes, modulo the number of styles, select the style in alphabetical order. An emoji with only one style is never
    held out.
    """
    digest = hashlib.sha256(name.encode()).digest()
    ordered = sorted(styles)
    if len(ordered) < 2 or int.from_bytes(digest[:4], "big") >= share * 2**32:
        return None
    return ordered[int.from_bytes(digest[4:8], "big") % len(ordered)]


def on_white(data: bytes, size: int = SIZE) -> Image.Image:
    """Decode an image, fit it into `size` x `size` pixels, and composite it on white; return it as RGB.

    The image is resized with premultiplied alpha, so that the colour of invisible pixels does not bleed into the outline.
    """
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    scale = size / max(image.size)
    fitted = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if fitted != image.size:
        image = image.convert("RGBa").resize(fitted, Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(image, ((size - fitted[0]) // 2, (size - fitted[1]) // 2))
    return canvas.convert("RGB")


def encode_webp(image: Image.Image) -> bytes:
    """Encode an image as WebP in several ways; return the most accurate result that is not too large.

    The encodings are lossy with `WEBP_QUALITY`, lossless, and lossless with a palette, which suits flat drawings. Lossy WebP
    halves the resolution of colour, which blurs thin lines and small flags. Another encoding is used instead if it has at
    most `WORTH` times as many bytes.
    """

    def encode(variant: Image.Image, **options: Any) -> tuple[bytes, int]:
        buffer = io.BytesIO()
        variant.save(buffer, "webp", method=6, **options)
        error = np.asarray(Image.open(buffer).convert("RGB"), np.int64) - np.asarray(image, np.int64)
        return buffer.getvalue(), int(np.square(error).sum())

    options = [encode(image, quality=WEBP_QUALITY, use_sharp_yuv=True), encode(image, lossless=True, quality=90)]
    for colours in PALETTES:
        palette = image.quantize(colours, Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)
        options.append(encode(palette.convert("RGB"), lossless=True, quality=90))
    limit = WORTH * len(options[0][0])
    return min((error, len(data), data) for data, error in options if len(data) <= limit)[-1]


def encode_edges(edges: np.ndarray) -> bytes:
    """Return an edge map, float (H, W) in [0, 1], as an 8-bit grey PNG of `EDGE_LEVELS` levels."""
    step = EDGE_LEVELS - 1
    grey = np.round(np.round(edges * step) * (255 / step)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def make_samples(
    concepts: Iterable[Concept],
    packages: dict[str, dict[str, bytes]],
    share: float,
    edges: Callable[[list[Image.Image]], list[np.ndarray]],
) -> Iterator[Sample]:
    """Yield one sample for each style of each emoji.

    Args:
        concepts: the emoji.
        packages: content of the packages' files, by package name and path.
        share: share of the emoji (0..1) that are held out in one style.
        edges: given the images of one emoji, returns their edge maps, float (H, W) in [0, 1].
    """
    for concept in concepts:
        held_out = held_out_style(concept.name, concept.files, share)
        images = [on_white(packages[STYLES[style].name][file]) for style, file in concept.files.items()]
        for (style, file), image, edge in zip(concept.files.items(), images, edges(images), strict=True):
            package = STYLES[style]
            record = {
                "captions": captions(concept.name, style, concept.category),
                "concept": concept.name,
                "style": style,
                "category": concept.category,
                "width": image.width,
                "height": image.height,
                "source": f"{package.name}@{package.version}/{file}",
            }
            text = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
            members = {"webp": encode_webp(image), "json": text, "edge.png": encode_edges(edge)}
            yield Sample(f"{slug(concept.name)}__{slug(style)}", style == held_out, members)


def write_tar(path: Path, samples: Iterable[Sample]) -> None:
    """Write one shard, gzipped if its name ends in ".gz". Equal samples give equal bytes, independent of user and time."""
    buffer = io.BytesIO()
    with TarWriter(buffer, encoder=False, user="", group="", mode=0o644, mtime=0) as tar:
        for sample in samples:
            for suffix, data in sample.members.items():  # one at a time: TarWriter sorts the members of a sample by name
                tar.write({"__key__": sample.key, suffix: data})
    plain = buffer.getvalue()
    path.write_bytes(gzip.compress(plain, 9, mtime=0) if path.suffix == ".gz" else plain)


def split_shards(samples: list[Sample], shard_bytes: int = SHARD_BYTES) -> list[list[Sample]]:
    """Divide samples into shards of about equal counts and up to about `shard_bytes` bytes before compression.

    Samples are ordered by the sha256 of their keys, which mixes the styles.
    """
    ordered = sorted(samples, key=lambda s: hashlib.sha256(s.key.encode()).digest())
    count = max(1, -(-sum(s.tar_bytes() for s in ordered) // shard_bytes))
    return [ordered[len(ordered) * i // count : len(ordered) * (i + 1) // count] for i in range(count)]


def write_dataset(samples: list[Sample], out: Path, subset: str) -> dict[str, Any]:
    """Write the shards `train-*`, `val-*` and `manifest.json` into `out`; return the manifest. Old shards are deleted.

    `subset`: "all" or "demo". Raises UserError if two samples have the same key.
    """
    if len({s.key for s in samples}) != len(samples):
        raise UserError(
            "the emoji packages must give each image its own key, but two images have the same. Use the versions of the "
            "packages that docs/data.md lists."
        )
    out.mkdir(parents=True, exist_ok=True)
    for stale in (*out.glob("train-*.tar*"), *out.glob("val-*.tar*")):
        stale.unlink()
    shards: dict[str, dict[str, Any]] = {}
    for split, held_out in (("train", False), ("val", True)):
        for i, shard in enumerate(split_shards([s for s in samples if s.held_out == held_out])):
            path = out / f"{split}-{i:04d}{SUFFIX[subset]}"
            write_tar(path, shard)
            data = path.read_bytes()
            shards[path.name] = {
                "samples": len(shard),
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
    manifest = {
        "subset": subset,
        "held_out_share": HELD_OUT_SHARE[subset],
        "packages": {p.name: p.version for p in (*STYLES.values(), NAMES)},
        "shards": shards,
        "held_out": sorted(s.key for s in samples if s.held_out),
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest
