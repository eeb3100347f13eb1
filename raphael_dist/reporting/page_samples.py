"""The sections of the HTML report with sample grids and routes.

Routes state which expert processes each word and timestep. Grids and routes of some steps are left out if the page would be
too large.
"""

import base64
import io
import json
import os
import shlex
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from raphael_dist.reporting.markup import heading, sentence
from raphael_dist.reporting.run_facts import Examined
from raphael_dist.reporting.run_files import read_routes
from raphael_dist.text import JsonObject, open_regular

MAX_STEPS = 24  # on a slider
SIDE, MIN_SIDE = 1000, 64  # of a sample grid in the page, in pixels: the largest, and the smallest that is still useful
MIN_BYTES = 12_000  # of a sample grid: if less than this is left for each, fewer steps are shown
QUALITIES = (85, 60, 35)  # of JPEG, in the order in which they are tried; then the image is made smaller


def payload_of(value: object) -> str:
    """Return a value as JSON for an HTML script element; "<" is escaped, so that no text in it can close the element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def samples_section(runs: Sequence[Examined], data: JsonObject, limit: int) -> str:
    """Return the HTML of the sample grids, and add the images to `data`, in at most `limit` bytes.

    `data`: values that the scripts of the page draw.
    """
    parts = []
    for number, examined in enumerate(runs):
        parts.append(heading(runs, examined.run))
        samples = examined.run.samples
        grids, scaled, unreadable = _grids(samples, limit // (len(runs) - number))
        limit -= len(payload_of(grids))
        if grids:
            data["samples"].append(grids)
            parts.append(f'<div data-samples="{len(data["samples"]) - 1}"></div>')
        if not samples:
            parts.append(sentence("There is no sample grid: sample.prompts is empty, or no step drew samples yet."))
        parts += _left_out("sample grids", len(grids), samples, unreadable)
        if scaled:
            folder = examined.run.folder / "samples"
            parts.append(sentence(f"The images are scaled down; the original ones are in {folder}."))
    return "".join(parts)


def routes_section(runs: Sequence[Examined], data: JsonObject, limit: int) -> str:
    """Return the HTML of the section with routes, and add the routes to `data`, in at most `limit` bytes.

    Routes state which expert processes each word and timestep. `data`: values that the scripts of the page draw.
    """
    parts = []
    for number, examined in enumerate(runs):
        parts.append(heading(runs, examined.run))
        routes = examined.run.routes
        entries, unreadable = _route_entries(routes, limit // (len(runs) - number))
        limit -= len(payload_of(entries))
        if entries:
            data["routes"].append(entries)
            parts.append(f'<div data-routes="{len(data["routes"]) - 1}"></div>')
        if not routes:
            parts.append(
                sentence(
                    "The run has no routes (which expert processes each word and timestep). A model with experts writes "
                    "them with each sample grid (train.sample_every). To make them from a checkpoint: python -m "
                    "raphael_dist routes --checkpoint "
                    f"{shlex.quote(str(examined.run.folder))} --out paths"
                )
            )
        parts += _left_out("steps with routes", len(entries), routes, unreadable)
    return "".join(parts)


def _left_out(what: str, shown: int, paths: Mapping[int, Path], unreadable: Sequence[str]) -> list[str]:
    """Return sentences as HTML that state how many steps are not in the page, and why.

    `what`: what the page shows of each step, in the plural. `shown`: number of steps in the page. `paths`: file of each
    step. `unreadable`: names of the files that cannot be read, with the reasons.
    """
    lines = []
    if shown + len(unreadable) < len(paths):
        lines.append(f"{shown} of {len(paths)} {what} are shown, because the size of this page is limited.")
    if unreadable:
        more = f" and {len(unreadable) - 3} more" if len(unreadable) > 3 else ""
        lines.append(f"Left out, because they cannot be used: {'; '.join(unreadable[:3])}{more}.")
    return [sentence(line) for line in lines]


def _grids(samples: Mapping[int, Path], limit: int) -> tuple[list[JsonObject], bool, list[str]]:
    """Return sample grids at evenly distributed steps, in at most `limit` bytes of JSON.

    Returns:
        The grids as dicts with "step" and "src" (a JPEG as a data URL); whether a grid is scaled down;
        and which files cannot be read.
    """
    steps = spread(sorted(samples), min(MAX_STEPS, limit // MIN_BYTES))
    grids: list[JsonObject] = []
    scaled, unreadable = False, []
    for step in steps:
        try:
            image, side = _read_image(samples[step])
        except Exception as error:  # of Pillow's decoders, which raise many types for damaged files
            unreadable.append(f"{samples[step].name} ({' '.join(str(error).split())[:100] or type(error).__name__})")
            continue
        jpeg, shown_side = _jpeg_within(image, (limit // len(steps) - 100) * 3 // 4)
        if jpeg is not None:
            scaled = scaled or shown_side < side
            grids.append({"step": step, "src": f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"})
    return grids, scaled, unreadable


def _read_image(path: Path) -> tuple[Image.Image, int]:
    """Read an image; return it, scaled down to SIDE pixels, and its original longer side.

    Raises many types of exceptions if it is damaged, missing or huge.
    """
    with os.fdopen(open_regular(path), "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice as many pixels raise an error
        with Image.open(file) as image:
            small = image.convert("RGB")
    side = max(small.size)
    small.thumbnail((SIDE, SIDE))
    return small, side


def _jpeg_within(image: Image.Image, limit: int) -> tuple[bytes | None, int]:
    """Return a JPEG of the image in at most `limit` bytes, scaled down if necessary, and the JPEG's longer side in pixels.

    The JPEG is None if the image would have to be smaller than MIN_SIDE.
    """
    while True:
        for quality in QUALITIES:
            file = io.BytesIO()
            image.save(file, "JPEG", quality=quality)
            if file.tell() <= limit:
                return file.getvalue(), max(image.size)
        side = round(max(image.size) * 0.7)
        if side < MIN_SIDE:
            return None, side
        image = image.copy()
        image.thumbnail((side, side))


def spread(steps: Sequence[int], count: int) -> list[int]:
    """Return at most `count` of the steps, evenly distributed, including the first and the last step.

    If `count` is 1, only the last step is returned.
    """
    if len(steps) <= count:
        return list(steps)
    if count < 2:
        return list(steps[-1:]) if count == 1 else []
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def _route_entries(paths: Mapping[int, Path], limit: int) -> tuple[list[JsonObject], list[str]]:
    """Return the routes of evenly distributed steps in at most `limit` bytes of JSON, and which files cannot be used.

    Newer steps have priority. Each entry is a dict with "step" and "routes".
    """
    entries: list[JsonObject] = []
    unreadable = []
    for step in reversed(spread(sorted(paths), MAX_STEPS)):
        try:
            if paths[step].stat().st_size > 4 * limit:  # too large even without the whitespace in it
                continue
            routes = read_routes(paths[step])
        except (OSError, ValueError) as error:
            unreadable.append(f"{paths[step].name} ({' '.join(str(error).split())[:100]})")
            continue
        size = len(payload_of(routes)) + 100
        if size <= limit and (routes["space"] or routes["time"]):
            limit -= size
            entries.append({"step": step, "routes": routes})
    return entries[::-1], unreadable
