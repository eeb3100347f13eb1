"""Evaluation: distances are torch-fidelity's own, studies resume and divide over ranks, the benchmark has controls."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raphael_dist import evaluate
from raphael_dist.errors import UserError
from raphael_dist.evaluation.distances import bootstrap, frechet_distance, kernel_distance, precision_recall
from raphael_dist.evaluation.emoji import Pictures, Space, judge
from raphael_dist.evaluation.features import ClipScore
from raphael_dist.evaluation.lettering import asked_text, edit_distance, reader_of
from raphael_dist.evaluation.readers import read_captions, read_reference
from raphael_dist.evaluation.study import Result, write_results
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.sampling.sampling import Request
from tests.checkpoints import handmade_canonical
from tests.launch import ROOT, run_ranks
from tests.test_sampling import config_of

DEFAULT = Request("", (8, 8), seed=3)


def features(seed: int, count: int, shift: float = 0.0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 24, generator=draw) @ torch.randn(24, 24, generator=draw) + shift


# torch-fidelity, and so torchmetrics, import torchvision for data sets and networks that are not used here: it need not be
# there. What follows runs in a process of its own, where a stand-in is imported in its place.
WITHOUT_TORCHVISION = """
import json, sys
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock
for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional",
             "torchvision.models"):
    sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))
import torch
"""
METRICS = (
    WITHOUT_TORCHVISION
    + """
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
a, b = torch.load(sys.argv[1])
found = fid_statistics_to_metric(*(fid_features_to_statistics(x.double()) for x in (a, b)), False)
found |= kid_features_to_metric(a.double(), b.double(), kid_subsets=7, kid_subset_size=50, verbose=False)
found |= prc_features_to_metric(a, b, verbose=False)
print(json.dumps(found))
"""
)
CLIP_SCORES = (
    """
import sys
from transformers import CLIPModel, CLIPProcessor
processor = CLIPProcessor.from_pretrained(sys.argv[2])
"""
    + WITHOUT_TORCHVISION
    + """
from torchmetrics.functional.multimodal import clip_score
class Model(CLIPModel):  # whose methods return tensors, as torchmetrics 1.9 expects of them
    def get_image_features(self, *args, **given):
        return super().get_image_features(*args, **given).pooler_output
    def get_text_features(self, *args, **given):
        return super().get_text_features(*args, **given).pooler_output
