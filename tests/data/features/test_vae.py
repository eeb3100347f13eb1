"""The small VAE: the committed weights reconstruct held-out images; training depends only on its seed."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from emoji_data import vae
from raphael_dist.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "data/vae-emoji"
WEIGHTS = FOLDER / "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: with tiny tensors on busy cores, threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_vae", ROOT / "tools/train_vae.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def committed() -> Any:
    return vae.load(FOLDER)


def shards(pattern: str) -> list[Path]:
    return sorted((ROOT / "data").glob(pattern))


def test_committed_weights_reconstruct_held_out_images(committed: Any) -> None:
    for pattern in ("emoji/val-*.tar*", "emoji-demo/val-*.tar*"):
        assert vae.psnr(committed, vae.read_images(shards(pattern))[::3]).mean() >= 27


def test_committed_vae_is_small_float16_with_factor_4() -> None:
    assert WEIGHTS.stat().st_size <= 3_000_000
    with safe_open(WEIGHTS, "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118 (no mapping)
    config = json.loads((FOLDER / "config.json").read_text())
    assert (len(config["block_out_channels"]), config["latent_channels"]) == (3, 4)


def test_scaled_latents_have_unit_std(committed: Any) -> None:
    images = vae.read_images(shards("emoji/train-0000.tar*"))[:128]
    assert vae.latent_std(committed, images) * committed.config["scaling_factor"] == pytest.approx(1, abs=0.05)


def test_batch_depends_only_on_seed_and_step() -> None:
    images = torch.arange(6 * 3 * 8 * 8, dtype=torch.uint8).view(6, 3, 8, 8)
    x, noise = vae.draw_batch(images, 3, 17, 4)
    again, other = vae.draw_batch(images, 3, 17, 4), vae.draw_batch(images, 3, 18, 4)
    assert torch.equal(x, again[0])
    assert torch.equal(noise, again[1])
    assert not torch.equal(noise, other[1])
    assert (x.shape, noise.shape) == ((4, 3, 8, 8), (4, 4, 2, 2))
    both = vae.to_unit_range(torch.cat([images, images.flip(3)]))
    assert all((row == both).flatten(1).all(1).any() for row in x)


def test_learning_rate_warms_up_and_ends_near_zero() -> None:
    assert vae.learning_rate(0, 1000, 2.0) == pytest.approx(0.02)
    assert vae.learning_rate(vae.WARMUP, 1000, 2.0) == pytest.approx(2.0)
    assert vae.learning_rate(550, 1000, 2.0) == pytest.approx(1.0)
    assert vae.learning_rate(999, 1000, 2.0) < 1e-4


class HalfGrey(torch.nn.Module):
    """A dummy VAE: decodes to mid grey, with latents of mean 1 and variance 3, 5, 3, 5, ..."""

    device = torch.device("cpu")

    def encode(self, x: torch.Tensor) -> Any:
        mean = torch.ones(len(x), 4, 2, 2)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, var=torch.tensor([3.0, 5.0]) * mean))

    def decode(self, z: torch.Tensor) -> Any:
        return SimpleNamespace(sample=torch.zeros(len(z), 3, 8, 8))


def test_metrics_equal_hand_computed_values() -> None:
    white = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    # An error of 0.5 everywhere: 10 log10(1 / 0.25) = 6.0206 dB.
    torch.testing.assert_close(vae.psnr(HalfGrey(), white, batch=1), torch.full((2,), 6.0206).double(), atol=1e-4, rtol=0)
    assert vae.latent_std(HalfGrey(), white) == pytest.approx(2)


def test_training_learns_repeats_and_saves(tmp_path: Path, tool: ModuleType) -> None:
    images = vae.read_images(shards("emoji-demo/train-*.tar*"))[:8, :, 16:32, 16:32].contiguous()
    losses: list[list[float]] = [[], []]
    for run in losses:
        model = vae.train(
            vae.small_vae(0), images, 12, 4, 2e-2, 0, "cpu", False, lambda _, loss, __, run=run: run.append(loss), 6
        )
    assert losses[0] == losses[1]
    assert losses[0][1] < 0.8 * losses[0][0]
    reloaded = vae.save(model, images, tmp_path)
    vae.save(reloaded, images, tmp_path)  # as when going on from given weights
    assert str(tmp_path) not in (tmp_path / "config.json").read_text()
    assert vae.latent_std(reloaded, images) * reloaded.config["scaling_factor"] == pytest.approx(1, abs=0.01)


def test_user_mistakes_are_reported(tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--data", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert tool.main(["--data", str(ROOT / "data/emoji-demo"), "--out", str(tmp_path), "--batch", "88"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "must contain train-*.tar" in lines[0]
    assert "--batch=88 must be from 1 to 87" in lines[1]
    with pytest.raises(UserError, match="must contain an AutoencoderKL"):
        vae.load(tmp_path)
    with pytest.raises(UserError, match=r"has 0 such images, of 0 different sizes"):
        vae.read_images([])


def test_decoder_training_keeps_the_latents() -> None:
    images = vae.read_images(shards("emoji-demo/train-*.tar*"))[:4, :, 16:32, 16:32].contiguous()
    before, model = vae.small_vae(0), vae.small_vae(0)
    after = vae.train(model, images, 3, 2, 2e-2, 0, "cpu", False, lambda *_: None, mirror=0.0, decoder_only=True)
    x = vae.to_unit_range(images)
    torch.testing.assert_close(after.encode(x).latent_dist.mean, before.encode(x).latent_dist.mean)
    assert not torch.equal(model.decoder.conv_in.weight, before.decoder.conv_in.weight)
