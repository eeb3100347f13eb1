"""What pydantic says of a configuration, in a user's words."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from raphael_dist.config_yaml import shortened
from raphael_dist.errors import did_you_mean


def explain(error: Mapping[str, Any], root: type[BaseModel]) -> str:
    """Return one line for one of a ValidationError's errors; `root` is the model that was to be made."""
    location = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return _unknown_key(error["loc"], root)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return str(message)
    return f"{location}: given {shortened(repr(error['input']))}; {message[0].lower()}{message[1:]}"


def _unknown_key(loc: Sequence[Any], root: type[BaseModel]) -> str:
    model: Any = root
    for part in loc[:-1]:
        # The number of an entry in a tuple of sections: each is of the type that the tuple names.
        model = get_args(model)[0] if isinstance(part, int) else model.model_fields[part].annotation
    known = list(model.model_fields)
    where = shortened(".".join(str(part) for part in loc))
    sections: dict[str, Any] = {name: info.annotation for name, info in root.model_fields.items()}
    every = {f"{name}.{field}" for name, section in sections.items() for field in section.model_fields}
    hint = did_you_mean(str(loc[-1]), known)
    elsewhere = [name for name in sorted(every) if name.endswith(f".{loc[-1]}")]
    if not hint and elsewhere:
        hint = f" (did you mean {elsewhere[0]!r}?)"
    return f"{where}: unknown key{hint}; known here: {', '.join(known)}"
