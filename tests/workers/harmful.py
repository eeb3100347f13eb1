"""A data set whose samples kill or block the worker process that decodes them.

The class has its own module, because worker processes import it.
"""

import multiprocessing
import os
import signal

from raphael_dist.data.shards.decode_sample import DecodedSample, ImageDataset


class Harmful(ImageDataset):
    """A data set that causes the fault `faults[i]` in the worker process that decodes sample i. Sample 0 causes none.

    The faults are: killed by SIGKILL, crashed by SIGSEGV, an endless loop, and not enough memory.
    """

    faults = ("", "kill", "crash", "endless", "memory")

    def load(self, sample_id: int, bucket: int, flip: bool = False) -> DecodedSample:
        fault = self.faults[sample_id] if multiprocessing.parent_process() else ""
        if fault in ("kill", "crash"):
            os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSEGV)
        while fault == "endless":
            pass
        if fault == "memory":
            raise MemoryError
        return super().load(sample_id, bucket, flip)
