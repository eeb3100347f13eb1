"""Presets, YAML files and `section.key=value` overrides: the tree of values that becomes a Config."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from raphael_dist.errors import UserError, did_you_mean
from raphael_dist.shipped import located

# What YAML's reader raises: for its own grammar; 2020-99-99 and numbers of 5,000 digits; deep brackets.
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError)
MOST_VALUES = 100_000
MOST_BASES = 10


@dataclass
class Given:
    """What a configuration was given: nested values, and by `section` and `section.key` the file and line they stand in."""

    tree: dict[str, Any]
    places: dict[str, str] = field(default_factory=dict)

    def place(self, location: Sequence[Any]) -> str:
        """Return " (my.yaml, line 3)" for where a value stands, "" where no file has it."""
        names = [".".join(map(str, location[:depth])) for depth in (2, 1)]
        # A value from the command line has no place, though its section may stand in the file.
        known = names[:1] if len(location) > 1 else names[1:]
        return next((f" ({self.places[name]})" for name in known if name in self.places), "")


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


def read_yaml(name_or_path: str) -> Given:
    """Return what a preset or a YAML file gives, on top of the preset or file that its `base` names. Raises UserError.

    A `base` that is a path is taken from the folder of the file that names it.
    """
    name, seen, found = name_or_path, [name_or_path], Given({})
    while True:
        found = _on_top(found, _read_one(name))
        base = found.tree.pop("base", None)
        if base is None:
            return found
        if not isinstance(base, str):
            raise UserError(f"--config {name}: base: given {shortened(repr(base))}; give one preset or YAML file")
        name = str(Path(name).parent / base) if Path(base).suffix in {".yaml", ".yml"} else base
        if name in seen or len(seen) == MOST_BASES:
            raise UserError(f"--config {name_or_path}: base: {' -> '.join([*seen, name])} goes round or is too long")
        seen.append(name)


def _on_top(upper: Given, lower: Given) -> Given:
    """Return what `upper` gives, and what it leaves out as `lower` gives it."""
    tree = {**lower.tree, **upper.tree}
    for name, section in lower.tree.items():
        if isinstance(section, dict) and isinstance(tree[name], dict):
            tree[name] = {**section, **tree[name]}
    return Given(tree, {**lower.places, **upper.places})


def _read_one(name_or_path: str) -> Given:
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise UserError(f"--config {name_or_path}: no such file" + ("" if path.is_absolute() else f" in {Path.cwd()}"))
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
        root = yaml.compose(text, yaml.SafeLoader)
        places = _places(root, name_or_path)
        tree = yaml.safe_load(text) or {}
        if not path.suffix:
            tree = _shipped(tree)
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"--config {name_or_path}: not valid YAML: {shortened(' '.join(str(error).split()))}") from None
    if not isinstance(tree, dict):
        raise UserError(f"--config {name_or_path}: must be a mapping of sections, got {type(tree).__name__}")
    return Given(tree, places)


def _shipped(preset: Any) -> Any:
    """Return a preset's values, with its data's paths as they are found from the working directory."""
    for section, name in (("data", "shards"), ("data", "val_shards"), ("image", "encoder"), ("sample", "pictures")):
        value = preset.get(section, {}).get(name)
        if isinstance(value, str):
            preset[section][name] = located(value)
        elif value is not None:
            preset[section][name] = [located(one) for one in value]
    return preset


def _places(root: yaml.Node | None, file: str) -> dict[str, str]:
    """Return where the sections and their keys stand. UserError for a key that a mapping has twice: YAML keeps the last."""
    places: dict[str, str] = {}
    for depth, where, mapping in _mappings(root):
        lines: dict[str, int] = {}
        for key, _ in mapping.value:
            name, line = str(key.value), key.start_mark.line + 1
            full = f"{where}.{name}".lstrip(".")
            if name in lines:
                raise UserError(
                    f"--config {file}: {shortened(full)} stands in line {lines[name]} and again in line {line}; "
                    "put both into one"
                )
            lines[name] = line
            if depth < 2:
                places[full] = f"{file}, line {line}"
    return places


def _mappings(root: yaml.Node | None) -> Iterator[tuple[int, str, yaml.MappingNode]]:
    """Yield (depth, dotted name, node) of every mapping, one that aliases repeat once."""
    seen: set[int] = set()
    waiting: list[tuple[int, str, Any]] = [(0, "", root)]
    while waiting:
        depth, where, node = waiting.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield depth, where, node
            waiting += [(depth + 1, f"{where}.{key.value}".lstrip("."), value) for key, value in node.value]
        else:
            waiting += [(depth + 1, where, value) for value in node.value]


def check_once(overrides: Sequence[str], root: type[BaseModel]) -> None:
    """Raise UserError when a key is given twice: what a shell makes of braces that are not quoted."""
    texts: dict[str, list[str]] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        texts.setdefault(key, []).append(text)
    for key, given in texts.items():
        if len(given) > 1:
            section, _, name = key.partition(".")
            many = _kind(section, name, root).startswith("tuple[str")
            remedy = f"quote braces, {key}='train-{{000..999}}.tar', or give one list, {key}=[A, B]" if many else "give one"
            shown = " and ".join(repr(shortened(text)) for text in given[:2])
            more = f" and {len(given) - 2} more" if len(given) > 2 else ""
            raise UserError(f"{shortened(key)}: given {len(given)} times, {shown}{more}; {remedy}")


def apply_override(given: Given, override: str, root: type[BaseModel]) -> None:
    """Put `section.key=value` into what a configuration that is to become a `root` was given. Raises UserError."""
    key, separator, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not (separator and dot and section and name) or "." in name:
        raise UserError(
            f"argument {shortened(repr(override))}: overrides are written section.key=value, e.g. train.max_steps=50"
        )
    try:
        value = yaml.safe_load(text)
    except UNREADABLE:
        value = text
    if not isinstance(given.tree.setdefault(section, {}), dict):
        raise UserError(f"{section}: must be a section of keys in the configuration file")
    given.tree[section][name] = _as_field_type(section, name, value, text, root)
    for place in (section, key):
        given.places.pop(place, None)


def _kind(section: str, name: str, root: type[BaseModel]) -> str:
    info = root.model_fields.get(section)
    known = info.annotation.model_fields.get(name) if info and isinstance(info.annotation, type) else None
    return str(known.annotation) if known is not None else ""


def _as_field_type(section: str, name: str, value: Any, text: str, root: type[BaseModel]) -> Any:
    """YAML reads 1e-4 as a string and a single shard as a scalar; give the field what it plainly means."""
    kind = _kind(section, name, root)
    plain = "Path" in kind or kind == "<class 'str'>" or kind.startswith("tuple[str")
    if kind.startswith("tuple"):
        return value if isinstance(value, list) else [text if plain else value]
    if plain and value is not None:
        return text
    return value
