"""The checkpoint folders of a run: list, publish, remove, quarantine.

A folder is written under a name that begins with a dot, and gets its final name, `step-00000100`, by one rename. A removal
renames the folder first and then deletes it. A process that is killed in between leaves only names that `remove_partial`
cleans up.
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
    """Return every folder step-00000100, the newest first, complete or not. Raises OSError when `root` cannot be read.

    Other names, such as a user's copy step-00000100-good, are neither resumed from nor removed.
    """
    try:
        folders = [path for path in root.iterdir() if step_of(path) is not None]
    except FileNotFoundError:
        return []
    return sorted(folders, key=lambda path: step_of(path) or 0, reverse=True)


def step_of(folder: Path) -> int | None:
    """Return the step in the name of a checkpoint folder, None if the name is not one that the trainer writes."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def resolve_latest(path: Path) -> Path:
    """Return the checkpoint that a file `latest` names; other paths unchanged.

    Raises UserError if there is no such checkpoint.
    """
    if path.name != "latest" or not path.is_file():
        return path
    name = path.read_text(encoding="utf-8", errors="replace").strip()[:99]
    if not _STEP.fullmatch(name) or not path.with_name(name).is_dir():
        raise UserError(
            f"{path} must contain the name of a checkpoint in the same folder, but it contains {name!r}. Give the run "
            "directory instead."
        )
    return path.with_name(name)


def publish(temporary: Path, final: Path) -> None:
    """Rename a complete folder to its final name. An old folder of that name is restored if this fails, else removed."""
    sync(temporary)
    replaced = final.with_name(REPLACED + final.name)
    if replaced.exists():
        remove(replaced)
    if final.exists():
        final.rename(replaced)
    try:
        temporary.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    sync(final.parent)
    if replaced.exists():
        remove(replaced)


def remove(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a partly deleted one never looks complete. Failures are logged."""
    hidden = folder if folder.name.startswith(".") else folder.with_name(REMOVING + folder.name)
    try:
        if hidden != folder:
            folder.rename(hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        _log.warning("the old checkpoint %s cannot be removed (%s). Remove it by hand.", folder, error)


def quarantine(folder: Path) -> Path:
    """Rename a damaged checkpoint to damaged-NAME and return its new path. Nothing is deleted."""
    for i in range(1000):
        target = folder.with_name(DAMAGED + folder.name + (f".{i}" if i else ""))
        if not target.exists():
            folder.rename(target)
            return target
    raise OSError(f"{folder} cannot be renamed, since 1000 damaged checkpoints of this step exist. Delete some of them")


def remove_partial(root: Path) -> None:
    """Clean up after a killed process: remove unfinished folders, restore a checkpoint that was about to be replaced."""
    for path in sorted(root.iterdir()):
        if path.name.startswith(REPLACED):
            final = root / path.name.removeprefix(REPLACED)
            if final.exists():
                remove(path)
            else:
                path.rename(final)
        elif path.name.startswith((WRITING, REMOVING)):
            remove(path)


def expired(folders: list[Path], keep: int, keep_every: int) -> list[Path]:
    """Return the folders (given newest first) to remove: all but the last `keep` and every `keep_every`th step."""
    return [f for f in folders[keep:] if not (keep_every and (step_of(f) or 0) % keep_every == 0)]
