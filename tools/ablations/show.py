"""Writes tables, figures and numbers of all finished runs of an ablation campaign."""

from ablations.campaign import Campaign
from ablations.figures import draw_curves, draw_variants
from ablations.results import collect, write
from ablations.table import describe


def show(campaign: Campaign, figures: bool = True) -> str:
    """Write results.*, curves.csv and, with `figures`, the figures into the campaign's folder; return the table.

    curves.png shows the variants that the command line chose, the other files those of all finished runs.

    Raises UserError if no run is finished.
    """
    runs, summaries = collect(campaign)
    text = describe(campaign, summaries)
    write(campaign, runs, summaries, text)
    if figures:
        draw_variants(summaries, campaign.out)
        chosen = {variant.name for variant in campaign.variants}
        draw_curves([run for run in runs if run.variant in chosen], campaign.out)
    return text
