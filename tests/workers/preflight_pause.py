"""Rank: runs tools/check_cluster.py, but waits before its all-reduce until the file `go` is in the folder of reports."""

import sys
import time
from pathlib import Path

from raphael_dist.cluster.preflight import Probe

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import check_cluster

_all_reduce = Probe._all_reduce


def pause(probe: Probe) -> float:
    """Replace `Probe._all_reduce`: write paused-RANK into the folder of reports, wait for the file `go`, and call it."""
    folder = probe.path.parent
    (folder / f"paused-{probe.ranks.rank}").touch()
    while not (folder / "go").exists():
        time.sleep(0.02)
    return _all_reduce(probe)


Probe._all_reduce = pause  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(check_cluster.main())
