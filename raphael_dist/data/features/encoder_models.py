"""Loads the models of the frozen encoders (text encoder and VAE), or checks them without reading their weights.

No Python code in the models' folders is run. In this module, `spec` is the value of text.encoder or image.vae.
"""

import importlib
import os
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from raphael_dist.config.types import TextLayer
from raphael_dist.data.features.characters import CHARACTERS, CharacterModel, CharacterTokenizer
from raphael_dist.data.features.encoder_files import Model, Tokenizer, offline, reported, text_folders, vae_folder
from raphael_dist.errors import UserError
from raphael_dist.storage.files import apply_umask
from raphael_dist.storage.tensorfile import StoredTensor
from raphael_dist.storage.torchfile import file_tensors
from raphael_dist.storage.weight_files import TRANSFORMERS, weight_files
from raphael_dist.text import JsonObject

_OWN_TOKENS = 100  # of a tokenizer, as texts that it must distinguish
_SPACE = "▁"  # in the vocabulary of every T5, also of an empty one
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.16


# ---- text ------------------------------------------------------------------------------------------------------------


def text_class(folder: Path, spec: str) -> tuple[Any, Any]:
    """Return (class of the library transformers that loads the text encoder in `folder`, its configuration object).

    Raises UserError if the model in the folder is not a supported text encoder.
    `spec`: value of the setting text.encoder, for messages.
    """
    from transformers import AutoConfig, AutoModelForTextEncoding, CLIPTextModel

    with reported("text.encoder", spec):
        config = AutoConfig.from_pretrained(folder, **offline())
    if config.model_type == "clip":  # a complete CLIP contains its text model
        return CLIPTextModel, config.text_config
    mapping = AutoModelForTextEncoding._model_mapping  # these classes do not load the decoder of a T5
    if type(config) not in mapping:
        raise UserError(
            f"text.encoder={spec} must be a text encoder, but its model_type is {config.model_type!r}. Use the folder of a "
            "CLIP, T5 or BERT model."
        )
    return mapping[type(config)], config


def empty_text_model(spec: str, layer: TextLayer) -> Model:
    """Build a text encoder of transformers without the data of its weights, to learn its shapes.

    The headers of its weight files are read, so that damage and missing weights are detected.

    Args:
        spec: Value of the setting text.encoder: a name such as "minilm", or a folder.
        layer: "last", or "penultimate" to leave out the model's last layer.

    Raises:
        UserError: Files are missing or damaged, or lack weights, or the model is not a text encoder.
    """
    if spec == CHARACTERS:
        return text_model(spec, torch.float32, layer)
    folder, _ = text_folders(spec)
    kind, config = text_class(folder, spec)
    with reported("text.encoder", spec), _quiet("transformers"):
        model, info = _load_without_data(kind, config, weight_files(folder, TRANSFORMERS).paths)
        _check_loaded(_without_pooler(model, info), folder)
    return model if layer == "last" else _without_last_layer(model, spec)


def _load_without_data(kind: Any, config: Any, paths: Iterable[Path]) -> tuple[Model, Mapping[str, Iterable[Any]]]:
    """Load a model of transformers from weight files as `from_pretrained` does, but with fake tensors, which have no data.

    `from_pretrained` itself is called, since only transformers knows which tensor of a file becomes which weight. Only the
    headers of the files are read, except for .bin files in the format before torch 1.6, which are read as a whole.

    Args:
        kind: class of the model.
        config: its configuration object.
        paths: the weight files.

    Returns:
        The model, and the loading info of `from_pretrained`: "missing_keys", "mismatched_keys", ...

    Raises:
        UserError or ValueError: a file is damaged.
    """
    stored: dict[str, StoredTensor | Tensor] = {}
    for path in paths:
        stored |= file_tensors(path) if path.suffix == ".safetensors" else _pickled_tensors(path)
    with _one_loading_thread(), FakeTensorMode():
        weights = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in stored.items()}
        model, info = kind.from_pretrained(
            None, **offline(), config=config, state_dict=weights, ignore_mismatched_sizes=True, output_loading_info=True
        )
    return model, info


@contextmanager
def _one_loading_thread() -> Iterator[None]:
    """Return a context manager in which transformers loads weights in the calling thread, where FakeTensorMode works."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _pickled_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a .bin file, on the meta device. Raises ValueError if transformers could not read the file.

    It calls torch.load, as transformers does: this project's reader, `file_tensors`, supports fewer kinds of .bin files.
    """
    try:
        tensors: dict[str, Tensor] = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read: {reason}") from error
    return tensors


