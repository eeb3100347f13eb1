"""Every key of the configuration in words: lines for the terminal, docs/configuration.md, a JSON schema for editors."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Len, Lt, MinLen
from pydantic.fields import FieldInfo

from raphael_dist.config import Config

_SIGNS = ((Ge, "ge", "at least"), (Gt, "gt", "above"), (Le, "le", "at most"), (Lt, "lt", "below"))
_HEAD = """# Configuration

Written by `python -m raphael_dist config --markdown`; a test holds it to the code.

Values come from the defaults below, then from `--config` (a preset or a YAML file, on top of the preset or file that its
`base` names), then from `section.key=value` on the command line, each key once. `python -m raphael_dist config optim` prints
the keys whose line contains a word. `python -m raphael_dist config --json-schema` prints what editors complete and check
YAML by; with the YAML language server the file begins with `# yaml-language-server: $schema=` and the schema's path.
"""


@dataclass(frozen=True)
class Key:
    """One key: dotted name, type, default, range and description, in words."""

    name: str
    type: str
    default: str
    range: str
    description: str

    def line(self) -> str:
        """Return it on one line."""
        limits = f" ({self.range})" if self.range else ""
        return f"{self.name}={self.default}  {self.type}{limits}: {self.description}"


def keys(word: str = "") -> list[Key]:
    """Return all keys, or those whose line contains `word`, in the order of the code."""
    found = [
        _key(f"{section}.{name}", field)
        for section, info in Config.model_fields.items()
        for name, field in getattr(info.annotation, "model_fields", {}).items()
    ]
    return [key for key in found if word.lower() in key.line().lower()]


def _key(name: str, field: FieldInfo) -> Key:
    kind, limits = _described(field.annotation)
    limits = list(dict.fromkeys([*limits, *_limits(field.metadata)]))
    return Key(name, kind, _default(field), ", ".join(limits), field.description or "")


def markdown() -> str:
    """Return docs/configuration.md."""
    lines = [_HEAD]
    for section, info in Config.model_fields.items():
        doc = (getattr(info.annotation, "__doc__", None) or "").strip().splitlines()
        lines += [
            f"## {section}",
            *([doc[0], ""] if doc else []),
            "| key | type | default | range | what |",
            "|---|---|---|---|---|",
        ]
        for key in keys():
            if key.name.split(".")[0] == section:
                cells = (f"`{key.name}`", key.type, f"`{key.default}`", key.range, key.description)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def json_schema() -> str:
    """Return the JSON schema of a YAML file, `base` among it."""
    schema = Config.model_json_schema()
    schema["title"] = "Configuration of raphael_dist"
    schema["properties"]["base"] = {"type": "string", "description": "preset or YAML file that this one builds on"}
    return json.dumps(schema, indent=1)


def _default(field: FieldInfo) -> str:
    value = _plain(field.get_default(call_default_factory=True))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, bool | int | float | str | dict | None) else str(value)


def _described(annotation: Any) -> tuple[str, list[str]]:
    """Return a type in words, and the limits that stand within it."""
    if hasattr(annotation, "__metadata__"):  # Annotated
        kind, limits = _described(annotation.__origin__)
        return kind, [*limits, *_limits(annotation.__metadata__)]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(map(str, args)), []
    if origin in (Union, UnionType):
        parts = [_described(arg) for arg in args]
        return " or ".join(kind for kind, _ in parts), [limit for _, limits in parts for limit in limits]
    if origin is tuple:
        inner = [_described(arg) for arg in args if arg is not Ellipsis]
        kinds, limits = [kind for kind, _ in inner], [limit for _, found in inner for limit in found]
        return (f"list of {kinds[0]}" if Ellipsis in args else f"[{', '.join(kinds)}]"), limits
    if origin is dict:
        return "mapping", []
    names = {"NoneType": "null", "bool": "true or false", "str": "text", "int": "integer", "float": "number", "Path": "path"}
    name = getattr(annotation, "__name__", str(annotation))
    return names.get(name, re.sub(r"(?<!^)(?=[A-Z])", " ", name).lower()), []


def _limits(metadata: Any) -> Iterator[str]:
    for limit in metadata:
        if isinstance(limit, FieldInfo):
            yield from _limits(limit.metadata)
        elif isinstance(limit, MinLen | Len):
            yield f"at least {limit.min_length} entries"
        else:
            yield from (f"{words} {getattr(limit, name):,}" for kind, name, words in _SIGNS if isinstance(limit, kind))
