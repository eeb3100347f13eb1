"""Data classes that the checks of `prove` share: a rank, a result, a problem."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from raphael_dist.runtime.ranks import Ranks


@dataclass(frozen=True)
class Problem:
    """A problem that a check found on one rank.

    Attributes:
        text: description, in which "it" means the rank.
        own: whether this rank is the cause. Other ranks may only see the effects of a problem elsewhere.
        amber: whether training is possible nevertheless.
    """

    text: str
    own: bool = True
    amber: bool = False

    def in_case(self, case: str) -> "Problem":
        """Return the same problem with the tested combination `case` in its text."""
        return replace(self, text=f"{case}: {self.text}")


@dataclass
class Result:
    """The result of a check on one rank.

    Attributes:
        lines: what was measured. The report shows those of rank 0.
        problems: what is wrong.
        values: numbers of this rank, from which the report computes a summary over all ranks.
        not_proven: what could not be checked on this machine, and why.
    """

    lines: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    not_proven: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the result as values for JSON."""
        return asdict(self)


@dataclass
class Proof:
    """The arguments of a check on one rank.

    Attributes:
        ranks: this rank, among the ranks on which the check runs.
        device: this rank's device.
        config: the user's configuration, for the checks of speed and memory.
        folder: folder of the reports, which all ranks share.
        options: further arguments of the check.
        mark: reports progress: what this rank begins now. If ranks hang, the one with the fewest such messages is late.
    """

    ranks: Ranks
    device: torch.device
    config: Any
    folder: Path
    options: dict[str, Any]
    mark: Callable[[str], None]
