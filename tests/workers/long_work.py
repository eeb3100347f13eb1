"""Rank: calls `long_work.run_on_all_ranks` with work that is slow, stops or fails on one rank (see tests/lib/forks.py).

Each rank writes seconds and result of the call to result-RANK.txt. The keys of the argument `spec` are
    folder: for the files
    case: "long": one rank works for 6 s; "stops": one rank stops itself; "fails": one rank raises an error
    at: number of that rank
    collective_s: time-out of collectives in seconds
    silence_s: seconds without progress after which a rank counts as hung
    share: if true, send the result of rank 0 to all ranks
The exit code is 2 after UserError and EXIT_HUNG after HungError.
"""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from raphael_dist.errors import EXIT_HUNG, HungError, UserError
from raphael_dist.runtime import long_work
from raphael_dist.runtime.progress_bar import Reporter
from raphael_dist.runtime.ranks import discover, initialise


def work_of(case: str, here: bool, folder: Path, rank: int) -> Any:
    """Return the function that `rank` runs in this case.

    `here`: whether this is the rank that is slow, stops or fails. `folder`: for files that show which ranks have started.
    """

    def long(report: Reporter) -> str:
        for i in range(30 if here else 0):
            time.sleep(0.2)
            report(f"shard {i} of 30")
        return "done"

    def stops(report: Reporter) -> str:
        (folder / f"began-{rank}").touch()
        if here:
            while len(list(folder.glob("began-*"))) < int(os.environ["WORLD_SIZE"]):
                time.sleep(0.05)
            report("shard 3 of 7")
            time.sleep(2.0)  # until the others know
            os.kill(os.getpid(), signal.SIGSTOP)
        return "done"

    def fails(report: Reporter) -> str:
        if here:
            report("shard 3 of 7")
            raise UserError("data.shards: no such shard")
        for i in range(300):  # half a minute, unless it hears of the failure
            time.sleep(0.1)
            report(f"shard {i} of 300")
        return "done"

    return {"long": long, "stops": stops, "fails": fails}[case]


def main(spec: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    long_work.SILENCE_S = spec.get("silence_s", long_work.SILENCE_S)
    ranks = discover()
    initialise(ranks, timedelta(seconds=spec["collective_s"]))
    work = work_of(spec["case"], ranks.rank == spec["at"], Path(spec["folder"]), ranks.rank)
    began, code = time.monotonic(), 0
    try:
        result = long_work.run_on_all_ranks("indexing", work)
        if ranks.rank == 0 or not spec.get("share"):
            result += f" by rank {ranks.rank}"
        if spec.get("share"):
            result = long_work.run_on_rank0("sharing", lambda _: result)
    except UserError as error:
        result, code = f"UserError: {error}", 2
    except HungError as error:
        result, code = f"HungError: {error}", EXIT_HUNG
    folder = Path(spec["folder"])
    (folder / f"result-{ranks.rank}.txt").write_text(f"{time.monotonic() - began:.1f} {result}")
    return code
