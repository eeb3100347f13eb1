"""Evaluation: distances equal torch-fidelity's, studies resume and divide over ranks, the benchmark has controls."""

import importlib.util
import json
import socket
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

import emoji_benchmark
from emoji_data.feature_space import FeatureSpace, TrueImages, judge
from raphael_dist.cli import evaluate
from raphael_dist.errors import UserError
from raphael_dist.evaluation.distances import bootstrap, frechet_distance, kernel_distance, precision_recall, wilson
from raphael_dist.evaluation.image_features import ClipScore
from raphael_dist.evaluation.lettering import alphabet_of, edit_distance, requested_text, score_texts
from raphael_dist.evaluation.ocr import load_reader
from raphael_dist.evaluation.study import Result, write_results
from raphael_dist.evaluation.study_data import read_captions, read_reference
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.sampling.sampler import Request
from tests.data.shards.test_shards import good, write_shard
from tests.lib.checkpoints import handmade_canonical
from tests.lib.launch import ROOT, run_ranks
from tests.sampling.test_sampling import config_of

DEFAULT = Request("", (8, 8), seed=3)


def features(seed: int, count: int, shift: float = 0.0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 24, generator=draw) @ torch.randn(24, 24, generator=draw) + shift


# torch-fidelity and torchmetrics import torchvision for data sets and networks that are not used here. The code below runs
# in a process of its own, where a mock replaces torchvision, so that it need not be installed.
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
metrics = fid_statistics_to_metric(*(fid_features_to_statistics(x.double()) for x in (a, b)), False)
metrics |= kid_features_to_metric(a.double(), b.double(), kid_subsets=7, kid_subset_size=50, verbose=False)
metrics |= prc_features_to_metric(a, b, verbose=False)
print(json.dumps(metrics))
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
class Model(CLIPModel):  # torchmetrics 1.9 expects methods that return tensors
    def get_image_features(self, *args, **kwargs):
        return super().get_image_features(*args, **kwargs).pooler_output
    def get_text_features(self, *args, **kwargs):
        return super().get_text_features(*args, **kwargs).pooler_output
