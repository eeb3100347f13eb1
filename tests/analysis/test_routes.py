"""Diffusion paths: planted routes are recovered exactly, from gates and while sampling; the classifier has controls."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from classify_paths import MIN_CAPTIONS, classify, gather
from raphael_dist.analysis.coverage import measure_coverage
from raphael_dist.analysis.expert_diagnostics import expert_loads, find_dead, find_duplicates, ordered_blocks
from raphael_dist.analysis.gate_routes import collect_word_paths, split_words, time_routes, word_routes
from raphael_dist.analysis.recorder import Record, Recorder
from raphael_dist.analysis.route_figures import draw_bands, draw_heat_map, draw_overlays, draw_routes, expert_colour
from raphael_dist.analysis.route_report import trace_values
from raphael_dist.analysis.trace_prompt import PromptTrace, make_trace
from raphael_dist.cli import routes as command_line
from raphael_dist.data.features.encoders import ImageEncoder, TextEncoder
from raphael_dist.data.features.run_encoders import TextFeatures
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import make_scheduler
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.sampling.sampler import Request, Sampler
from tests.lib.checkpoints import handmade_canonical
from tests.lib.synthetic import TEXT_WIDTH, TOKENS, tiny_config
from tests.sampling.test_sampling import config_of

EDGES = ((250, 500, 750), (100, 200, 900))  # where the time experts of even and odd blocks change


class TimestepOnly(nn.Module):
    """A dummy timestep embedding: t in the first number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, t_B: Tensor) -> Tensor:
        return nn.functional.pad(t_B.float().view(-1, 1), (0, self.width - 1))


class OneHot:
    """A dummy text encoder: token i of a caption is its i-th letter, one-hot; padding is zero."""

    max_tokens = TOKENS

    def encode(self, captions: list[str], pad: bool = True) -> TextFeatures:
        tokens = torch.zeros(len(captions), TOKENS, TEXT_WIDTH)
        for i, caption in enumerate(captions):
            for j, letter in enumerate(caption):
                tokens[i, j, ord(letter) - ord("a")] = 1
        count = len(captions)
        return TextFeatures(tokens, torch.ones(count, TOKENS, dtype=torch.bool), torch.full((count,), TOKENS - 1))


def planted_model() -> RaphaelUNet:
    """Return a model with known routes: letter d to expert (d + block) % 6, a timestep to its interval of EDGES."""
    config = tiny_config(model={**tiny_config().model.model_dump(), "latent_channels": 3, "gate_width": TEXT_WIDTH})
    torch.manual_seed(0)
    model = RaphaelUNet(config).eval()
    width = 4 * config.model.channels[0]
    model.time_proj, model.time_embedding = nn.Identity(), TimestepOnly(width)
    with torch.no_grad():
        for block in range(model.num_blocks):
            first, last = model.text_gates[block].net[0], model.text_gates[block].net[2]
            first.weight.copy_(10 * torch.eye(TEXT_WIDTH)), first.bias.zero_()
            last.weight.copy_(torch.eye(6).roll(block, 0).repeat(1, 2)), last.bias.zero_()
            first, last = model.time_gates[block].net[0], model.time_gates[block].net[2]
            for p in (first.weight, first.bias, last.weight, last.bias):
                p.zero_()
            first.weight[0, 0], first.bias[0] = 1, 2000  # large and positive, where GELU is the identity
            # Lines whose upper envelope changes at the edges: the slope grows by 1 at each, the offset falls by the edge.
            for k in range(4):
                last.weight[k, 0] = k
                last.bias[k] = -2000 * k - sum(edge - 0.5 for edge in EDGES[block % 2][:k])
    return model


def expected_time(num_blocks: int) -> np.ndarray:
    return np.array([[sum(t >= edge for edge in EDGES[block % 2]) for t in range(1000)] for block in range(num_blocks)])


