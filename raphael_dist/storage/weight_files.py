"""Finds the weight files of a model folder, by the file names that diffusers and transformers use.

STEM is diffusion_pytorch_model, model or pytorch_model. The files are one of:

- STEM.safetensors, or STEM.safetensors.index.json and the files that this index lists;
- STEM.bin or STEM.bin.index.json, the same in the format of torch.save;
- files of both kinds with a variant, e.g. fp16, in their names: STEM.fp16.safetensors, STEM.safetensors.index.fp16.json.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from raphael_dist.errors import UserError
from raphael_dist.text import read_json, reason_unreadable

DIFFUSERS, TRANSFORMERS = ("diffusion_pytorch_model",) * 2, ("model", "pytorch_model")  # stems of safetensors and of .bin
_FIRST = ("fp32", "bf16", "fp16")  # order in which variants are preferred


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of one model, all .safetensors or all .bin.

    Attributes:
        paths: the files that together contain the weights.
        variant: the variant in their names, such as "fp16" in model.fp16.safetensors; None if the names have none.
    """

    paths: tuple[Path, ...]
    variant: str | None = None

    @property
    def pickled(self) -> bool:
        return self.paths[0].suffix == ".bin"


def weight_files(folder: Path, stems: tuple[str, str] = DIFFUSERS) -> WeightFiles:
    """Find the weight files of the diffusers or transformers model in `folder`. Raises UserError if files are missing.

    Files without a variant (such as fp16) in their names are preferred to those with one, then .safetensors to .bin.
    `stems`: the beginning of the file names, before the first dot or hyphen, for .safetensors and for .bin files.
    """
    for variant in (None, *_variants(folder, stems)):
        for stem, suffix in zip(stems, ("safetensors", "bin"), strict=True):
            single = folder / ".".join(filter(None, (stem, variant, suffix)))
            index = folder / ".".join(filter(None, (stem, suffix, "index", variant, "json")))
            if single.is_file():
                return WeightFiles((single,), variant)
            if index.is_file():
                return WeightFiles(_parts(index), variant)
    raise UserError(
        f"{folder} must contain weights, but has neither {stems[0]}.safetensors nor {stems[1]}.bin, nor such a file with a "
        f"variant in the name, e.g. {stems[0]}.fp16.safetensors. Copy the weights into the folder, or give another folder."
    )


def _variants(folder: Path, stems: tuple[str, str]) -> list[str]:
    """Return the variants in the names of the weight files in `folder`: fp32, bf16 and fp16 first, then others by name."""
    either = "|".join(map(re.escape, dict.fromkeys(stems)))
    names = re.compile(rf"(?:{either})\.(?:([\w-]+)\.(?:safetensors|bin)|(?:safetensors|bin)\.index\.([\w-]+)\.json)")
    matches = [names.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    variants = {match[1] or match[2] for match in matches if match and "-of-" not in match[0]}
    return sorted(variants, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name))


def _parts(index: Path) -> tuple[Path, ...]:
    """Return the weight files that an index file (*.index.json) lists.

    Raises UserError if the index cannot be read, or a listed file is missing or outside the folder of the index.
    """
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} cannot be read: {reason_unreadable(error)}. Download the model again.") from None
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise UserError(
            f"{index} must list weight files in its own folder under weight_map, but it lists {names[:3]}. Download the "
            "model again."
        )
    for name in names:
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name} is missing, but {index.name} lists it. Download the model again.")
    return tuple(index.parent / name for name in names)
