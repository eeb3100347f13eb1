"""Finds files that come with the package: demo data, DeepSpeed configurations, Slurm scripts, tools.

In the repository these files lie next to the package. In an installed wheel they lie in `raphael_dist/assets/` (setup.py).
"""

import subprocess
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def root() -> Path:
    """Return the folder that contains data/, ds_configs/, slurm/ and tools/: the repository, or the assets of a wheel."""
    assets = _PACKAGE / "assets"
    return assets if assets.is_dir() else _PACKAGE.parent


def locate(path: str) -> str:
    """Return the path of a file that may be in the working directory, or come with the package (in the folder `root()`).

    The result is root()/path if the folder of `path` exists in root() but not in the working directory, otherwise `path`.
    So presets can name the demo data, such as data/emoji-demo/train-0000.tar, in any working directory. An absolute path,
    or a file name without a folder, is returned unchanged.
    """
    folder = Path(path).parent
    if Path(path).is_absolute() or folder == Path() or folder.is_dir() or not (root() / folder).is_dir():
        return path
    return str(root() / path)


def git_commit() -> str:
    """Return the git commit (12 hex digits) of the code, plus "+" if files have changed since; "" if unknown."""
    built = _PACKAGE / "assets" / "commit"
    if built.is_file():
        return built.read_text().strip()
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "-uno")
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit + "+" * bool(changed)


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_PACKAGE.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
