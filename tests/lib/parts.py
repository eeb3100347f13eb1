"""Write VAEs and text encoders with tiny random weights, in the file formats in which real ones are published."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

_KL_DEFAULTS = ("scaling_factor", "shift_factor", "force_upcast", "latents_mean", "latents_std", "use_quant_conv",
                "use_post_quant_conv", "mid_block_add_attention")  # fmt: skip


def _kl(levels: int = 4, **config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        **config,
    )


def _tiny() -> AutoencoderTiny:
    return AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)


def _dc() -> AutoencoderDC:
    blocks = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock", "EfficientViTBlock")
    return AutoencoderDC(
        latent_channels=8, attention_head_dim=8, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=(16,) * 6, decoder_block_out_channels=(16,) * 6,
        encoder_layers_per_block=(0, 1, 1, 1, 1, 1), decoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        downsample_block_type="Conv", upsample_block_type="interpolate", scaling_factor=0.41407,
    )  # fmt: skip


VAES: dict[str, Callable[[], Any]] = {
    "sd": _kl,
    "sdxl": lambda: _kl(scaling_factor=0.13025, force_upcast=True),
    "sd3": lambda: _kl(
        latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
    ),
    "flux": lambda: _kl(
        latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
    ),
    "latents_mean": lambda: _kl(
        scaling_factor=0.5, latents_mean=(-1.6574, 1.886, -1.383, 2.5155), latents_std=(8.4927, 5.9022, 6.5498, 5.2299)
    ),
    "tiny": _tiny,
    "factor 16": lambda: _kl(5, latent_channels=8, scaling_factor=0.7),
    "factor 32": _dc,
}


def save_vae(folder: Path, name: str) -> Path:
    """Write the VAE `name` of VAES as a diffusers folder; return `folder`.

    "sd" is written as Stable Diffusion's first release: config.json has few fields, and attention weights have old names.
    """
    torch.manual_seed(0)
    model = VAES[name]()
    with torch.no_grad():  # larger weights, so that latents vary as those of a trained VAE
        for parameter in model.parameters():
            parameter.mul_(1.5)
        if isinstance(model, AutoencoderKL):  # small standard deviations
            last = model.encoder.conv_out if model.quant_conv is None else model.quant_conv
            last.bias[model.config.latent_channels :] = -6.0
    model.save_pretrained(folder)
    if name == "sd":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in _KL_DEFAULTS}))
        path = folder / "diffusion_pytorch_model.safetensors"
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        tensors = load_file(path)
        for new, before in old.items():
            tensors = {key.replace(f"attentions.0.{new}.", f"attentions.0.{before}."): t for key, t in tensors.items()}
        save_file(tensors, path, {"format": "pt"})
    return folder


# ---- text ------------------------------------------------------------------------------------------------------------

WIDTH, LETTERS = 32, "abcdefghijklmnopqrstuvwxyz"


def _clip_tokenizer(folder: Path, pad: str, side: str) -> int:
    from transformers import CLIPTokenizer

    letters = [chr(i) for i in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token=pad, padding_side=side)
    tokenizer.save_pretrained(folder)
    return len(words)


def _clip(folder: Path, pad: str, act: str, side: str, projection: bool = False) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    size = _clip_tokenizer(folder / "tokenizer", pad, side)
    config = CLIPTextConfig(
        vocab_size=size, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, hidden_act=act,
        projection_dim=16, bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    model.save_pretrained(folder / "text_encoder")


def _whole_clip(folder: Path, side: str) -> None:
    from transformers import CLIPConfig, CLIPModel

    size = _clip_tokenizer(folder, "<|endoftext|>", side)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**sizes, "hidden_size": 16, "image_size": 32, "patch_size": 16}
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    config = CLIPConfig(text_config={**sizes, **ids, "vocab_size": size}, vision_config=vision, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)


def _t5(folder: Path, side: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = ["<pad>", "</s>", "<unk>", *LETTERS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", padding_side=side
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    T5EncoderModel(_t5_config(T5Config, len(words))).save_pretrained(folder / "text_encoder")


def _byt5(folder: Path, side: str) -> None:
    from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

    ByT5Tokenizer(padding_side=side).save_pretrained(folder)
    T5ForConditionalGeneration(_t5_config(T5Config, 384)).save_pretrained(folder)


def _t5_config(kind: Any, size: int) -> Any:
    return kind(vocab_size=size, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=1, num_heads=4,
                feed_forward_proj="gated-gelu", tie_word_embeddings=False)  # fmt: skip


def _bert(folder: Path, side: str) -> None:
    from transformers import BertConfig, BertModel, BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer.from_pretrained(folder, padding_side=side).save_pretrained(folder)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)


TEXTS: dict[str, Callable[[Path, str], None]] = {
    "CLIP L": lambda folder, side: _clip(folder, "<|endoftext|>", "quick_gelu", side),
    "CLIP H": lambda folder, side: _clip(folder, "!", "gelu", side),
    "CLIP g": lambda folder, side: _clip(folder, "!", "gelu", side, projection=True),
    "whole CLIP": _whole_clip,
    "T5": _t5,
    "ByT5": _byt5,
    "BERT": _bert,
}


def save_text(folder: Path, name: str, side: str = "right") -> Path:
    """Write the text encoder `name` of TEXTS and its tokenizer, which pads on `side` (left or right); return `folder`."""
    torch.manual_seed(1)
    TEXTS[name](folder, side)
    return folder


# ---- files -----------------------------------------------------------------------------------------------------------

FORMS = ("safetensors", "fp16", "sharded", "sharded fp16", "bin", "sharded bin", "fp16 bin")


def save_as(source: Path, target: Path, form: str, stems: tuple[str, str]) -> Path:
    """Copy a model folder whose weights are one safetensors file, and store the weights in the file format `form` of FORMS.

    Args:
        source: the folder to copy.
        target: the new folder, which is also returned.
        form: one of FORMS.
        stems: names of the weight files without suffix: in safetensors format, and in PyTorch's .bin format.
    """
    shutil.copytree(source, target)
    whole = target / f"{stems[0]}.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    variant = "fp16" if "fp16" in form else None
    if variant:
        tensors = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
    stem, suffix = (stems[1], "bin") if "bin" in form else (stems[0], "safetensors")

    def save(part: dict[str, torch.Tensor], name: str) -> None:
        if suffix == "bin":
            torch.save(part, target / name)
        else:
            save_file(part, target / name, {"format": "pt"})

    if "sharded" not in form:
        save(tensors, ".".join(filter(None, (stem, variant, suffix))))
        return target
    names, places = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"{number:05d}-of-00002"
        # diffusers puts the variant after the number, transformers before it.
        after = variant and stem == "diffusion_pytorch_model"
        file = (
            f"{stem}-{shard}.{variant}.{suffix}" if after else f"{stem}{f'.{variant}' if variant else ''}-{shard}.{suffix}"
        )
        save({name: tensors[name] for name in part}, file)
        places |= dict.fromkeys(part, file)
    index = ".".join(filter(None, (stem, suffix, "index", variant, "json")))
    (target / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return target
