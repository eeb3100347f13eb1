"""Classes that the checks of `prove` share: a rank, a result, a problem."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from raphael_dist.runtime.ranks import Ranks


@dataclass(frozen=True)
class Problem:
    """A problem of a rank.

    Attributes:
        text: description, with "it" for the rank.
        own: whether this rank causes it, so that other ranks may only see its effects.
        amber: whether training is possible nevertheless.
    """

    text: str
    own: bool = True
    amber: bool = False

    def in_case(self, case: str) -> "Problem":
        """Return the problem with the case in which it was seen."""
        return replace(self, text=f"{case}: {self.text}")


@dataclass
class Result:
    """The result of a check on one rank.

    Attributes:
        lines: what was measured, for the report; those of rank 0 are shown.
        problems: what is wrong.
        values: numbers of this rank, for the check's summary over all ranks.
        not_proven: why the check could not prove its claim here.
    """

    lines: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    not_proven: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return it as values of JSON."""
        return asdict(self)


@dataclass
class Proof:
    """One rank of a check.

    Attributes:
        ranks: this rank among those of the check.
        device: this rank's device.
        config: the user's configuration, for the checks of speed and memory.
        folder: folder of the reports, which all ranks share.
        options: further arguments of the check.
        mark: reports what this rank begins. The rank with the fewest marks is late.
    """

    ranks: Ranks
    device: torch.device
    config: Any
    folder: Path
    options: dict[str, Any]
    mark: Callable[[str], None]
