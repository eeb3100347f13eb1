"""Rank: runs the command `prove`, which checks a cluster, with fewer checks and training settings and shorter time limits.

The arguments are those of `prove`. The environment variable CHECKS has the names of the checks, and LIMIT_S the time limit
of each in seconds. The processes of the checks import this module, too, so that they have the same settings.
"""

import os
import sys
from dataclasses import replace

from raphael_dist.cli import prove as command
from raphael_dist.cluster import prove_agent, prove_numbers
from raphael_dist.cluster.prove_model import Case

LIMIT_S = float(os.environ["LIMIT_S"])
prove_agent.CHECKS = {name: replace(prove_agent.CHECKS[name], limit_s=LIMIT_S) for name in os.environ["CHECKS"].split()}
prove_agent.JOIN_S, prove_agent.START_S = 90.0, 60.0
prove_numbers.cases = lambda world: [Case("float32", 2, 1), Case("float32", 2, 2)]

if __name__ == "__main__":
    sys.exit(command.main(sys.argv[1:]))
