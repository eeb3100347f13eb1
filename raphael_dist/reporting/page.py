"""The HTML report of runs: one file that needs no server and no network."""

import base64
import io
import json
import shlex
from collections.abc import Callable, Sequence
from html import escape
from importlib import resources

from PIL import Image

from raphael_dist.analysis.experts import DEAD_SHARE
from raphael_dist.reporting import summary
from raphael_dist.reporting.expert_health import OVERLOADED, dead_blocks, overloaded_blocks
from raphael_dist.reporting.plan_comparison import number as shown_number
from raphael_dist.reporting.run_facts import Examined
from raphael_dist.reporting.run_files import RunFiles, read_routes
from raphael_dist.reporting.series import CHARTS, Curve, chart_data, timeline_data
from raphael_dist.text import JsonObject, hide_secrets_in_text, redact

MAX_BYTES = 5_000_000
IMAGE_BYTES = 2_500_000  # for all sample grids of the page
ROUTES_BYTES = 1_000_000  # for all routes of the page
MAX_STEPS = 24  # on a slider
MAX_EVENTS = 200
SECTIONS = {
    "summary": "Summary",
    "loss": "Loss and learning rate",
    "speed": "Speed",
    "samples": "Samples",
    "routes": "Routes: word, region, expert, timestep",
    "experts": "Expert health",
    "memory": "Memory and time compared with the plan",
    "faults": "Faults and restarts",
    "config": "Configuration",
    "versions": "Versions",
}


def build_page(runs: Sequence[Examined]) -> str:
    """Return the HTML report of one or more runs, as the text of one file with figures, scripts and styles inside.

    `runs`: for each run, its metrics, logs, detected problems and predictions.
    """
    data: JsonObject = {"charts": [], "samples": [], "routes": []}
    parts = []
    for name, title in SECTIONS.items():
        inner = _SECTIONS[name](runs, data)
        parts.append(f'<section id="{name}"><h2>{title}</h2>{inner}</section>')
    names = ", ".join(escape(e.run.name) for e in runs)
    links = "".join(f'<a href="#{name}">{name.capitalize()}</a>' for name in SECTIONS)
    web = resources.files("raphael_dist.reporting") / "web"
    read = lambda name: (web / name).read_text(encoding="utf-8")  # noqa: E731
    # Escaped, since < could end the element early. The policy forbids to fetch anything, whatever a caption contains.
    payload = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Report of {names}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{read('uPlot.min.css')}{read('report.css')}</style></head><body>"
        f"<h1>Report of {names}</h1><nav>{links}</nav>{''.join(parts)}"
        f'<script type="application/json" id="data">{payload}</script>'
        f"<script>/* uPlot, MIT licence, (c) 2022 Leon Sorokin */{read('uPlot.iife.min.js')}</script>"
        f"<script>{read('report.js')}</script></body></html>"
    )


def _text(text: object) -> str:
    return escape(hide_secrets_in_text(str(text)))


def _sentence(text: str) -> str:
    return f"<p>{_text(text)}</p>"