pictures, captions = torch.load(sys.argv[1])
model = Model.from_pretrained(sys.argv[2])
print(json.dumps([float(clip_score(p, c, lambda: (model, processor))) for p, c in zip(pictures, captions)]))
"""
)


def theirs(code: str, tmp_path: Path, given: object, *arguments: str):
    """Return what other packages compute, in a process of their own."""
    torch.save(given, tmp_path / "given.pt")
    command = [sys.executable, "-c", code, str(tmp_path / "given.pt"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "No module named 'torch" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_distances_are_those_of_torch_fidelity_on_the_same_features(tmp_path: Path):
    a, b = features(1, 120), features(2, 90, shift=0.3)
    expected = theirs(METRICS, tmp_path, (a, b))
    assert frechet_distance(a, b) == pytest.approx(expected["frechet_inception_distance"], rel=1e-9)
    mean, deviation = kernel_distance(a, b, subsets=7, size=50)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert deviation == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9)
    assert precision_recall(a, b) == pytest.approx((expected["precision"], expected["recall"]))


def test_the_frechet_distance_is_the_formula_for_diagonal_covariances():
    x = torch.tensor([[-1.0, -2.0], [1.0, -2.0], [-1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    variance = torch.tensor([4 / 3, 16 / 3])
    expected = 9.0 + float(((variance.sqrt() * 3) - variance.sqrt()).square().sum())
    assert frechet_distance(3 * x, x + torch.tensor([3.0, 0.0])) == pytest.approx(expected)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    a, b = features(1, 60), features(2, 50, shift=0.3)
    wide = [torch.nn.functional.pad(x, (0, 100)) for x in (a, b)]  # more features than pictures: the other way to compute it
    assert frechet_distance(*wide) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_precision_and_recall_tell_few_kinds_from_wrong_ones():
    torch.manual_seed(0)
    true = torch.cat([torch.randn(60, 3), torch.randn(60, 3) + 100])
    half = torch.randn(60, 3) * 0.1
    precision, recall = precision_recall(half, true)
    assert precision > 0.9  # nearly all of them could be true
    assert recall <= 0.5  # half of what there is never appears


def test_the_bootstrap_covers_the_mean_as_often_as_it_says():
    draw, covered = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = bootstrap(draw.normal(1.0, 2.0, 40), draws=300)
        covered += low <= 1.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


@pytest.mark.parametrize(("a", "b", "edits"), [("", "", 0), ("ABC", "ABC", 0), ("KITTEN", "SITTING", 3), ("", "AB", 2)])
def test_edit_distances(a: str, b: str, edits: int):
    assert edit_distance(a, b) == edit_distance(b, a) == edits


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "Hello World"', "Hello World"),
        ("a keycap with the number 10, noto style", "10"),
        ("a button with the letters ab, twemoji style", "AB"),
        ("an sos button, noto style", "SOS"),
        ("a red heart", None),
    ],
)
def test_the_text_that_a_prompt_asks_for(prompt: str, text: str | None):
    assert asked_text(prompt) == text


def test_tesseract_reads_what_is_printed():
    from PIL import ImageDraw, ImageFont

    try:
        read = reader_of("tesseract")
    except UserError as error:
        pytest.skip(str(error))
    for ground, ink in (("white", "black"), ("black", "white")):
        image = Image.new("RGB", (300, 80), ground)
        ImageDraw.Draw(image).text((20, 15), "HELLO 42", fill=ink, font=ImageFont.load_default(size=44))
        assert read(np.asarray(image)) == "HELLO 42"


def shout(pixels: np.ndarray) -> str:
    """Stands for an OCR engine: it reads "OK" in everything."""
    assert pixels.dtype == np.uint8
    return "ok "


@pytest.mark.parametrize("spec", ["tests.test_evaluation:nothing", "no.such.module:f", "tests.test_evaluation:DEFAULT"])
def test_an_engine_that_is_none_is_refused(spec: str):
    with pytest.raises(UserError, match="--ocr"):
        reader_of(spec)


def coco(path: Path, images: int) -> Path:
    rows = [
        {"image_id": i, "id": 10 * i + k, "caption": f"picture {i}, said\n {k}"} for i in range(images) for k in range(5)
    ]
    path.write_text(json.dumps({"annotations": rows, "images": []}))
    return path


def test_coco_gives_one_caption_of_each_image_and_a_fixed_choice(tmp_path: Path):
    spec = f"coco={coco(tmp_path / 'captions.json', 20)}"
    everything = read_captions(spec, None, 0, DEFAULT, tmp_path)
    assert [r.prompt.split(",")[0] for r in everything] == [f"picture {i}" for i in range(20)]
    assert len({r.prompt[-1] for r in everything}) > 1
    assert [r.index for r in everything] == list(range(20))
    some = [r.prompt for r in read_captions(spec, 8, 0, DEFAULT, tmp_path)]
    assert some == [r.prompt for r in read_captions(spec, 8, 0, DEFAULT, tmp_path)]
    assert some != [r.prompt for r in read_captions(spec, 8, 1, DEFAULT, tmp_path)]
    assert len({text.split(",")[0] for text in some}) == 8
    with pytest.raises(UserError, match="--count: given 21"):
        read_captions(spec, 21, 0, DEFAULT, tmp_path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("coco=nothing.json", "no annotations of COCO captions"),
        ("folder=/nothing", "holds 0 pictures"),
        ("shards=/nothing/*.tar", "--captions: '/nothing/\\*.tar' matches no file"),
        ("what", "allowed coco=FILE"),
    ],
)
def test_captions_that_are_not_there_are_named(tmp_path: Path, spec: str, message: str):
    with pytest.raises(UserError, match=message):
        read_captions(spec, None, 0, DEFAULT, tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a checkpoint of a tiny model, true pictures with captions, and a tiny CLIP."""
    folder = tmp_path_factory.mktemp("evaluation")
    config = config_of()
    config = config.model_copy(update={"data": config.data.model_copy(update={"cache_dir": folder / "cache"})})
    torch.manual_seed(5)
    weights = {name: p.detach() for name, p in RaphaelUNet(config).named_parameters()}
    handmade_canonical(folder / "model", config, {(kind, n): p for n, p in weights.items() for kind in ("ema", "master")})
    (folder / "true").mkdir()
    draw = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(draw.integers(0, 255, (10, 12, 3), np.uint8)).save(folder / "true" / f"{i}.png")
        (folder / "true" / f"{i}.txt").write_text(f"picture number {i}")
    return folder


def images_command(made: Path, out: Path, *more: str) -> list[str]:
    captions = ["--captions", f"folder={made / 'true'}", "--reference", f"folder={made / 'true'}", "--features", "hed"]
    common = ["--checkpoint", str(made / "model"), "--out", str(out), "--steps", "2", "--side", "8", "--batch", "5"]
    return ["images", *common, *captions, *more]


