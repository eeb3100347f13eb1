"""Rank process: `python -m tests.workers.spec FILE` runs the worker tortured.py in a new process. FILE: its spec as JSON."""

import json
import sys
from pathlib import Path

from tests.workers import tortured

if __name__ == "__main__":
    sys.exit(tortured.main(json.loads(Path(sys.argv[1]).read_text())))
