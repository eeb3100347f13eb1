"""A data set whose samples harm the worker that decodes them. Of its own, since workers import it."""

import multiprocessing
import os
import signal

from raphael_dist.data.shards.decode_sample import DecodedSample, ImageDataset


class Harmful(ImageDataset):
    """Its samples 1 and up do to the worker that decodes them what a fault would do."""

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
