"""The processes that share a conversion: one, or those of `mpirun`, through mpi4py."""

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

from raphael_dist.errors import UserError
from raphael_dist.parallel.ranks import agree, attempt

T = TypeVar("T")
_LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")


class MpiRanks:
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
            started = int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or self.size)
            if started != self.size:  # every process would convert everything
                raise UserError(
                    f"mpirun started {started} processes, mpi4py sees {self.size}: they belong to different MPIs"
                )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def agree(self, work: Callable[[], T]) -> T:
        """Run `work` everywhere; return this rank's result, or raise the first failure everywhere, as `ranks.all_or_none`.

        What the operating system refuses becomes a UserError.
        """
        result, failure = attempt(work)
        if isinstance(failure, OSError):
            failure = UserError(f"{failure.strerror or failure}" + (f": {failure.filename}" if failure.filename else ""))
        return agree(result, failure, self.gather)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in order."""
        return [value] if self._comm is None else cast(list[T], self._comm.allgather(value))

    def main_only(self, work: Callable[[], object]) -> None:
        """Run `work` on rank 0 alone."""
        self.agree(lambda: work() if self.is_main else None)
