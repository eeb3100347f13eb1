"""Rank on a simulated node (tests/lib/netns.py): counts the bytes that are sent in training steps.

The keys of the argument `spec` are
    config, cases, out: preset or file, measurements, and output file, as for `benchmarks.network.measure`
    nodes: namespace of each rank's node
    master: address of the first node
"""

import os
import sys
from typing import Any

from tests.lib.launch import ROOT
from tests.lib.relay import enter


def main(spec: dict[str, Any]) -> int:
    sys.path.insert(0, str(ROOT / "tools"))
    from benchmarks.network import Case, measure

    node = spec["nodes"][int(os.environ["RANK"])]
    enter(node)
    os.environ |= {"MASTER_ADDR": spec["master"], "GLOO_SOCKET_IFNAME": "eth0", "SLURMD_NODENAME": node}
    measure(spec["config"], [Case(**case) for case in spec["cases"]], spec["out"])
    return 0
