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


def newest(root: Path) -> list[Path]:
    """Return the checkpoint folders in `root`, the newest first, including incomplete ones; [] if `root` is missing.

    Their names have the form step-00000100. Other folders, such as a user's copy step-00000100-good, are left out, so that
    the trainer neither resumes from them nor removes them. Raises UserError if `root` cannot be read.
    """
    try:
        steps = {path: step for path in root.iterdir() if (step := step_of(path)) is not None}
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{root} cannot be read: {error.strerror}. Check the path and its permissions.") from None
    return sorted(steps, key=steps.__getitem__, reverse=True)


def step_of(folder: Path) -> int | None:
    """Return the step number in a folder's name, 100 for step-00000100; None for a name of another form."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def resolve_latest(path: Path) -> Path:
    """If `path` is the text file `latest`, return the checkpoint folder that this file names; otherwise return `path`.

    Raises UserError if `latest` does not contain the name of a checkpoint folder in the same parent folder.
    """
    if path.name != "latest" or not path.is_file():
        return path
    name = path.read_text(encoding="utf-8", errors="replace").strip()[:99]
    if not _STEP.fullmatch(name) or not path.with_name(name).is_dir():
        raise UserError(
            f"{path} must contain the name of a checkpoint folder next to it (step-NUMBER), but it contains {name!r}. "
            "Give the run directory instead of this file."
        )
    return path.with_name(name)


def publish(temporary: Path, final: Path) -> None:
    """Rename the completely written checkpoint folder `temporary` to `final`, the path under which readers look for it.

    If `final` exists already, it is replaced: the old folder is removed after the rename, or restored if the rename fails.
    Raises OSError if the rename fails.
    """
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
    """Delete a checkpoint folder. Errors are only logged.

    The folder is renamed first, so that a partly deleted checkpoint never looks complete.
    """
    hidden = folder if folder.name.startswith(".") else folder.with_name(REMOVING + folder.name)
    try:
        if hidden != folder:
            folder.rename(hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        _log.warning("the old checkpoint %s cannot be removed (%s). Remove it by hand.", folder, error)


def quarantine(folder: Path) -> Path:
    """Rename a damaged checkpoint folder to damaged-NAME, so that it is not used, and return its new path.

    Nothing is deleted. If damaged-NAME exists already, a number is appended. Raises OSError if the rename fails.
    """
    for i in range(1000):
        target = folder.with_name(DAMAGED + folder.name + (f".{i}" if i else ""))
        if not target.exists():
            folder.rename(target)
            return target
    raise OSError(f"{folder} cannot be renamed, since 1000 folders {DAMAGED}{folder.name}* exist. Delete some of them")


def remove_partial(root: Path) -> None:
    """Clean up `root`, the folder that contains a run's checkpoints, after a process was killed.

    Folders of unfinished saves and removals are deleted. A checkpoint that was being replaced by a newer one of the same
    step is restored, unless the newer one is complete.
    """
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
    """Return the checkpoint folders to remove, which neither `keep` nor `keep_every` protects.

    Args:
        folders: all checkpoint folders, the newest first.
        keep: number of newest checkpoints to keep.
        keep_every: also keep every checkpoint whose step is a multiple of this number. 0: keep only the newest ones.
    """
    return [f for f in folders[keep:] if not (keep_every and (step_of(f) or 0) % keep_every == 0)]
