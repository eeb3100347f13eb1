"""Data classes that the checks of `prove` share: `Proof` (arguments of a check), `Result`, `Problem` and `Outcome`."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from raphael_dist.config.schema import Config
from raphael_dist.runtime.ranks import Ranks
from raphael_dist.text import JsonObject


@dataclass(frozen=True)
class Problem:
    """A problem that a check found on one rank.

    Attributes:
        text: what is wrong. It calls the rank on which the problem was found "this rank".
        own: whether this rank is the cause. Other ranks may only see the effects of a problem elsewhere.
        amber: whether training is possible nevertheless.
    """

    text: str
    own: bool = True
    amber: bool = False

    def in_case(self, case: str) -> "Problem":
        """Return the same problem with `case`, a description of the tested settings, in front of its text."""
        return replace(self, text=f"{case}: {self.text}")


@dataclass
class Result:
    """The result of a check of `prove` on one rank.

    Attributes:
        lines: what was measured, as lines of text. The report shows the lines of rank 0.
        problems: what is wrong.
        values: measured numbers of this rank by name. The report stores those of rank 0.
        not_proven: what could not be checked on this machine, and why.
    """

    lines: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    values: JsonObject = field(default_factory=dict)
    not_proven: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    """How one check of `prove` ended on one rank, as recorded by its agent (the process that supervises the rank's checks).

    Attributes:
        rank, node: the rank, and the host name of its node.
        result: the check's `Result` as a dict; None: the check did not finish.
        marks: number of progress messages that the worker process, which runs the check, has sent.
        last: the last of these messages.
        why: why the check did not finish; "" if it did.
        seconds: how long the check ran.
    """

    rank: int
    node: str
    result: JsonObject | None = None
    marks: int = 0
    last: str = "nothing"
    why: str = ""
    seconds: float = 0.0


@dataclass
class Proof:
    """The arguments of a check of `prove` on one rank.

    Attributes:
        ranks: number of this rank, and the number of ranks on which the check runs.
        device: this rank's device.
        config: the user's configuration, for the checks of speed and memory.
        folder: folder of the reports, which all ranks share.
        launched: number of ranks that the launcher started.
        mark: a function to call with a description of what this rank begins now. If ranks hang, those with the fewest calls
            are late.
    """

    ranks: Ranks
    device: torch.device
    config: Config
    folder: Path
    launched: int
    mark: Callable[[str], None]
