"""Presets, YAML files and `section.key=value` overrides: the tree of values that becomes a Config."""

from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from raphael_dist.errors import UserError, did_you_mean

# What YAML's reader raises: for its own grammar; 2020-99-99 and numbers of 5,000 digits; deep brackets.
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError)
MOST_VALUES = 100_000


def preset_names() -> list[str]:
    """Return the names of the presets that ship with the package."""
    folder = resources.files("raphael_dist") / "presets"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def shortened(text: str) -> str:
    """Return a text that fits into a line."""
    return text if len(text) <= 200 else f"{text[:150]}... ({len(text)} characters)"


def check_size(tree: Any) -> None:
    """Raise UserError for a NUL, and for more than MOST_VALUES values, which a few lines of YAML with aliases can make."""
    seen, waiting = 0, [("", tree)]
    while waiting:
        where, value = waiting.pop()
        seen += 1
        if seen > MOST_VALUES:
            raise UserError(f"{shortened(where)}: the configuration holds more than {MOST_VALUES:,} values")
        if isinstance(value, dict):
            waiting += [(where if "." in where else f"{where}.{key}".lstrip("."), inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(where, inner) for inner in value]
        elif isinstance(value, str) and "\0" in value:
            raise UserError(f"{where}: given {shortened(repr(value))}; must hold no NUL character")


def read_yaml(name_or_path: str) -> dict[str, Any]:
    """Return the tree of a preset or a YAML file. Raises UserError."""
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise UserError(f"--config {name_or_path}: no such file")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--config {name_or_path}: cannot be read: {error}") from None
    elif name_or_path in preset_names():
        text = (resources.files("raphael_dist") / "presets" / f"{name_or_path}.yaml").read_text()
    else:
        hint = did_you_mean(name_or_path, preset_names())
        raise UserError(
            f"--config {name_or_path}: no such preset{hint}; presets: {', '.join(preset_names())}, or a .yaml file"
        )
    try:
        tree = yaml.safe_load(text) or {}
    except UNREADABLE as error:
        raise UserError(f"--config {name_or_path}: not valid YAML: {shortened(' '.join(str(error).split()))}") from None
    if not isinstance(tree, dict):
        raise UserError(f"--config {name_or_path}: must be a mapping of sections, got {type(tree).__name__}")
    return tree


def apply_override(tree: dict[str, Any], override: str, root: type[BaseModel]) -> None:
    """Put `section.key=value` into the tree of a configuration that is to become a `root`. Raises UserError."""
    key, separator, text = override.partition("=")
    section, dot, field = key.partition(".")
    if not (separator and dot and section and field) or "." in field:
        raise UserError(
            f"argument {shortened(repr(override))}: overrides are written section.key=value, e.g. train.max_steps=50"
        )
    try:
        value = yaml.safe_load(text)
    except UNREADABLE:
        value = text
    if not isinstance(tree.setdefault(section, {}), dict):
        raise UserError(f"{section}: must be a section of keys in the configuration file")
    tree[section][field] = _as_field_type(section, field, value, text, root)


def _as_field_type(section: str, field: str, value: Any, text: str, root: type[BaseModel]) -> Any:
    """YAML reads 1e-4 as a string and a single shard as a scalar; give the field what it plainly means."""
    info = root.model_fields.get(section)
    known = info.annotation.model_fields.get(field) if info and isinstance(info.annotation, type) else None
    kind = str(known.annotation) if known is not None else ""
    if ("Path" in kind or kind == "<class 'str'>") and value is not None:
        return text
    if kind.startswith("tuple") and not isinstance(value, list):
        return [text if kind.startswith("tuple[str") else value]
    return value
