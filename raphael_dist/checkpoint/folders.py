"""The folders of a run's checkpoints: which there are, which may go, and how one appears or vanishes in one step.

A folder is written under a name that begins with a dot and gets its own name, `step-00000100`, by a rename. So does its
removal: first a rename, then the deletion. A process that is killed in between leaves only names that `tidy` clears away.
"""

import logging
import re
import shutil
from pathlib import Path

from raphael_dist.errors import UserError
from raphael_dist.storage.files import sync

_log = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d{8,18})")
WRITING, REMOVING, REPLACED, DAMAGED = ".writing-", ".removing-", ".replaced-", "damaged-"


def step_folders(root: Path) -> list[Path]:
    """Return every folder step-00000100, the newest first, whole or not. Raises OSError when `root` cannot be read.

    Others, as a user's copy step-00000100-good, are none of ours: neither resumed from nor removed.
    """
    try:
        ours = [path for path in root.iterdir() if step_of(path) is not None]
    except FileNotFoundError:
        return []
    return sorted(ours, key=lambda path: step_of(path) or 0, reverse=True)


def step_of(folder: Path) -> int | None:
    """Return the step in the name of a checkpoint's folder, None where the name is not one that the trainer gives."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def followed(path: Path) -> Path:
    """Return the checkpoint that the file `latest` beside it names; any other path as it is. UserError: it names none."""
    if path.name != "latest" or not path.is_file():
        return path
    name = path.read_text(encoding="utf-8", errors="replace").strip()[:99]
    if not _STEP.fullmatch(name) or not path.with_name(name).is_dir():
        raise UserError(f"{path}: names {name!r}, which is no checkpoint beside it; give the run directory instead")
    return path.with_name(name)


def publish(temporary: Path, final: Path) -> None:
    """Rename a whole folder into place; one of that name steps aside first and comes back if this is not completed."""
    sync(temporary)
    aside = final.with_name(REPLACED + final.name)
    if aside.exists():
        remove(aside)
    if final.exists():
        final.rename(aside)
    try:
        temporary.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    sync(final.parent)
    if aside.exists():
        remove(aside)


def remove(folder: Path) -> None:
    """Delete a checkpoint: out of sight first, so that half of one never looks whole. Only warns when it cannot."""
    hidden = folder if folder.name.startswith(".") else folder.with_name(REMOVING + folder.name)
    try:
        if hidden != folder:
            folder.rename(hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        _log.warning("cannot remove the old checkpoint %s: %s; remove it by hand", folder, error)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint out of the way, keeping it; return its new path."""
    for i in range(1000):
        target = folder.with_name(DAMAGED + folder.name + (f".{i}" if i else ""))
        if not target.exists():
            folder.rename(target)
            return target
    raise OSError(f"{folder}: a thousand damaged checkpoints of this step already")


def tidy(root: Path) -> None:
    """Clear away what a killed process left: unfinished folders go, one that was about to be replaced comes back."""
    for path in sorted(root.iterdir()):
        if path.name.startswith(REPLACED):
            final = root / path.name.removeprefix(REPLACED)
            if final.exists():
                remove(path)
            else:
                path.rename(final)
        elif path.name.startswith((WRITING, REMOVING)):
            remove(path)


def surplus(folders: list[Path], keep: int, keep_every: int) -> list[Path]:
    """Return which of `folders`, newest first, retention lets go: all but the last `keep` and every `keep_every`th step."""
    return [f for f in folders[keep:] if not (keep_every and (step_of(f) or 0) % keep_every == 0)]