def text_model(spec: str, dtype: torch.dtype | str, layer: TextLayer = "last") -> Model:
    """Load a text encoder with its weights, and return the model of transformers. UserError: it cannot be loaded.

    Args:
        spec: Value of the setting text.encoder: a name such as "minilm", or a folder.
        dtype: Dtype of the weights; "auto": the dtype in the files.
        layer: "last", or "penultimate" to leave out the model's last layer.
    """
    if spec == CHARACTERS:
        if layer != "last":
            raise UserError(
                f"text.layer={layer} requires an encoder with layers, but text.encoder={spec} has none. Use text.layer=last."
            )
        return CharacterModel()
    folder, _ = text_folders(spec)
    kind, _ = text_class(folder, spec)
    with reported("text.encoder", spec), _quiet("transformers"):
        files = weight_files(folder, TRANSFORMERS)
        model, info = kind.from_pretrained(folder, **offline(), dtype=dtype, variant=files.variant, output_loading_info=True)
        _check_loaded(_without_pooler(model, info), folder)
    return model if layer == "last" else _without_last_layer(model, spec)


def _without_pooler(model: Model, info: Mapping[str, Iterable[Any]]) -> Mapping[str, Iterable[Any]]:
    """Remove a BERT model's pooler, which is never used, if the files lack it; return `info` without the pooler's weights.

    Files of masked language models usually have no pooler. `info`: loading info of `from_pretrained`, with "missing_keys".
    """
    missing = set(info["missing_keys"])
    pooler = {name for name in missing if name.startswith("pooler.")}
    if pooler:
        model.pooler = None
    return {**info, "missing_keys": missing - pooler}


def _without_last_layer(model: Model, spec: str) -> Model:
    """Remove the last layer of `model`; return the model, whose output is then that of the penultimate layer.

    A final norm of the model is kept, and applied to this output. `spec`: value of the setting text.encoder, for messages.
    UserError: the model has no stack of at least two layers.
    """
    count = model.config.num_hidden_layers
    lists = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count}
    # Only the outermost list: a layer of T5 has a list too, and a model of two layers has lists of two in each.
    stacks = [m for name, m in lists.items() if not any(name.startswith(f"{outer}.") for outer in lists)]
    if count < 2 or len(stacks) != 1:
        raise UserError(
            "text.layer=penultimate requires an encoder with at least two transformer layers in one stack, but "
            f"text.encoder={spec} has no such stack. Use text.layer=last."
        )
    del stacks[0][-1]
    model.config.num_hidden_layers = count - 1
    return model


def tokenizer_of(spec: str) -> Tokenizer:
    """Load the tokenizer of a text encoder. It pads and truncates on the right.

    Raises UserError if it cannot be loaded, has no padding token, or has no vocabulary. `spec`: value of the setting
    text.encoder: a name such as "minilm", or a folder.
    """
    if spec == CHARACTERS:
        return CharacterTokenizer()
    from transformers import AutoTokenizer

    _, folder = text_folders(spec)
    with reported("text.encoder", spec):
        tokenizer = AutoTokenizer.from_pretrained(folder, **offline())
        _check_vocabulary(tokenizer, folder)
    if tokenizer.pad_token is None:
        raise UserError(
            f"text.encoder={spec} requires a tokenizer with a padding token, but its tokenizer has none. Set pad_token in "
            "tokenizer_config.json."
        )
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.split_special_tokens = True  # a caption is plain text
    return tokenizer


