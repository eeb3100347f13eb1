"""The builder of the data set of words: deterministic, and nothing held out is in a training image."""

import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import make_words_dataset
from make_words_dataset import PROMPTS, Scope, draw_text
from raphael_dist.errors import UserError
from raphael_dist.evaluation.lettering import requested_text
from words_data.drawing import FONTS, HEIGHT, HELD_OUT_FONT, WIDTH, Look, captions, full_caption, render
from words_data.vocabulary import ALPHABET, Vocabulary, emoji_words, random_string

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["BIRD", "BIRDS", "BLUE", "CAT", "HEART", "HOUSE", "KEY", "MOON", "OK", "RED", "SHIP", "STAR", "TREE", "WAVE"]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(emoji_words(ROOT / "data/emoji"))


def test_training_texts_contain_nothing_held_out(vocabulary: Vocabulary) -> None:
    held_out = [*vocabulary.held_out_words, *vocabulary.held_out_strings]
    assert len(vocabulary.held_out_words) >= 300
    assert len(set(vocabulary.held_out_strings)) == 300
    sets = ((None, 4000), (4, 20000), (8, 4000))  # --longest and --samples of the documented data sets, with seed 0
    drawn = (draw_text(vocabulary, 0, n, Scope(longest)) for longest, samples in sets for n in range(samples))
    texts = {text for text, _ in drawn} | set(vocabulary.words)
    joined = " ".join(texts) + " " + " ".join(text.replace(" ", "") for text in texts)
    assert [text for text in held_out if text in joined] == []
    kinds = {" " in text: text for text in texts}
    assert set(kinds) == {False, True}
    assert all(len(text) <= 12 for text in texts)


def test_leak_inside_a_longer_string_is_found(vocabulary: Vocabulary) -> None:
    word = vocabulary.held_out_words[0]
    assert vocabulary.allowed("AXE")
    assert not vocabulary.allowed(f"X{word}7")
    assert not vocabulary.allowed(f"{word[:2]} {word[2:]}")


def test_random_strings_have_no_ambiguous_digits() -> None:
    random = np.random.default_rng(0)
    strings = [random_string(random) for _ in range(500)]
    assert {len(text) for text in strings} == set(range(1, 9))
    assert set("".join(strings)) == set(ALPHABET)
    assert not set("01") & set(ALPHABET)


def test_short_texts_only(vocabulary: Vocabulary) -> None:
    random = np.random.default_rng(0)
    texts = [vocabulary.training_text(random, longest=4) for _ in range(500)]
    assert {len(text) for text in texts} == {1, 2, 3, 4}
    assert 0.4 < np.mean([text in vocabulary.words for text in texts]) < 0.65
    assert not any(" " in text for text in texts)


def test_captions_may_lack_all_but_the_text() -> None:
    random = np.random.default_rng(0)
    look = Look(FONTS[0], "red", "white", "left", 15, (0, 0))
    drawn = {caption for _ in range(100) for caption in captions("BIRD", look, random)}
    assert full_caption("BIRD", look) == 'the word "BIRD" in red on white, sans font, left'
    assert '"BIRD"' in drawn
    assert any("roboto font" in caption for caption in drawn)
    assert {requested_text(caption) for caption in drawn} == {"BIRD"}


@pytest.mark.parametrize("text", ["I", "WWWWWWWW", "BLUE BIRD WA"])
def test_text_lies_inside_the_image(text: str) -> None:
    pytest.importorskip("font_roboto")
    for place in ("left", "centre", "right"):
        pixels = np.asarray(render(text, Look(FONTS[0], "black", "white", place, 17, (1, 2))))
        ink = (pixels < 128).any(axis=2)
        assert pixels.shape == (HEIGHT, WIDTH, 3)
        assert ink.any()
        assert not any(border.any() for border in (ink[0], ink[-1], ink[:, 0], ink[:, -1]))


def test_simple_characters_stand_in_cells_of_equal_width() -> None:
    pytest.importorskip("font_roboto")
    look = Look.draw(np.random.default_rng(0), simple=True, monochrome=True)
    ink = np.asarray(render("MIW8", look, 64)).min(axis=(0, 2)) < 128  # by column
    for i, character in enumerate("MIW8"):
        columns = np.flatnonzero(ink[16 * i : 16 * i + 16])
        assert abs((columns[0] + columns[-1]) / 2 - 7.5) <= 1, character
    tall, flat = np.asarray(render("MIW8", look, 64)), np.asarray(render("MIW8", look, 64, 16))
    assert (tall[8:24] == flat).all()
    alone = np.asarray(render("I", look, 64)).min(axis=(0, 2)) < 128
    assert abs(np.flatnonzero(alone).mean() - 31.5) <= 1


def test_dataset_is_deterministic_and_complete(tmp_path: Path) -> None:
    pytest.importorskip("font_roboto")
    vocabulary = Vocabulary(WORDS)
    shards = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        make_words_dataset.write_prompts(vocabulary, folder, Scope())
        make_words_dataset.write_shards(vocabulary, folder, 3, 8, Scope(), lambda _: None)
        shards.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    assert shards[0] == shards[1]
    with tarfile.open(tmp_path / "a/train-0000.tar") as tar:
        names = tar.getnames()
        records = [json.load(tar.extractfile(n)) for n in names if n.endswith(".json")]  # type: ignore[arg-type]
    assert len(names) == 24
    assert {name.partition(".")[2] for name in names} == {"webp", "json", "edge.png"}
    assert HELD_OUT_FONT.name not in {record["font"] for record in records}
    prompts = (tmp_path / "a/prompts-held-out-font.txt").read_text().splitlines()
    assert all(HELD_OUT_FONT.name in line for line in prompts)


def test_simple_images_of_short_texts(tmp_path: Path) -> None:
    pytest.importorskip("font_roboto")
    scope = Scope(longest=4, width=64, height=16, simple=True, monochrome=True)
    vocabulary = Vocabulary(WORDS)
    make_words_dataset.write_prompts(vocabulary, tmp_path, scope)
    make_words_dataset.write_shards(vocabulary, tmp_path, 3, 8, scope, lambda _: None)
    for path in tmp_path.glob("*.tar"):
        with tarfile.open(path) as tar:
            files = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
        records = [json.loads(data) for name, data in files.items() if name.endswith(".json")]
        assert all(len(record["text"]) <= 4 for record in records)
        looks = {
            (record["width"], record["height"], record["place"], record["colour"], record["background"])
            for record in records
        }
        assert looks == {(64, 16, "centre", "black", "white")}
        assert {record["font"] for record in records} == {"manrope" if "font" in path.name else "roboto"}
    for path in tmp_path.glob("prompts-*.txt"):
        lines = path.read_text().splitlines()
        assert len(lines) == PROMPTS
        assert {len(requested_text(line)) for line in lines} == {4}


def test_missing_emoji_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--emoji=.* has no shards"):
        make_words_dataset.build(SimpleNamespace(emoji=tmp_path, out=tmp_path))