@pytest.mark.slow
def test_a_study_resumes_draws_nothing_twice_and_equals_that_of_two_ranks(made: Path, tmp_path: Path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    guidance = ["--guidance", "1", "3"]
    assert evaluate.main(images_command(made, one, *guidance)) == 0
    first = json.loads((one / "results.json").read_text())
    assert [row["guidance"] for row in first] == [1.0, 3.0]
    assert {"fid", "kid", "precision", "recall", "pictures"} <= set(first[0])
    assert Image.open(one / "curve.png").size[0] > 300
    # What a killed run leaves: half of the pictures, no features.
    kept = (one / "guidance-3" / "000001.png").stat().st_mtime_ns
    for name in ("000004.png", "000007.png", "features.npy"):
        (one / "guidance-3" / name).unlink()
    assert evaluate.main(images_command(made, one, *guidance)) == 0
    assert (one / "guidance-3" / "000001.png").stat().st_mtime_ns == kept
    for mine, again in zip(first, json.loads((one / "results.json").read_text()), strict=True):
        assert mine == pytest.approx(again, rel=1e-3, abs=1e-6)  # in other batches now
    run_ranks(["raphael_dist/evaluate.py", *images_command(made, two, *guidance)], 2)
    for mine, theirs in zip(first, json.loads((two / "results.json").read_text()), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-6)
    assert sorted(p.name for p in (one / "guidance-3").iterdir()) == sorted(p.name for p in (two / "guidance-3").iterdir())
    protocol = json.loads((one / "protocol.json").read_text())
    assert protocol["steps"] == 2
    assert protocol["count"] == 12
    assert (one / "results.csv").read_text().startswith("guidance,pictures,fid")
    # Numbers of another protocol do not mix with these.
    capsys.readouterr()
    assert evaluate.main([*images_command(made, one, *guidance), "--seed", "1"]) == 2
    assert "begun with seed = 0, now 1; choose another folder" in capsys.readouterr().err.replace("\n", " ")


def test_a_study_of_one_guidance_draws_what_is_missing_alone(made: Path, tmp_path: Path):
    command = images_command(made, tmp_path / "out", "--guidance", "2", "--count", "4")
    assert evaluate.main(command) == 0
    folder, first = tmp_path / "out" / "guidance-2", (tmp_path / "out" / "results.json").read_text()
    assert {"fid", "kid", "precision", "recall", "pictures"} <= set(json.loads(first)[0])
    kept = (folder / "000001.png").stat().st_mtime_ns
    for name in ("000002.png", "features.npy"):
        (folder / name).unlink()
    assert evaluate.main(command) == 0
    assert (folder / "000001.png").stat().st_mtime_ns == kept
    (again,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again == pytest.approx(json.loads(first)[0], rel=1e-3, abs=1e-6)


def test_lettering_is_scored_by_an_engine_of_the_users(made: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a sign "OK"\na sign "NO"\na red heart\na sign "OKAY"\n')
    common = ["--checkpoint", str(made / "model"), "--out", str(tmp_path / "out"), "--steps", "2"]
    assert evaluate.main(["text", *common, "--captions", f"prompts={prompts}", "--ocr", "tests.test_evaluation:shout"]) == 0
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert row["pictures"] == 3  # the heart asks for no text
    assert row["text_exact"] == pytest.approx(1 / 3)
    assert row["text_edits"] == pytest.approx((0 + 2 / 2 + 2 / 4) / 3)


def test_results_leave_out_what_was_not_asked_for(tmp_path: Path):
    write_results(tmp_path, [Result(1.5, 10, clip=25.0), Result(3.0, 10, clip=26.0)])
    assert (tmp_path / "results.csv").read_text().split() == ["guidance,pictures,clip", "1.5,10,25.0", "3.0,10,26.0"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--guidance", "-1"], "--guidance: given -1"),
        (["--count", "1"], "--count: given 1, must be 2 or more"),
        (["--features", "inception=/nothing"], "--features: /nothing is not a file"),
        (["--features", "vgg"], "--features: given 'vgg'"),
        (["--clip", "/nothing"], "--clip: '/nothing' is not a folder"),
        (["--reference", "what"], "--reference: given 'what'"),
        (["--out", "/proc/x"], "--out /proc/x: cannot use"),
    ],
)
def test_mistakes_are_one_line(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more, message):
    assert evaluate.main([*images_command(made, tmp_path / "out"), *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# ---- the emoji benchmark --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Space:
    cache = tmp_path_factory.mktemp("cache")
    pictures = Pictures.read(["data/emoji-demo/train-0000.tar"], ["data/emoji-demo/val-0000.tar"], cache, (64, 64))
    assert len(pictures.things) == 90
    assert pictures.held_out.sum() == 3
    return Space(pictures, cache, torch.device("cpu"))


def test_true_pictures_are_judged_right_and_wrong_ones_wrong(space: Space):
    p = space.pictures
    held = np.flatnonzero(p.held_out)
    things, styles = [p.things[i] for i in held], [p.styles[i] for i in held]
    true = {row.what: row.value for row in judge(space, space.features([p.pixels[i] for i in held]), things, styles)}
    assert true["own true picture found, at 1"] == 1.0
    assert true["style accuracy"] == 1.0
    assert true["Frechet distance"] == pytest.approx(0, abs=1e-5)
    noise = list(np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), np.uint8))
    rows = judge(space, space.features(noise), things, styles)
    assert all(row.low <= row.value <= row.high for row in rows)
    wrong = {row.what: row.value for row in rows}
    assert wrong["own true picture found, at 1"] <= 1 / 3  # something is nearest to noise, too
    assert wrong["Frechet distance"] > 0.05
    # Another thing of the right style: the style is right, the thing is not.
    others = [next(i for i, s in enumerate(p.styles) if s == p.styles[h] and p.things[i] != p.things[h]) for h in held]
    mixed = {row.what: row.value for row in judge(space, space.true[torch.tensor(others)], things, styles)}
    assert mixed["style accuracy"] > 0.6
    assert mixed["own true picture found, at 1"] == 0.0


def test_ranks_are_those_of_a_search_by_hand(space: Space):
    p = space.pictures
    query = space.true[torch.tensor([3])]
    cells = space.true.cells
    similar = {p.things[i]: float(cells[i] @ query.cells[0]) for i in range(90) if p.styles[i] == "noto"}
    for thing in list(similar)[:5]:
        expected = sum(value > similar[thing] for value in similar.values())
        assert space.rank(query, [thing], ["noto"])[0] == expected


def test_features_of_true_pictures_are_kept(space: Space, tmp_path: Path):
    p = space.pictures
    few = Pictures(p.pixels[-9:], p.things[-9:], p.styles[-9:], p.captions[-9:], p.held_out[-9:])
    first = Space(few, tmp_path, torch.device("cpu"))
    (kept,) = (tmp_path / "features").iterdir()
    before = kept.stat().st_mtime_ns
    again = Space(few, tmp_path, torch.device("cpu"))
    assert kept.stat().st_mtime_ns == before
    torch.testing.assert_close(first.true.cells, again.true.cells, rtol=0, atol=0)


@pytest.mark.slow
def test_the_benchmark_is_one_command_and_one_table(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shards = ["--shards", "data/emoji-demo/train-0000.tar", "--val-shards", "data/emoji-demo/val-0000.tar"]
    common = ["--checkpoint", str(made / "model"), "--out", str(tmp_path / "out"), "--steps", "2", "--per-pair", "2"]
    assert evaluate.main(["emoji", *common, *shards]) == 0
    table = capsys.readouterr().out
    for what in ("style accuracy", "own true picture found, at 5", "Frechet distance", "loss at timestep 950"):
        assert f"| {what} |" in table
    assert "3 held-out pairs, 6 pictures" in table
    assert Image.open(tmp_path / "out" / "pairs.png").size[0] > 300
    first = json.loads((tmp_path / "out" / "results.json").read_text())
    assert evaluate.main(["emoji", *common, *shards]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == first
    (row,) = [row for row in first["this model"] if row["what"] == "loss, all timesteps"]
    assert row["low"] <= row["value"] <= row["high"]
    assert evaluate.main(["emoji", *common, "--shards", str(made / "nothing.tar")]) == 2
    assert "error: " in capsys.readouterr().err


def test_references_are_read_from_shards_cut_to_a_size(tmp_path: Path):
    found = read_reference(f"shards={ROOT}/data/emoji-demo/val-0000.tar", tmp_path, (16, 16))
    assert [picture.shape for picture in found] == [(16, 16, 3)] * 3


def tiny_clip(folder: Path) -> Path:
    """Write a CLIP with random weights, and its processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    from tests.test_pipeline import clip

    tokenizer = CLIPTokenizer.from_pretrained(clip(folder / "text", 32) / "tokenizer")
    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "vocab_size": len(tokenizer)}
    config = CLIPConfig(
        text_config={**sizes, **ids}, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=16
    )
    CLIPModel(config).save_pretrained(folder / "clip")
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder / "clip")
    return folder / "clip"


@pytest.mark.slow
def test_the_clip_score_is_that_of_torchmetrics(tmp_path: Path):
    folder = tiny_clip(tmp_path)
    pictures = list(np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), np.uint8))
    captions = ["a red heart", "a sun", "a dog", "a boat", "a cup"]
    scores = ClipScore(folder, torch.device("cpu"))(pictures, captions)
    tensors = [torch.from_numpy(p).permute(2, 0, 1) for p in pictures]
    expected = theirs(CLIP_SCORES, tmp_path, (tensors, captions), str(folder))
    assert scores == pytest.approx(expected, abs=1e-3)
    assert len({round(score, 3) for score in scores}) > 1
