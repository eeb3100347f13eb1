"""text.encoder=characters: quoted text is spelled, other words are hashed."""

import pytest
import torch

from raphael_dist.analysis.gate_routes import split_words
from raphael_dist.data.features.characters import BLOCK, WIDTH
from raphael_dist.data.features.encoders import TextEncoder, TextFacts
from raphael_dist.errors import UserError

CAPTION = 'the word "BIRD" in red on white, serif font'


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.load("characters", 24, "cpu", torch.float32)


def tokens(encoder: TextEncoder, caption: str) -> torch.Tensor:
    features = encoder.encode([caption])
    return features.tokens[0, features.mask[0]]


def test_each_quoted_character_is_a_token(encoder: TextEncoder) -> None:
    words = split_words(encoder.tokenizer, CAPTION, 24)
    texts = ["the", "word", "b", "i", "r", "d", "in", "red", "on", "white", "serif", "font"]
    assert words == [(text, place) for place, text in enumerate(texts)]
    features = encoder.encode([CAPTION, ""])
    assert features.tokens.shape == (2, 24, WIDTH)
    assert (features.mask.sum(1).tolist(), features.end.tolist()) == ([13, 1], [12, 0])
    assert not features.tokens[~features.mask].any()


def test_embedding_separates_identity_and_place(encoder: TextEncoder) -> None:
    noon = tokens(encoder, '"NOON"')
    identity, place = noon[:4, :BLOCK], noon[:4, BLOCK : 2 * BLOCK]
    assert torch.equal(identity[0], identity[3])
    assert identity[0].dot(identity[1]).abs() < BLOCK / 2
    assert all(not torch.equal(place[i], place[j]) for i in range(4) for j in range(i))
    assert torch.equal(tokens(encoder, '"NOON"')[0, BLOCK : 2 * BLOCK], tokens(encoder, '"SEEN"')[0, BLOCK : 2 * BLOCK])
    assert not torch.equal(noon[0], tokens(encoder, '"NOONS"')[0]), "the length is known to each character"
    assert not torch.equal(noon[0], tokens(encoder, '"noon"')[0])


def test_words_know_the_word_before(encoder: TextEncoder) -> None:
    one, other = tokens(encoder, "red on white"), tokens(encoder, "white on red")
    assert torch.equal(one[0, 2 * BLOCK : 3 * BLOCK], other[2, 2 * BLOCK : 3 * BLOCK])
    assert not torch.equal(one[0], other[2])
    assert torch.equal(tokens(encoder, "Red, on white."), one)


def test_truncation_keeps_the_end(encoder: TextEncoder) -> None:
    short = TextEncoder.load("characters", 4, "cpu", torch.float32)
    features = short.encode(['"ABCDEFGH"'])
    assert features.end.tolist() == [3]
    assert short.counter.truncated == 1
    assert torch.equal(features.tokens[0, 0], encoder.encode(['"ABCDEFGH"']).tokens[0, 0])


def test_special_characters_are_characters(encoder: TextEncoder) -> None:
    assert len(tokens(encoder, '"<pad>é😀"')) == 8
    assert len(tokens(encoder, '"')) == 1


def test_penultimate_layer_is_refused() -> None:
    with pytest.raises(UserError, match=r"text\.layer=penultimate requires .* text\.encoder=characters has none"):
        TextFacts.read("characters", 8, torch.float32, "penultimate")


def test_fingerprint_depends_on_length() -> None:
    facts = [TextFacts.read("characters", length, torch.float32) for length in (8, 8, 9)]
    assert facts[0] == facts[1]
    assert facts[0].fingerprint != facts[2].fingerprint
