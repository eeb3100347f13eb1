"""Reads presets, YAML files and `section.key=value` overrides into a tree of values, from which a Config is made."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import yaml
from pydantic import BaseModel

from raphael_dist.config.assets import locate
from raphael_dist.config.key_suggestions import known_key, near_key
from raphael_dist.config.types import sections_of
from raphael_dist.config.validation_errors import value_text
from raphael_dist.errors import UserError, did_you_mean
from raphael_dist.text import JsonObject, json_type, read_text, shorten

# Exceptions of YAML's reader: wrong syntax; values such as 2020-99-99 or numbers of 5,000 digits; deep nesting.
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError)
MAX_VALUES = 100_000
MAX_BASES = 10


@dataclass
class ConfigTree:
    """Settings of a configuration that are not validated yet.

    Attributes:
        tree: nested dicts {section: {key: value}}.
        places: where a section or key was set (file and line, such as "my.yaml, line 3"), by its name `section` or
            `section.key`.
    """

    tree: JsonObject
    places: dict[str, str] = field(default_factory=dict)

    def place(self, location: Sequence[str | int]) -> str:
        """Return where a value was set, as " (my.yaml, line 3)"; "" if it does not come from a file.

        `location`: the names and indices that lead to the value in `tree`, such as ("data", "filters", 0).
        """
        names = [".".join(map(str, location[:depth])) for depth in (2, 1)]
        # A value from the command line has no place, even if its section is in the file.
        known = names[:1] if len(location) > 1 else names[1:]
        return next((f" ({self.places[name]})" for name in known if name in self.places), "")


def preset_names() -> list[str]:
    """Return the names of the presets (configurations that come with the package), such as "emoji-tiny"."""
    folder = resources.files("raphael_dist.config") / "presets"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def check_tree(tree: object) -> None:
    """Raise UserError if a configuration is too large, or contains a string that is not valid Unicode.

    `tree`: the configuration as nested dicts and lists. It must have at most MAX_VALUES (100,000) values, since a few lines
    of YAML aliases can expand to billions. A string must not contain half of a surrogate pair, which YAML accepts as an
    escape such as "\\uD800".
    """
    count, queue = 0, [("", tree)]
    while queue:
        name, value = queue.pop()
        count += 1
        if count > MAX_VALUES:
            raise UserError(
                f"{shorten(name)}: the whole configuration must have at most {MAX_VALUES:,} keys and list entries, but it "
                "has more. Remove some, or remove YAML aliases."
            )
        if not all(_is_encodable(text) for text in (name, value) if isinstance(text, str)):
            raise UserError(
                f"{value_text(name)}={value_text(value)} must consist of Unicode characters, but it has half of a surrogate "
                "pair. Write the character itself, or its escape \\UXXXXXXXX in double quotes."
            )
        if isinstance(value, dict):
            queue += [(name if "." in name else f"{name}.{key}".lstrip("."), inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            queue += [(name, inner) for inner in value]


def _is_encodable(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8, or as a file name with bytes that are not UTF-8 (see PEP 383)."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def read_yaml(name_or_path: str) -> ConfigTree:
    """Read a preset or a YAML file, together with the preset or file that it builds on (its key `base`).

    Values of the file override values of its base. If `base` is a path, it is relative to the folder of the file that
    contains it.

    Raises:
        UserError: a file is missing or not valid, or files name each other as `base`.
    """
    name, names, config = name_or_path, [name_or_path], ConfigTree({})
    while True:
        config = _merge(config, _read_one(name))
        base = config.tree.pop("base", None)
        if base is None:
            return config
        if not isinstance(base, str):
            raise UserError(
                f"--config={name}: base={value_text(base)} must be the name of one preset or YAML file. Write, for "
                "example, base: emoji-tiny."
            )
        name = str(Path(name).parent / base) if Path(base).suffix in {".yaml", ".yml"} else base
        if name in names or len(names) == MAX_BASES:
            chain = " -> ".join([*names, name])
            raise UserError(
                f"--config={name_or_path}: a chain of `base` files must end within {MAX_BASES} files, but {chain} does "
                "not. Remove the `base` of one of them."
            )
        names.append(name)


def _merge(upper: ConfigTree, lower: ConfigTree) -> ConfigTree:
    """Return the values of both configurations. If a key is set in both, the result has its value in `upper`."""
    tree = {**lower.tree, **upper.tree}
    for name, section in lower.tree.items():
        if isinstance(section, dict) and isinstance(tree[name], dict):
            tree[name] = {**section, **tree[name]}
    return ConfigTree(tree, {**lower.places, **upper.places})


def _read_one(name_or_path: str) -> ConfigTree:
    is_file = Path(name_or_path).suffix in {".yaml", ".yml"}
    text = _file_text(name_or_path) if is_file else _preset_text(name_or_path)
    try:
        places = _find_places(yaml.compose(text, yaml.SafeLoader), name_or_path)
        tree = yaml.safe_load(text) or {}
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(
            f"--config={name_or_path}: the file is not valid YAML: {shorten(' '.join(str(error).split()))}. Correct the "
            "line with this mistake; a section has the form `section: {key: value}`."
        ) from None
    if not isinstance(tree, dict):
        raise UserError(
            f"--config={name_or_path}: the file must contain a mapping of sections, but it contains "
            f"{json_type(tree)}. Write `section: {{key: value}}`."
        )
    return ConfigTree(tree if is_file else _locate_assets(tree), places)


def _file_text(name: str) -> str:
    path = Path(name)
    if not path.is_file():
        folder = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise UserError(
            f"--config={name}: there is no such file{folder}{did_you_mean(path.stem, preset_names())}. Correct the path, "
            "or give a preset, for example --config emoji-tiny."
        )
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--config={name} cannot be read: {error}. Give a UTF-8 file that you may read.") from None


def _preset_text(name: str) -> str:
    if name in preset_names():
        return (resources.files("raphael_dist.config") / "presets" / f"{name}.yaml").read_text()
    in_run_dir = Path(name) / "config.yaml"
    hint = f" (did you mean {str(in_run_dir)!r}?)" if in_run_dir.is_file() else did_you_mean(name, preset_names())
    raise UserError(
        f"--config={name}: there is no such preset{hint}. Give a .yaml file or one of {', '.join(preset_names())}."
    )


def _locate_assets(preset: JsonObject) -> JsonObject:
    """Replace paths of data files in a preset by their actual paths, if the files come with the package.

    Returns the same preset.
    """
    for section, name in (("data", "shards"), ("data", "val_shards"), ("image", "vae"), ("sample", "images")):
        value = preset.get(section, {}).get(name)
        if isinstance(value, str):
            preset[section][name] = locate(value)
        elif value is not None:
            preset[section][name] = [locate(path) for path in value]
    return preset


def _find_places(root: yaml.Node | None, file: str) -> dict[str, str]:
    """Return file and line (such as "my.yaml, line 3") of each section and key, by `section` or `section.key`.

    `root`: the parsed file; None if the file is empty. `file`: the file's name. Raises UserError if a mapping (dict) has the
    same key twice. YAML would silently keep the last one.
    """
    places: dict[str, str] = {}
    for depth, parent, mapping in _mappings(root):
        lines: dict[str, int] = {}
        for key, _ in mapping.value:
            name, line = str(key.value), key.start_mark.line + 1
            full_name = f"{parent}.{name}".lstrip(".")
            if name in lines:
                raise UserError(
                    f"--config={file}: {shorten(full_name)} is set in line {lines[name]} and again in line {line}. Merge "
                    "the two."
                )
            lines[name] = line
            if depth < 2:
                places[full_name] = f"{file}, line {line}"
    return places


def _mappings(root: yaml.Node | None) -> Iterator[tuple[int, str, yaml.MappingNode]]:
    """Yield (depth, dotted name, node) of every mapping (dict) in a YAML tree. Repetitions by YAML aliases are left out."""
    seen: set[int] = set()
    queue: list[tuple[int, str, yaml.Node | None]] = [(0, "", root)]
    while queue:
        depth, name, node = queue.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield depth, name, node
            queue += [(depth + 1, f"{name}.{key.value}".lstrip("."), value) for key, value in node.value]
        else:
            queue += [(depth + 1, name, value) for value in node.value]


def check_repeated_keys(overrides: Sequence[str], config_type: type[BaseModel]) -> None:
    """Raise UserError if two overrides `section.key=value` set the same key, e.g. because a shell expanded braces.

    `config_type`: the class of the whole configuration, for the remedy in the message.
    """
    texts: dict[str, list[str]] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        texts.setdefault(key, []).append(text)
    for key, values in texts.items():
        if len(values) == 1:
            continue
        section, _, name = key.partition(".")
        remedy = "Give it only once."
        if _type_name(section, name, config_type).startswith("tuple[str"):
            remedy = f"Quote braces, {key}='train-{{000..999}}.tar', or give one list, {key}=[A, B]."
        shown = " and ".join(repr(shorten(text)) for text in values[:2])
        others = f" and {len(values) - 2} more" if len(values) > 2 else ""
        raise UserError(
            f"{shorten(key)} must be given once, but it is given {len(values)} times, as {shown}{others}. {remedy}"
        )


def apply_override(config: ConfigTree, override: str, config_type: type[BaseModel]) -> None:
    """Set a value of `config` by an argument of the command line, `override`, which has the form `section.key=value`.

    `config_type`: the class that is made from `config` later. The types of its fields decide how the value is read. Raises
    UserError if `override` has another form.
    """
    key, separator, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not (separator and dot and section and name) or "." in name:
        raise UserError(
            f"argument {shorten(repr(override))} must have the form section.key=value{_suggestion(key, text, config_type)}. "
            "Write, for example, train.max_steps=50."
        )
    try:
        value = yaml.safe_load(text)
    except UNREADABLE:
        value = text
    if not isinstance(config.tree.setdefault(section, {}), dict):
        raise UserError(
            f"{section}={value_text(config.tree[section])} in the configuration file must be a mapping of keys, "
            f"because the command line sets {shorten(key)}. Write `{section}: {{key: value}}` in the file."
        )
    config.tree[section][name] = _for_field(_type_name(section, name, config_type), value, text)
    for place in (section, key):
        config.places.pop(place, None)


def _suggestion(word: str, text: str, config_type: type[BaseModel]) -> str:
    """Return " (did you mean ...?)" for an argument not of the form section.key=value; "" if there is no suggestion.

    `word`, `text`: the parts of the argument before and after "=", such as "lr" and "1e-4"; without "=", `text` is "".
    """
    key = known_key(word, config_type) or near_key(word, config_type)
    if word.endswith(".json"):
        meant = f"--deepspeed_config {word}"
    elif word in preset_names() or word.endswith((".yaml", ".yml")):
        meant = f"--config {word}"
    elif key is not None:
        meant = f"{key}={text or 'VALUE'}"
    else:
        return ""
    return f" (did you mean {shorten(meant)!r}?)"


def _type_name(section: str, name: str, config_type: type[BaseModel]) -> str:
    fields = sections_of(config_type)[section].model_fields if section in sections_of(config_type) else {}
    return str(fields[name].annotation) if name in fields else ""


def _for_field(type_name: str, value: object, text: str) -> object:
    """Convert the value of an override `section.key=value`, as YAML reads it, to the form that its setting requires.

    For example, a single path becomes a list if the setting is a list, and a name such as `123`, which YAML reads as a
    number, becomes a string. `type_name`: the setting's type, as text. `text`: the value before YAML read it.
    """
    is_text = "Path" in type_name or type_name == "<class 'str'>" or type_name.startswith("tuple[str")
    if type_name.startswith("tuple"):
        if not text:
            return []
        return value if isinstance(value, list) else [text if is_text else value]
    return text if is_text and value is not None else value
