"""Types of configuration fields: the base class of sections, number ranges, choices, and marks of what may change on resume.

A mark of a field (FREE or SHAPES) states whether its value may differ when a run is resumed.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

T = TypeVar("T")
INT_LIMIT = 2**63  # tensors and files hold 64-bit integers
_NAME_LIMIT = 255  # bytes of a file name


def require_local_path(path: str) -> str:
    """Return a path unchanged. Raises PydanticCustomError for an address (scheme://...), and for too long file names.

    `pathlib.Path` would shorten :// to :/, so that messages would no longer recognise and hide secrets in the address.
    """
    if "://" in path:
        raise PydanticCustomError("address", "must be a local path, not an address. Give a local file or folder")
    if any(len(os.fsencode(name)) > _NAME_LIMIT for name in path.split("/")):
        raise PydanticCustomError("name_too_long", "must not have a file name of more than 255 bytes")
    return path


PathText = Annotated[str, AfterValidator(require_local_path)]

Positive = Annotated[int, Field(ge=1, lt=INT_LIMIT)]
NonNegative = Annotated[int, Field(ge=0, lt=INT_LIMIT)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]

Dtype = Literal["float32", "bfloat16"]
ExpertKind = Literal["space", "time"]
EXPERT_KINDS: tuple[ExpertKind, ...] = ("space", "time")
Dispatch = Literal["auto", "all_to_all", "all_gather"]
ExpertBackend = Literal["auto", "grouped", "dense", "reference", "megablocks"]
Kernel = Literal[
    "group_norm", "layer_norm", "cross_attention", "space_moe", "space_moe_dense", "time_moe", "adamw", "deferred_update"
]  # fmt: skip
FocalForm = Literal["focal", "quality"]
Placement = Literal["auto", "shard", "replicate"]
Scheduler = Literal["ddim", "dpm++", "euler"]
TextLayer = Literal["last", "penultimate"]
WEIGHTS = ("ema", "master")  # weights in checkpoints: averaged (EMA), and fp32 master weights

# What may change when a run is resumed, as a mark of a field or of a section. Fields without a mark decide the results of a
# run: they may change only if run.allow_change names them.
FREE: JsonDict = {"on_resume": "free"}
SHAPES: JsonDict = {"on_resume": "never"}  # the shapes of the weights depend on it


# Types of fields with such a mark: `Free[int]` is an int with the mark FREE, `Shape[int]` one with the mark SHAPES.
Free = Annotated[T, Field(json_schema_extra=FREE)]
Shape = Annotated[T, Field(json_schema_extra=SHAPES)]
NonEmpty = Annotated[tuple[T, ...], Field(min_length=1)]


class Section(BaseModel):
    """A section of the configuration. Unknown keys are refused, and values cannot be changed after validation.

    The string below a field says what the setting means, for users.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_stray_value(cls, value: object, info: ValidationInfo) -> object:
        """Return the value of a field unchanged. Raises PydanticCustomError for some mistakes that pydantic accepts.

        These are true and false as numbers, empty strings, NUL characters, and addresses (scheme://...) as local paths.
        """
        kinds = set(_plain_types(cls.model_fields[str(info.field_name)].annotation))
        if kinds & {int, float} and not kinds & {bool, Any} and _contains_bool(value):
            raise PydanticCustomError("bool_for_number", "must be a number, not true or false")
        if value == "" and kinds & {str, Path}:
            raise PydanticCustomError("empty", "must not be empty")
        if kinds & {str, Path} and _contains_null(value):
            raise PydanticCustomError("null_byte", "must not contain NUL characters")
        if Path in kinds:
            for path in value if isinstance(value, list | tuple) else [value]:
                if isinstance(path, str):
                    require_local_path(path)
        return value


def sections_of(config_type: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Return the class of each section of the configuration class `config_type`, by the section's name."""
    types = {name: field.annotation for name, field in config_type.model_fields.items()}
    return {name: kind for name, kind in types.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


def keys_of(config_type: type[BaseModel]) -> list[str]:
    """Return the names of all settings of the configuration class `config_type`, as `section.key` (such as optim.lr)."""
    return [f"{section}.{name}" for section, kind in sections_of(config_type).items() for name in kind.model_fields]


def keys_marked(config_type: type[BaseModel], mark: JsonDict) -> list[str]:
    """Return the settings (as `section.key`) of the class `config_type` that have a mark, directly or by their section.

    `mark`: FREE (the value may change whenever a run is resumed) or SHAPES (never).
    """
    return [
        f"{section}.{name}"
        for section, kind in sections_of(config_type).items()
        for name, field in kind.model_fields.items()
        if mark in (field.json_schema_extra, kind.model_config.get("json_schema_extra"))
    ]


def _plain_types(annotation: object) -> Iterator[object]:
    """Yield the types that an annotation such as `tuple[int, ...] | None` consists of."""
    inner = get_args(annotation)
    if not inner:
        yield annotation
    for part in inner:
        yield from _plain_types(part)


def _contains_bool(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_contains_bool, value.values()))
    return any(map(_contains_bool, value)) if isinstance(value, list | tuple) else isinstance(value, bool)


def _contains_null(value: object) -> bool:
    """Return whether a string, also one inside lists or dicts, has a NUL character, which no file name can have."""
    if isinstance(value, dict):
        return any(_contains_null(key) or _contains_null(item) for key, item in value.items())
    return any(map(_contains_null, value)) if isinstance(value, list | tuple) else isinstance(value, str) and "\0" in value


def bytes_per_element(dtype: Dtype) -> int:
    """Return the size in bytes of one element of the dtype "float32" (4) or "bfloat16" (2)."""
    return 2 if dtype == "bfloat16" else 4


def fits_grouped_product(dtype: str, widths: Iterable[int]) -> bool:
    """Return whether torch's grouped matrix product on GPUs supports matrices of this dtype with rows of these widths.

    It requires bfloat16, and rows whose size is a multiple of 16 bytes.

    Args:
        dtype: "float32" or "bfloat16".
        widths: lengths of rows, in elements.
    """
    return dtype == "bfloat16" and all(width % 8 == 0 for width in widths)
