"""Describes every key of the configuration, as lines for the terminal, docs/configuration.md, or a JSON schema."""

import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Len, Lt, MinLen
from pydantic.fields import FieldInfo

from raphael_dist.config.key_suggestions import NAMES_ELSEWHERE
from raphael_dist.config.schema import Config
from raphael_dist.config.types import FREE, INT_LIMIT, SHAPES, keys_marked, sections_of

# Topics that people look for, the keys that belong to them, and the page that explains them.
TOPICS = {
    "accumulation": ("train.global_batch_size train.micro_batch_size", "batching.md"),
    "cpu": ("data.workers model.expert_backend train.dtype", "install.md"),
    "early stopping": ("train.max_steps train.max_skipped train.val_every", "training.md"),
    "fine tuning": ("run.init_from run.reinit lora.rank control.enabled", "adapters.md"),
    "gpu": ("train.dtype train.compile train.cuda_graphs train.kernels model.expert_backend", "install.md"),
    "learning rate": ("optim.lr optim.warmup_steps optim.lr_schedule optim.lr_schedule_args", "training.md"),
    "memory": ("train.micro_batch_size model.checkpoint_activations train.dtype data.workers", "memory.md"),
    "precision": ("train.dtype image.dtype", "training.md"),
    "resume": ("run.dir run.allow_change run.ignore_damaged run.init_from", "training.md"),
    "workers": ("data.workers data.prefetch", "data.md"),
}

_SIGNS = ((Ge, "ge", "at least"), (Gt, "gt", "above"), (Le, "le", "at most"), (Lt, "lt", "below"))
_TYPE_NAMES = {
    "NoneType": "null", "bool": "true or false", "str": "string", "int": "integer", "float": "number", "Path": "path",
}  # fmt: skip
_HEAD = """# Configuration

Every setting with its meaning, default, type and range. This page is generated:
`python -m raphael_dist config --markdown`.

A setting is taken from these places. A later one has priority:

1. the default in the tables below,
2. `--config`: a preset or a YAML file, on top of the preset or file that its `base` names,
3. `section.key=value` on the command line, each key once.

Commands:

- `python -m raphael_dist config WORD` finds keys by a word: a part of their name, a word of their
  description, what another trainer calls them, or a topic such as `memory` or `resume`.
- `python -m raphael_dist config --json-schema` prints a schema by which editors complete and check
  YAML. With the YAML language server the file begins with `# yaml-language-server: $schema=` and
  the path of the schema.

## Changes on resume
A run that is resumed may be started with other values than before. The last column of each table
states for each key whether its value may differ from the earlier one:

| last column | meaning |
|---|---|
| may change | The value may differ. |
| only with `run.allow_change` | The key affects the results. The run ends with an error, unless `run.allow_change` names \
the key, e.g. `run.allow_change=[optim.lr]`. |
| must not change | The shapes of the weights depend on the key, so the run ends with an error. |

Some keys that may change have a further condition:

- Shards and encoders may lie in other folders, but the names of the shards and all contents must be
  the same as before. Otherwise `run.allow_change` must name `data.shards` (also for captions),
  `text.encoder` or `image.vae`.
- The weights of a frozen base model (LoRA, ControlNet) must be the same, or `run.allow_change` must
  name `run.init_from`.
- `train.max_steps` may change only with `run.allow_change` if the learning rate depends on it: with
  every `optim.lr_schedule` but `constant` and `inverse_sqrt`.
"""
# How the tables write `Key.on_resume`.
_ON_RESUME = {"free": "may change", "fixed": "only with `run.allow_change`", "never": "must not change"}


@dataclass(frozen=True)
class Key:
    """One key (setting) of the configuration, as the reference for users describes it.

    Attributes:
        name: section.key, such as optim.lr.
        type: its type in words, such as "integer".
        default: its default value, as in YAML.
        range: limits of the value, such as "at least 0"; "" if there are none.
        description: what it means.
        on_resume: whether the value may change when a run is resumed: "free" (it may), "fixed" (only if run.allow_change
            names the key) or "never".
    """

    name: str
    type: str
    default: str
    range: str
    description: str
    on_resume: str

    def line(self) -> str:
        """Return name, default, type, range and description as one line of text."""
        limits = f" ({self.range})" if self.range else ""
        return f"{self.name}={self.default}  {self.type}{limits}: {self.description}"


