"""Writes checkpoints that are either whole or absent, and resumes from the newest that verifies.

Every rank writes its fragments into a temporary folder; when all have succeeded, rank 0 writes the manifest with sizes and
checksums, and renames the folder. A kill at any moment leaves the previous checkpoint and at most a temporary folder.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from raphael_dist import parallel
from raphael_dist.checkpoint.reader import FORMAT, MANIFEST, CheckpointReader, check_architecture, newest, sha256
from raphael_dist.config import Config
from raphael_dist.ema import Ema
from raphael_dist.errors import UserError
from raphael_dist.fragments import MOMENTS, Fragments
from raphael_dist.rundir import versions

_log = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one run. Every method is collective: all ranks call it."""

    def __init__(self, config: Config, ranks: parallel.Ranks, fragments: Fragments, ema: Ema | None, dataset: str) -> None:
        self.root = config.run.dir / "checkpoints"
        self._config, self._ranks, self._fragments, self._ema, self._dataset = config, ranks, fragments, ema, dataset

    def save(self, step: int, samples_seen: int) -> Path:
        """Write and publish the checkpoint of optimizer step `step`. Raises OSError on all ranks when any cannot write."""
        final = self.root / f"step-{step:08d}"
        temporary = self.root / f".writing-{final.name}"
        parallel.all_or_none(lambda: self._clear(temporary) if self._ranks.is_main else None)
        entries = self._together(lambda: self._write_rank_file(temporary), temporary)
        manifest = self._manifest(step, samples_seen, entries)
        parallel.all_or_none(lambda: self._publish(temporary, final, manifest) if self._ranks.is_main else None)
        return final

    def _clear(self, temporary: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def _publish(self, temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
        _write_synced(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _sync_folder(self.root)
        _write_synced(self.root / ".latest", final.name.encode())
        (self.root / ".latest").replace(self.root / "latest")
        for old in newest(self.root)[self._config.checkpoint.keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def resume(self) -> tuple[int, int] | None:
        """Restore the newest checkpoint that verifies; return its (step, samples_seen), or None without any.

        Raises UserError when there are checkpoints but none verifies, or when it is of another architecture.
        """
        folders = self._shared(newest(self.root) if self._ranks.is_main else None)
        for folder in folders:
            damage = self._verify(folder)
            if damage is None:
                progress = parallel.all_or_none(partial(self._restore, CheckpointReader(folder)))
                self._fragments.publish()
                return progress
            if self._ranks.is_main:
                _log.warning("skipping checkpoint %s: %s", folder, damage)
        if folders:
            raise UserError(f"run.dir: no checkpoint in {self.root} verifies; repair one or use another run.dir")
        return None

    def _restore(self, reader: CheckpointReader) -> tuple[int, int]:
        check_architecture(reader.config(), self._config, str(reader.folder))
        if reader.manifest["dataset"] != self._dataset and not self._config.data.allow_change:
            raise UserError(
                f"data.shards: {reader.folder} was trained on other shards, and the order of samples would change; give the "
                "same shards, another run.dir, or data.allow_change=true"
            )
        self._fragments.create_moments(reader.step)
        average = "ema" if "ema" in reader.kinds() else "master"
        with torch.no_grad():
            for i, f in enumerate(self._fragments):
                f.master.copy_(reader.read("master", f.name, f.start, f.numel))
                for kind in MOMENTS:
                    moment = self._fragments.moment(f, kind)
                    if moment is not None:
                        moment.copy_(reader.read(kind, f.name, f.start, f.numel))
                if self._ema is not None:
                    self._ema.values[i].copy_(reader.read(average, f.name, f.start, f.numel))
        return reader.step, int(reader.manifest["samples_seen"])

    def _write_rank_file(self, folder: Path) -> tuple[str, dict[str, Any]]:
        tensors, starts = self._owned()
        path = folder / f"rank-{self._ranks.rank:05d}.safetensors"
        save_file(tensors, path, {"starts": json.dumps(starts)})
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        return path.name, {"bytes": path.stat().st_size, "sha256": sha256(path)}

    def _owned(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        tensors, starts = {}, {}
        for i, f in enumerate(self._fragments):
            if f.shared and i % self._ranks.world_size != self._ranks.rank:
                continue
            values = {"master": f.master, **{kind: self._fragments.moment(f, kind) for kind in MOMENTS}}
            if self._ema is not None:
                values["ema"] = self._ema.values[i]
            for kind, value in values.items():
                if value is not None:
                    tensors[f"{kind}/{f.name}"] = value.detach().to("cpu", copy=True)
                    starts[f"{kind}/{f.name}"] = f.start
            if not tensors[f"master/{f.name}"].isfinite().all():
                raise OSError(f"weights of {f.name} are not finite; this state is not worth keeping")
        return tensors, starts

    def _manifest(self, step: int, samples_seen: int, entries: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "step": step,
            "samples_seen": samples_seen,
            "world_size": self._ranks.world_size,
            "dataset": self._dataset,
            "versions": versions(),
            "config": self._config.model_dump(mode="json"),
            "tensors": self._fragments.shapes,
            "files": dict(entries),
        }

    def _verify(self, folder: Path) -> str | None:
        """Check the files, divided over the ranks; return what is wrong on any of them."""
        damage = None
        try:
            reader = CheckpointReader(folder)
            files = sorted(reader.manifest["files"])
            damage = reader.damage(files[self._ranks.rank :: self._ranks.world_size])
        except (UserError, OSError, KeyError) as error:
            damage = str(error)
        found: list[str | None] = [None] * self._ranks.world_size
        dist.all_gather_object(found, damage)
        return next((d for d in found if d is not None), None)

    def _shared(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def _together(self, write: Callable[[], tuple[str, dict[str, Any]]], temporary: Path) -> list[Any]:
        """Run `write` on every rank; return all results, or remove the folder and raise the first failure on all."""
        try:
            result: Any = write()
        except Exception as error:
            result = f"rank {self._ranks.rank}: {error}"
        results: list[Any] = [None] * self._ranks.world_size
        dist.all_gather_object(results, result)
        failures = [r for r in results if isinstance(r, str)]
        if failures:
            if self._ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(f"checkpoint not written, the previous one stays: {failures[0]}")
        return results


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
