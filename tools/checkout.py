"""Makes a tool use the package of its own checkout, not an installed version. Every tool imports this module first."""

import sys
from contextlib import suppress
from pathlib import Path

_root = Path(__file__).resolve().parent.parent
if (_root / "raphael_dist" / "__init__.py").is_file():  # in a wheel the tools are inside the package
    sys.path.insert(0, str(_root))

with suppress(ImportError):  # an older installed package does not have this function
    from raphael_dist.cli.missing_packages import report_missing_packages

    report_missing_packages()
