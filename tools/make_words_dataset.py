"""Build the data set of words in images: `python tools/make_words_dataset.py --out data/words-full`.

Requires the packages of the fonts (docs/words.md) and the extra `edges` of this package. The words are taken from the names
of emoji.
"""

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import checkout  # noqa: F401 (before the package)
from emoji_data.dataset import Sample, encode_edges, write_tar
from raphael_dist.cli.common import Parser
from raphael_dist.data.features.hed import canny_edges
from raphael_dist.errors import run_command
from words_data.drawing import FONTS, HEIGHT, HELD_OUT_FONT, WIDTH, Font, Look, captions, full_caption, render
from words_data.vocabulary import HELD_OUT_STRINGS, MIN_HELD_OUT, Vocabulary, emoji_words

SHARD_SAMPLES = 5000
# Number of prompts in each set of held-out (or trained) texts, one file prompts-NAME.txt each.
PROMPTS = 300
# How many prompts of each set are in prompts.jsonl, whose images form a grid of six columns.
GRID = {"trained-words": 6, "held-out-words": 12, "held-out-strings": 6, "held-out-font": 6}
# The first word of an image's label in the grid, in place of the prompt's "the".
MARKS = {
    "trained-words": "trained",
    "held-out-words": "held-out",
    "held-out-strings": "held-out",
    "held-out-font": "held-out font: trained",
}
_TRAIN, _VAL, _PROMPTS = range(3)  # streams of random numbers


@dataclass(frozen=True)
class Scope:
    """Restrictions of the images of a data set, which make it easier to learn.

    Attributes:
        longest: largest number of characters of the text in an image; None: any.
        width, height: size of an image, in pixels.
        simple: whether all text has one font in one size in the centre (`Look.draw`).
        monochrome: whether all text is black on white.
    """

    longest: int | None = None
    width: int = WIDTH
    height: int = HEIGHT
    simple: bool = False
    monochrome: bool = False

    def look(self, random: np.random.Generator, fonts: tuple[Font, ...] = FONTS) -> Look:
        """Choose at random how text is drawn, within these restrictions. `fonts`: fonts to choose from."""
        return Look.draw(random, fonts, self.simple, self.monochrome)


def make_sample(key: str, text: str, look: Look, random: np.random.Generator, scope: Scope) -> Sample:
    """Draw `text`, and encode the image as a sample with captions and edge map.

    `key`: key of the sample. `look`: how the text is drawn. `random`: chooses what the captions mention.
    """
    image = render(text, look, scope.width, scope.height)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).unsqueeze(0)
    record = {
        "captions": captions(text, look, random),
        "text": text,
        "font": look.font.name,
        "style": look.font.style,
        "colour": look.colour,
        "background": look.background,
        "place": look.place,
        "width": image.width,
        "height": image.height,
    }
    edges = encode_edges(canny_edges(pixels)[0, 0].numpy())
    data = json.dumps(record, separators=(",", ":")).encode()
    return Sample(key, False, {"webp": encode_lossless(image), "json": data, "edge.png": edges})


def encode_lossless(image: Image.Image) -> bytes:
    """Encode an image as lossless WebP."""
    buffer = io.BytesIO()
    image.save(buffer, "webp", lossless=True, quality=50, method=2)
    return buffer.getvalue()


def training_samples(vocabulary: Vocabulary, seed: int, numbers: range, scope: Scope) -> Iterator[Sample]:
    """Yield the training samples with these numbers. Each sample depends only on its number and the other arguments."""
    for number in numbers:
        text, random = draw_text(vocabulary, seed, number, scope)
        yield make_sample(f"{number:07d}", text, scope.look(random), random, scope)


def draw_text(vocabulary: Vocabulary, seed: int, number: int, scope: Scope) -> tuple[str, np.random.Generator]:
    """Return the text of the training sample with this number, and the generator of the sample's further random choices."""
    random = np.random.default_rng((seed, _TRAIN, number))
    return vocabulary.training_text(random, scope.longest), random


def held_out_texts(vocabulary: Vocabulary, scope: Scope) -> dict[str, list[str]]:
    """Return 300 texts (PROMPTS) for each evaluation set, by the name of the set, such as "held-out-words".

    Prompts and validation shards use these texts. If there are fewer than 300 different texts, they are repeated, and
    drawn in different looks. The sets "trained-words" and "held-out-font" have words that training images also show. There
    is no set "held-out-font" if all training images have one font. `scope`: limits the length of the texts, and the fonts.
    """
    longest = scope.longest
    order = np.random.default_rng(PROMPTS).permutation(len(vocabulary.words))
    trained = [vocabulary.words[i] for i in order if len(vocabulary.words[i]) >= MIN_HELD_OUT]
    sets = {
        "trained-words": trained,
        "held-out-words": sorted(vocabulary.held_out_words, key=lambda w: hashlib.sha256(w[::-1].encode()).digest()),
        "held-out-strings": vocabulary.held_out_strings,
    }
    if not scope.simple:
        sets["held-out-font"] = trained
    short = {name: [text for text in texts if longest is None or len(text) <= longest] for name, texts in sets.items()}
    return {name: list(islice(cycle(texts), PROMPTS)) for name, texts in short.items()}


def looks(name: str, seed: int, stream: int, scope: Scope) -> Iterator[tuple[Look, np.random.Generator]]:
    """Yield, without end, how the texts of an evaluation set are drawn: (look, generator for further random choices).

    The pair number n is a function of (seed, stream, n). `name`: name of the set; looks of "held-out-font" have the held-out
    font. `stream`: _VAL or _PROMPTS, so that validation images and prompts have different looks.
    """
    fonts = (HELD_OUT_FONT,) if name == "held-out-font" else FONTS
    number = 0
    while True:
        random = np.random.default_rng((seed, stream, number))
        yield scope.look(random, fonts), random
        number += 1


