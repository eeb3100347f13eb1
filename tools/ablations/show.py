"""Writes all that a campaign has found so far: tables, figures, and the numbers behind them."""

from ablations.campaign import Campaign
from ablations.figures import draw
from ablations.results import collect, write
from ablations.table import describe


def show(campaign: Campaign, figures: bool = True) -> str:
    """Write results.csv, results.json, results.md, and figures; return the table. UserError: no run is finished."""
    runs, summaries = collect(campaign)
    text = describe(campaign, summaries)
    write(campaign, runs, summaries, text)
    if figures:
        draw(campaign.base, summaries, campaign.out)
    return text
