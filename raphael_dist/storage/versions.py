"""The versions of Python and packages, as a run and its checkpoints store them."""

import platform
from importlib.metadata import version

from raphael_dist import __version__

PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "webdataset", "numpy")


def versions() -> dict[str, str]:
    """Return the installed versions of Python, this package and its main dependencies, by package name."""
    return {"python": platform.python_version(), "raphael_dist": __version__, **{name: version(name) for name in PACKAGES}}
