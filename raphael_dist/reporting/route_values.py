"""Checks a file of routes (which expert processes each word and timestep) before the HTML report shows them."""

import math
from collections.abc import Callable

from raphael_dist.text import JsonObject

KEYS = ("prompt", "image", "words", "space", "regions", "at", "time", "timesteps")
MAX_SIDE = 256  # of a region, in cells


def checked_routes(routes: object) -> JsonObject:
    """Check the types and shapes of routes that were read from a JSON file; return those keys that the report draws.

    `routes`: the parsed file, with the keys and values that `analysis.route_report.trace_values` describes.

    Raises ValueError if a key is missing, or if its value has the wrong type or shape or contains NaN.
    """
    if not isinstance(routes, dict) or not {"words", "space", "regions", "time", "timesteps"} <= set(routes):
        raise ValueError("it contains no routes")
    words, space, time, timesteps = (routes[key] for key in ("words", "space", "time", "timesteps"))
    _require(_is_list(words, _is_text), "words")
    _require(_is_list(timesteps, _is_finite), "timesteps")
    blocks = len(space[0]) if isinstance(space, list) and space and isinstance(space[0], list) else 0
    if space != []:
        _require(blocks > 0 and _is_table(space, len(words), blocks, _is_expert), "space")
        _require(_is_table(routes["regions"], len(words), blocks, _is_region), "regions")
        _require(_is_finite(routes.get("at")), "at")
    if time != []:
        rows = blocks or (len(time) if isinstance(time, list) else 0)
        _require(len(timesteps) > 0 and _is_table(time, rows, len(timesteps), _is_expert), "time")
    for key in ("prompt", "image"):
        _require(_is_text(routes.setdefault(key, "")), key)
    return {key: routes.get(key) for key in KEYS}


def _require(is_valid: bool, key: str) -> None:
    if not is_valid:
        raise ValueError(f"the values of {key!r} have another type or shape than those that the trainer writes")


def _is_list(value: object, is_valid: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and all(map(is_valid, value))


def _is_table(value: object, rows: int, columns: int, is_valid: Callable[[object], bool]) -> bool:
    return (
        isinstance(value, list)
        and len(value) == rows
        and all(_is_list(row, is_valid) and len(row) == columns for row in value)
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15 and math.isfinite(value)


def _is_expert(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1_000_000


def _is_region(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 3:
        return False
    height, width, cells = value
    if not (_is_expert(height) and _is_expert(width) and _is_text(cells)):
        return False
    return 0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE and len(cells) == height * width and set(cells) <= set("01")