def _check_vocabulary(tokenizer: Tokenizer, folder: Path) -> None:
    """Raise ValueError if all texts get the same tokens.

    If the files of the vocabulary are missing, transformers silently makes a tokenizer that knows only special tokens, and
    all captions would be encoded alike. A sound tokenizer distinguishes letters, or at least the words in its vocabulary.
    """
    special = {_SPACE, *tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    words = sorted(set(tokenizer.get_vocab()) - special)[:_OWN_TOKENS]
    texts = [*string.ascii_lowercase, *words]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if len({frozenset(row) for row in rows}) > 1:
        return
    files = sorted({*tokenizer.vocab_files_names.values(), "tokenizer_config.json"})
    missing = [name for name in files if not (folder / name).is_file()]
    reason = f"lacks {', '.join(missing)}" if missing else f"has damaged files among {', '.join(files)}"
    raise ValueError(
        f"its tokenizer ({type(tokenizer).__name__}, {len(tokenizer)} tokens) maps all words to the same token: {folder} "
        f"{reason}"
    )


def save_text_model(spec: str, layer: TextLayer, folder: Path) -> None:
    """Copy a text encoder into `folder`, in the format of transformers (`save_pretrained`). UserError: it cannot be loaded.

    `spec`: value of the setting text.encoder: a name such as "minilm", or a folder. `layer`: "last", or "penultimate" to
    leave out the model's last layer.
    """
    text_model(spec, "auto", layer).save_pretrained(folder)
    apply_umask(folder)


# ---- images ----------------------------------------------------------------------------------------------------------


def autoencoder_class(folder: Path, spec: str) -> tuple[Any, JsonObject]:
    """Return (class of diffusers for the autoencoder (VAE) in `folder`, fields of its config.json).

    Raises UserError if the class is not supported or the autoencoder is not for RGB images. `spec`: value of the setting
    image.vae, for messages.
    """
    import diffusers

    with reported("image.vae", spec):
        config = diffusers.AutoencoderKL.load_config(folder, local_files_only=True)
    name, colours = config.get("_class_name"), {config.get("in_channels", 3), config.get("out_channels", 3)}
    if name not in AUTOENCODERS or colours != {3}:
        other = (
            f"has {max(colours, key=lambda n: n != 3)} colour channels" if name in AUTOENCODERS else f"has the class {name}"
        )
        raise UserError(
            f"image.vae={spec} must be an autoencoder for RGB images of the class {', '.join(AUTOENCODERS[:-1])} or "
            f"{AUTOENCODERS[-1]}, but it {other}. Use another autoencoder, or image.vae=none."
        )
    return getattr(diffusers, name), config


def empty_autoencoder(spec: str) -> Model:
    """Build an autoencoder (VAE) of diffusers without weights, on the meta device, to learn its shapes.

    `spec`: value of the setting image.vae, a folder. Raises UserError if the folder has no supported autoencoder, or its
    shapes differ from those in the headers of its weight files.
    """
    folder = vae_folder(spec)
    kind, config = autoencoder_class(folder, spec)
    with reported("image.vae", spec), _quiet("diffusers"):
        with torch.device("meta"):
            model = kind.from_config(config)
        paths = weight_files(folder).paths
        stored = {name: tensor.shape for path in paths for name, tensor in file_tensors(path).items()}
        # diffusers renames old names in single files only.
        shapes = stored if len(paths) > 1 else {_current_name(name): shape for name, shape in stored.items()}
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        if wrong := sorted(name for name, shape in expected.items() if shapes.get(name) != shape):
            in_files = list(shapes[wrong[0]]) if wrong[0] in shapes else "missing"
            raise ValueError(
                f"the shape of {wrong[0]} is {list(expected[wrong[0]])} by config.json, but {in_files} in the weight files"
            )
    return model


def _current_name(name: str) -> str:
    return re.sub(r"(attentions\.\d+)\.(\w+)(?=\.\w+$)", lambda m: f"{m[1]}.{_OLD_ATTENTION.get(m[2], m[2])}", name)


def autoencoder(spec: str, dtype: torch.dtype | None) -> Model:
    """Load an autoencoder (VAE) with its weights, and return the model of diffusers. UserError: it cannot be loaded.

    `spec`: value of the setting image.vae, a folder. `dtype`: dtype of the weights; None: float32.
    """
    folder = vae_folder(spec)
    kind, _ = autoencoder_class(folder, spec)
    with reported("image.vae", spec), _quiet("diffusers"):
        files = weight_files(folder)
        # Without low_cpu_mem_usage=False diffusers advises installing accelerate, which a small VAE does not need.
        model, info = kind.from_pretrained(
            folder, local_files_only=True, torch_dtype=dtype, low_cpu_mem_usage=False, variant=files.variant,
            use_safetensors=not files.pickled, output_loading_info=True,
        )  # fmt: skip
        _check_loaded(info, folder)
    return model


def save_autoencoder(spec: str, folder: Path) -> None:
    """Copy an autoencoder (VAE) into `folder` in float32, under diffusers' standard file names.

    `spec`: value of the setting image.vae, a folder. Raises UserError if it cannot be loaded.
    """
    autoencoder(spec, None).save_pretrained(folder)
    apply_umask(folder)


@contextmanager
def _quiet(library: str) -> Iterator[None]:
    """Return a context manager in which a library logs only errors, not warnings about unused weights in a folder.

    It also turns off the library's progress bars. `library`: "diffusers" or "transformers".
    """
    logging = importlib.import_module(f"{library}.utils.logging")
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _check_loaded(info: Mapping[str, Iterable[Any]], folder: Path) -> None:
    """Raise ValueError if the weight files lack weights of the model, or have weights with other shapes than the model's.

    Such weights would be random. `info`: loading info of `from_pretrained`. `folder`: folder of the files, for messages.
    """
    for name in sorted(info["missing_keys"]):
        raise ValueError(f"the weight {name} is missing in the files of {folder}")
    for name, in_files, expected in sorted(info["mismatched_keys"]):
        raise ValueError(f"the shape of {name} is {list(expected)} by config.json, but {list(in_files)} in the weight files")
