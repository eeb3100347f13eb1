"""What the paths command found, as text and as data."""

from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any

from torch import Tensor

from raphael_dist.insight.classifier import Outcome
from raphael_dist.insight.coverage import Coverage
from raphael_dist.insight.experts import Finding
from raphael_dist.insight.prompt import Followed

COLUMNS = {
    "words": "region of a word",
    "padding": "of a padding token",
    "pairs": "pairs in sampling",
    "pairs_of_words": "without padding",
    "trained": "pairs in training",
    "trained_of_words": "without padding",
}


@dataclass
class Report:
    """Collects; `text()` is the page, `routes` the data."""

    origin: str
    routes: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    regions: dict[str, list[Coverage]] = field(default_factory=dict)
    agree: dict[str, float] = field(default_factory=dict)

    def add_time(self, route_LT: Tensor) -> None:
        """Note the stretches of timesteps that one expert of a block serves."""
        self.routes["time"] = [_stretches(row) for row in route_LT.tolist()]

    def add_prompt(self, prompt: str, seen: Followed, regions: list[Coverage], agree: float) -> None:
        """Note the routes of a prompt's words, how much of the picture regions cover, and which share of the words' routes
        the noise of training leaves as they are."""
        assert seen.route_WL is not None
        self.routes.setdefault("words", {})[prompt] = dict(zip(seen.words, seen.route_WL.tolist(), strict=True))
        self.regions[prompt], self.agree[prompt] = regions, agree
        self.routes.setdefault("regions", {})[prompt] = [asdict(one) for one in regions]

    def text(self) -> str:
        """Return the report as Markdown."""
        lines = [f"# Diffusion paths of {self.origin}"]
        if "time" in self.routes:
            lines += ["", "## Time experts (timesteps first-last: expert)"]
            lines += [f"- block {number}: " + self._bands(row) for number, row in enumerate(self.routes["time"])]
        for prompt, regions in self.regions.items():
            lines += ["", f"## Regions: {prompt}", "mean over blocks (by block: paths.json)", ""]
            lines += [f"With the gate noise of training {self.agree[prompt]:.0%} of the words' routes stay as they are.", ""]
            lines += ["| alpha | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
            for one in regions:
                lines.append(f"| {one.alpha:g} | " + " | ".join(f"{fmean(getattr(one, c)):.2f}" for c in COLUMNS) + " |")
        lines += ["", "## Experts", *([f"- {finding}" for finding in self.findings] or ["none is dead, no two do the same"])]
        if self.outcomes:
            lines += ["", "## Words told by their paths (XGBoost, five folds of captions)", ""]
            lines += [
                "| words | how many | samples | accuracy | chance (most frequent) | shuffled |",
                "|---|---|---|---|---|---|",
            ]
        for kind, o in self.outcomes.items():
            accuracy = f"{o.accuracy:.1%} +- {o.deviation:.1%}"
            lines.append(f"| {kind} | {o.words} | {o.samples} | {accuracy} | {o.chance:.1%} | {o.shuffled:.1%} |")
        return "\n".join(lines) + "\n"

    def _bands(self, row: list[list[int]]) -> str:
        shown = ", ".join(f"{first}-{last}: {expert}" for first, last, expert in row[:12])
        return shown + (f" and {len(row) - 12} more" if len(row) > 12 else "")


def _stretches(row: list[int]) -> list[list[int]]:
    """Return [first, last, expert] of each run of equal experts."""
    edges = [0, *(t for t in range(1, len(row)) if row[t] != row[t - 1]), len(row)]
    return [[first, end - 1, row[first]] for first, end in pairwise(edges)]
