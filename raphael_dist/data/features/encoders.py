"""The frozen encoders: the text encoder turns captions into tokens, the VAE images into latents. Nothing is downloaded.

Most ranks of a run never encode anything, because encoded samples are cached. They need only facts about an encoder, such as
its width and fingerprint (hash of its files). Rank 0 reads these for all ranks without loading weights. A rank loads the
weights when it first encodes. In this module, `spec` is the value of text.encoder or image.vae.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from raphael_dist.config.types import TextLayer
from raphael_dist.data.features import characters
from raphael_dist.data.features.encoder_files import Model, Tokenizer, fingerprint, reported, text_folders, vae_folder
from raphael_dist.data.features.encoder_models import (
    autoencoder,
    empty_autoencoder,
    empty_text_model,
    text_model,
    tokenizer_of,
)
from raphael_dist.data.features.run_encoders import TextFeatures, decode_latents, encode_images, run_text_encoder
from raphael_dist.data.features.tokens import TruncationCounter, tokenize
from raphael_dist.errors import UserError
from raphael_dist.model.latents import downscale_factor

T = TypeVar("T")
_TOKENIZED = 1024  # texts at a time, when only their tokens are counted


@dataclass(frozen=True)
class TextFacts:
    """Facts about a text encoder that are known without loading its weights. They are the same on every rank.

    Attributes:
        max_tokens: Number of tokens of a caption, with padding.
        width: Number of elements of a token's embedding.
        fingerprint: Hash of the encoder's files and settings.
    """

    max_tokens: int
    width: int
    fingerprint: str

    @classmethod
    def read(cls, spec: str, max_tokens: int, dtype: torch.dtype, layer: TextLayer = "last") -> Self:
        """Return the facts about a text encoder: read its configuration and tokenizer, and hash its files.

        Args:
            spec: Value of the setting text.encoder: a name such as "minilm", or a folder.
            max_tokens: Number of tokens of a caption, with padding.
            dtype: Dtype in which the encoder will compute. It is a part of the fingerprint.
            layer: "last" or "penultimate": the layer whose output is used as the tokens' embeddings.

        Raises:
            UserError: The folder or package does not exist, is not a text encoder, has no weights, or does not support
                captions of `max_tokens` tokens.
        """
        config = empty_text_model(spec, layer).config
        with reported("text.encoder", spec):
            width = int(config.hidden_size)
        tokenizer = tokenizer_of(spec)
        largest = max([tokenizer.pad_token_id, *tokenizer("")["input_ids"]])
        if largest >= config.vocab_size:
            raise UserError(
                f"text.encoder={spec} must have an embedding for each token of its tokenizer, but it has "
                f"{config.vocab_size} embeddings and the tokenizer uses the token id {largest}. Use the tokenizer that the "
                "encoder was trained with."
            )
        positions = getattr(config, "max_position_embeddings", None)
        least = tokenizer.num_special_tokens_to_add() + 1
        if max_tokens < least or (positions and max_tokens > positions):
            raise UserError(
                f"text.max_tokens={max_tokens} must be at least {least}{f' and at most {positions}' if positions else ''} "
                f"with text.encoder={spec}. Set text.max_tokens={positions or least}, or use another text.encoder."
            )
        if spec == characters.CHARACTERS:
            return cls(max_tokens, width, characters.fingerprint(max_tokens))
        settings = (max_tokens, str(dtype)) if layer == "last" else (max_tokens, str(dtype), layer)
        return cls(max_tokens, width, fingerprint(text_folders(spec), settings))


class _Frozen(Generic[T]):
    """Base class of a frozen model, which is loaded once: when it is first used, or by `load_weights`.

    `load`: function that loads and returns the model. `fingerprint`: hash that identifies the model.
    """

    def __init__(self, load: Callable[[], T], fingerprint: str) -> None:
        self._loaded = lru_cache(maxsize=1)(load)
        self.fingerprint = fingerprint

    def load_weights(self) -> Self:
        """Load the weights if they are not loaded yet; return this object. Raises UserError if they cannot be read."""
        self._loaded()
        return self


class TextEncoder(_Frozen[tuple[Model, Tokenizer]]):
    """A frozen text encoder. It encodes a caption as `max_tokens` tokens (padded or truncated) of `width` numbers each.

    Attributes:
        dtype: Dtype in which the model computes. `encode` returns float32 in any case.
        counter: Counts captions that were truncated.
    """

    def __init__(self, load: Callable[[], tuple[Model, Tokenizer]], facts: TextFacts) -> None:
        """Create the encoder.

        `load`: returns (model, tokenizer); it is called when a caption is first encoded. `facts`: width, number of tokens
        and hash of this encoder.
        """
        super().__init__(load, facts.fingerprint)
        self.max_tokens, self.width = facts.max_tokens, facts.width
        self.dtype, self.counter = torch.float32, TruncationCounter(facts.max_tokens)
        # A fast tokenizer allows one call at a time, and sampling may run while a batch is encoded.
        self._tokenizing = threading.Lock()

    @classmethod
    def load(
        cls, spec: str, max_tokens: int, device: torch.device | str, dtype: torch.dtype, layer: TextLayer = "last"
    ) -> Self:
        """Load the text encoder `spec` with its weights.

        Args:
            spec: "minilm" (its weights come with a Python package), "characters" (it has no weights), or a folder with a
                text encoder of transformers, or with a diffusers pipeline that contains one.
            max_tokens: Number of tokens of a caption.
            device: Device on which the encoder runs.
            dtype: Dtype in which the encoder computes.
            layer: "last" or "penultimate": the layer whose output is used as the tokens' embeddings.

        Raises:
            UserError: The encoder cannot be read, is not a text encoder, or does not support captions of `max_tokens`
                tokens.
        """
        return cls.lazy(spec, TextFacts.read(spec, max_tokens, dtype, layer), device, dtype, layer).load_weights()

    @classmethod
    def lazy(
        cls, spec: str, facts: TextFacts, device: torch.device | str, dtype: torch.dtype, layer: TextLayer = "last"
    ) -> Self:
        """Return the encoder that `load` returns, but open no file before the first caption is encoded.

        `spec`: value of text.encoder. `facts`: the result of `TextFacts.read` for this encoder, perhaps from another rank.
        `device`, `dtype`: device on which the encoder computes, and its dtype. `layer`: the layer whose output is the
        tokens.
        """
        encoder = cls(lambda: (_freeze(text_model(spec, dtype, layer), device), tokenizer_of(spec)), facts)
        encoder.dtype = dtype
        return encoder

    @classmethod
    def of(cls, model: Model, tokenizer: Tokenizer, max_tokens: int, fingerprint: str) -> Self:
        """Make a text encoder from a loaded model of transformers and its tokenizer.

        `max_tokens`: number of tokens of a caption, with padding. `fingerprint`: hash that identifies the model.
        """
        return cls(lambda: (model, tokenizer), TextFacts(max_tokens, int(model.config.hidden_size), fingerprint))

    @property
    def tokenizer(self) -> Tokenizer:
        """The encoder's tokenizer, of transformers. The encoder is loaded if it is not loaded yet."""
        return self._loaded()[1]

    @torch.no_grad()
    def encode(self, captions: Sequence[str], pad: bool = True) -> TextFeatures:
        """Encode B captions on the encoder's device.

        Args:
            captions: The captions.
            pad: Pad each caption to `max_tokens` tokens. False: to the length of the longest caption.

        Returns:
            Embeddings of Y tokens per caption, float32 [B, Y, width]; mask, bool [B, Y], False at padding; index of each
            caption's end-of-text token, int64 [B].
        """
        model, tokenizer = self._loaded()
        with self._tokenizing:
            batch, truncated = tokenize(tokenizer, captions, self.max_tokens, "max_length" if pad else "longest")
            self.counter.add(truncated, len(captions))
        batch = batch.to(model.device)
        return run_text_encoder(model, batch["input_ids"], batch["attention_mask"], tokenizer.eos_token_id)

    def warn_truncated(self, texts: Sequence[str], what: str) -> None:
        """Log a warning with the number of texts that have more than `max_tokens` tokens, if there are any.

        `what`: kind of the texts, such as "captions". The warning is logged at most once for each kind. Nothing is encoded.
        """
        with self._tokenizing:
            count = count_longer(self.tokenizer, texts, self.max_tokens)
        self.counter.warn(what, count, len(texts))