def _table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[object]]]) -> str:
    """Return an HTML table. Rows are (CSS class, cells); numbers are aligned to the right."""
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    lines = []
    for css, cells in rows:
        inner = "".join(f"<td{' class=n' if _is_number(cell) else ''}>{_text(cell)}</td>" for cell in cells)
        lines.append(f'<tr class="{css}">{inner}</tr>' if css else f"<tr>{inner}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _is_number(cell: object) -> bool:
    return str(cell).replace(".", "").replace(",", "").replace("-", "").isdigit()


def _heading(runs: Sequence[Examined], run: RunFiles) -> str:
    return f"<h3>{_text(run.name)}</h3>" if len(runs) > 1 else ""


def _charts(section: str, runs: Sequence[Examined], data: JsonObject) -> str:
    """Return the HTML of a section's charts, and add their curves to `data`. A sentence lists charts without data."""
    figures, absent = [], []
    for chart in CHARTS:
        if chart.section != section:
            continue
        if curves := chart_data(chart, [examined.run for examined in runs]):
            figures.append(_figure(chart.title, "step", curves, data))
        else:
            absent.append(chart.title.lower())
    note = _sentence(f"Not in metrics.jsonl: {', '.join(absent)}.") if absent else ""
    return f'<div class="charts">{"".join(figures)}</div>{note}'


def _figure(title: str, x: str, curves: list[Curve], data: JsonObject) -> str:
    data["charts"].append({"x": x, "curves": curves})
    return f'<figure data-chart="{len(data["charts"]) - 1}"><figcaption>{_text(title)}</figcaption></figure>'


def _summary(runs: Sequence[Examined], data: JsonObject) -> str:
    questions: dict[str, Callable[[Examined], str]] = {
        "Did it converge?": lambda examined: summary.convergence(examined.run),
        "Is any expert dead?": lambda examined: summary.expert_health(examined.run),
        "What limits its speed?": summary.speed,
        "How often did it fail?": summary.failures,
    }
    lines = []
    for question, answer in questions.items():
        lines.append(f"<dt>{question}</dt>")
        for examined in runs:
            name = f"<b>{_text(examined.run.name)}:</b> " if len(runs) > 1 else ""
            lines.append(f"<dd>{name}{_text(answer(examined))}</dd>")
    if len(runs) > 1:
        flat = _flat_configs(runs)
        keys = summary.differences(flat)
        shown = "; ".join(f"{key}: {' / '.join(config.get(key, 'absent') for config in flat)}" for key in keys[:8])
        rest = f" and {len(keys) - 8} more below" if len(keys) > 8 else ""
        names = " / ".join(_text(examined.run.name) for examined in runs)
        shown = shown or "nothing in the configuration"
        lines.append(f"<dt>What differs between the runs?</dt><dd>({names}) {_text(shown + rest)}.</dd>")
    lines.append("<dt>Which problems does it have, and what to do?</dt>")
    for examined in runs:
        name = f"<b>{_text(examined.run.name)}:</b> " if len(runs) > 1 else ""
        items = "".join(f"<li>{_text(f)}</li>" for f in examined.findings)
        lines.append(f"<dd>{name}{f'<ul>{items}</ul>' if items else 'No problem was found.'}</dd>")
        unseen = [f"Not checked: {', '.join(examined.not_looked_at)}."] if examined.not_looked_at else []
        lines += [f"<dd>{_text(note)}</dd>" for note in unseen + examined.notes]
    return f"<dl>{''.join(lines)}</dl>"


def _loss(runs: Sequence[Examined], data: JsonObject) -> str:
    return _charts("loss", runs, data) + _sentence("Quarter 0 of the timesteps is the least noisy.")


def _speed(runs: Sequence[Examined], data: JsonObject) -> str:
    answers = (f"{_heading(runs, examined.run)}{_sentence(summary.speed(examined))}" for examined in runs)
    return "".join(answers) + _charts("speed", runs, data)


def _samples(runs: Sequence[Examined], data: JsonObject) -> str:
    parts = []
    for examined in runs:
        parts.append(_heading(runs, examined.run))
        grids = _grids(examined.run, IMAGE_BYTES // len(runs))
        if not grids:
            parts.append(_sentence("There is no sample grid: sample.prompts is empty, or no step drew samples yet."))
            continue
        data["samples"].append(grids)
        parts.append(f'<div data-samples="{len(data["samples"]) - 1}"></div>')
    return "".join(parts)


def _grids(run: RunFiles, limit: int) -> list[JsonObject]:
    """Return sample grids at evenly distributed steps, in about `limit` bytes: {"step", "src" (JPEG as data URL)}."""
    steps = _spread(sorted(run.samples), MAX_STEPS)
    grids = []
    for step in steps:
        try:
            with Image.open(run.samples[step]) as image:
                small = image.convert("RGB")
        except OSError:  # damaged, or vanished
            continue
        small.thumbnail((1000, 1000))
        for quality in (85, 60, 35, 15):
            file = io.BytesIO()
            small.save(file, "JPEG", quality=quality)
            if file.tell() * 4 / 3 <= limit / len(steps):
                break
        grids.append({"step": step, "src": f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"})
    return grids


def _spread(steps: list[int], count: int) -> list[int]:
    """Return at most `count` of the steps, evenly distributed, with the first and the last."""
    if len(steps) <= count:
        return steps
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def _routes(runs: Sequence[Examined], data: JsonObject) -> str:
    parts = []
    for examined in runs:
        parts.append(_heading(runs, examined.run))
        entries = _route_entries(examined.run, ROUTES_BYTES // len(runs))
        if entries:
            data["routes"].append(entries)
            parts.append(f'<div data-routes="{len(data["routes"]) - 1}"></div>')
        else:
            parts.append(
                _sentence(
                    "The run has no routes. A model with experts writes them with each sample grid (train.sample_every). To "
                    "make them from a checkpoint: python -m raphael_dist routes --checkpoint "
                    f"{shlex.quote(str(examined.run.folder))} --out paths"
                )
            )
    return "".join(parts)


def _route_entries(run: RunFiles, limit: int) -> list[JsonObject]:
    """Return the routes of evenly distributed steps, as JSON values, in at most `limit` bytes. The newest have priority."""
    entries: list[JsonObject] = []
    for step in reversed(_spread(sorted(run.routes), MAX_STEPS)):
        try:
            routes = read_routes(run.routes[step])
        except (OSError, ValueError):
            continue
        size = len(json.dumps(routes))
        if size > limit or not (routes["space"] or routes["time"]):
            continue
        limit -= size
        entries.append({"step": step, "routes": routes})
    return entries[::-1]


def _experts(runs: Sequence[Examined], data: JsonObject) -> str:
    tables = []
    for examined in runs:
        tables += [_heading(runs, examined.run), _sentence(summary.expert_health(examined.run)), _health(examined.run)]
    legend = (
        "Loads are means over the last fifth of the log lines; 1 is an even share. A block is marked if an expert has under "
        f"{DEAD_SHARE} (dead) or over {OVERLOADED:.0%} of the load (overloaded) in each of these lines. Block 0 is the "
        "first."
    )
    return _charts("experts", runs, data) + "".join(tables) + _sentence(legend)


def _health(run: RunFiles) -> str:
    """Return the HTML table with the lowest and the highest load of an expert in each block."""
    blocks = sorted({tag.split("/")[2] for tag in run.series if tag.startswith("moe/") and tag.count("/") == 3})
    bad = {
        block for by_kind in (dead_blocks(run), overloaded_blocks(run)) for numbers in by_kind.values() for block in numbers
    }
    columns = [(kind, end) for kind in ("space", "time") for end in ("min", "max")]
    rows: list[tuple[str, Sequence[object]]] = []
    for name in blocks:
        number, loads = int(name[1:]), [run.last(f"moe/{kind}/{name}/load_{end}") for kind, end in columns]
        cells = ["-" if load is None else f"{load:.2f}" for load in loads]
        rows.append(("bad" if number in bad else "", [number, *cells]))
    return _table(["block", *(f"{kind}: {end}" for kind, end in columns)], rows) if rows else ""


def _memory(runs: Sequence[Examined], data: JsonObject) -> str:
    parts = [_charts("memory", runs, data)]
    for examined in runs:
        rows: list[tuple[str, Sequence[object]]] = []
        for row in examined.plan:
            ratio = f"{row.ratio:.2f}" if row.ratio else "unknown"
            rows.append(("", [row.name, shown_number(row.measured), shown_number(row.planned), ratio]))
        parts += [_heading(runs, examined.run), _table(["quantity", "measured", "planned", "measured / planned"], rows)]
        if examined.plan_note:
            parts.append(_sentence(f"There is no plan: {examined.plan_note}."))
    note = (
        "On a CPU, the measured memory is that of the whole process. The plan assumes that its cores have no other work, "
        "but the run measures their peak FLOP/s at its start, with the other work."
    )
    return "".join(parts) + _sentence(note)


def _faults(runs: Sequence[Examined], data: JsonObject) -> str:
    curves = timeline_data([(examined.run.name, examined.history) for examined in runs])
    parts = [_figure("Step over minutes since the first log line; faults in red", "minutes", curves, data)] if curves else []
    for examined in runs:
        parts += [_heading(runs, examined.run), _sentence(summary.failures(examined))]
        events = [event for event in examined.history.events if event.kind != "saved"]
        rows = [("bad" if e.is_fault else "", [f"{e.time:%Y-%m-%d %H:%M:%S}", e.step, e.kind, e.text]) for e in events]
        if rows:
            parts.append(_table(["time", "step", "event", "log line"], rows[-MAX_EVENTS:]))
        if len(rows) > MAX_EVENTS:
            parts.append(_sentence(f"The last {MAX_EVENTS} of {len(rows)} events are listed."))
        if not examined.run.log:
            parts.append(_sentence("There is no train.log: starts, stops and faults are unknown."))
    return "".join(parts)


def _flat_configs(runs: Sequence[Examined]) -> list[dict[str, str]]:
    """Return the configuration of each run as {"section.key": value as text}, without secrets."""
    return [summary.flatten(redact(examined.run.config)) for examined in runs]


def _config(runs: Sequence[Examined], data: JsonObject) -> str:
    flat = _flat_configs(runs)
    if not any(flat):
        return _sentence("There is no config.yaml.")
    header = ["option", *(examined.run.name for examined in runs)]
    differing = summary.differences(flat)
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = [("bad" if key in differing else "", [key, *(config.get(key, "absent") for config in flat)]) for key in keys]
    parts = []
    if len(runs) > 1:
        changed = [row for row in rows if row[0]]
        parts.append(_sentence(f"{len(changed)} options differ (marked)." if changed else "No option differs."))
        parts.append(_table(header, changed) if changed else "")
    return "".join(parts) + f"<details><summary>All {len(keys)} options</summary>{_table(header, rows)}</details>"


def _versions(runs: Sequence[Examined], data: JsonObject) -> str:
    names = dict.fromkeys(name for examined in runs for name in examined.run.versions)
    if not names:
        return _sentence("There is no versions.json.")
    rows: list[tuple[str, Sequence[object]]] = []
    for name in names:
        values = [examined.run.versions.get(name, "absent") for examined in runs]
        rows.append(("bad" if len(set(values)) > 1 else "", [name, *values]))
    return _table(["package", *(examined.run.name for examined in runs)], rows)


_SECTIONS: dict[str, Callable[[Sequence[Examined], JsonObject], str]] = {
    "summary": _summary, "loss": _loss, "speed": _speed, "samples": _samples, "routes": _routes, "experts": _experts,
    "memory": _memory, "faults": _faults, "config": _config, "versions": _versions,
}  # fmt: skip