images, captions = torch.load(sys.argv[1])
model = Model.from_pretrained(sys.argv[2])
print(json.dumps([float(clip_score(p, c, lambda: (model, processor))) for p, c in zip(images, captions)]))
"""
)


def run_reference(code: str, tmp_path: Path, inputs: object, *arguments: str):
    """Return what another package computes, in a process of its own."""
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", code, str(tmp_path / "inputs.pt"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "No module named 'torch" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_distances_equal_torch_fidelity(tmp_path: Path):
    a, b = features(1, 120), features(2, 90, shift=0.3)
    expected = run_reference(METRICS, tmp_path, (a, b))
    assert frechet_distance(a, b) == pytest.approx(expected["frechet_inception_distance"], rel=1e-9)
    mean, deviation = kernel_distance(a, b, subsets=7, size=50)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert deviation == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9)
    assert precision_recall(a, b) == pytest.approx((expected["precision"], expected["recall"]))


def test_frechet_distance_of_diagonal_covariances():
    x = torch.tensor([[-1.0, -2.0], [1.0, -2.0], [-1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    variance = torch.tensor([4 / 3, 16 / 3])
    expected = 9.0 + float(((variance.sqrt() * 3) - variance.sqrt()).square().sum())
    assert frechet_distance(3 * x, x + torch.tensor([3.0, 0.0])) == pytest.approx(expected)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    a, b = features(1, 60), features(2, 50, shift=0.3)
    wide = [torch.nn.functional.pad(x, (0, 100)) for x in (a, b)]  # more features than images, which is computed another way
    assert frechet_distance(*wide) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_precision_and_recall_of_a_missing_mode():
    torch.manual_seed(0)
    true = torch.cat([torch.randn(60, 3), torch.randn(60, 3) + 100])
    half = torch.randn(60, 3) * 0.1
    precision, recall = precision_recall(half, true)
    assert precision > 0.9  # nearly all of them could be true
    assert recall <= 0.5  # half of what there is never appears


def test_bootstrap_interval_covers_the_mean():
    draw, covered = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = bootstrap(draw.normal(1.0, 2.0, 40), draws=300)
        covered += low <= 1.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


@pytest.mark.parametrize(("a", "b", "edits"), [("", "", 0), ("ABC", "ABC", 0), ("KITTEN", "SITTING", 3), ("", "AB", 2)])
def test_edit_distance(a: str, b: str, edits: int):
    assert edit_distance(a, b) == edit_distance(b, a) == edits


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "Hello World"', "Hello World"),
        ("the words “RED” and “CAT”", "RED CAT"),
        ("a keycap with the number 10, noto style", "10"),
        ("a button with the letters ab, twemoji style", "AB"),
        ("an sos button, noto style", "SOS"),
        ("a red heart", None),
    ],
)
def test_requested_text_of_a_prompt(prompt: str, text: str | None):
    assert requested_text(prompt) == text


def printed(text: str, size: int = 44, ground: str = "white", ink: str = "black") -> np.ndarray:
    """Return an image with a line of text of a height in pixels."""
    from PIL import ImageDraw, ImageFont

    image = Image.new("RGB", (7 * size, 2 * size), ground)
    ImageDraw.Draw(image).text((size // 2, size // 3), text, fill=ink, font=ImageFont.load_default(size=size))
    return np.asarray(image)


@pytest.mark.parametrize("ocr", ["rapidocr", "tesseract"])
def test_ocr_reads_printed_text(ocr: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket, "socket", None)  # weights that were missing could not be downloaded
    try:
        read = load_reader(ocr, alphabet_of(["HELLO 42"]))
    except UserError as error:
        pytest.skip(str(error))
    for ground, ink in (("white", "black"), ("black", "white")):
        assert read(printed("HELLO 42", 44, ground, ink)) == "HELLO 42"
    if ocr == "rapidocr":
        assert "rapidocr" not in sys.modules
        assert read(printed("HELLO 42", 16)) == "HELLO 42"
        assert load_reader(ocr, alphabet_of(["LO"]))(printed("O")) == "O"
        assert load_reader(ocr, alphabet_of(["42"]))(printed("O")) == "0"  # the nearest character of the alphabet


def test_missing_rapidocr_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'^--ocr=rapidocr requires .* Run `pip install "raphael_dist\[eval\]"`'):
        load_reader("rapidocr", "ABC")


def test_alphabet_of_texts():
    assert alphabet_of(["Ab"]) == set(string.ascii_letters)
    assert alphabet_of(["7 É!"]) == {*string.digits, " ", "É", "!"}
    assert alphabet_of(["A7É"], "AB89") == set("AB789É")


def test_score_of_read_texts():
    score = score_texts(["BIRD", "OK", "a cat", "NO"], ["bird.", "0K", "a cat", ""])
    assert score.exact == 0.5
    assert score.cer == pytest.approx((0 + 1 + 0 + 2) / (4 + 2 + 5 + 2))
    assert (score.exact_low, score.exact_high) == pytest.approx((0.1500, 0.8500), abs=1e-4)  # Wilson, by hand
    assert score.cer_low < score.cer < score.cer_high
    assert wilson(300, 300) == pytest.approx((0.98736, 1.0), abs=1e-5)
    assert wilson(0, 300) == pytest.approx((0.0, 0.01264), abs=1e-5)


def shout(pixels: np.ndarray) -> str:
    """A dummy OCR engine that reads "OK" in every image."""
    assert pixels.dtype == np.uint8
    return "ok "


@pytest.mark.parametrize(
    "spec", ["tests.evaluation.test_evaluation:nothing", "no.such.module:f", "tests.evaluation.test_evaluation:DEFAULT"]
)
def test_unknown_ocr_engine_is_refused(spec: str):
    with pytest.raises(UserError, match="--ocr"):
        load_reader(spec, "")


def coco(path: Path, images: int) -> Path:
    rows = [{"image_id": i, "id": 10 * i + k, "caption": f"image {i}, with\n {k}"} for i in range(images) for k in range(5)]
    path.write_text(json.dumps({"annotations": rows, "images": []}))
    return path


def test_coco_captions_one_per_image_fixed_by_seed(tmp_path: Path):
    spec = f"coco={coco(tmp_path / 'captions.json', 20)}"
    everything = read_captions(spec, None, 0, DEFAULT, tmp_path)
    assert [r.prompt.split(",")[0] for r in everything] == [f"image {i}" for i in range(20)]
    assert len({r.prompt[-1] for r in everything}) > 1
    assert [r.index for r in everything] == list(range(20))
    some = [r.prompt for r in read_captions(spec, 8, 0, DEFAULT, tmp_path)]
    assert some == [r.prompt for r in read_captions(spec, 8, 0, DEFAULT, tmp_path)]
    assert some != [r.prompt for r in read_captions(spec, 8, 1, DEFAULT, tmp_path)]
    assert len({text.split(",")[0] for text in some}) == 8
    with pytest.raises(UserError, match="--count=21 "):
        read_captions(spec, 21, 0, DEFAULT, tmp_path)


@pytest.mark.parametrize(
    ("caption", "kind"), [(None, "null"), ({"en": "x"}, "an object"), (True, "true or false"), (3, "a number")], ids=str
)
def test_coco_caption_that_is_no_text_is_refused(tmp_path: Path, caption: object, kind: str):
    (tmp_path / "c.json").write_text(json.dumps({"annotations": [{"image_id": 7, "caption": caption}]}))
    with pytest.raises(UserError, match=f"the caption of image 7 must be a string, but it is {kind}"):
        read_captions(f"coco={tmp_path / 'c.json'}", None, 0, DEFAULT, tmp_path)


def test_folder_is_read_by_the_rules_of_data_preparation(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in ("a.png", "b.png", "c.PNG", ".ipynb_checkpoints/a-checkpoint.png", "a.edge.png", "._b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, format="PNG")
    for name in ("a.txt", "b.TXT", "c.PNG.txt", "._b.txt"):
        (tmp_path / name).write_text(f"caption in {name}")
    images = read_reference(f"folder={tmp_path}", tmp_path, (8, 8))
    assert [path.name for path in images if isinstance(path, Path)] == ["a.png", "b.png", "c.PNG"]
    assert "files that are left out: 2 x hidden file" in caplog.text
    captions = read_captions(f"folder={tmp_path}", None, 0, DEFAULT, tmp_path)
    assert [r.prompt for r in captions] == ["caption in a.txt", "caption in b.TXT", "caption in c.PNG.txt"]


def test_damaged_shard_and_bad_samples_are_counted_in_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    samples = [good(i) for i in range(10)]
    samples[0][1]["png"] = b"no image"
    whole = write_shard(tmp_path / "x.tar", samples).read_bytes()
    assert read_captions(f"shards={tmp_path}/x.tar", None, 0, DEFAULT, tmp_path / "cache")
    assert "samples that cannot be used and are left out: 1; the first is x.tar:" in caplog.text
    assert "to the end" not in caplog.text
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 3])
    caplog.clear()
    assert len(read_captions(f"shards={tmp_path}/cut.tar", None, 0, DEFAULT, tmp_path / "cache")) < 9
    assert caplog.text.count("1 of 1 shard cannot be read to the end") == caplog.text.count("is cut.tar: is ") == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("coco=nothing.json", "--captions=coco=nothing.json .*nothing.json"),
        ("folder=/nothing", "--captions=folder=/nothing must be a folder, but there is no such folder"),
        ("shards=/nothing/*.tar", "--captions='/nothing/\\*.tar' matches no file"),
        ("what", "--captions=what .*coco=FILE"),
    ],
)
def test_missing_captions_are_named(tmp_path: Path, spec: str, message: str):
    with pytest.raises(UserError, match=message):
        read_captions(spec, None, 0, DEFAULT, tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a checkpoint of a tiny model, and true images with captions."""
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
        (folder / "true" / f"{i}.txt").write_text(f"image number {i}")
    return folder


