"""Imported first by every tool: it runs the package that lies beside it, not another version that is installed."""

import sys
from pathlib import Path

_root = Path(__file__).resolve().parent.parent
if (_root / "raphael_dist" / "__init__.py").is_file():  # in a wheel the tools lie inside the package
    sys.path.insert(0, str(_root))
