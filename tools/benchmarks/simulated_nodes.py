"""Runs ranks of the network benchmarks on nodes that are simulated by network namespaces (tests/lib/netns.py)."""

import importlib
from collections.abc import Sequence
from typing import Any


def import_netns() -> Any:
    """Return the module tests.lib.netns. Ends this program with a message if nodes cannot be simulated."""
    netns = importlib.import_module("tests.lib.netns")
    if reason := netns.missing():
        raise SystemExit(f"nodes cannot be simulated: {reason}")
    return netns


def finish(ranks: Any, seconds: float) -> None:
    """Wait for started ranks; end this program with their output if one fails or they take longer than `seconds`."""
    codes, outputs = importlib.import_module("tests.lib.netns").finish(ranks, seconds)
    if any(codes):
        raise SystemExit(f"exit codes {codes}:\n" + "\n".join(outputs)[-3000:])


def run_ranks(words: list[str], links: Sequence[Any], per_node: int = 1) -> None:
    """Run ranks of a benchmark on simulated nodes, and wait for them.

    Ends this program with a message if nodes cannot be simulated or a rank fails.

    Args:
        words: the arguments of tools/bench.py.
        links: the network link (tests.lib.netns.Link) of each node, so there are as many nodes as links.
        per_node: number of ranks on each node.
    """
    with import_netns().Network(links) as network:
        finish(network.start_ranks(["tools/bench.py", *words], per_node), 3600)