def prompt(name: str, text: str, look: Look) -> str:
    """Return a prompt that states text, colours, place and style of font (in the set "held-out-font" the font's name)."""
    caption = full_caption(text, look)
    return caption.replace(f"{look.font.style} font", f"{look.font.name} font") if name == "held-out-font" else caption


def write_prompts(vocabulary: Vocabulary, out: Path, scope: Scope) -> None:
    """Write the prompts of each evaluation set NAME to prompts-NAME.txt, and a selection of all sets to prompts.jsonl.

    The selection is the first GRID[NAME] prompts of each set: 12 of "held-out-words", 6 of each other set. Their images form
    a grid, with labels that state whether the text is held out. `vocabulary`: the words and strings of which the sets
    consist. `out`: folder of the files. `scope`: limits the length and the looks of the texts.
    """
    out.mkdir(parents=True, exist_ok=True)
    grid = []
    for name, texts in held_out_texts(vocabulary, scope).items():
        drawn = zip(texts, looks(name, 0, _PROMPTS, scope), strict=False)
        lines = [prompt(name, text, look) for text, (look, _) in drawn]
        (out / f"prompts-{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for line in lines[: GRID[name]]:
            label, _, _ = line.replace("the", MARKS[name], 1).partition(", ")
            grid.append(json.dumps({"prompt": line, "label": label}))
    (out / "prompts.jsonl").write_text("\n".join(grid) + "\n", encoding="utf-8")


def write_shards(
    vocabulary: Vocabulary, out: Path, seed: int, samples: int, scope: Scope, report: Callable[[str], None]
) -> None:
    """Write train-*.tar, one val-NAME.tar for each evaluation set except trained-words, and manifest.json.

    Old shards are deleted. `samples`: number of training samples. `report`: called with a line of progress.
    """
    out.mkdir(parents=True, exist_ok=True)
    for stale in (*out.glob("train-*.tar"), *out.glob("val-*.tar")):
        stale.unlink()
    shards = {}
    for i, first in enumerate(range(0, samples, SHARD_SAMPLES)):
        path = out / f"train-{i:04d}.tar"
        numbers = range(first, min(first + SHARD_SAMPLES, samples))
        write_tar(path, training_samples(vocabulary, seed, numbers, scope))
        shards[path.name] = len(numbers)
        report(f"{numbers.stop} of {samples} training samples")
    for name, texts in held_out_texts(vocabulary, scope).items():
        if name == "trained-words":
            continue
        path = out / f"val-{name}.tar"
        drawn = enumerate(zip(texts, looks(name, seed, _VAL, scope), strict=False))
        write_tar(path, (make_sample(f"{name}-{i:04d}", text, look, r, scope) for i, (text, (look, r)) in drawn))
        shards[path.name] = len(texts)
    manifest = {
        "seed": seed,
        **asdict(scope),
        "fonts": {
            font.name: f"{font.module.replace('_', '-')} {font.file} {font.licence}"
            for font in FONTS[: 1 if scope.simple else None]
        },
        "held_out_font": None if scope.simple else HELD_OUT_FONT.name,
        "words": len(vocabulary.words),
        "held_out_words": vocabulary.held_out_words,
        "held_out_strings": vocabulary.held_out_strings,
        "shards": {
            name: {"samples": n, "sha256": hashlib.sha256((out / name).read_bytes()).hexdigest()}
            for name, n in shards.items()
        },
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line `argv`; a mistake in it ends the process with exit code 2."""
    parser = Parser(
        example="python tools/make_words_dataset.py --out data/words-full",
        description="Make the data set of words in images. Requires the font packages (docs/words.md) and the extra "
        "`edges`.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument(
        "--emoji",
        type=Path,
        default=Path("data/emoji"),
        help="folder with the emoji shards; the names of the emoji are the words to draw",
    )
    parser.add_argument("--samples", type=int, default=40_000, help="number of training samples (default 40,000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of words, fonts and layouts (default 0)")
    parser.add_argument("--longest", type=int, metavar="N", help="draw only words and strings of up to N characters")
    parser.add_argument("--width", type=int, default=WIDTH, metavar="PIXELS", help=f"width of an image (default {WIDTH})")
    parser.add_argument(
        "--height",
        type=int,
        default=HEIGHT,
        metavar="PIXELS",
        help=f"height of an image (default {HEIGHT}; 16 suffices for --simple)",
    )
    parser.add_argument("--simple", action="store_true", help="draw all text in one font and size, centred, evenly spaced")
    parser.add_argument("--monochrome", action="store_true", help="draw all text black on white")
    parser.add_argument("--prompts-only", action="store_true", help="write only prompts*, no shards")
    return parser.parse_args(argv)


def build(args: argparse.Namespace) -> None:
    """Write the prompts and, unless --prompts-only is given, the shards."""
    vocabulary = Vocabulary(emoji_words(args.emoji))
    scope = Scope(args.longest, args.width, args.height, args.simple, args.monochrome)
    write_prompts(vocabulary, args.out, scope)
    if not args.prompts_only:
        write_shards(vocabulary, args.out, args.seed, args.samples, scope, lambda line: print(line, flush=True))
    print(
        f"{len(vocabulary.words)} training words, {len(vocabulary.held_out_words)} held-out words, "
        f"{HELD_OUT_STRINGS} held-out strings in {args.out}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the tool with the command line `argv` (None: that of the process); return the exit code."""
    return run_command(lambda: build(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
