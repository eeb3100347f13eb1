"""Files that come with the package: the demo's data, DeepSpeed configurations, Slurm scripts, tools.

In the repository they lie beside the package; setup.py puts them into a wheel, in `raphael_dist/assets/`.
"""

import subprocess
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def root() -> Path:
    """Return the folder that holds data/, ds_configs/, slurm/ and tools/."""
    assets = _PACKAGE / "assets"
    return assets if assets.is_dir() else _PACKAGE.parent


def located(path: str) -> str:
    """Return a relative path as it is where its folder exists, else where it was shipped, if it was."""
    given = Path(path)
    folder = given.parent
    here = given.is_absolute() or folder == Path() or folder.is_dir()
    return path if here or not (root() / folder).is_dir() else str(root() / path)


def git_commit() -> str:
    """Return the commit that the code was taken from, with "+" where files were changed since; "" where nobody knows."""
    built = _PACKAGE / "assets" / "commit"
    if built.is_file():
        return built.read_text().strip()
    git = ["git", "-C", str(_PACKAGE.parent)]
    try:
        run = {"capture_output": True, "text": True, "timeout": 10, "check": True}
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()  # type: ignore[call-overload]
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], **run).stdout  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit + "+" * bool(changed)
