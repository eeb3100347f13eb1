"""What a wheel holds beside the package: what the repository keeps next to it, and the commit that it was built from."""

import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
# Folders and patterns of what goes to raphael_dist/assets/ (raphael_dist/config/assets.py finds it there).
ASSETS = (
    ("data/emoji-demo", "*"),
    ("data/emoji-demo/pictures", "*"),
    ("data/vae-emoji", "*"),
    ("data/emoji/LICENSES", "*"),
    ("ds_configs", "*.json"),
    ("slurm", "*"),
    ("tools", "**/*.py"),
)
# Single files: what the licences ask to go with the pictures.
FILES = ("data/emoji/README.md", "SECURITY.md", "docs/licences.md")


class BuildWithAssets(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        assets = Path(self.build_lib) / "raphael_dist" / "assets"
        for folder, pattern in ASSETS:
            for path in sorted((HERE / folder).glob(pattern)):
                if path.is_file():
                    keep(path, assets)
        for name in FILES:
            keep(HERE / name, assets)
        (assets / "commit").write_text(commit())


def keep(path: Path, assets: Path) -> None:
    target = assets / path.relative_to(HERE)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)


def commit() -> str:
    try:
        git = subprocess.run(["git", "-C", str(HERE), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    except OSError:
        return ""
    return git.stdout.strip() if git.returncode == 0 else ""


setup(cmdclass={"build_py": BuildWithAssets})
