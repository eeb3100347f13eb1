"""Finds the newest checkpoint that verifies, and restores from it what this rank owns, whatever ranks and stage wrote it.

All ranks decide together, before any of them changes anything: each file is checked once, by one rank.
"""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from raphael_dist.checkpoint import folders
from raphael_dist.checkpoint.progress import Progress, progress_of
from raphael_dist.checkpoint.reader import CheckpointReader, check_architecture, newest
from raphael_dist.config import Config
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.fragments import MOMENTS, Fragments
from raphael_dist.errors import UserError, cannot_write
from raphael_dist.identity import check_same_data, check_same_run
from raphael_dist.parallel.long_work import Tell, from_main, together
from raphael_dist.parallel.ranks import Ranks, all_or_none, gather_objects

_log = logging.getLogger(__name__)


class Restorer:
    """The checkpoints of one run, seen from where they are read. Methods are collective."""

    def __init__(self, config: Config, ranks: Ranks, fragments: Fragments, ema: Ema | None, data: Mapping[str, str]) -> None:
        self.root = config.run.dir / "checkpoints"
        self._config, self._ranks, self._fragments, self._ema, self._data = config, ranks, fragments, ema, data

    def resume(self) -> Progress | None:
        """Restore the newest checkpoint that verifies and return its progress, or None without any. Clears what a kill left.

        Raises UserError when there are checkpoints but none verifies (unless run.fresh), when the folder cannot be used, or
        when the checkpoint is of another architecture or data set; nothing has been changed then.
        """
        all_or_none(self._claim_folder)
        reader, damaged = self._newest_whole(from_main("looking for checkpoints", lambda _: newest(self.root)))
        all_or_none(partial(self._check, reader, damaged))
        if reader is not None:
            together(f"restoring {reader.folder.name}", partial(self._restore, reader))
            self._fragments.sync_model()
        # Only now, out of the way of retention and of saves of the same step. They are kept: a disk may have hiccupped.
        self._set_aside(list(damaged))
        return progress_of(reader.manifest) if reader else None

    def rewind(self, before: int | None = None) -> Progress | None:
        """Restore the newest checkpoint that verifies in the middle of training; None, and no change, without any.

        before: the newest of an earlier step than this; those of this step and later ones are set aside.
        """
        known = from_main("looking for checkpoints", lambda _: newest(self.root))
        later = [folder for folder in known if before is not None and (folders.step_of(folder) or 0) >= before]
        reader, _ = self._newest_whole([folder for folder in known if folder not in later])
        if reader is None:
            return None
        self._set_aside(later)
        together(f"restoring {reader.folder.name}", partial(self._restore, reader))
        self._fragments.sync_model()
        return progress_of(reader.manifest)

    def _set_aside(self, bad: list[Path]) -> None:
        for kept in from_main("setting checkpoints aside", lambda _: [folders.set_aside(folder) for folder in bad]):
            _log.warning("the damaged checkpoint is kept as %s", kept)

    def _claim_folder(self) -> None:
        """Find out now whether this rank may write where it will have to in an hour."""
        probe = self.root / f".probe-{self._ranks.rank:05d}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
            if self._ranks.is_main:
                folders.tidy(self.root)
        except OSError as error:
            raise cannot_write(self.root, error) from None

    def _newest_whole(self, folders: list[Path]) -> tuple[CheckpointReader | None, dict[Path, str]]:
        """Return the newest checkpoint that verifies, and what is wrong with each that is newer."""
        damaged: dict[Path, str] = {}
        for folder in folders:
            damage = self._verify(folder)
            if damage is None:
                return all_or_none(partial(CheckpointReader, folder)), damaged
            damaged[folder] = damage.removeprefix(f"{folder}: ").removeprefix(f"{folder}/")
            if self._ranks.is_main:
                _log.warning("skipping checkpoint %s: %s", folder, damaged[folder])
        return None, damaged

    def _verify(self, folder: Path) -> str | None:
        """Check each file once, divided over the ranks; return what is wrong on any of them."""

        def look(tell: Tell) -> str | None:
            try:
                reader = CheckpointReader(folder)
                names = sorted(reader.manifest["files"])
                return reader.damage(names[self._ranks.rank :: self._ranks.world_size], tell) or reader.incomplete()
            except Exception as error:  # a manifest may say anything
                return str(error)

        damage = together(f"verifying {folder.name}", look)
        return next((d for d in gather_objects(damage) if d is not None), None)

    def _check(self, reader: CheckpointReader | None, damaged: dict[Path, str]) -> None:
        if reader is None:
            if damaged and not self._config.run.fresh:
                reasons = "; ".join(f"{folder.name}: {damage}" for folder, damage in damaged.items())
                raise UserError(
                    f"run.dir: no checkpoint in {self.root} verifies ({reasons}); repair one, use another run.dir, or start "
                    "anew beside them with run.fresh=true"
                )
            return
        check_architecture(reader.config(), self._config, str(reader.folder))
        if reader.shapes != self._fragments.shapes:
            raise UserError(f"checkpoint {reader.folder}: its tensors are not those of this model; use another run.dir")
        told = check_same_run(reader.config(), self._config, str(reader.folder))
        told += check_same_data(reader.manifest, self._data, self._config, str(reader.folder))
        for line in told if self._ranks.is_main else []:
            _log.warning("%s", line)
        if self._config.optim.kind == "adamw" and progress_of(reader.manifest).updates and "exp_avg" not in reader.kinds():
            raise UserError(f"optim.kind = adamw: {reader.folder} holds no moments; use optim.kind=sgd or another run.dir")

    @torch.no_grad()
    def _restore(self, reader: CheckpointReader, tell: Tell) -> None:
        self._fragments.create_moments(progress_of(reader.manifest).updates)
        kinds = reader.kinds()
        average = "ema" if "ema" in kinds else "master"
        for i, f in enumerate(self._fragments):
            tell(f.name)
            f.master.copy_(reader.read("master", f.name, f.start, f.numel))
            for kind in MOMENTS:
                moment = self._fragments.moment(f, kind)
                if moment is not None and kind in kinds:
                    moment.copy_(reader.read(kind, f.name, f.start, f.numel))
            if self._ema is not None:
                self._ema.values[i].copy_(reader.read(average, f.name, f.start, f.numel))