def images_command(made: Path, out: Path, *more: str) -> list[str]:
    captions = ["--captions", f"folder={made / 'true'}", "--reference", f"folder={made / 'true'}", "--features", "hed"]
    common = ["--checkpoint", str(made / "model"), "--out", str(out), "--steps", "2", "--side", "8", "--batch", "5"]
    return ["images", *common, *captions, *more]


@pytest.mark.slow
def test_study_resumes_and_equals_two_ranks(made: Path, tmp_path: Path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    guidance = ["--guidance", "1", "3"]
    assert evaluate.main(images_command(made, one, *guidance)) == 0
    first = json.loads((one / "results.json").read_text())
    assert [row["guidance"] for row in first] == [1.0, 3.0]
    assert {"fid", "kid", "precision", "recall", "images"} <= set(first[0])
    assert Image.open(one / "curve.png").size[0] > 300
    # What a killed run leaves: some of the images, no features.
    written_at = (one / "guidance-3" / "000001.png").stat().st_mtime_ns
    for name in ("000004.png", "000007.png", "features.npy"):
        (one / "guidance-3" / name).unlink()
    assert evaluate.main(images_command(made, one, *guidance)) == 0
    assert (one / "guidance-3" / "000001.png").stat().st_mtime_ns == written_at
    for before, after in zip(first, json.loads((one / "results.json").read_text()), strict=True):
        assert before == pytest.approx(after, rel=1e-3, abs=1e-6)  # batches differ
    run_ranks(["raphael_dist/__main__.py", "evaluate", *images_command(made, two, *guidance)], 2)
    for alone, together in zip(first, json.loads((two / "results.json").read_text()), strict=True):
        assert alone == pytest.approx(together, rel=1e-3, abs=1e-6)
    assert sorted(p.name for p in (one / "guidance-3").iterdir()) == sorted(p.name for p in (two / "guidance-3").iterdir())
    protocol = json.loads((one / "protocol.json").read_text())
    assert protocol["steps"] == 2
    assert protocol["count"] == 12
    assert (one / "results.csv").read_text().startswith("guidance,images,fid")
    # Another protocol in the same folder is refused.
    capsys.readouterr()
    assert evaluate.main([*images_command(made, one, *guidance), "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in (f"--out={one}", "seed=0", "is 1 now"))


def test_study_draws_only_missing_images(made: Path, tmp_path: Path):
    command = images_command(made, tmp_path / "out", "--guidance", "2", "--count", "4")
    assert evaluate.main(command) == 0
    folder, first = tmp_path / "out" / "guidance-2", (tmp_path / "out" / "results.json").read_text()
    assert {"fid", "kid", "precision", "recall", "images"} <= set(json.loads(first)[0])
    written_at = (folder / "000001.png").stat().st_mtime_ns
    for name in ("000002.png", "features.npy"):
        (folder / name).unlink()
    assert evaluate.main(command) == 0
    assert (folder / "000001.png").stat().st_mtime_ns == written_at
    (again,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again == pytest.approx(json.loads(first)[0], rel=1e-3, abs=1e-6)


def test_lettering_is_scored_by_a_custom_engine(made: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a sign "OK"\na sign "NO"\na red heart\na sign "OKAY"\n')
    common = ["--checkpoint", str(made / "model"), "--out", str(tmp_path / "out"), "--steps", "2"]
    assert (
        evaluate.main(
            ["text", *common, "--captions", f"prompts={prompts}", "--ocr", "tests.evaluation.test_evaluation:shout"]
        )
        == 0
    )
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert row["images"] == 3  # the heart asks for no text
    assert row["text_exact"] == pytest.approx(1 / 3)
    assert row["text_exact_low"] < 1 / 3 < row["text_exact_high"]
    assert row["text_cer"] == pytest.approx((0 + 2 + 2) / (2 + 2 + 4))
    read = (tmp_path / "out" / "guidance-4" / "text.csv").read_text().splitlines()
    assert read == ["image,requested,read", "0,OK,ok ", "1,NO,ok ", "2,OKAY,ok "]
    (header, values) = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert header == "guidance,images," + ",".join(f"text_{n}{e}" for n in ("exact", "cer") for e in ("", "_low", "_high"))
    assert len(values.split(",")) == 8


def test_true_images_are_read_like_drawings(made: Path, tmp_path: Path):
    shards, prompts = tmp_path / "true.tar", tmp_path / "prompts.txt"
    prompts.write_text('a sign "NO"\n')
    captions = ['a sign "OK"', "a dog", 'a sign "WHY"']
    with webdataset.TarWriter(str(shards)) as tar:
        for i, caption in enumerate(captions):
            tar.write({"__key__": str(i), "png": np.zeros((8, 8, 3), np.uint8), "txt": caption})
    command = ["text", "--checkpoint", str(made / "model"), "--out", str(tmp_path / "out"), "--steps", "2"]
    command += ["--captions", f"prompts={prompts}", "--reference", f"shards={shards}"]
    assert evaluate.main([*command, "--ocr", "tests.evaluation.test_evaluation:shout"]) == 0
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (row["text_exact"], row["true_text_exact"]) == (0.0, 0.5)
    assert (row["text_cer"], row["true_text_cer"]) == (1.0, 3 / 5)
    assert (tmp_path / "out" / "reference-text.csv").read_text().splitlines()[1:] == ["0,OK,ok ", "1,WHY,ok "]


def test_quoted_punctuation_is_refused_before_drawing(made: Path, tmp_path: Path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text('a sign "OK"\na sign "?!"\na sign "_"\n')
    command = ["text", "--checkpoint", str(made / "model"), "--out", str(out), "--steps", "2"]
    assert (
        evaluate.main([*command, "--captions", f"prompts={prompts}", "--ocr", "tests.evaluation.test_evaluation:shout"]) == 2
    )
    assert """2 of 3 captions it has neither, for example in 'a sign "?!"'""" in capsys.readouterr().err.replace("\n", " ")
    assert not out.exists()


def test_results_have_only_requested_columns(tmp_path: Path):
    write_results(tmp_path, [Result(1.5, 10, clip=25.0), Result(3.0, 10, clip=26.0)])
    assert (tmp_path / "results.csv").read_text().split() == ["guidance,images,clip", "1.5,10,25.0", "3.0,10,26.0"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--guidance", "-1"], "--guidance -1"),
        (["--count", "1"], "--count 1"),
        (["--features", "inception=/nothing"], "--features=inception=/nothing "),
        (["--features", "vgg"], "--features=vgg "),
        (["--clip", "/nothing"], "--clip=/nothing "),
        (["--reference", "what"], "--reference=what "),
        (["--out", "/proc/x"], "--out=/proc/x "),
    ],
)
def test_mistakes_are_one_line(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more, message):
    assert evaluate.main([*images_command(made, tmp_path / "out"), *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# ---- the emoji benchmark --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> FeatureSpace:
    cache = tmp_path_factory.mktemp("cache")
    images = TrueImages.read(["data/emoji-demo/train-0000.tar"], ["data/emoji-demo/val-0000.tar"], cache, (64, 64))
    assert len(images.things) == 90
    assert images.held_out.sum() == 3
    return FeatureSpace(images, cache, torch.device("cpu"))


def test_missing_shards_are_named_by_their_option(tmp_path: Path) -> None:
    missing, present = [str(tmp_path / "missing.tar")], ["data/emoji-demo/val-0000.tar"]
    with pytest.raises(UserError, match=r"^--shards\b"):
        TrueImages.read(missing, present, tmp_path, (8, 8), ("--shards", "data.val_shards"))
    with pytest.raises(UserError, match=r"^data\.val_shards\b"):
        TrueImages.read(present, missing, tmp_path, (8, 8), ("--shards", "data.val_shards"))


def test_judgement_of_true_wrong_and_noise_images(space: FeatureSpace):
    true = space.images
    held = np.flatnonzero(true.held_out)
    things, styles = [true.things[i] for i in held], [true.styles[i] for i in held]
    values = {row.what: row.value for row in judge(space, space.features([true.pixels[i] for i in held]), things, styles)}
    assert values["own true image, top 1"] == 1.0
    assert values["style accuracy"] == 1.0
    assert values["Frechet distance"] == pytest.approx(0, abs=1e-5)
    noise = list(np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), np.uint8))
    rows = judge(space, space.features(noise), things, styles)
    assert all(row.low <= row.value <= row.high for row in rows)
    wrong = {row.what: row.value for row in rows}
    assert wrong["own true image, top 1"] <= 1 / 3  # something is nearest to noise, too
    assert wrong["Frechet distance"] > 0.05
    # Another thing of the right style: the style is right, the thing is not.
    others = [
        next(i for i, s in enumerate(true.styles) if s == true.styles[h] and true.things[i] != true.things[h]) for h in held
    ]
    mixed = {row.what: row.value for row in judge(space, space.true[torch.tensor(others)], things, styles)}
    assert mixed["style accuracy"] > 0.6
    assert mixed["own true image, top 1"] == 0.0


def test_ranks_equal_a_direct_search(space: FeatureSpace):
    true = space.images
    query = space.true[torch.tensor([3])]
    cells = space.true.cells
    similar = {true.things[i]: float(cells[i] @ query.cells[0]) for i in range(90) if true.styles[i] == "noto"}
    for thing in list(similar)[:5]:
        expected = sum(value > similar[thing] for value in similar.values())
        assert space.rank(query, [thing], ["noto"])[0] == expected


def test_features_of_true_images_are_cached(space: FeatureSpace, tmp_path: Path):
    true = space.images
    few = TrueImages(true.pixels[-9:], true.things[-9:], true.styles[-9:], true.captions[-9:], true.held_out[-9:])
    first = FeatureSpace(few, tmp_path, torch.device("cpu"))
    (cached,) = (tmp_path / "features").iterdir()
    before = cached.stat().st_mtime_ns
    again = FeatureSpace(few, tmp_path, torch.device("cpu"))
    assert cached.stat().st_mtime_ns == before
    torch.testing.assert_close(first.true.cells, again.true.cells, rtol=0, atol=0)


@pytest.mark.slow
def test_emoji_benchmark_command(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shards = ["--shards", "data/emoji-demo/train-0000.tar", "--val-shards", "data/emoji-demo/val-0000.tar"]
    common = ["--checkpoint", str(made / "model"), "--out", str(tmp_path / "out"), "--steps", "2", "--per-pair", "2"]
    assert emoji_benchmark.main([*common, *shards]) == 0
    table = capsys.readouterr().out
    for what in ("style accuracy", "own true image, top 5", "Frechet distance", "loss at timestep 950"):
        assert f"| {what} |" in table
    assert "3 held-out pairs, 6 images" in table
    assert Image.open(tmp_path / "out" / "pairs.png").size[0] > 300
    first = json.loads((tmp_path / "out" / "results.json").read_text())
    assert emoji_benchmark.main([*common, *shards]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == first
    (row,) = [row for row in first["this model"] if row["what"] == "loss, all timesteps"]
    assert row["low"] <= row["value"] <= row["high"]
    assert emoji_benchmark.main([*common, "--shards", str(made / "nothing.tar")]) == 2
    assert "error: " in capsys.readouterr().err


def test_reference_shards_are_cropped_to_a_size(tmp_path: Path):
    images = read_reference(f"shards={ROOT}/data/emoji-demo/val-0000.tar", tmp_path, (16, 16))
    assert [image.shape for image in images] == [(16, 16, 3)] * 3


def tiny_clip(folder: Path) -> Path:
    """Write a CLIP with random weights, and its processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    from tests.sampling.test_pipeline import clip

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
def test_clip_score_equals_torchmetrics(tmp_path: Path):
    folder = tiny_clip(tmp_path)
    images = list(np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), np.uint8))
    captions = ["a red heart", "a sun", "a dog", "a boat", "a cup"]
    scores = ClipScore(folder, torch.device("cpu"))(images, captions)
    tensors = [torch.from_numpy(p).permute(2, 0, 1) for p in images]
    expected = run_reference(CLIP_SCORES, tmp_path, (tensors, captions), str(folder))
    assert scores == pytest.approx(expected, abs=1e-3)
    assert len({round(score, 3) for score in scores}) > 1