def all_keys() -> list[Key]:
    """Return all keys of the configuration, in the order in which they are defined."""
    free, shapes = keys_marked(Config, FREE), keys_marked(Config, SHAPES)
    keys = []
    for section, kind in sections_of(Config).items():
        for name, field in kind.model_fields.items():
            key = f"{section}.{name}"
            type_name, limits = _describe(field.annotation)
            limits = list(dict.fromkeys([*limits, *_limits(field.metadata)]))
            on_resume = "free" if key in free else "never" if key in shapes else "fixed"
            meaning = " ".join((field.description or "").split())
            keys.append(Key(key, type_name, _default(field), ", ".join(limits), meaning, on_resume))
    return keys


def find_keys(word: str) -> tuple[list[Key], list[str]]:
    """Search the keys of the configuration for a word.

    `word` is compared with topics (memory, resume), names of settings in other trainers, and names and descriptions of
    keys. A part of a name is enough, and the beginning of a word of a description.

    Returns:
        The keys, the best match first; and the file names of the pages in docs/ about the matching topics.
    """
    word = _spaced(word)
    topics = [topic for name, topic in TOPICS.items() if word and word in name]
    names = [key for keys, _ in topics for key in keys.split()]
    if word:
        names += [key for name, key in NAMES_ELSEWHERE.items() if word in _spaced(name)]
    keys = {key.name: key for key in all_keys()}
    names += [name for name in keys if word in _spaced(name)]
    names += [key.name for key in keys.values() if re.search(rf"(?<!\w){re.escape(word)}", _spaced(key.line()))]
    return [keys[name] for name in dict.fromkeys(names)], sorted({page for _, page in topics})


def _spaced(text: str) -> str:
    return text.lower().replace("_", " ").replace("-", " ")


def markdown() -> str:
    """Return the text of docs/configuration.md: tables of all settings with meaning, default, type and range."""
    lines, keys = [_HEAD], all_keys()
    for section, kind in sections_of(Config).items():
        lines += [
            f"## {section}",
            *textwrap.wrap((kind.__doc__ or "").splitlines()[0], 100, break_long_words=False),
            "",
            "| key | meaning | default | type | range | [on resume](#changes-on-resume) |",
            "|---|---|---|---|---|---|",
        ]
        for key in keys:
            if key.name.split(".")[0] == section:
                on_resume = _ON_RESUME[key.on_resume]
                cells = (f"`{key.name}`", key.description, f"`{key.default}`", key.type, key.range, on_resume)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def json_schema() -> str:
    """Return a JSON schema of configuration files as a string, by which editors check YAML files.

    It includes the key `base`, which is not a setting: it names the preset or file that a file builds on.
    """
    schema = Config.model_json_schema()
    schema["title"] = "Configuration of raphael_dist"
    schema["properties"]["base"] = {"type": "string", "description": "Preset or YAML file that this one builds on."}
    return json.dumps(schema, indent=1)


def _default(field: FieldInfo) -> str:
    value = _plain(field.get_default(call_default_factory=True))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plain(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, bool | int | float | str | dict | None) else str(value)


def _describe(annotation: object) -> tuple[str, list[str]]:
    """Return the name of an annotated type, and the limits of its values, as text."""
    if hasattr(annotation, "__metadata__"):  # Annotated
        name, limits = _describe(get_args(annotation)[0])
        return name, [*limits, *_limits(annotation.__metadata__)]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(map(str, args)), []
    parts = [_describe(arg) for arg in args if arg is not Ellipsis]
    names, limits = [name for name, _ in parts], [limit for _, inner in parts for limit in inner]
    if origin in (Union, UnionType):
        return " or ".join(names), limits
    if origin is tuple:
        plural = names[0] if " or " in names[0] or names[0].endswith("]") else f"{names[0]}s"
        return (f"list of {plural}" if Ellipsis in args else f"[{', '.join(names)}]"), limits
    if origin is dict:
        return "mapping", []
    name = getattr(annotation, "__name__", str(annotation))
    return _TYPE_NAMES.get(name, re.sub(r"(?<!^)(?=[A-Z])", " ", name).lower()), []


def _limits(metadata: Iterable[object]) -> Iterator[str]:
    for limit in metadata:
        if isinstance(limit, FieldInfo):
            yield from _limits(limit.metadata)
        elif isinstance(limit, MinLen | Len):
            yield f"at least {limit.min_length} {'entry' if limit.min_length == 1 else 'entries'}"
        elif not (isinstance(limit, Lt) and limit.lt == INT_LIMIT):
            yield from (f"{words} {getattr(limit, name):,}" for kind, name, words in _SIGNS if isinstance(limit, kind))
