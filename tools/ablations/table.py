"""Shows the results of an ablation campaign as Markdown: tables, the variants by loss, a verdict on each model part."""

from collections.abc import Sequence

from ablations.campaign import Campaign
from ablations.results import ROUTING, Interval, Summary
from ablations.size import size_of

PARTS = ("no-space", "no-time", "no-edge")  # the variants without a part of the paper's model


def listing(campaign: Campaign) -> str:
    """Return one line of text for each variant: name, size, description and overrides of the configuration."""
    lines = []
    for variant in campaign.variants:
        size = size_of(campaign.base.config(variant.overrides))
        fields = " ".join(f"{key}={text}" for key, text in variant.overrides.items())
        numbers = f"{size.parameters / 1e6:9.3f} M {size.flops / 1e9:9.3f} GFLOP"
        lines.append(f"{variant.name:17} {numbers}  {variant.what}: {fields}")
    return "\n".join(lines)


def describe(campaign: Campaign, summaries: Sequence[Summary]) -> str:
    """Return the results as Markdown: tables, the order of the variants by loss, and verdicts on the parts of the model."""
    full = next((summary for summary in summaries if summary.variant == "full"), None)
    rows = list(dict.fromkeys(what for summary in summaries for what in summary.benchmark))
    head = ["variant", "", "seeds", "held-out loss", "difference to `full`", "training loss", "parameters"]
    head += ["GFLOP per image", "images/s", *rows]
    lines = [
        f"`{campaign.base.name}`, {campaign.steps * campaign.base.config().train.global_batch_size:,} images a run. "
        "Losses are L_denoise; means over seeds with 95% intervals by Student's t, differences seed by seed.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    lines += ["| " + " | ".join(_cells(summary, full, rows)) + " |" for summary in summaries]
    compared = list(dict.fromkeys(what for summary in summaries for what in summary.differences if what != "val/loss"))
    lines += _table("Differences to `full`", compared, [(s.variant, s.differences) for s in summaries], sign="+")
    lines += _table("Routing at the end", ROUTING, [(s.variant, s.routing) for s in summaries])
    return "\n".join([*lines, "", *_conclusions(summaries)]) + "\n"


def _table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, dict[str, Interval]]], sign: str = "") -> list[str]:
    """Return the lines of a Markdown table with one row per variant; [] if no variant has values.

    `rows`: name of each variant, and for each column the mean over seeds with its 95% interval. `sign`: "+" to show the
    sign of positive values too.
    """
    rows = [(name, values) for name, values in rows if values]
    if not rows:
        return []
    lines = ["", f"{title}:", "", "| variant | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    cells = [(name, [_text(values.get(column), digits=3, sign=sign) for column in columns]) for name, values in rows]
    return lines + [f"| `{name}` | " + " | ".join(texts) + " |" for name, texts in cells]


def _cells(summary: Summary, full: Summary | None, rows: Sequence[str]) -> list[str]:
    seeds = str(summary.runs) + (f" ({summary.diverged} diverged)" if summary.diverged else "")
    parameters, flops = f"{summary.parameters / 1e6:.3f} M", f"{summary.flops_per_image / 1e9:.3f}"
    if full is not None and summary is not full:
        parameters += f" ({summary.parameters / full.parameters - 1:+.2%})"
        flops += f" ({summary.flops_per_image / full.flops_per_image - 1:+.2%})"
    return [
        f"`{summary.variant}`",
        summary.what,
        seeds,
        _text(summary.loss),
        _text(summary.difference, sign="+"),
        _text(summary.train_loss),
        parameters,
        flops,
        _text(summary.images_per_s, digits=1),
        *(_text(summary.benchmark.get(row), digits=3) for row in rows),
    ]


def _text(value: Interval | None, digits: int = 4, sign: str = "") -> str:
    return "" if value is None else value.text(digits, sign)


def _conclusions(summaries: Sequence[Summary]) -> list[str]:
    """Return lines with the variants ordered by held-out loss, and whether each part of the paper's model lowers it."""
    ranked = sorted((s for s in summaries if s.loss is not None), key=lambda s: s.loss.mean if s.loss else 0.0)
    lines = ["By held-out loss, the best first: " + ", ".join(f"`{s.variant}`" for s in ranked) + "."]
    verdicts = {1: "worse, as in the paper", -1: "better, against the paper", 0: "no significant difference"}
    for summary in summaries:
        if summary.variant in PARTS and summary.difference is not None:
            how = verdicts[summary.difference.side]
            lines.append(f"- {summary.what}: {how} ({summary.difference.text(sign='+')}, {summary.difference.count} seeds).")
    return lines