def test_planted_routes_are_recovered():
    model = planted_model()
    route_LT = time_routes(model, 1000)
    assert route_LT is not None
    np.testing.assert_array_equal(route_LT.numpy(), expected_time(model.num_blocks))
    routes_BLY = word_routes(model, OneHot().encode(["abcdefg", "gfedcba"]).tokens)
    assert routes_BLY is not None
    expected = [[(d + block) % 6 for d in range(7)] for block in range(model.num_blocks)]
    assert routes_BLY[0].tolist() == expected
    assert routes_BLY[1].tolist() == [row[::-1] for row in expected]


def test_recorder_sees_planted_routes_and_changes_no_image():
    model, text = planted_model(), OneHot()
    sampler = Sampler.of(model, text, ImageEncoder.of(None))
    requests = [Request(caption, (8, 16), index=i) for i, caption in enumerate(("abc", "dab"))]

    def drawn() -> np.ndarray:
        return sampler.draw(requests, make_scheduler(model_config().diffusion, "ddim"), steps=4, guidance=3.0)

    before = drawn()
    with Recorder(model, sample=1, at=2) as recorder:
        assert (drawn() == before).all()
    record = recorder.record
    timesteps = [int(t) for t in record.timesteps]
    assert timesteps == [751, 501, 251, 1]
    np.testing.assert_array_equal(record.time_LS, expected_time(model.num_blocks)[:, timesteps])
    assert record.space_LY[:, :3].tolist() == [[(d + block) % 6 for d in (3, 0, 1)] for block in range(model.num_blocks)]
    assert record.sizes == [(4, 8) if level else (8, 16) for level in (0, 1, 0, 0)]  # down, middle, up
    assert [tuple(region.shape) for region in record.regions] == [(TOKENS, h * w) for h, w in record.sizes]
    assert all(region.any(dim=1).all() for region in record.regions)  # where a token's weight is largest at least
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    seen = make_trace(before[1], [("b", 2)], record)
    assert seen.route_WL.tolist() == [[(1 + block) % 6 for block in range(model.num_blocks)]]
    assert [region.shape for region in seen.regions[0]] == record.sizes
    assert seen.timestep == 251
    values = json.loads(json.dumps(trace_values("dab", seen)))
    assert (values["words"], values["at"], values["timesteps"]) == (["b"], 251, [751, 501, 251, 1])
    assert values["space"] == seen.route_WL.tolist()
    assert values["time"] == record.time_LS.tolist()
    for (h, w, cells), region in zip(values["regions"][0], seen.regions[0], strict=True):
        assert [[cell == "1" for cell in cells[row * w : row * w + w]] for row in range(h)] == region.tolist()


def test_large_regions_are_stored_with_fewer_cells() -> None:
    region_hw = np.zeros((100, 60), bool)
    region_hw[:50] = True
    trace = PromptTrace(np.zeros((400, 240, 3), np.uint8), ["a"], np.zeros((1, 1), int), [[region_hw]], 1.0, Record())
    ((h, w, cells),) = trace_values("a", trace)["regions"][0]
    assert (h, w) == (25, 15)
    assert cells == "1" * (13 * 15) + "0" * (12 * 15)


def model_config():
    return tiny_config()


def test_regions_follow_the_attention_maps():
    """Uniform attention gives a region of the whole image, peaked attention a part of it."""
    model = planted_model()
    with torch.no_grad():
        ordered_blocks(model)[0].attn2.to_q.weight.zero_()
        ordered_blocks(model)[1].attn2.to_q.weight.mul_(300)
    sampler = Sampler.of(model, OneHot(), ImageEncoder.of(None))
    with Recorder(model) as recorder:
        sampler.draw([Request("abc", (8, 8))], make_scheduler(model_config().diffusion, "ddim"), steps=1, guidance=1.0)
    assert recorder.record.regions[0].all()
    assert not recorder.record.regions[1].all(dim=1).any()


