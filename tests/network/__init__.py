"""Tests on nodes of network namespaces (tests/lib/netns.py)."""

import pytest

from tests.lib import netns, slurm_cluster

_MISSING = netns.missing() or slurm_cluster.missing()
SLURM_MARKS = [
    pytest.mark.network,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(_MISSING), reason=f"no Slurm of several nodes: {_MISSING}"),
]