def count_longer(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> int:
    """Return how many of `texts` have more than `max_tokens` tokens with this tokenizer of transformers.

    The special tokens that the tokenizer adds to a text, such as those at its beginning and end, are counted too.
    """
    parts = [texts[first : first + _TOKENIZED] for first in range(0, len(texts), _TOKENIZED)]
    return sum(tokenize(tokenizer, part, max_tokens, "longest")[1] for part in parts)


@dataclass(frozen=True)
class ImageFacts:
    """Facts about an image encoder that are known without loading its weights. They are the same on every rank.

    Attributes:
        factor: Image height divided by latent height (and width by width), such as 8.
        channels: Number of channels of the latents.
        fingerprint: Hash of the encoder's files and settings.
        deterministic: Whether an image has one latent, not a distribution of latents.
    """

    factor: int
    channels: int
    fingerprint: str
    deterministic: bool = False

    @classmethod
    def of(cls, model: Model, fingerprint: str) -> Self:
        """Return the facts about an autoencoder of diffusers. `model` needs no weights. `fingerprint`: hash of its files."""
        deterministic = type(model).__name__ != "AutoencoderKL"  # the only class whose latents are a distribution
        return cls(downscale_factor(model.config), int(model.config.latent_channels), fingerprint, deterministic)

    @classmethod
    def read(cls, spec: str, dtype: torch.dtype = torch.float32) -> "ImageFacts":
        """Return the facts about an image encoder: read its configuration and weight headers, and hash its files.

        Args:
            spec: Value of the setting image.vae: a folder, or "none".
            dtype: Dtype in which the encoder will compute. It is a part of the fingerprint.

        Raises:
            UserError: The folder does not exist or does not contain a supported autoencoder, or weights are missing or have
                other shapes than config.json states.
        """
        if spec == "none":
            return NO_IMAGE_ENCODER
        settings = () if dtype == torch.float32 else (str(dtype),)
        return cls.of(empty_autoencoder(spec), fingerprint([vae_folder(spec)], settings))


NO_IMAGE_ENCODER = ImageFacts(factor=1, channels=3, fingerprint="none", deterministic=True)


class ImageEncoder(_Frozen[Model]):
    """A frozen autoencoder (VAE). With image.vae=none there is no autoencoder, and the pixels are the latents.

    Attributes:
        factor: Image height divided by latent height (and width by width), such as 8.
        channels: Number of channels of the latents.
        deterministic: Whether the std that `encode` returns is always zero.
    """

    def __init__(self, load: Callable[[], Model], facts: ImageFacts) -> None:
        """Create the encoder.

        `load`: returns the autoencoder, or None if latents are pixels; it is called when the autoencoder is first used.
        `facts`: factor, channels and hash of this encoder.
        """
        super().__init__(load, facts.fingerprint)
        self.factor, self.channels, self.deterministic = facts.factor, facts.channels, facts.deterministic

    @classmethod
    def load(cls, spec: str, device: torch.device | str, dtype: torch.dtype) -> Self:
        """Load the image encoder `spec` with its weights. It runs on `device` and computes in `dtype`.

        `spec`: "none" (latents are the pixels), or the folder of an autoencoder or of a diffusers pipeline that contains
        one. Raises UserError if the autoencoder cannot be read or is not supported.
        """
        return cls.lazy(spec, ImageFacts.read(spec, dtype), device, dtype).load_weights()

    @classmethod
    def lazy(cls, spec: str, facts: ImageFacts, device: torch.device | str, dtype: torch.dtype) -> Self:
        """Return the encoder that `load` returns, but open no file before the first image is encoded or decoded.

        `spec`: value of image.vae. `facts`: the result of `ImageFacts.read` for this encoder, perhaps from another rank.
        `device`, `dtype`: device on which the encoder computes, and its dtype.
        """
        return cls(lambda: None if spec == "none" else _freeze(autoencoder(spec, dtype), device), facts)

    @classmethod
    def of(cls, model: Model, fingerprint: str = "") -> Self:
        """Make an image encoder from a loaded autoencoder of diffusers. If `model` is None, the pixels are the latents.

        `fingerprint`: hash of the autoencoder's files. Cached latents are only used if they were made with an equal hash.
        """
        return cls(lambda: model, NO_IMAGE_ENCODER if model is None else ImageFacts.of(model, fingerprint))

    @property
    def _model(self) -> Model:
        return self._loaded()

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mean, standard deviation) of the latents of images, each float32 [B, C, h, w].

        `images`: [B, 3, H, W] in [-1, 1]. The shift and scale in the VAE's configuration are already applied, so that
        training latents are mean + std * noise.
        """
        if self._model is None:
            return images.float(), torch.zeros_like(images, dtype=torch.float32)
        return encode_images(self._model, images, self._model.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode `latents` [B, C, h, w] (shifted and scaled as by `encode`) to images, float32 [B, 3, H, W] in [-1, 1]."""
        if self._model is None:
            return latents.float().clamp(-1, 1)
        return decode_latents(self._model, latents, self._model.device)


def _freeze(model: Model, device: torch.device | str) -> Model:
    return model.eval().requires_grad_(False).to(device)
