"""Turns pydantic's validation errors of a configuration into messages for the user."""

import difflib
import re
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from raphael_dist.config.key_suggestions import RENAMED, meant_keys, near_key
from raphael_dist.errors import UserError, did_you_mean
from raphael_dist.text import escape_control, hide_secrets_in_text, shorten

# Messages by pydantic's type of error, with placeholders for its context. Other types keep pydantic's message.
_MESSAGES = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping, {{key: value}}",
    "finite_number": "must be finite",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_from_float": "must be an integer",
    "int_parsing": "must be an integer",
    "int_type": "must be an integer",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "missing": "is required, but it is missing",
    "model_type": "must be a mapping, {{key: value}}",
    "path_type": "must be a path",
    "string_pattern_mismatch": "must match the pattern {pattern}",
    "string_too_long": "must have at most {max_length} characters",
    "string_type": "must be a string",
    "too_short": "must have at least {min_length} entries, but it has {actual_length}",
    "tuple_type": "must be a list, [a, b]",
}


def value_text(value: object) -> str:
    """Return a value as one short line for a message, written as in YAML (null, true). Secrets in addresses are hidden."""
    if isinstance(value, str):
        return escape_control(shorten(hide_secrets_in_text(value))) or "''"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return escape_control(shorten(hide_secrets_in_text(str(value))))


def explain(error: ErrorDetails, config_type: type[BaseModel]) -> list[str]:
    """Translate one error of pydantic into messages for users about the configuration; usually it is one message.

    Args:
        error: an element of `ValidationError.errors()`.
        config_type: the class of the configuration that was validated, for suggestions of similar keys.
    """
    context = error.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, UserError):
        return list(cause.args)
    if error["type"] == "extra_forbidden":
        return [_unknown_key(error["loc"], error["input"], config_type)]
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return [str(message)]
    message = _MESSAGES.get(error["type"], message).format(**context)
    hint = ""
    if error["type"] == "literal_error":
        hint = did_you_mean(str(error["input"]), re.findall(r"'([^']*)'", context["expected"]))
    field = shorten(".".join(str(part) for part in error["loc"]))
    value = "" if error["type"] == "missing" else f"={value_text(error['input'])}"
    return [f"{field}{value} {message[0].lower()}{message[1:]}{hint}"]


def _unknown_key(location: Sequence[str | int], value: object, config_type: type[BaseModel]) -> str:
    section: Any = config_type
    for part in location[:-1]:
        # An integer is the number of an entry in a tuple of sections, whose type the tuple's first argument names.
        section = get_args(section)[0] if isinstance(part, int) else section.model_fields[part].annotation
    *parents, name = map(str, location)
    key = shorten(".".join([*parents, name]))
    # An unknown section is recognised by its keys.
    inner = [str(other) for other in value] if len(location) == 1 and isinstance(value, dict) else []
    renamed = [other for other in (key, *(f"{key}.{other}" for other in inner)) if other in RENAMED]
    if renamed:
        return "; ".join(f"{other} was renamed to {RENAMED[other]}. Use the new name." for other in renamed)
    prefix = f"{parents[0]}." if len(parents) == 1 else ""
    near = difflib.get_close_matches(name, section.model_fields, n=1, cutoff=0.6)
    hint = f" (did you mean {prefix + near[0]!r}?)" if near else ""
    meant = meant_keys(name, config_type) or [other for word in inner for other in meant_keys(word, config_type)[:1]][:1]
    if not meant and not hint:
        meant = [other for other in [near_key(name, config_type)] if other]
    if meant and not (inner and hint):
        hint = f" (did you mean {' or '.join(repr(other) for other in meant)}?)"
    known = ", ".join(section.model_fields)
    if len(location) == 1:
        return f"{key}: unknown section{hint}. Known sections: {known}."
    return f"{key}: unknown key{hint}. Known keys: {known}."
