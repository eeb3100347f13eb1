"""A copy of this rank's state on the host, from which a checkpoint is written while training goes on."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raphael_dist.engine.ema import Ema
from raphael_dist.engine.fragments import MOMENTS, Fragment, Fragments
from raphael_dist.storage import tensorfile
from raphael_dist.storage.files import sha256


class Snapshot:
    """One float32 buffer, made once and filled at every save; pinned where there is a GPU, so that the copy is a DMA.

    layout: (key, number of elements) of the parts in the buffer, in order; key is `<kind>/<parameter>`.
    starts: where each part begins in its flattened parameter.
    """

    def __init__(self, fragments: Fragments, ema: Ema | None, rank: int, world_size: int) -> None:
        self._fragments, self._ema, self._rank, self._world_size = fragments, ema, rank, world_size
        self._buffer = torch.empty(0)
        self._values: list[Tensor] = []  # live, in the order of the layout
        self._addresses: list[int] | None = None  # of the moments when it was laid out
        self.layout: list[tuple[str, int]] = []
        self.starts: dict[str, int] = {}

    def prepare(self) -> int:
        """Lay out what this rank will save now and make room for it on the host; return its bytes.

        Moments join after the first optimizer step. Raises RuntimeError or MemoryError when the host has no room.
        """
        addresses = self._fragments.moment_addresses()
        if addresses != self._addresses:  # naming thousands of views takes as long as copying them
            self._lay_out()
            self._addresses = addresses
        total = sum(numel for _, numel in self.layout)
        if self._buffer.numel() < total:
            self._buffer = torch.empty(total, dtype=torch.float32, pin_memory=torch.cuda.is_available())
        return 4 * total

    def _lay_out(self) -> None:
        self._values, self.layout, self.starts = [], [], {}
        for f, kinds in self._owned():
            for kind, value in kinds.items():
                key = f"{kind}/{f.name}"
                self._values.append(value)
                self.layout.append((key, f.numel))
                self.starts[key] = f.start

    @torch.no_grad()
    def take(self) -> Tensor:
        """Copy what `prepare` laid out into the buffer and return it, float32 [n] on the host; valid until the next call."""
        total = sum(numel for _, numel in self.layout)
        parts = list(self._buffer[:total].split([numel for _, numel in self.layout]))
        torch._foreach_copy_(parts, self._values, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._buffer[:total]

    def _owned(self) -> list[tuple[Fragment, dict[str, Tensor]]]:
        owned = []
        for i, f in enumerate(self._fragments):
            if f.shared and i % self._world_size != self._rank:
                continue
            kinds = {"master": f.master, **{kind: self._fragments.moment(f, kind) for kind in MOMENTS}}
            if self._ema is not None:
                kinds["ema"] = self._ema.values[i]
            owned.append((f, {kind: value.detach() for kind, value in kinds.items() if value is not None}))
        return owned


def write_snapshot(
    path: Path,
    layout: list[tuple[str, int]],
    values: Tensor,
    metadata: Mapping[str, str],
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write consecutive parts of `values`, float32 [n] on the host, as one safetensors file, and read it back.

    layout: (key, number of elements) of each part. tell: gets a word about every piece. Returns the manifest's entry: bytes
    and sha256. Raises OSError when it cannot be written, when a value is not finite, or when the device returns something
    else than was written.
    """
    heads = [(key, torch.float32, (numel,)) for key, numel in layout]
    with tensorfile.HashedFile(path) as file:
        tensorfile.write_safetensors(file, heads, metadata, _finite(layout, values, tell))
    entry = file.entry()
    tell("reading it back")
    # From the device, not from memory: a file that was read back is one that an older checkpoint may be removed for.
    if sha256(path, from_device=True) != entry["sha256"]:
        raise OSError(f"{path}: the file system returned other bytes than were written")
    return entry


def _finite(layout: list[tuple[str, int]], values: Tensor, tell: Callable[[str], None]) -> Iterator[Tensor]:
    """Yield the values in pieces, telling how far they are. Raises OSError naming the first part that is not finite."""
    for i, piece in enumerate(values.split(tensorfile.CHUNK)):
        tell(f"{i * tensorfile.CHUNK} of {values.numel()} numbers written")
        # One pass without a mask: NaN and infinities are the extremes of what holds any.
        if piece.numel() and not all(x.isfinite() for x in piece.aminmax()):
            parts = zip(layout, values.split([numel for _, numel in layout]), strict=True)
            wrong = next(key for (key, _), part in parts if not part.isfinite().all())
            raise OSError(f"{wrong} is not finite; this state is not worth keeping")
        yield piece