def test_coverage_of_regions_and_expert_pairs():
    """Worked out by hand: 4 image tokens, 3 text tokens of which the last is padding, 2 experts."""
    map_NY = torch.tensor([[1.0, 0.1, 1.0], [0.5, 1.0, 1.0], [0.1, 0.1, 1.0], [0.1, 0.1, 1.0]])
    record = Record(space_LY=torch.tensor([[0, 0, 1]]), maps=[map_NY])
    noisy = torch.tensor([[0, 1, 1]])
    low, high = measure_coverage(record, noisy, torch.tensor([True, True, False]), 2, (0.2, 0.8))
    assert low.trained_of_words == [pytest.approx((2 + 1) / 8)]
    assert low.trained == [pytest.approx((2 + 4) / 8)]
    assert low.words == [pytest.approx((2 / 4 + 1 / 4) / 2)]
    assert high.words == [pytest.approx(1 / 4)]
    assert low.padding == high.padding == [1.0]
    assert low.pairs == [pytest.approx((2 + 4) / 8)]  # expert 0 on the union of two regions, expert 1 everywhere
    assert low.pairs_of_words == [pytest.approx(2 / 8)]
    assert high.pairs_of_words == [pytest.approx(2 / 8)]


def test_dead_and_duplicate_experts_are_found():
    model = planted_model()
    block = ordered_blocks(model)[1]
    with torch.no_grad():
        for name in ("w1", "b1", "w2"):
            parameter = getattr(block.space_moe, name)
            parameter[4] = parameter[1]
    duplicates = [(f.kind, f.block, f.expert, f.other) for f in find_duplicates(model)]
    assert duplicates == [("space", 1, 1, 4)]
    route_LT = torch.tensor([[0, 0, 1, 2], [0, 1, 2, 3]])
    load_LK = expert_loads(route_LT, 4)
    assert load_LK.tolist() == [[2, 1, 1, 0], [1, 1, 1, 1]]
    assert [(f.kind, f.block, f.expert, f.other) for f in find_dead("time", load_LK)] == [("time", 0, 3, None)]
    assert "time expert 3 of block 0 is dead" in str(find_dead("time", load_LK)[0])


def words_with_paths(noise: float) -> list[tuple[str, int, list[int]]]:
    """Return 12 words in 30 captions each; each word has a path, a share of which is random."""
    draw = np.random.default_rng(1)
    own = draw.integers(0, 6, (12, 16))
    rows = []
    for caption in range(30):
        for word in range(12):
            random = draw.random(16) < noise
            rows.append((f"word{word}", caption, np.where(random, draw.integers(0, 6, 16), own[word]).tolist()))
    return rows


def test_classifier_finds_planted_words_and_not_shuffled_ones():
    pytest.importorskip("xgboost")
    outcome = classify(gather(words_with_paths(noise=0.1)), rounds=10)
    assert outcome.accuracy > 0.95
    assert outcome.chance == pytest.approx(1 / 12)
    # Three deviations of 360 guesses. It may be lower: a word that is frequent in a fold is rare in the training folds.
    limit = 1 / 12 + 3 * (1 / 12 * 11 / 12 / 360) ** 0.5
    assert outcome.shuffled < limit
    nothing = classify(gather(words_with_paths(noise=1.0)), rounds=10)
    assert nothing.accuracy < limit


def test_words_are_chosen_by_their_number_of_captions():
    paths = [("often", c, [0]) for c in range(MIN_CAPTIONS)] + [("also", c, [1]) for c in range(MIN_CAPTIONS)]
    paths += [("rare", c, [2]) for c in range(MIN_CAPTIONS - 1)] + [("often", 0, [3])]
    samples = gather(paths)
    assert sorted(samples.words) == ["also", "often"]
    assert len(samples.labels) == 2 * MIN_CAPTIONS  # a word counts once a caption
    with pytest.raises(UserError, match="two words"):
        gather(paths, only=["rare", "often"])


def test_words_match_tokens_up_to_the_encoder_limit():
    tokenizer = TextEncoder.load("minilm", 77, "cpu", torch.float32).tokenizer
    words = split_words(tokenizer, "a smiling unicornfish, noto style", 77)
    assert [word for word, _ in words] == ["a", "smiling", "unicornfish", "noto", "style"]
    assert [first for _, first in words[:3]] == [1, 2, 3]  # after the start token
    assert words[3][1] > 3 + 1 + 1  # "unicornfish" has several tokens, and the comma has one
    assert split_words(tokenizer, "a smiling unicornfish", 4) == [("a", 1), ("smiling", 2)]


