"""The processes that share a conversion: one, or those of `mpirun`, through mpi4py."""

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

from raphael_dist.errors import UserError

T = TypeVar("T")
_LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")


class Ranks:
    """This process among `size`; every method is collective."""

    def __init__(self) -> None:
        self._comm: Any = None
        self.rank, self.size = 0, 1
        if any(name in os.environ for name in _LAUNCHED):
            try:
                from mpi4py import MPI
            except (ImportError, RuntimeError) as error:
                first = str(error).splitlines()[0]
                raise UserError(f'mpirun needs mpi4py and an MPI: pip install "raphael_dist[mpi]" ({first})') from None
            self._comm = MPI.COMM_WORLD
            self.rank, self.size = self._comm.rank, self._comm.size
            started = int(os.environ.get("OMPI_COMM_WORLD_SIZE", self.size))
            if started != self.size:  # every process would convert everything
                raise UserError(
                    f"mpirun started {started} processes, mpi4py sees {self.size}: they belong to different MPIs"
                )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> list[T]:
        """Run `work` everywhere; return all results, by rank, or raise the first failure everywhere."""
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        if self._comm is None:
            if failure is not None:
                raise failure
            return [cast(T, result)]
        text = None if failure is None else (isinstance(failure, UserError | OSError), f"{failure}")
        found = self._comm.allgather((text, result))
        problems = [(rank, problem) for rank, (problem, _) in enumerate(found) if problem is not None]
        if problems:
            rank, (by_user, message) = problems[0]
            if failure is not None and not by_user:
                raise failure
            raise UserError(message) if by_user else RuntimeError(f"rank {rank} failed: {message}")
        return [value for _, value in found]

    def main_only(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 alone and return its result everywhere."""
        return cast(T, self.together(lambda: work() if self.is_main else None)[0])
