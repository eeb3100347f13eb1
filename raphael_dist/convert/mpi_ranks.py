"""The processes that share the work of a conversion: this process alone, or those that `mpirun` started (mpi4py)."""

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

from raphael_dist.errors import UserError
from raphael_dist.runtime.ranks import attempt, raise_if_any_failed

T = TypeVar("T")
_LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")


class MpiRanks:
    """This process as one of the processes that mpirun started. Every method is collective: all processes call it.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes; 1 without mpirun.
    """

    def __init__(self) -> None:
        self._comm: Any = None
        self.rank, self.size = 0, 1
        if any(name in os.environ for name in _LAUNCHED):
            try:
                from mpi4py import MPI
            except (ImportError, RuntimeError) as error:
                first = str(error).splitlines()[0]
                raise UserError(
                    f"mpirun requires the package mpi4py and an MPI library here, but they cannot be loaded ({first}). "
                    "Run: pip install 'raphael_dist[mpi]'"
                ) from None
            self._comm = MPI.COMM_WORLD
            self.rank, self.size = self._comm.rank, self._comm.size
            started = int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or self.size)
            if started != self.size:  # otherwise every process would convert all files
                raise UserError(
                    f"mpirun -n {started} requires an mpi4py that was built with the same MPI, but mpi4py counts "
                    f"{self.size} of the {started} processes. Use the mpirun of the MPI that mpi4py was built with."
                )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def raise_on_all_ranks(self, work: Callable[[], T]) -> T:
        """Call `work` on every rank and return this rank's result. If it fails on any rank, raise an error on all ranks.

        Collective. An OSError of `work` becomes a UserError.

        Raises:
            UserError, NotSavedError: on all ranks, if `work` raises it on one rank.
            RuntimeError: on the other ranks, if `work` raises any other exception on one rank. That rank itself raises this
                exception.
        """
        result, failure = attempt(work)
        if isinstance(failure, OSError):
            where, why = failure.filename or "a file", failure.strerror or failure
            failure = UserError(f"{where} cannot be read or written: {why}. Check the path and free space.")
        return raise_if_any_failed(result, failure, self.gather)

    def gather(self, value: T) -> list[T]:
        """Return the values that all ranks pass, in the order of the ranks, on every rank. Collective."""
        return [value] if self._comm is None else cast(list[T], self._comm.allgather(value))

    def main_only(self, work: Callable[[], object]) -> None:
        """Call `work` on rank 0 only, while the other ranks wait. If it fails, raise an error on all ranks. Collective.

        The errors are those of `raise_on_all_ranks`.
        """
        self.raise_on_all_ranks(lambda: work() if self.is_main else None)
