"""Exit codes and the exceptions that lead to them. UserError is a mistake of the user; the others say why a run ended."""

import contextlib
import difflib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from raphael_dist.text import escape_control, hide_secrets_in_text, prepare_streams, print_line

# Exit codes are an interface: a launcher may restart a run on other codes, never on these.
EXIT_USER_ERROR = 2
EXIT_NON_FINITE = 3  # the loss or the gradients stayed infinite, NaN or far too large
EXIT_NOT_SAVED = 4  # the last state could not be saved, on a full disk for example; the previous checkpoint remains
EXIT_INTERRUPTED = 75  # stopped by a signal after saving; the same command resumes
EXIT_HUNG = 76  # a run without progress was ended, by the watchdog or HungError; the same command resumes


class UserError(ValueError):
    """A mistake of the user. It is shown as one line, without a traceback; the process exits with 2.

    The text names the field or file, its value, what is allowed and what to do. Each mistake is one argument.

    Attributes:
        agreed: every rank raises the same error.
    """

    agreed = False

    def __str__(self) -> str:
        return "; ".join(map(str, self.args))


def write_error(where: Path, error: OSError) -> Exception:
    """Return the exception for a failed write into a run directory: NotSavedError on a full disk, else UserError."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NotSavedError(
            f"run.dir: {where} cannot be written ({error.strerror}). Free some space; no checkpoint was lost."
        )
    return UserError(f"run.dir: {where} cannot be written ({error.strerror}). Choose another run.dir.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the most similar known name, "" if none is similar."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


class NonFiniteError(RuntimeError):
    """Too many consecutive steps were skipped. All ranks raise it; the last checkpoint is unchanged."""


class NotSavedError(RuntimeError):
    """The disk has no space for a start or for the last checkpoint of a run. All ranks raise it."""

    agreed = False


class HungError(RuntimeError):
    """Other ranks make no progress; the text names them. Collectives are not possible afterwards."""


def describe_error(error: BaseException) -> str:
    """Describe an error in one line. A lack of memory is stated, even if the exception itself does not."""
    text = " ".join(str(error).split())
    lacks = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if lacks or "can't allocate memory" in text or "out of memory" in text:
        return f"not enough memory ({text[:200]})" if text else "not enough memory"
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}"


def write_exit_code(code: int, why: str = "") -> None:
    """Write the exit code into the file that RAPHAEL_EXIT_FILE names, and the reason into a second file (.why).

    Some launchers turn every code into 1, and a launcher may kill a rank before its last message is printed.
    """
    path = os.environ.get("RAPHAEL_EXIT_FILE")
    if path:
        with contextlib.suppress(OSError):
            _write(path, f"{code}\n")
            if why:
                _write(f"{path}.why", escape_control(hide_secrets_in_text(" ".join(why.split()))) + "\n")


def _write(path: str, text: str) -> None:
    # Never through a symbolic link: anyone who can write to the run directory may have created it.
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666), "w", encoding="utf-8") as file:
        file.write(text)


def run_command(command: Callable[[], object]) -> int:
    """Run the work of a command; print a user's mistake or Ctrl-C as one line. Return the exit code, 0 if there was none."""
    prepare_streams()
    try:
        command()
    except UserError as error:
        print_line(f"error: {error}", file=sys.stderr)
        write_exit_code(EXIT_USER_ERROR, str(error))  # a Slurm job reads it
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0
