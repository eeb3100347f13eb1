"""What the paths command found, as text and as data."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor

from raphael_dist.insight.classifier import Outcome
from raphael_dist.insight.coverage import Coverage
from raphael_dist.insight.experts import Finding
from raphael_dist.insight.prompt import Followed


@dataclass
class Report:
    """Collects; `text()` is the page, `routes` the data."""

    origin: str
    routes: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    regions: dict[str, list[Coverage]] = field(default_factory=dict)

    def add_time(self, route_LT: Tensor) -> None:
        """Note the stretches of timesteps that one expert of a block serves."""
        self.routes["time"] = [_stretches(row) for row in route_LT.tolist()]

    def add_prompt(self, prompt: str, seen: Followed, regions: list[Coverage]) -> None:
        """Note the routes of a prompt's words, and how much of the picture regions cover."""
        assert seen.route_WL is not None
        self.routes.setdefault("words", {})[prompt] = dict(zip(seen.words, seen.route_WL.tolist(), strict=True))
        self.regions[prompt] = regions

    def text(self) -> str:
        """Return the report as Markdown."""
        lines = [f"# Diffusion paths of {self.origin}"]
        if "time" in self.routes:
            lines += ["", "## Time experts (timesteps first-last: expert)"]
            lines += [f"- block {number}: " + self._bands(row) for number, row in enumerate(self.routes["time"])]
        for prompt, regions in self.regions.items():
            lines += [
                "",
                f"## Regions: {prompt}",
                "share of the picture, and of (image token, expert) pairs in use, by block",
                "",
            ]
            lines += ["| alpha | word | padding token | pairs | pairs without padding |", "|---|---|---|---|---|"]
            lines += [_row(c) for c in regions]
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


def _row(c: Coverage) -> str:
    return f"| {c.alpha:g} | " + " | ".join(map(_numbers, (c.words, c.padding, c.pairs, c.pairs_of_words))) + " |"


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)
