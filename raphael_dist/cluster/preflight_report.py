"""Evaluates the report files of the preflight: a table of results, and the faulty nodes with reasons and remedies."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from raphael_dist.errors import UserError
from raphael_dist.text import JsonObject, counted

MAX_SKEW_S = 5.0
GPU_IN_USE_GIB = 4.0  # more than the contexts of one node's own ranks take
SLOW_PAIR = 0.3  # a pair of nodes is slow below this share of the bandwidth of fast pairs
LOCAL_CHECKS = ("device", "data", "checkpoints")  # of a rank on its own, before it joins the others
RankReport = JsonObject  # of a rank, as `preflight.Probe` writes it


@dataclass
class Verdict:
    """The result of a preflight (tests of all nodes before a training starts).

    Attributes:
        lines: the table of results, as lines of text.
        faults: for each faulty node, by its name, the reasons why it cannot train.
        warnings: problems that do not prevent training.
        everywhere: whether every node has the same fault, so that excluding nodes does not help.
    """

    lines: list[str]
    faults: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    everywhere: bool = False

    def add_fault(self, node: str, text: str) -> None:
        """Add the description `text` of a fault to the faults of `node`, unless it is already listed."""
        if text not in self.faults.setdefault(node, []):
            self.faults[node].append(text)


def read_reports(folder: Path) -> list[RankReport]:
    """Return the contents of the preflight's report files (rank-NNNNN.json) in a folder, by ascending rank.

    Raises:
        UserError: the folder has no report file.
    """
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
    if not reports:
        raise UserError(
            f"--judge={folder} must contain reports of ranks (rank-*.json), but there is none. Check that the ranks "
            "started and wrote to this folder."
        )
    return reports


def judge(reports: list[RankReport], num_ranks: int, nodes: list[str]) -> Verdict:
    """Find the faulty nodes of a cluster from the report files that each rank's preflight (tests before a training) wrote.

    Args:
        reports: contents of the report files, one per rank that wrote one (`read_reports`).
        num_ranks: expected number of ranks.
        nodes: names of all nodes, including nodes without a report file; []: only nodes with a report file are known.
    """
    verdict = Verdict([_row(r) for r in reports])
    reported = {r["node"] for r in reports}
    for node in nodes:
        if node not in reported:
            verdict.add_fault(node, "no report: its ranks did not start, or died (their messages are above)")
    if not set(nodes) - reported and len(reports) < num_ranks:
        missing = sorted(set(range(num_ranks)) - {r["rank"] for r in reports})
        verdict.add_fault(f"ranks {missing[:8]}", "no report")
    _judge_local_checks(verdict, reports)
    _judge_versions(verdict, reports)
    _judge_gpus(verdict, reports)
    problems = [(r["node"], p) for r in reports for p in r["problems"] if p["phase"] not in LOCAL_CHECKS]
    if not verdict.faults:
        # A node that could not join is faulty. Nodes that joined and timed out are not.
        not_joined = {r["node"] for r in reports if not r["joined"]}
        suspects = _unreachable(reports) or not_joined or _slow_nodes(reports) or {node for node, _ in problems}
        for node, problem in problems:
            if node in suspects:
                verdict.add_fault(node, _text(problem))
    elif problems:
        verdict.warnings.append("without these nodes the collectives were not tested completely")
    if all(r["joined"] for r in reports):
        _judge_joint_checks(verdict, reports)
    faults = [set(texts) for texts in verdict.faults.values()]
    verdict.everywhere = len(faults) >= max(1, len(set(nodes) | reported)) and bool(set.intersection(*faults))
    return verdict


def _unreachable(reports: list[RankReport]) -> set[str]:
    """Return the nodes of the ranks that rank 0 cannot reach, according to the preflight's `reports`.

    If there are several other nodes and rank 0 reaches none of them, the node of rank 0 is returned instead, because its
    link must be broken. Errors of collectives do not show which link is broken, because collectives then fail on all nodes.
    """
    nodes = {r["rank"]: r["node"] for r in reports}
    home = nodes.get(0)
    lost = {nodes[rank] for r in reports if r["rank"] == 0 for rank in r.get("unreachable", []) if rank in nodes} - {home}
    return {str(home)} if 1 < len(lost) == len(set(nodes.values())) - 1 else lost


def _row(r: RankReport) -> str:
    device = r.get("device") or {}
    return f"rank {r['rank']:<5} {r['node']:<16} {device.get('name', '?'):<24} {device.get('network', '?')}"


def _text(problem: dict[str, str]) -> str:
    return problem["what"] + (f"; {problem['fix']}" if problem["fix"] else "")


def _judge_local_checks(verdict: Verdict, reports: list[RankReport]) -> None:
    for r in reports:
        for problem in r["problems"]:
            if problem["phase"] in LOCAL_CHECKS:
                verdict.add_fault(r["node"], _text(problem))
    for name, verb in (("data", "readable"), ("checkpoints", "writable")):
        speeds = {r["node"]: r[name]["mb_per_s"] for r in reports if (r.get(name) or {}).get("mb_per_s")}
        if speeds:
            node = min(speeds, key=lambda n: speeds[n])
            free = min((r[name].get("free_gib", float("inf")) for r in reports if r.get(name)), default=float("inf"))
            space = f", {free:.0f} GiB free" if name == "checkpoints" else ""
            nodes = counted(len(speeds), "node")
            verdict.lines.append(f"{name:<12} {verb} on {nodes}, slowest {node} {speeds[node]:.0f} MB/s{space}")


def _judge_versions(verdict: Verdict, reports: list[RankReport]) -> None:
    by_node = {r["node"]: r["device"]["versions"] for r in reports if r.get("device")}
    if not by_node:
        return
    usual = dict(Counter(tuple(sorted(v.items())) for v in by_node.values()).most_common(1)[0][0])
    for node, installed in by_node.items():
        differing = {k for k in installed.keys() | usual.keys() if installed.get(k) != usual.get(k)}
        for name in sorted(differing):
            text = f"{name} is {installed.get(name)}, on other nodes {usual.get(name)}; install the same version everywhere"
            verdict.add_fault(node, text)
    shown = ", ".join(f"{k} {usual[k]}" for k in ("python", "torch", "deepspeed", "cuda", "nccl") if k in usual)
    verdict.lines.append(f"versions     {shown}")


def _judge_gpus(verdict: Verdict, reports: list[RankReport]) -> None:
    """Add a fault to `verdict` for each GPU that several ranks share, or on which other processes use much memory."""
    users: dict[tuple[str, str], list[RankReport]] = {}
    for r in reports:
        gpu = (r.get("device") or {}).get("gpu")
        if gpu:
            users.setdefault((r["node"], gpu["id"]), []).append(r)
    for (node, gpu_id), sharing in users.items():
        if len(sharing) > 1:
            ranks = " and ".join(str(r["rank"]) for r in sharing)
            verdict.add_fault(node, f"ranks {ranks} share the GPU {gpu_id}; start one rank per GPU, which sees all of them")
        elif (used := sharing[0]["device"]["gpu"]["used_gib"]) > GPU_IN_USE_GIB:
            verdict.add_fault(
                node, f"{used:.1f} GiB of the GPU {gpu_id} are in use by another process; end it, or exclude the node"
            )


def _judge_joint_checks(verdict: Verdict, reports: list[RankReport]) -> None:
    skews = {r["node"]: r["clock"] for r in reports if r.get("clock") is not None}
    # The clock of rank 0's node, to which these values are relative, may be the wrong one. Of two nodes either may be.
    middle = median(skews.values()) if len(skews) > 2 else 0.0
    for node, skew in skews.items():
        if abs(skew - middle) > MAX_SKEW_S:
            other = "" if len(skews) > 2 else f" from that of {reports[0]['node']}"
            text = f"its clock differs by {skew - middle:+.1f} s{other}; start a time service (chrony, ntpd) there"
            verdict.add_fault(node, text)
    if skews:
        verdict.lines.append(f"clocks       within {max(skews.values()) - min(skews.values()):.2f} s")
    for name, title in (("all_reduce", "all-reduce"), ("all_to_all", "all-to-all")):
        speeds = [r[name] for r in reports if r.get(name) is not None]
        if speeds:
            verdict.lines.append(f"{title:<12} over {counted(len(reports), 'rank')}: {min(speeds):.2f} GB/s per rank")
    _judge_pairs(verdict, reports)
    differences = [r["experts"]["difference"] for r in reports if r.get("experts")]
    if differences:
        ranks = counted(next(r["experts"]["ranks"] for r in reports if r.get("experts")), "rank")
        verdict.lines.append(f"experts      sharded over {ranks}, within {max(differences):.0e} of one process")


def _judge_pairs(verdict: Verdict, reports: list[RankReport]) -> None:
    pairs = _pair_speeds(reports)
    if not pairs:
        return
    middle, slowest = median(pairs.values()), min(pairs, key=lambda p: pairs[p])
    verdict.lines.append(
        f"pairs        {len(pairs)} of nodes: {middle:.2g} GB/s, slowest {' and '.join(slowest)} {pairs[slowest]:.2g} GB/s"
    )
    for node in sorted(_slow_nodes(reports)):
        if node in verdict.faults:
            verdict.add_fault(node, "it is slow to most other nodes; check its network")
        else:
            verdict.warnings.append(f"{node} is slow to most other nodes; check its network")


def _pair_speeds(reports: list[RankReport]) -> dict[tuple[str, str], float]:
    """Return the measured GB/s between two nodes, by (name, name) in alphabetical order, from the preflight's `reports`."""
    return {
        (min(r["node"], other), max(r["node"], other)): speed
        for r in reports
        for other, speed in (r.get("pairs") or {}).items()
    }


def _slow_nodes(reports: list[RankReport]) -> set[str]:
    """Return the nodes whose links to most other nodes are slow, according to the preflight's `reports`.

    A link is slow if its bandwidth is below SLOW_PAIR (0.3) times the bandwidth that the fastest quarter of all links
    reaches. If half of the nodes or more have slow links, no node is returned: the network itself is then uneven.
    """
    pairs = _pair_speeds(reports)
    usual = sorted(pairs.values())[-1 - len(pairs) // 4] if pairs else 0.0
    slow = {pair for pair, speed in pairs.items() if speed < SLOW_PAIR * usual}
    counts = Counter(node for pair in slow for node in pair)
    nodes = {node for node, n in counts.items() if n > 1 and n > sum(node in pair for pair in pairs) / 2}
    return nodes if 2 * len(nodes) < len({node for pair in pairs for node in pair}) else set()
