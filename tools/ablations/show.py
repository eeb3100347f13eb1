"""Writes tables, figures and numbers of all finished runs of an ablation campaign."""

from ablations.campaign import Campaign
from ablations.figures import draw, draw_curves
from ablations.results import collect, write
from ablations.table import describe


def show(campaign: Campaign, figures: bool = True) -> str:
    """Write results.*, curves.csv and, with `figures`, the figures into the campaign's folder; return the table.

    Raises UserError if no run is finished.
    """
    runs, summaries = collect(campaign)
    text = describe(campaign, summaries)
    write(campaign, runs, summaries, text)
    if figures:
        draw(campaign.base, summaries, campaign.out)
        draw_curves(runs, campaign.out)
    return text
