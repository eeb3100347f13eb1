"""The HTML report of runs: one file that needs no server and no network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

from raphael_dist.analysis.expert_diagnostics import DEAD_SHARE
from raphael_dist.errors import UserError
from raphael_dist.reporting import summary
from raphael_dist.reporting.expert_health import LAYER, OVERLOADED, dead_blocks, overloaded_blocks
from raphael_dist.reporting.markup import Row, heading, sentence, table, text_html
from raphael_dist.reporting.page_samples import payload_of, routes_section, samples_section
from raphael_dist.reporting.plan_comparison import number as shown_number
from raphael_dist.reporting.run_facts import Examined
from raphael_dist.reporting.run_files import RunFiles
from raphael_dist.reporting.series import BUCKETS, CHARTS, Curve, buckets_for, chart_data, timeline_data
from raphael_dist.text import JsonObject, counted, redact

MAX_BYTES = 5_000_000
IMAGE_BYTES = 2_500_000  # for all sample grids of the page
ROUTES_BYTES = 1_000_000  # for all routes of the page: which expert processes each word and timestep
NOTE_BYTES = 2_000  # for the sentences next to the sample grids of a run
MAX_EVENTS = 200  # of all runs
MIN_EVENTS = 20  # of each run
MAX_NOTES = 20  # of each run, about what could not be read or checked
MAX_VALUE = 200  # characters of a value in the summary
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

    The page has at most MAX_BYTES bytes. Therefore curves are downsampled. The remaining bytes are for sample grids, whose
    images are scaled down, and for routes (which expert processes each word and timestep). If there are still too many
    bytes, grids and routes of some training steps are left out. The page states what is left out.

    `runs`: for each run, its metrics, logs, detected problems and predictions.

    Raises UserError if there are so many runs that the page would be larger.
    """
    runs = with_labels(runs)
    data: JsonObject = {"charts": [], "samples": [], "routes": []}
    parts = {name: section(runs, data) for name, section in _SECTIONS.items()}
    left = _bytes_left(runs, parts, data)
    if left < 0:
        raise UserError(
            f"RUN: a report must have at most {MAX_BYTES / 1e6:.0f} MB, but the curves and tables of "
            f"{counted(len(runs), 'run')} take {(MAX_BYTES - left) / 1e6:.1f} MB. Name fewer runs."
        )
    parts["routes"] = routes_section(runs, data, min(ROUTES_BYTES, left // 3))
    parts["samples"] = samples_section(runs, data, max(0, min(IMAGE_BYTES, _bytes_left(runs, parts, data))))
    return _document(runs, parts, data)


def with_labels(runs: Sequence[Examined]) -> list[Examined]:
    """Return the runs, each with a label that distinguishes it from the other runs.

    A label is the end of the run's path, as short as possible: for example "a/demo" and "b/demo". If a folder is
    given several times, a number follows: "demo (2)".
    """
    paths = [examined.run.folder.resolve().parts for examined in runs]
    labelled = []
    for number, (examined, path) in enumerate(zip(runs, paths, strict=True)):
        others = [other for other in paths if other != path]
        count = 1
        while count < len(path) and any(other[-count:] == path[-count:] for other in others):
            count += 1
        repetition = paths[:number].count(path)
        label = str(Path(*path[-count:])) + (f" ({repetition + 1})" if repetition else "")
        labelled.append(replace(examined, run=replace(examined.run, label=label)))
    return labelled


def _bytes_left(runs: Sequence[Examined], parts: Mapping[str, str], data: JsonObject) -> int:
    """Return how many bytes of sample grids or routes can still be added to the page.

    The result is negative if the page is too large already. `parts`: HTML of the page's sections so far, by name.
    `data`: values that the page's scripts draw.
    """
    return MAX_BYTES - len(_document(runs, parts, data).encode()) - NOTE_BYTES * len(runs)


def _document(runs: Sequence[Examined], parts: Mapping[str, str], data: JsonObject) -> str:
    """Return the HTML of the page. `parts`: HTML of its sections by name. `data`: values that its scripts draw."""
    sections = "".join(
        f'<section id="{name}"><h2>{title}</h2>{parts.get(name, "")}</section>' for name, title in SECTIONS.items()
    )
    names = ", ".join(text_html(examined.run.name) for examined in runs)
    links = "".join(f'<a href="#{name}">{name.capitalize()}</a>' for name in SECTIONS)
    web = resources.files("raphael_dist.reporting") / "web"
    read = lambda name: (web / name).read_text(encoding="utf-8")  # noqa: E731
    # The policy forbids to fetch anything, whatever a caption contains.
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Report of {names}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{read('uPlot.min.css')}{read('report.css')}</style></head><body>"
        f"<h1>Report of {names}</h1><nav>{links}</nav>{sections}"
        f'<script type="application/json" id="data">{payload_of(data)}</script>'
        f"<script>/* uPlot, MIT licence, (c) 2022 Leon Sorokin */{read('uPlot.iife.min.js')}</script>"
        f"<script>{read('report.js')}</script></body></html>"
    )


def _charts(section: str, runs: Sequence[Examined], data: JsonObject) -> str:
    """Return the HTML of a section's charts, and add their curves to `data`. A sentence lists charts without data."""
    figures, absent = [], []
    files = [examined.run for examined in runs]
    buckets = buckets_for(files)
    for chart in CHARTS:
        if chart.section != section:
            continue
        if curves := chart_data(chart, files, buckets):
            figures.append(_figure(chart.title, "step", curves, data))
        else:
            absent.append(chart.title.lower())
    note = sentence(f"Not in metrics.jsonl: {', '.join(absent)}.") if absent else ""
    if buckets < BUCKETS:
        note += sentence(f"A curve has at most {2 * buckets} points, because the size of this page is limited.")
    return f'<div class="charts">{"".join(figures)}</div>{note}'


def _figure(title: str, x: str, curves: list[Curve], data: JsonObject) -> str:
    data["charts"].append({"x": x, "curves": curves})
    return f'<figure data-chart="{len(data["charts"]) - 1}"><figcaption>{text_html(title)}</figcaption></figure>'


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
            name = f"<b>{text_html(examined.run.name)}:</b> " if len(runs) > 1 else ""
            lines.append(f"<dd>{name}{text_html(answer(examined))}</dd>")
    if len(runs) > 1:
        flat = _flat_configs(runs)
        keys = summary.differences(flat)
        shown = "; ".join(f"{key}: {' / '.join(_values(flat, key))}" for key in keys[:8])
        rest = f" and {len(keys) - 8} more below" if len(keys) > 8 else ""
        names = " / ".join(text_html(examined.run.name) for examined in runs)
        shown = shown or "nothing in the configuration"
        lines.append(f"<dt>What differs between the runs?</dt><dd>({names}) {text_html(shown + rest)}.</dd>")
    lines.append("<dt>Which problems does it have, and what to do?</dt>")
    for examined in runs:
        name = f"<b>{text_html(examined.run.name)}:</b> " if len(runs) > 1 else ""
        items = "".join(f"<li>{text_html(f)}</li>" for f in examined.findings)
        lines.append(f"<dd>{name}{f'<ul>{items}</ul>' if items else 'No problem was found.'}</dd>")
        unseen = [f"Not checked: {', '.join(examined.not_looked_at)}."] if examined.not_looked_at else []
        more = len(examined.notes) - MAX_NOTES
        cut = [f"{more} more such sentences are left out."] if more > 0 else []
        lines += [f"<dd>{text_html(note)}</dd>" for note in unseen + examined.notes[:MAX_NOTES] + cut]
    return f"<dl>{''.join(lines)}</dl>"


def _values(flat: Sequence[dict[str, str]], key: str) -> list[str]:
    """Return the value of an option in each run, shortened. `flat`: the flat configurations of the runs."""
    values = [config.get(key, "absent") for config in flat]
    return [value if len(value) <= MAX_VALUE else f"{value[:MAX_VALUE]}..." for value in values]


def _loss(runs: Sequence[Examined], data: JsonObject) -> str:
    return _charts("loss", runs, data) + sentence("Quarter 0 of the timesteps is the least noisy.")


def _speed(runs: Sequence[Examined], data: JsonObject) -> str:
    answers = (f"{heading(runs, examined.run)}{sentence(summary.speed(examined))}" for examined in runs)
    return "".join(answers) + _charts("speed", runs, data)


def _experts(runs: Sequence[Examined], data: JsonObject) -> str:
    tables = []
    for examined in runs:
        tables += [heading(runs, examined.run), sentence(summary.expert_health(examined.run)), _health(examined.run)]
    legend = (
        "The table has the smallest (min) and largest (max) load of an expert in each block; 1 is the mean load of the "
        "block's experts. Loads are means over the last fifth of the log lines. A block is marked if, in each of these "
        f"lines, an expert has a load under {DEAD_SHARE} (dead) or gets over {OVERLOADED:.0%} of the block's work "
        "(overloaded). Block 0 is the first."
    )
    return _charts("experts", runs, data) + "".join(tables) + sentence(legend)


def _health(run: RunFiles) -> str:
    """Return the HTML table with the lowest and the highest load of an expert in each block."""
    blocks = sorted({match[2] for tag in run.series if (match := LAYER.fullmatch(tag))}, key=int)
    bad = {
        block for by_kind in (dead_blocks(run), overloaded_blocks(run)) for numbers in by_kind.values() for block in numbers
    }
    columns = [(kind, end) for kind in ("space", "time") for end in ("min", "max")]
    rows: list[Row] = []
    for name in blocks:
        number, loads = int(name), [run.last(f"moe/{kind}/L{name}/load_{end}") for kind, end in columns]
        cells = ["-" if load is None else f"{load:.2f}" for load in loads]
        rows.append(("bad" if number in bad else "", [number, *cells]))
    return table(["block", *(f"{kind}: {end}" for kind, end in columns)], rows) if rows else ""


def _memory(runs: Sequence[Examined], data: JsonObject) -> str:
    parts = [_charts("memory", runs, data)]
    for examined in runs:
        rows: list[Row] = []
        for row in examined.plan:
            ratio = f"{row.ratio:.2f}" if row.ratio else "unknown"
            rows.append(("", [row.name, shown_number(row.measured), shown_number(row.planned), ratio]))
        parts += [heading(runs, examined.run), table(["quantity", "measured", "planned", "measured / planned"], rows)]
        if examined.plan_note:
            parts.append(sentence(f"There is no prediction: {examined.plan_note}."))
    note = (
        "Planned values are predictions for the same settings. On a CPU, the measured memory is that of the whole process, "
        "and the measured MFU refers to the peak FLOP/s that the run measured at its start, while other processes may have "
        "used the same cores; the planned MFU refers to the peak of idle cores."
    )
    return "".join(parts) + sentence(note)


def _faults(runs: Sequence[Examined], data: JsonObject) -> str:
    buckets = buckets_for([examined.run for examined in runs])
    curves = timeline_data([(examined.run.name, examined.history) for examined in runs], buckets)
    most = max(MIN_EVENTS, MAX_EVENTS // len(runs))
    parts = [_figure("Step over minutes since the first log line; faults in red", "minutes", curves, data)] if curves else []
    for examined in runs:
        parts += [heading(runs, examined.run), sentence(summary.failures(examined))]
        events = [event for event in examined.history.events if event.kind != "saved"]
        rows = [("bad" if e.is_fault else "", [f"{e.time:%Y-%m-%d %H:%M:%S}", e.step, e.kind, e.text]) for e in events]
        if rows:
            parts.append(table(["time", "step", "event", "log line"], rows[-most:]))
        if len(rows) > most:
            parts.append(sentence(f"The last {most} of {len(rows)} events are listed."))
        if not examined.run.log:
            parts.append(sentence("There is no train.log: starts, stops and faults are unknown."))
    return "".join(parts)


def _flat_configs(runs: Sequence[Examined]) -> list[dict[str, str]]:
    """Return the configuration of each run as {"section.key": value as text}, without secrets."""
    return [summary.flatten(redact(examined.run.config)) for examined in runs]


def _config(runs: Sequence[Examined], data: JsonObject) -> str:
    flat = _flat_configs(runs)
    if not any(flat):
        return sentence("There is no config.yaml.")
    header = ["option", *(examined.run.name for examined in runs)]
    differing = summary.differences(flat)
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = [("bad" if key in differing else "", [key, *(config.get(key, "absent") for config in flat)]) for key in keys]
    parts = []
    if len(runs) > 1:
        changed = [row for row in rows if row[0]]
        text = f"{counted(len(changed), 'option')} with different values (marked)." if changed else "No option differs."
        parts.append(sentence(text))
        parts.append(table(header, changed) if changed else "")
    return "".join(parts) + f"<details><summary>All {len(keys)} options</summary>{table(header, rows)}</details>"


def _versions(runs: Sequence[Examined], data: JsonObject) -> str:
    names = dict.fromkeys(name for examined in runs for name in examined.run.versions)
    if not names:
        return sentence("There is no versions.json.")
    rows: list[Row] = []
    for name in names:
        values = [examined.run.versions.get(name, "absent") for examined in runs]
        rows.append(("bad" if len(set(values)) > 1 else "", [name, *values]))
    return table(["package", *(examined.run.name for examined in runs)], rows)


_SECTIONS: dict[str, Callable[[Sequence[Examined], JsonObject], str]] = {
    "summary": _summary, "loss": _loss, "speed": _speed, "experts": _experts, "memory": _memory, "faults": _faults,
    "config": _config, "versions": _versions,
}  # fmt: skip
