"""Finds the newest undamaged checkpoint of a run, and restores this rank's part of the training state from it.

The checkpoint may have been written by another number of ranks or with another ZeRO stage. All ranks agree on the checkpoint
before any of them changes its state. The checksum of each file is computed once, by one rank.
"""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from raphael_dist.checkpoint import folders
from raphael_dist.checkpoint.progress import Progress, progress_of
from raphael_dist.checkpoint.reader import CheckpointReader, check_architecture
from raphael_dist.checkpoint.tensors import default_weights
from raphael_dist.config.resume_check import check_same_data, check_same_run
from raphael_dist.config.schema import Config
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.fragments import MOMENTS, Fragments
from raphael_dist.errors import UserError, write_error
from raphael_dist.runtime.long_work import run_on_all_ranks, run_on_rank0
from raphael_dist.runtime.progress_bar import Reporter
from raphael_dist.runtime.ranks import Ranks, gather_objects, raise_on_all_ranks
from raphael_dist.storage import files

_log = logging.getLogger(__name__)


class Restorer:
    """Restores this rank's weights, Adam moments and EMA (moving average) from the checkpoints of the run.

    All methods are collective: all ranks call them.

    Args:
        config: settings of the run. The checkpoints are in the folder `checkpoints` of its run.dir.
        ranks: number of this rank, and number of ranks.
        fragments: the ranges of parameters and Adam moments that this rank owns under ZeRO. Their values are restored.
        ema: the moving average of these ranges; None: the run has no EMA.
        data: fingerprints of the training data and the base model, by setting, to compare with those in the checkpoint.
    """

    def __init__(self, config: Config, ranks: Ranks, fragments: Fragments, ema: Ema | None, data: Mapping[str, str]) -> None:
        self.root = config.run.dir / "checkpoints"
        self._config, self._ranks, self._fragments, self._ema, self._data = config, ranks, fragments, ema, data

    def resume(self) -> Progress | None:
        """Restore the newest undamaged checkpoint at the start of a run. Remove unfinished folders of killed processes.

        Damaged checkpoints that are newer than this one are renamed to damaged-*.

        Returns:
            The progress (step, ...) that the checkpoint states, or None if there is no checkpoint.

        Raises:
            UserError: all checkpoints are damaged (and run.ignore_damaged is false), the folder of the checkpoints cannot be
                written, or the architecture, the data set or a setting that affects results differs between checkpoint and
                run. If it is raised, weights, moments and EMA are unchanged.
        """
        raise_on_all_ranks(self._check_folder)
        reader, damaged = self._newest_verified(run_on_rank0("looking for checkpoints", lambda _: folders.newest(self.root)))
        raise_on_all_ranks(partial(self._check, reader, damaged))
        progress = None if reader is None else self._restore(reader)
        # They are renamed, so that retention and saves of the same step ignore them. They are not deleted: the damage may be
        # a passing fault of the disk.
        self._quarantine(list(damaged))
        return progress

    def rewind(self, before: int | None = None) -> Progress | None:
        """Restore the newest undamaged checkpoint during training (rollback).

        Args:
            before: a step number. A checkpoint of an earlier step is restored, and the checkpoints of this step and later
                steps are renamed to damaged-*. None: the checkpoint may be of any step, and none is renamed.

        Returns:
            The progress (step, ...) that the checkpoint states. None if there is no such checkpoint. In this case weights,
            moments and EMA are unchanged, and no checkpoint is renamed.
        """
        checkpoints = run_on_rank0("looking for checkpoints", lambda _: folders.newest(self.root))
        later = [folder for folder in checkpoints if before is not None and (folders.step_of(folder) or 0) >= before]
        reader, _ = self._newest_verified([folder for folder in checkpoints if folder not in later])
        if reader is None:
            return None
        self._quarantine(later)
        return self._restore(reader)

    def _quarantine(self, bad: list[Path]) -> None:
        renamed = run_on_rank0("renaming damaged checkpoints", lambda _: [folders.quarantine(folder) for folder in bad])
        for folder in renamed:
            _log.warning("the damaged checkpoint was moved to %s", folder)

    def _check_folder(self) -> None:
        """Raise UserError if this rank cannot write into the folder in which the run will save checkpoints.

        Rank 0 also cleans up unfinished folders of killed processes there.
        """
        probe = self.root / f".probe-{self._ranks.rank:05d}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe.unlink(missing_ok=True)
            files.write_bytes(probe, b"")
            probe.unlink()
            if self._ranks.is_main:
                folders.remove_partial(self.root)
        except OSError as error:
            raise write_error(self.root, error) from None

    def _newest_verified(self, candidates: list[Path]) -> tuple[CheckpointReader | None, dict[Path, str]]:
        """Return the first undamaged checkpoint in `candidates`, and the damage of each folder before it. Collective.

        `candidates` are checkpoint folders, the newest first. The returned checkpoint is None if all are damaged. The dict
        of damages has a message for each damaged folder.
        """
        damaged: dict[Path, str] = {}
        for folder in candidates:
            problem = self._verify(folder)
            if problem is None:
                return raise_on_all_ranks(partial(CheckpointReader, folder)), damaged
            damaged[folder] = problem.removeprefix(f"{folder}: ").removeprefix(f"{folder} ").removeprefix(f"{folder}/")
            if self._ranks.is_main:
                _log.warning("skipping checkpoint %s: %s", folder, damaged[folder])
        return None, damaged

    def _verify(self, folder: Path) -> str | None:
        """Check each file of a checkpoint once, divided over the ranks; return the first problem, or None. Collective."""

        def check_share(report: Reporter) -> str | None:
            try:
                reader = CheckpointReader(folder)
                names = sorted(reader.manifest["files"])
                share = [names[i] for i in self._ranks.share(len(names))]
                return reader.integrity_error(share, report) or reader.incomplete()
            except (OSError, UserError) as error:
                return str(error)

        problem = run_on_all_ranks(f"verifying {folder.name}", check_share)
        return next((each for each in gather_objects(problem) if each is not None), None)

    def _check(self, reader: CheckpointReader | None, damaged: dict[Path, str]) -> None:
        if reader is None:
            if damaged and not self._config.run.ignore_damaged:
                reasons = "; ".join(f"{folder.name}: {problem}" for folder, problem in damaged.items())
                raise UserError(
                    f"run.dir={self._config.run.dir} requires a checkpoint that is not damaged, but {self.root} has none "
                    f"({reasons}). Replace one by a backup copy, use another run.dir, or start from scratch with "
                    "run.ignore_damaged=true."
                )
            return
        check_architecture(reader.config(), self._config, str(reader.folder))
        if reader.shapes != self._fragments.shapes:
            old, new = reader.shapes, self._fragments.shapes
            name = next(name for name in [*new, *old] if old.get(name) != new.get(name))
            there, here = (f"of shape {list(s[name])}" if name in s else "missing" for s in (old, new))
            raise UserError(
                f"run.dir={self._config.run.dir}: {reader.folder} must have the parameters of this run's model, but {name} "
                f"is {there} in the checkpoint and {here} in the model. Use another run.dir."
            )
        changes = check_same_run(reader.config(), self._config, str(reader.folder))
        changes += check_same_data(reader.manifest, self._data, self._config, str(reader.folder))
        for line in changes if self._ranks.is_main else []:
            _log.warning("%s", line)
        if self._config.optim.has_moments and progress_of(reader.manifest).updates and "exp_avg" not in reader.kinds():
            raise UserError(
                f"optim.kind={self._config.optim.kind} requires Adam's moments, but the checkpoint {reader.folder} has "
                "none. Set optim.kind=sgd, or use another run.dir."
            )

    def _restore(self, reader: CheckpointReader) -> Progress:
        """Read this rank's part of the training state, and return the progress that the checkpoint states. Collective."""
        run_on_all_ranks(f"restoring {reader.folder.name}", partial(self._read_fragments, reader))
        self._fragments.sync_model()
        return progress_of(reader.manifest)

    @torch.no_grad()
    def _read_fragments(self, reader: CheckpointReader, report: Reporter) -> None:
        self._fragments.create_moments(progress_of(reader.manifest).updates)
        kinds = reader.kinds()
        for i, f in enumerate(self._fragments):
            report(f.name)
            f.master.copy_(reader.read("master", f.name, f.start, f.numel))
            for kind in MOMENTS:
                moment = self._fragments.moment(f, kind)
                if moment is not None and kind in kinds:
                    moment.copy_(reader.read(kind, f.name, f.start, f.numel))
            if self._ema is not None:
                self._ema.values[i].copy_(reader.read(default_weights(kinds), f.name, f.start, f.numel))
