"""Judges the reports of all ranks (preflight.py): a table of results, and which nodes are at fault, why, and what to do."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from raphael_dist.errors import UserError

MAX_SKEW_S = 5.0
SLOW_PAIR = 0.3  # a pair of nodes is slow below this share of the median bandwidth
ALONE = ("device", "data", "checkpoints")  # the checks that a rank makes before it joins the others


@dataclass
class Verdict:
    """The outcome. `lines`: the table. `faults`: by node, what keeps it from training. `warnings`: what does not.

    `everywhere`: every node has the same fault, so that leaving nodes out would not help.
    """

    lines: list[str]
    faults: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    everywhere: bool = False

    def blame(self, node: str, text: str) -> None:
        """Add a fault of a node, once."""
        if text not in self.faults.setdefault(node, []):
            self.faults[node].append(text)


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """Return the ranks' reports, by rank. Raises UserError when there is none."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
    if not reports:
        raise UserError(f"{folder}: no rank left a report; did the ranks start?")
    return reports


def judge(reports: list[dict[str, Any]], num_ranks: int, nodes: list[str]) -> Verdict:
    """Return the verdict over `num_ranks` ranks. `nodes` names all nodes, those without a report too; it may be empty."""
    verdict = Verdict([_row(r) for r in reports])
    heard = {r["node"] for r in reports}
    for node in nodes:
        if node not in heard:
            verdict.blame(node, "no report: its ranks did not start, or died (their messages are above)")
    if not set(nodes) - heard and len(reports) < num_ranks:
        missing = sorted(set(range(num_ranks)) - {r["rank"] for r in reports})
        verdict.blame(f"ranks {missing[:8]}", "no report")
    _alone(verdict, reports)
    _equal_versions(verdict, reports)
    problems = [(r["node"], p) for r in reports for p in r["problems"] if p["phase"] not in ALONE]
    if not verdict.faults:
        # A node that could not join is at fault; nodes that joined and timed out waiting for it are not.
        outside = [r["node"] for r in reports if not r["joined"]]
        for node, problem in problems:
            if not outside or node in outside:
                verdict.blame(node, _text(problem))
    elif problems:
        verdict.warnings.append("the ranks' collectives were not tested to the end, for want of these nodes")
    if all(r["joined"] for r in reports):
        _together(verdict, reports)
    faults = [set(texts) for texts in verdict.faults.values()]
    verdict.everywhere = len(faults) >= max(1, len(set(nodes) | heard)) and bool(set.intersection(*faults))
    return verdict


def _row(r: dict[str, Any]) -> str:
    device = r.get("device") or {}
    return f"rank {r['rank']:<5} {r['node']:<16} {device.get('name', '?'):<24} {device.get('network', '?')}"


def _text(problem: dict[str, str]) -> str:
    return problem["what"] + (f"; {problem['fix']}" if problem["fix"] else "")


def _alone(verdict: Verdict, reports: list[dict[str, Any]]) -> None:
    for r in reports:
        for problem in r["problems"]:
            if problem["phase"] in ALONE:
                verdict.blame(r["node"], _text(problem))
    for name, title in (("data", "data"), ("checkpoints", "checkpoints")):
        speeds = {r["node"]: r[name]["mb_per_s"] for r in reports if (r.get(name) or {}).get("mb_per_s")}
        if speeds:
            node = min(speeds, key=lambda n: speeds[n])
            free = min((r[name].get("free_gib", float("inf")) for r in reports if r.get(name)), default=float("inf"))
            space = f", {free:.0f} GiB free" if name == "checkpoints" else ""
            verb = "readable" if name == "data" else "writable"
            verdict.lines.append(f"{title:<12} {verb} on {len(speeds)} nodes, slowest {node} {speeds[node]:.0f} MB/s{space}")


def _equal_versions(verdict: Verdict, reports: list[dict[str, Any]]) -> None:
    by_node = {r["node"]: r["device"]["versions"] for r in reports if r.get("device")}
    if not by_node:
        return
    usual = dict(Counter(tuple(sorted(v.items())) for v in by_node.values()).most_common(1)[0][0])
    for node, installed in by_node.items():
        differing = {k for k in installed.keys() | usual.keys() if installed.get(k) != usual.get(k)}
        for name in sorted(differing):
            verdict.blame(node, f"{name} is {installed.get(name)}, elsewhere {usual.get(name)}; install the same everywhere")
    shown = ", ".join(f"{k} {usual[k]}" for k in ("python", "torch", "deepspeed", "cuda", "nccl") if k in usual)
    verdict.lines.append(f"versions     {shown}")


def _together(verdict: Verdict, reports: list[dict[str, Any]]) -> None:
    skews = {r["node"]: r["clock"] for r in reports if r.get("clock") is not None}
    middle = median(skews.values()) if skews else 0.0
    for node, skew in skews.items():
        if abs(skew - middle) > MAX_SKEW_S:
            verdict.blame(node, f"its clock is {skew - middle:+.1f} s off; start a time service (chrony, ntpd) there")
    if skews:
        verdict.lines.append(f"clocks       within {max(skews.values()) - min(skews.values()):.2f} s")
    for name, title in (("all_reduce", "all-reduce"), ("all_to_all", "all-to-all")):
        speeds = [r[name] for r in reports if r.get(name) is not None]
        if speeds:
            verdict.lines.append(f"{title:<12} over {len(reports)} ranks: {min(speeds):.2f} GB/s per rank")
    _pairs(verdict, reports)
    differences = [r["experts"]["difference"] for r in reports if r.get("experts")]
    if differences:
        size = next(r["experts"]["ranks"] for r in reports if r.get("experts"))
        verdict.lines.append(f"experts      spread over {size} ranks, within {max(differences):.0e} of one process")


def _pairs(verdict: Verdict, reports: list[dict[str, Any]]) -> None:
    pairs = {tuple(sorted((r["node"], other))): speed for r in reports for other, speed in (r.get("pairs") or {}).items()}
    if not pairs:
        return
    middle, slowest = median(pairs.values()), min(pairs, key=lambda p: pairs[p])
    verdict.lines.append(
        f"pairs        {len(pairs)} of nodes: {middle:.2f} GB/s, slowest {' and '.join(slowest)} {pairs[slowest]:.2f} GB/s"
    )
    slow = {pair for pair, speed in pairs.items() if speed < SLOW_PAIR * middle}
    for node, count in Counter(node for pair in slow for node in pair).most_common():
        if count > 1 and count > len([pair for pair in pairs if node in pair]) / 2:
            verdict.warnings.append(f"{node} is slow to most other nodes; look at its network")
