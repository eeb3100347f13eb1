"""Exit codes, and the exceptions behind them: UserError means "the user can fix this", the others say why a run ended."""

import contextlib
import difflib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# Exit codes are an interface: a launcher may restart a run on other codes, never on these.
EXIT_USER_ERROR = 2
EXIT_NON_FINITE = 3  # the loss or the gradients stayed infinite, NaN or far too large
EXIT_NOT_SAVED = 4  # the last state could not be saved, the disk being full, say; the checkpoint before it stands
EXIT_INTERRUPTED = 75  # stopped by a signal after saving; the same command continues
EXIT_HUNG = 76  # a run without progress was ended, by the watchdog or HungError; the same command continues

_SECRET = re.compile(r"(?i)(^|_)(api_?key|key|token|secret|password|passwd)$")


class UserError(ValueError):
    """A mistake in what the user gave. Shown as one line, without a traceback; the process exits with 2.

    The text names the field or file, what was given, what is allowed and what to do. `agreed`: every rank raises it alike.
    """

    agreed = False


def cannot_write(where: Path, error: OSError) -> Exception:
    """Return what to raise when nothing can be written: NotSavedError on a full disk, else UserError."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NotSavedError(f"run.dir: cannot write to {where}: {error.strerror}; free some space, nothing was lost")
    return UserError(f"run.dir: cannot write to {where}: {error.strerror}; choose another run.dir")


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the nearest known name, or "" if none is near."""
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


class NonFiniteError(RuntimeError):
    """Too many steps in a row were no good; raised on all ranks alike, the last checkpoint is untouched."""


class NotSavedError(RuntimeError):
    """The disk has no room for a start, or for the last checkpoint of a run; raised on all ranks alike."""

    agreed = False


class HungError(RuntimeError):
    """Other ranks make no progress; the text names them. Ranks cannot agree on anything after it."""


def leave_exit_code(code: int, why: str = "") -> None:
    """Write the exit code into the file that RAPHAEL_EXIT_FILE names, and why, if given, into one beside it (.why).

    Some launchers turn every code into 1, and a rank may be ended by its launcher before its last words are out.
    """
    path = os.environ.get("RAPHAEL_EXIT_FILE")
    if path:
        with contextlib.suppress(OSError):
            Path(path).write_text(f"{code}\n")
            if why:
                Path(f"{path}.why").write_text(f"{' '.join(why.split())}\n")


def redact(tree: Any) -> Any:
    """Return a copy of nested dicts and lists in which what is named like a secret is hidden."""
    if isinstance(tree, dict):
        return {k: "(hidden)" if _SECRET.search(str(k)) and v is not None else redact(v) for k, v in tree.items()}
    return [redact(value) for value in tree] if isinstance(tree, list) else tree


def exit_code_of(command: Callable[[], object]) -> int:
    """Run a command line's work; show a user's mistake, or Ctrl-C, as one line and return its exit code, else 0."""
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        leave_exit_code(EXIT_USER_ERROR, str(error))  # for a job that checks its nodes first
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0
