"""The versions that wrote a run or a checkpoint."""

import platform
from importlib.metadata import version

from raphael_dist import __version__

PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "webdataset", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and its main dependencies."""
    return {"python": platform.python_version(), "raphael_dist": __version__, **{name: version(name) for name in PACKAGES}}
