"""Reports missing packages in one line instead of a traceback. Imports only modules that need no other package."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from raphael_dist.errors import EXIT_USER_ERROR, write_exit_code
from raphael_dist.runtime.launcher_env import launcher_of

# Modules, and the packages that provide them: the dependencies in pyproject.toml.
PACKAGES = {
    "torch": "torch", "deepspeed": "deepspeed", "transformers": "transformers", "diffusers": "diffusers",
    "webdataset": "webdataset", "braceexpand": "braceexpand", "fsspec": "fsspec", "safetensors": "safetensors",
    "psutil": "psutil", "pydantic": "pydantic", "yaml": "PyYAML", "tensorboard": "tensorboard", "rich": "rich",
    "numpy": "numpy", "PIL": "pillow", "ftfy": "ftfy",
}  # fmt: skip


def report_missing_packages() -> None:
    """From now on, end this process with one line and exit code 2 if the import of a required package fails."""
    sys.excepthook = _report


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    name = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or name not in PACKAGES or find_spec(name) is not None:
        sys.__excepthook__(kind, error, trace)
        return
    missing = ", ".join(package for module, package in PACKAGES.items() if find_spec(module) is None)
    python = Path(__file__).resolve().parents[2] / ".venv" / "bin" / "python"
    remedy = f"Use {python}" if python.is_file() else "Run `make install` and use .venv/bin/python"
    line = (
        f"{sys.executable} requires packages that are not installed: {missing}. {remedy}. For make and the Slurm scripts, "
        "set PYTHON to this path."
    )
    launcher = launcher_of()
    if launcher is None or os.environ.get(launcher.local_rank, "0") == "0":
        print(f"error: {line}", file=sys.stderr, flush=True)
    write_exit_code(EXIT_USER_ERROR, line)
    raise SystemExit(EXIT_USER_ERROR)
