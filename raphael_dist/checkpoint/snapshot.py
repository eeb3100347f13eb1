"""A copy of this rank's training state in host memory, from which a checkpoint is written while training continues."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from raphael_dist.engine.ema import Ema
from raphael_dist.engine.fragments import MOMENTS, Fragments
from raphael_dist.runtime.progress_bar import Reporter, no_report
from raphael_dist.storage import tensorfile
from raphael_dist.storage.files import FileEntry, sha256


class Snapshot:
    """A float32 buffer in host memory for this rank's weights, Adam moments and EMA.

    The buffer is allocated once and filled at every save. With a GPU it is pinned, so that the copy is a DMA transfer.

    Attributes:
        ranges: the contents of the buffer, in order. For each key `<kind>/<parameter>`, the elements of the flattened
            parameter that this rank saves: (index of the first element, number of elements). Kinds are "master" (fp32
            weights), "exp_avg", "exp_avg_sq" (Adam moments) and "ema".
    """

    def __init__(self, fragments: Fragments, ema: Ema | None, rank: int, world_size: int) -> None:
        self._fragments, self._ema, self._rank, self._world_size = fragments, ema, rank, world_size
        self._buffer = torch.empty(0)
        self._values: list[Tensor] = []  # of the training state, in the order of the ranges
        self._addresses: list[int] | None = None  # of the moments when the ranges were listed
        self.ranges: dict[str, tuple[int, int]] = {}

    def prepare(self) -> int:
        """Prepare a save: list the `ranges`, allocate the buffer, and return how many bytes this rank will save.

        Adam's moments are included only after the first optimizer step, which creates them. Raises RuntimeError or
        MemoryError if there is not enough memory.
        """
        addresses = self._fragments.moment_addresses()
        if addresses != self._addresses:  # listing thousands of views takes as long as copying them
            self._list_ranges()
            self._addresses = addresses
        total = sum(value.numel() for value in self._values)
        if self._buffer.numel() < total:
            self._buffer = torch.empty(total, dtype=torch.float32, pin_memory=torch.cuda.is_available())
        return 4 * total

    def _list_ranges(self) -> None:
        self._values, self.ranges = [], {}
        for i, f in enumerate(self._fragments):
            if f.shared and i % self._world_size != self._rank:
                continue
            kinds = {"master": f.master, **{kind: self._fragments.moment(f, kind) for kind in MOMENTS}}
            if self._ema is not None:
                kinds["ema"] = self._ema.values[i]
            for kind, value in kinds.items():
                if value is not None:
                    self._values.append(value.detach())
                    self.ranges[f"{kind}/{f.name}"] = (f.start, f.numel)

    @torch.no_grad()
    def take(self) -> Tensor:
        """Copy weights, Adam moments and EMA of this rank into the buffer, in the order of `ranges`; call `prepare` first.

        Returns:
            The buffer, float32 [n] in host memory. The next call overwrites it.
        """
        sizes = [value.numel() for value in self._values]
        filled = self._buffer[: sum(sizes)]
        torch._foreach_copy_(list(torch.split(filled, sizes)), self._values, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return filled


def write_snapshot(
    path: Path,
    layout: list[tuple[str, int]],
    values: Tensor,
    metadata: Mapping[str, str],
    report: Reporter = no_report,
) -> FileEntry:
    """Write the tensors in a buffer as a new safetensors file, then read the file back and compare checksums.

    Args:
        path: the file; it must not exist.
        layout: (key, number of elements) of each tensor, in the order in which they follow each other in the buffer.
        values: the buffer, float32 [n] in host memory.
        metadata: strings by name, for the header of the file.
        report: called with a line of progress for every block that is written.

    Returns:
        Size and SHA-256 of the file, for the manifest.

    Raises:
        OSError: the file cannot be written, a value is not finite, or the bytes that are read back differ from those that
            were written.
    """
    heads = [(key, torch.float32, (numel,)) for key, numel in layout]
    with tensorfile.HashedFile(path) as file:
        tensorfile.write_safetensors(file, heads, metadata, _finite(layout, values, report))
    entry = file.entry()
    report("reading it back")
    # From the device, not from memory: older checkpoints are removed once this file is known to be readable.
    if sha256(path, from_device=True) != entry["sha256"]:
        raise OSError(f"{path}: the file system does not return the bytes that were written. Check the disk")
    return entry


def _finite(layout: list[tuple[str, int]], values: Tensor, report: Reporter) -> Iterator[Tensor]:
    """Yield the buffer `values` in blocks. If a value is NaN or infinite, raise OSError, which names its tensor.

    `layout`: (key, number of elements) of each tensor in the buffer. `report`: called with a line of progress per block.
    """
    for i, piece in enumerate(torch.split(values, tensorfile.CHUNK)):
        report(f"{i * tensorfile.CHUNK} of {values.numel()} numbers written")
        # One pass without a mask: if a tensor holds NaN or infinity, its minimum or maximum does.
        if piece.numel() and not all(x.isfinite() for x in piece.aminmax()):
            parts = zip(layout, torch.split(values, [numel for _, numel in layout]), strict=True)
            key = next(key for (key, _), part in parts if not part.isfinite().all())
            raise OSError(f"{key} is not finite (it contains NaN or infinity), so this state is not saved")
        yield piece
