"""Writes a debug bundle: an archive with the files of a run that a maintainer needs, without secrets."""

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from raphael_dist.errors import UserError
from raphael_dist.reporting.plan_comparison import plan_lines
from raphael_dist.reporting.run_facts import Examined
from raphael_dist.reporting.run_files import paths_in
from raphael_dist.storage.files import atomic_path
from raphael_dist.text import HIDDEN, hide_secrets_in_text, open_regular, redact

LOG_BYTES = 1 << 20  # the last bytes of each log are kept
METRIC_BYTES = 8 << 20  # the last bytes of metrics.jsonl are kept
# The folder and the pattern of each kind of log.
LOGS = (("", "train.log"), ("logs", "rank-*.log"), ("logs", "stacks-rank-*.txt"), ("logs/heartbeats", "rank-*"))
MAX_LOGS = 64  # of each kind
MAX_LISTED = 20_000  # files
_NAME = (
    r"[\w.-]*(?:api[_-]?key|(?:access|account|private)_?key|private-key|[a-z\d]_key(?![a-z])|token|secret|passw(?:or)?d"
    r"|passphrase|\bpwd|credentials?|cookie)[\w.-]*"
)
# name=value, name: value, "name": "value", name<tab>value, --name value, Authorization: Bearer value, and keys known by
# their beginning. A quoted value may contain escaped quotes and may have been cut off before its closing quote.
_ASSIGNED = re.compile(
    rf"(?i)(\b(?:{_NAME}|key(?=[\"'\s=:\\b]{{1,8}}[0-9a-f]{{32}}))(?:\\*[\"']?\s*[=:]\s*|\t+)|--{_NAME}\s+(?!-))"
    r"""(b?\\*"(?:[^"\\\n]|\\.)*"?|b?\\*'(?:[^'\\\n]|\\.)*'?|[^\s"';]+)"""
)
_BEARER = re.compile(r"(?i)\b(bearer|basic|authorization: *token)\s+[\w.+/=~-]{8,}")
_KNOWN = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|AIza[\w-]{30,}|sk-[\w-]{20,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|xox[a-z]-[\w-]{10,}|hooks\.slack\.com/[\w/-]+)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.*?)(-----END|\Z)"
)
_SECRET_NAME = re.compile(rf"(?i){_NAME}")
# Options of the configuration whose names look like those of secrets: they count tokens.
_NO_SECRET = re.compile(r"(?i)\b(max_|num_|n_)?tokens\b\s*(?:[=:]|(?<=\t)$)")


def scrub(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return `text` with everything hidden that may be a secret.

    Hidden are credentials in addresses, access keys in known formats, what follows names such as `token=`, and the values of
    variables with such names in `environment`.
    """
    text = _KNOWN.sub(HIDDEN, _BEARER.sub(rf"\1 {HIDDEN}", _hide_values(text, environment)))
    text = _ASSIGNED.sub(lambda match: match[0] if _NO_SECRET.search(match[1]) else f"{match[1]}{HIDDEN}", text)
    return hide_secrets_in_text(text)


def _hide_values(tree: Any, environment: Mapping[str, str]) -> Any:
    """Return a string, or a copy of nested dicts and lists, with the values of secret variables in `environment` hidden."""
    if isinstance(tree, dict):
        return {key: _hide_values(value, environment) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_hide_values(value, environment) for value in tree]
    secrets = {value for name, value in environment.items() if _SECRET_NAME.fullmatch(name) and len(value) >= 8}
    for value in sorted(secrets, key=len, reverse=True) if isinstance(tree, str) else ():
        for form in (value, json.dumps(value)[1:-1], repr(value)[1:-1]):
            tree = tree.replace(form, HIDDEN)
    return tree


def write_bundle(examined: Examined, report: str, path: Path) -> list[str]:
    """Write the debug bundle of a run: an archive with its configuration, logs and metrics, without secrets.

    Args:
        examined: the contents of the run directory, and the results of `doctor`.
        report: text that `python -m raphael_dist doctor` printed for this run.
        path: the archive to write. It appears only when it is complete.

    Returns:
        The names of the files in the archive.

    Raises:
        UserError: `path` cannot be written.
    """
    folder, names = examined.run.folder, []
    try:
        with atomic_path(path) as temporary, tarfile.open(temporary, "w:gz") as archive:
            for name, text in _members(examined, report, folder):
                data = scrub(text).encode(errors="backslashreplace")
                info = tarfile.TarInfo(f"bundle/{name}")
                info.size, info.mtime = len(data), int(examined.now.timestamp())
                archive.addfile(info, io.BytesIO(data))
                names.append(name)
    except OSError as error:
        raise UserError(f"--bundle {path} cannot be written: {error.strerror or error}. Choose another file.") from None
    return names


def _members(examined: Examined, report: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each file of the archive. The file not-included.txt lists what could not be read.

    `examined`: the contents of the run directory, and the results of `doctor`. `report`: text that `doctor` printed.
    `folder`: the run directory.
    """
    left_out = list(examined.notes)
    yield "doctor.txt", report
    yield "plan.txt", "\n".join([*plan_lines(examined.plan), examined.plan_note]) + "\n"
    if examined.run.config:
        config = _hide_values(redact(examined.run.config), os.environ)  # before YAML escapes or folds secrets
        yield "config.yaml", yaml.safe_dump(config, sort_keys=False)
    if examined.run.versions:
        yield "versions.txt", "".join(f"{name} {version}\n" for name, version in examined.run.versions.items())
    for parent, pattern, limit in (*((*kind, LOG_BYTES) for kind in LOGS), ("", "metrics.jsonl", METRIC_BYTES)):
        paths = paths_in(folder / parent, pattern)
        for path in paths[:MAX_LOGS]:
            name = str(path.relative_to(folder))
            try:
                yield name, _tail(path, limit)
            except OSError as error:
                left_out.append(f"{name}: {error.strerror or error}")
        left_out += [f"{path.relative_to(folder)}: only {MAX_LOGS} such files are included" for path in paths[MAX_LOGS:]]
    yield "files.txt", "".join(f"{line}\n" for line in _listing(folder, left_out))
    yield "not-included.txt", "".join(f"{line}\n" for line in left_out)


def _tail(path: Path, limit: int) -> str:
    """Return the last `limit` bytes of a file as text, without a first line that is cut off."""
    with open(open_regular(path), "rb") as file:
        start = max(0, os.fstat(file.fileno()).st_size - limit)
        file.seek(start)
        data = file.read(limit)
    return (data.partition(b"\n")[2] if start else data).decode(errors="replace")


def _listing(folder: Path, left_out: list[str]) -> Iterator[str]:
    """Yield a line with size and name for each file and folder inside `folder`, the run directory.

    If the run is in progress, files may vanish meanwhile. `left_out`: gets a line for each folder that cannot be listed.
    """
    errors: list[OSError] = []
    count = 0
    for parent, folders, files in os.walk(folder, onerror=errors.append):
        folders.sort()
        for name in sorted(folders + files):
            count += 1
            if count > MAX_LISTED:
                left_out.append(f"files.txt has only the first {MAX_LISTED:,} files")
                return
            path = Path(parent, name)
            try:
                yield f"{path.stat().st_size:>14,} {path.relative_to(folder)}"
            except OSError:
                yield f"{'vanished':>14} {path.relative_to(folder)}"
    for error in errors:
        where = Path(error.filename).relative_to(folder)
        left_out.append(f"{where}/: its files are not in files.txt: {error.strerror or error}")
