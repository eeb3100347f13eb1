"""Writes the results of the command `routes` as Markdown and as JSON values."""

import base64
import io
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import numpy as np
from PIL import Image
from torch import Tensor

from raphael_dist.analysis.coverage import Coverage
from raphael_dist.analysis.expert_diagnostics import Finding
from raphael_dist.analysis.trace_prompt import PromptTrace
from raphael_dist.text import JsonObject

# Headings of the columns of `Coverage.means`.
COLUMNS = (
    *("region of a word", "of a padding token", "pairs in sampling", "without padding"),
    *("pairs in training", "without padding"),
)
_LEGEND = (
    "A region is the share of the image tokens that a text token attends to, for a value of alpha (model.mask_threshold). "
    "Pairs are the share of all (image token, space expert) pairs that are computed. Numbers are means over the blocks; "
    "paths.json has those of each block."
)


@dataclass
class RouteReport:
    """Collects the results of the command `routes`, which shows the experts that words and timesteps are routed to.

    The method `text` returns the results as Markdown.

    Attributes:
        origin: name of the model, for the heading.
        routes: the results as JSON values.
        findings: dead and duplicate experts.
        regions: by prompt, for several thresholds alpha: how much of the image a text token's region covers (`Coverage`).
        agreement: by prompt, the share (0..1) of its words that have the same expert with and without gate noise.
    """

    origin: str
    routes: JsonObject = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    regions: dict[str, list[Coverage]] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)

    def add_time(self, route_LT: Tensor) -> None:
        """Add the time expert of each of L blocks at each of T timesteps to the results. `route_LT`: int [L, T]."""
        self.routes["time"] = [_stretches(row) for row in route_LT.tolist()]

    def add_prompt(self, prompt: str, trace: PromptTrace, regions: list[Coverage], agreement: float) -> None:
        """Add the results for one prompt.

        Args:
            prompt: the text of the prompt.
            trace: the space experts of the prompt's words.
            regions: a `Coverage` for each threshold alpha. For each transformer block it has the mean share of the image
                that a text token's region covers; padding tokens have their own mean. The region is the set of image tokens
                whose attention to the text token is at least alpha times the largest one.
            agreement: share (0..1) of the prompt's word tokens that have the same expert with and without gate noise.
        """
        assert trace.route_WL is not None
        self.routes.setdefault("words", {})[prompt] = dict(zip(trace.words, trace.route_WL.tolist(), strict=True))
        self.regions[prompt], self.agreement[prompt] = regions, agreement
        self.routes.setdefault("regions", {})[prompt] = [asdict(coverage) for coverage in regions]

    def text(self) -> str:
        """Return the report as Markdown."""
        lines = [f"# Diffusion paths of {self.origin}"]
        if "time" in self.routes:
            lines += ["", "## Time experts (timesteps first-last: expert)"]
            lines += [f"- block {number}: " + _describe(row) for number, row in enumerate(self.routes["time"])]
        for prompt, regions in self.regions.items():
            lines += ["", f"## Regions: {prompt}", _LEGEND, ""]
            agreement = (
                f"{self.agreement[prompt]:.0%} of the words keep their expert when the gate noise of training is added."
            )
            lines += [agreement, ""]
            lines += ["| alpha | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
            for coverage in regions:
                cells = [f"{coverage.alpha:g}", *(f"{mean:.2f}" for mean in coverage.means())]
                lines.append("| " + " | ".join(cells) + " |")
        findings = [f"- {finding}" for finding in self.findings] or ["No expert is dead, and no two are duplicates."]
        return "\n".join([*lines, "", "## Experts", *findings]) + "\n"


def _describe(stretches: list[list[int]]) -> str:
    shown = ", ".join(f"{first}-{last}: {expert}" for first, last, expert in stretches[:12])
    return shown + (f" and {len(stretches) - 12} more" if len(stretches) > 12 else "")


def _stretches(row: list[int]) -> list[list[int]]:
    """Return [first index, last index, expert] for each stretch of consecutive equal experts in the list `row`."""
    edges = [0, *(t for t in range(1, len(row)) if row[t] != row[t - 1]), len(row)]
    return [[first, end - 1, row[first]] for first, end in pairwise(edges)]


def trace_values(prompt: str, trace: PromptTrace, side: int = 192) -> JsonObject:
    """Convert a `PromptTrace` to JSON values for the HTML report: the image, and each word's experts and regions.

    Args:
        prompt: the text of the prompt.
        trace: the image drawn for the prompt, and for each word its experts and its regions in the image.
        side: largest width and height of the image, in pixels.

    Returns:
        A dict for W words, L blocks and S timesteps, with these keys:
            prompt, words, timesteps: the prompt, its words [W], and the timesteps [S].
            space, time: numbers of the experts, [W][L] and [L][S]; [] if the model has no such experts.
            at: the timestep at which `regions` were recorded.
            regions: for each word and block, the part of the image that attends to the word, as [h, w, cells]. The string
                `cells` has 1 in this part, else 0, row by row.
            image: a JPEG in base64.
    """
    image = Image.fromarray(trace.pixels)
    image.thumbnail((side, side))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    record = trace.record
    return {
        "prompt": prompt,
        "image": base64.b64encode(data.getvalue()).decode(),
        "words": trace.words,
        "space": [] if trace.route_WL is None else trace.route_WL.tolist(),
        "regions": [[_region(region_hw) for region_hw in by_block] for by_block in trace.regions],
        "at": trace.timestep,
        "time": [] if record.time_LS is None else record.time_LS.tolist(),
        "timesteps": record.timesteps,
    }


def _region(region_hw: np.ndarray, side: int = 32) -> list[int | str]:
    """Return [height, width, cells] of a bool map, with the cells as a string of 0 and 1, row by row.

    If the map is larger than `side` x `side`, only every n-th row and column is used, with the smallest n that makes it fit.
    """
    step = -(-max(region_hw.shape) // side)
    small = region_hw[::step, ::step]
    return [*small.shape, "".join("01"[int(cell)] for cell in small.flat)]
