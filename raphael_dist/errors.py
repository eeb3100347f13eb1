"""Exit codes and the exceptions that lead to them. UserError is a mistake of the user; the others state why a run ended."""

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

# Errors of the system that a file itself causes: it is missing, may not be read, is a folder, or its name is impossible.
_FAULTS_OF_THE_FILE = (
    errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG,
)  # fmt: skip


class UserError(ValueError):
    """A mistake of the user. It is shown as one line, without a traceback; the process exits with 2.

    The message names the field or file, its value, what is allowed and what to do. For several mistakes, `args` has one
    message for each.

    Attributes:
        agreed: whether every rank raises this same error, so that rank 0 alone prints it.
    """

    agreed = False

    def __str__(self) -> str:
        return "; ".join(map(str, self.args))


def write_error(where: Path, error: OSError) -> Exception:
    """Return the exception to raise when a file or folder in a run's directory could not be written.

    Args:
        where: the file or folder.
        error: the OSError that writing it raised.

    Returns:
        NotSavedError if the disk or the quota is full, otherwise UserError. The message has the path and the cause.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NotSavedError(
            f"run.dir: {where} cannot be written ({error.strerror}). Free some space; no checkpoint was lost."
        )
    return UserError(f"run.dir: {where} cannot be written ({error.strerror}). Choose another run.dir.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the suggestion " (did you mean 'x'?)" with the name in `known` that is most similar to `name`.

    Returns "" if no name reaches the similarity ratio 0.6 (see `difflib.get_close_matches`).
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


class NonFiniteError(RuntimeError):
    """Too many steps in a row were skipped, since their loss or gradients were not finite or far too large (exit code 3).

    All ranks raise it. The last checkpoint is unchanged.
    """


class NotSavedError(RuntimeError):
    """The disk has no space for the files of a starting run, or a run's last checkpoint cannot be saved (exit code 4).

    Attributes:
        agreed: whether every rank raises this same error, so that rank 0 alone prints it.
    """

    agreed = False


class HungError(RuntimeError):
    """Raised on a rank when other ranks make no progress (exit code 76). The message names these ranks.

    Collectives must not be called afterwards.
    """


def lacks_memory(error: BaseException) -> bool:
    """Return whether an exception states that there was not enough memory. PyTorch's own exceptions are recognised, too."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return "can't allocate memory" in str(error) or "out of memory" in str(error)


def is_machine_fault(error: BaseException) -> bool:
    """Return whether the cause of `error`, raised while a file was read, is the machine and not the file.

    Faults of the machine, such as too little memory or a failing disk, may be temporary. A missing or unreadable file is
    not such a fault.
    """
    if isinstance(error, OSError):
        return error.errno is not None and error.errno not in _FAULTS_OF_THE_FILE
    return isinstance(error, MemoryError)


def describe_error(error: BaseException) -> str:
    """Return an exception's type and message as one line. It begins with "not enough memory" if that is the cause."""
    text = " ".join(str(error).split())
    if lacks_memory(error):
        return f"not enough memory ({text[:200]})" if text else "not enough memory"
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}"


def write_exit_code(code: int, why: str = "") -> None:
    """Write this process's exit code into the file $RAPHAEL_EXIT_FILE, and the error `why` into $RAPHAEL_EXIT_FILE.why.

    The Slurm job reads these files, since some launchers turn every exit code into 1, and a launcher may kill a rank before
    its last message is printed. Nothing is written if RAPHAEL_EXIT_FILE is not set.
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


def run_command(command: Callable[[], int | None]) -> int:
    """Call the function `command` (the body of a command-line program) and return the exit code for this process.

    Returns:
        What `command` returns, or 0 for None; 2 after a UserError, which is printed as one line; or 130 after Ctrl-C. Other
        exceptions are not caught.
    """
    prepare_streams()
    try:
        return command() or 0
    except UserError as error:
        print_line(f"error: {error}", file=sys.stderr)
        write_exit_code(EXIT_USER_ERROR, str(error))  # a Slurm job reads it
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
