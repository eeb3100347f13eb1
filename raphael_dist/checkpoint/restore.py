"""Finds the newest checkpoint that verifies, and restores from it what this rank owns, whatever ranks and stage wrote it.

All ranks decide together, before any of them changes anything: each file is checked once, by one rank.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from raphael_dist.checkpoint import folders as files
from raphael_dist.checkpoint.progress import Progress, progress_of
from raphael_dist.checkpoint.reader import CheckpointReader, check_architecture, newest
from raphael_dist.config import Config
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.fragments import MOMENTS, Fragments
from raphael_dist.errors import UserError
from raphael_dist.parallel import ranks as parallel

_log = logging.getLogger(__name__)


class Restorer:
    """The checkpoints of one run, seen from where they are read. Methods are collective."""

    def __init__(self, config: Config, ranks: parallel.Ranks, fragments: Fragments, ema: Ema | None, dataset: str) -> None:
        self.root = config.run.dir / "checkpoints"
        self._config, self._ranks, self._fragments, self._ema, self._dataset = config, ranks, fragments, ema, dataset

    def resume(self) -> Progress | None:
        """Restore the newest checkpoint that verifies and return its progress, or None without any. Clears what a kill left.

        Raises UserError when there are checkpoints but none verifies (unless run.fresh), when the folder cannot be used, or
        when the checkpoint is of another architecture or data set; nothing has been changed then.
        """
        parallel.all_or_none(self._claim_folder)
        reader, damaged = self._newest_whole(self._on_main(lambda: newest(self.root)))
        parallel.all_or_none(partial(self._check, reader, damaged))
        if reader is not None:
            parallel.all_or_none(partial(self._restore, reader))
            self._fragments.publish()
        # Only now, out of the way of retention and of saves of the same step. They are kept: a disk may have hiccupped.
        for kept in self._on_main(lambda: [files.set_aside(folder) for folder in damaged]):
            _log.warning("the damaged checkpoint is kept as %s", kept)
        return progress_of(reader.manifest) if reader else None

    def rewind(self) -> Progress | None:
        """Restore the newest checkpoint that verifies in the middle of training; None, and no change, without any."""
        reader, _ = self._newest_whole(self._on_main(lambda: newest(self.root)))
        if reader is None:
            return None
        parallel.all_or_none(partial(self._restore, reader))
        self._fragments.publish()
        return progress_of(reader.manifest)

    def _claim_folder(self) -> None:
        """Find out now whether this rank may write where it will have to in an hour."""
        probe = self.root / f".probe-{self._ranks.rank:05d}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
            if self._ranks.is_main:
                files.tidy(self.root)
        except OSError as error:
            raise UserError(f"run.dir: cannot write to {self.root}: {error.strerror}; choose another run.dir") from None

    def _newest_whole(self, folders: list[Path]) -> tuple[CheckpointReader | None, dict[Path, str]]:
        """Return the newest checkpoint that verifies, and what is wrong with each that is newer."""
        damaged: dict[Path, str] = {}
        for folder in folders:
            damage = self._verify(folder)
            if damage is None:
                return parallel.all_or_none(partial(CheckpointReader, folder)), damaged
            damaged[folder] = damage.removeprefix(f"checkpoint {folder}: ")
            if self._ranks.is_main:
                _log.warning("skipping checkpoint %s: %s", folder, damaged[folder])
        return None, damaged

    def _verify(self, folder: Path) -> str | None:
        """Check each file once, divided over the ranks; return what is wrong on any of them."""
        damage = None
        try:
            reader = CheckpointReader(folder)
            names = sorted(reader.manifest["files"])
            damage = reader.damage(names[self._ranks.rank :: self._ranks.world_size]) or reader.incomplete()
        except Exception as error:  # a manifest may say anything; the other ranks wait
            damage = str(error)
        return next((d for d in parallel.gather(damage) if d is not None), None)

    def _check(self, reader: CheckpointReader | None, damaged: dict[Path, str]) -> None:
        if reader is None:
            if damaged and not self._config.run.fresh:
                found = "; ".join(f"{folder.name}: {damage}" for folder, damage in damaged.items())
                raise UserError(
                    f"run.dir: no checkpoint in {self.root} verifies ({found}); repair one, use another run.dir, or start "
                    "anew beside them with run.fresh=true"
                )
            return
        check_architecture(reader.config(), self._config, str(reader.folder))
        if reader.shapes != self._fragments.shapes:
            raise UserError(f"checkpoint {reader.folder}: its tensors are not those of this model; use another run.dir")
        if reader.manifest["dataset"] != self._dataset and not self._config.data.allow_change:
            raise UserError(
                f"data.shards: {reader.folder} was trained on other shards, and the order of samples would change; give the "
                "same shards, another run.dir, or data.allow_change=true"
            )
        if self._config.optim.kind == "adamw" and progress_of(reader.manifest).updates and "exp_avg" not in reader.kinds():
            raise UserError(f"optim.kind = adamw: {reader.folder} holds no moments; use optim.kind=sgd or another run.dir")

    @torch.no_grad()
    def _restore(self, reader: CheckpointReader) -> None:
        self._fragments.create_moments(progress_of(reader.manifest).updates)
        kinds = reader.kinds()
        average = "ema" if "ema" in kinds else "master"
        for i, f in enumerate(self._fragments):
            f.master.copy_(reader.read("master", f.name, f.start, f.numel))
            for kind in MOMENTS:
                moment = self._fragments.moment(f, kind)
                if moment is not None and kind in kinds:
                    moment.copy_(reader.read(kind, f.name, f.start, f.numel))
            if self._ema is not None:
                self._ema.values[i].copy_(reader.read(average, f.name, f.start, f.numel))

    def _on_main(self, work: Callable[[], Any]) -> Any:
        """Return on all ranks what `work` returns on rank 0; what it raises is raised on all."""
        result = parallel.all_or_none(lambda: work() if self._ranks.is_main else None)
        return parallel.gather(result)[0]
