"""The state of one save: what the threads that write a checkpoint have done so far."""

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from raphael_dist.checkpoint.manifest import Manifest
from raphael_dist.storage import files


class WrittenFile(NamedTuple):
    """The file of a checkpoint that one rank has written.

    Attributes:
        name: file name.
        seconds: duration of writing the file and reading it back.
        entry: size and SHA-256 of the file.
        ranges: for each key `<kind>/<parameter>`, which elements of the flattened parameter the file contains: (index of
            the first element, number of elements).
    """

    name: str
    seconds: float
    entry: files.FileEntry
    ranges: dict[str, tuple[int, int]]


@dataclass
class Save:
    """The state of saving one checkpoint, on this rank.

    Attributes:
        temporary, final: path of the checkpoint's folder while it is written, and afterwards.
        manifest: content of the manifest. Its list of files is empty until `commit`.
        bytes: size of the checkpoint in bytes, over all ranks.
        stall_s: seconds that training waited for this save.
        write_s: seconds in which the slowest rank wrote its file and read it back.
        written: result of the thread that writes this rank's file; None after `commit`.
        published: result of the thread that writes the manifest and renames the folder; on rank 0 after `commit`, else None.
        status: what this rank's thread is doing, for messages.
        failure: why the save failed, or None; the same text on all ranks once they have agreed.
        concluded: whether rank 0 has read the result of `published`, and recorded the save as finished or failed.
    """

    temporary: Path
    final: Path
    manifest: Manifest
    bytes: int = 0
    stall_s: float = 0.0
    write_s: float = 0.0
    written: Future[WrittenFile] | None = None
    published: Future[None] | None = None
    status: str = ""
    failure: str | None = None
    concluded: bool = False

    @property
    def line(self) -> str:
        """The log line about the saved checkpoint: folder, size in MiB, how long training waited, duration of writing."""
        cost = f"training waited {self.stall_s:.3f} s, written and read back in {self.write_s:.2f} s"
        return f"saved {self.final} ({self.bytes / 2**20:.1f} MiB, {cost})"

    def metrics(self) -> dict[str, float]:
        """Return the duration (s) and size (bytes) of this save by TensorBoard tag, such as checkpoint/write_s."""
        values = {"stall_s": self.stall_s, "write_s": self.write_s, "bytes": float(self.bytes)}
        return {f"checkpoint/{name}": value for name, value in values.items()}
