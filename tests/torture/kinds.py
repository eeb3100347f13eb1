"""The register of fault kinds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.torture.trial import Outcome


@dataclass(frozen=True)
class Kind:
    """A kind of fault. where: "ranks", "data", "commands" or "slurm", the setup that `inject` uses."""

    name: str
    group: str
    where: str
    inject: Callable[[Any], Outcome]


KINDS: dict[str, Kind] = {}


def fault(name: str, group: str, where: str = "ranks") -> Callable[[Callable[[Any], Outcome]], Callable[[Any], Outcome]]:
    """Register a function as a kind of fault."""

    def register(inject: Callable[[Any], Outcome]) -> Callable[[Any], Outcome]:
        assert name not in KINDS, name
        KINDS[name] = Kind(name, group, where, inject)
        return inject

    return register
