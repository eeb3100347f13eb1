"""The results of a campaign as Markdown: a table, and in words what was told apart."""

from collections.abc import Sequence

from ablations.campaign import Campaign
from ablations.results import Interval, Summary
from ablations.size import size_of

PARTS = ("no-space", "no-time", "no-edge")  # every part of the paper's model, taken out


def listing(campaign: Campaign) -> str:
    """Return the variants with their sizes and overrides, a line each."""
    lines = []
    for variant in campaign.variants:
        size = size_of(campaign.base.config(variant.overrides))
        fields = " ".join(f"{key}={text}" for key, text in variant.overrides.items())
        numbers = f"{size.parameters / 1e6:9.3f} M {size.flops / 1e9:9.3f} GFLOP"
        lines.append(f"{variant.name:17} {numbers}  {variant.what}: {fields}")
    return "\n".join(lines)


def describe(campaign: Campaign, summaries: Sequence[Summary]) -> str:
    """Return the table and the order of the variants."""
    whole = next((summary for summary in summaries if summary.variant == "full"), None)
    rows = list(dict.fromkeys(what for summary in summaries for what in summary.benchmark))
    head = ["variant", "", "seeds", "held-out loss", "difference to `full`", "training loss", "parameters"]
    head += ["GFLOP per image", "images/s", *rows]
    lines = [
        f"`{campaign.base.name}`, {campaign.steps * campaign.base.config().train.global_batch:,} images a run. "
        "Losses are L_denoise; means over seeds with 95% intervals by Student's t, differences seed by seed.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    lines += ["| " + " | ".join(_cells(summary, whole, rows)) + " |" for summary in summaries]
    return "\n".join([*lines, "", *_in_words(summaries)]) + "\n"


def _cells(summary: Summary, whole: Summary | None, rows: Sequence[str]) -> list[str]:
    seeds = str(summary.runs) + (f" ({summary.diverged} diverged)" if summary.diverged else "")
    parameters, flops = f"{summary.parameters / 1e6:.3f} M", f"{summary.flops_per_image / 1e9:.3f}"
    if whole is not None and summary is not whole:
        parameters += f" ({summary.parameters / whole.parameters - 1:+.2%})"
        flops += f" ({summary.flops_per_image / whole.flops_per_image - 1:+.2%})"
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


def _text(found: Interval | None, digits: int = 4, sign: str = "") -> str:
    return "" if found is None else found.text(digits, sign)


def _in_words(summaries: Sequence[Summary]) -> list[str]:
    """Return the order by held-out loss, and for each part whether the model is worse without it, as the paper has it."""
    ranked = sorted((s for s in summaries if s.loss is not None), key=lambda s: s.loss.mean if s.loss else 0.0)
    lines = ["By held-out loss, the best first: " + ", ".join(f"`{s.variant}`" for s in ranked) + "."]
    verdicts = {1: "worse, as in the paper", -1: "better, against the paper", 0: "not told apart"}
    for summary in summaries:
        if summary.variant in PARTS and summary.difference is not None:
            how = verdicts[summary.difference.side]
            lines.append(f"- {summary.what}: {how} ({summary.difference.text(sign='+')}, {summary.difference.count} seeds).")
    return lines