def test_figures_show_routes_bands_and_regions():
    table = np.asarray(draw_routes(["red", "heart"], np.array([[0, 1, 2], [3, 4, 5]]), "title"))
    for expert in range(6):
        assert (table == expert_colour(expert)).all(axis=2).any(), expert
    strip = np.asarray(draw_bands(np.array([[0, 0, 1, 1]]), [0, 250, 500, 999], "title"))
    row = strip[24 + 8, 30:530]
    assert (row[10] == expert_colour(0)).all()
    assert (row[-10] == expert_colour(1)).all()
    assert draw_heat_map(np.array([[0.0, 2.0]]), "title").size[1] > 40
    region = np.zeros((4, 4), bool)
    region[:2] = True
    black = np.zeros((64, 64, 3), np.uint8)
    over = np.asarray(draw_overlays(black, ["a"], [[region]], np.array([[1]]), "t"))
    cell = over[42:106, -68:-4]
    assert (cell[10, 10] == (np.array(expert_colour(1)) * 0.45).astype(np.uint8)).all()
    assert (cell[50, 10] == 191).all()  # dimmed towards white


def test_routes_command_writes_figures_and_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = config_of()
    torch.manual_seed(5)
    weights = {name: p.detach() for name, p in RaphaelUNet(config).named_parameters()}
    handmade_canonical(tmp_path / "model", config, {(kind, n): p for n, p in weights.items() for kind in ("ema", "master")})
    command = [
        "--checkpoint",
        str(tmp_path / "model"),
        "--captions",
        "data/emoji-demo/val-0000.tar",
        "--out",
        str(tmp_path / "out"),
    ]
    assert command_line.main([*command, "--prompt", "a red heart, noto style"]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    figures = {"time.png", "space-experts.png", "prompt-0.png", "prompt-0-routes.png", "prompt-0-regions.png"}
    assert names == figures | {"paths.json", "report.md"}
    assert all(Image.open(tmp_path / "out" / name).size[0] > 7 for name in figures)
    routes = json.loads((tmp_path / "out" / "paths.json").read_text())
    blocks = len(routes["time"])
    assert all(row[0][0] == 0 and row[-1][1] == 999 for row in routes["time"])
    words = routes["words"]["a red heart, noto style"]
    assert list(words) == ["a", "red", "heart", "noto", "style"]
    assert all(len(path) == blocks for path in words.values())
    assert "| 0.2 | " in capsys.readouterr().out
    command[command.index("data/emoji-demo/val-0000.tar")] = "prompts=data/emoji/prompts.txt"
    assert command_line.main(command) == 0
    assert len(json.loads((tmp_path / "out" / "paths.json").read_text())["words"]) == 3  # sample.prompts
    capsys.readouterr()
    assert command_line.main([*command, "--timestep", "1000"]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in ("--timestep", "1000", "999"))


def test_word_paths_of_captions():
    model = planted_model()

    class WithTokenizer(OneHot):
        @staticmethod
        def tokenizer(caption: str, truncation: bool, max_length: int):
            return Letters(caption)

    class Letters:
        def __init__(self, caption: str) -> None:
            self.caption = caption

        def word_ids(self) -> list[int | None]:
            return [None if letter == "_" else i for i, letter in enumerate(self.caption)]

        def token_to_chars(self, token: int):
            return type("Span", (), {"start": token, "end": token + 1})

    paths = collect_word_paths(model, WithTokenizer(), ["ab", "c"], batch=1)
    assert [(word, caption) for word, caption, _ in paths] == [("a", 0), ("b", 0), ("c", 1)]
    assert paths[2][2] == [(2 + block) % 6 for block in range(model.num_blocks)]
    # Folds are made of these numbers: a repeated caption must not be in two folds.
    again = collect_word_paths(model, WithTokenizer(), ["ab", "c", "ab", "d", "c"], batch=2)
    assert [number for _, number, _ in again] == [0, 0, 1, 0, 0, 2, 1]
