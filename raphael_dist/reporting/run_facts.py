"""Gathers everything that is known about a run: its files, events, problems, and the planner's prediction."""

import contextlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from raphael_dist.checkpoint.folders import step_of
from raphael_dist.config.schema import Config, load_config
from raphael_dist.errors import UserError, describe_error
from raphael_dist.reporting.evidence import Finding, RunEvidence
from raphael_dist.reporting.plan_comparison import PlanRow, compare, measured_rows
from raphael_dist.reporting.rules import coverage, diagnose
from raphael_dist.reporting.run_events import History, read_history
from raphael_dist.reporting.run_files import RunFiles, paths_in, read_run
from raphael_dist.storage.files import free_bytes

if TYPE_CHECKING:
    from raphael_dist.reporting.data_sample import DataSample

NO_PLAN = "none"  # value of --cluster that turns the prediction off


@dataclass(frozen=True)
class Examined:
    """A run and everything that is known about it.

    Attributes:
        run: contents of its run directory.
        history: events from its logs.
        findings: problems that the rules (rules.py) detect.
        looked_at, not_looked_at: names of the problems that the rules looked for, and of the problems that they could not
            look for, because the run has no data about them.
        notes: sentences that state what could not be read, and why.
        plan: measured and predicted values of speed and memory. A prediction is None if the planner made none.
        plan_note: why there is no prediction; "" if there is one.
        now: time of the examination.
    """

    run: RunFiles
    history: History
    findings: list[Finding]
    looked_at: list[str]
    not_looked_at: list[str]
    notes: list[str]
    plan: list[PlanRow]
    plan_note: str
    now: datetime


def examine(folder: Path, cluster: str = "auto", *, with_data: bool = True) -> Examined:
    """Read a run directory, look for problems by all rules, and compare the run with the planner's prediction.

    Args:
        folder: the run directory.
        cluster: hardware for the prediction, as for `tools/plan_run.py --cluster`. "auto": "cpu" if the run used CPUs, else
            there is no prediction. NO_PLAN: make no prediction.
        with_data: whether to decode some samples of the run's data and check them.

    Raises:
        UserError: the folder is not a run directory.
    """
    run = read_run(folder)
    notes, now = list(run.missing), datetime.now()
    history = read_history(run, now)
    config, why = _config_of(run)
    if config is None and run.config:
        notes.append(f"{why[:1].upper()}{why[1:].rstrip('.')}.")
    data = _check_data(config, notes) if config is not None and with_data else None
    evidence = RunEvidence(run, history, now, _free_bytes(folder), _newest_bytes(folder), data)
    plan, plan_note = measured_rows(run), why
    if cluster == NO_PLAN:
        plan_note = "--cluster none: no prediction was made"
    elif config is not None:
        try:
            plan = compare(run, config, cluster)
        except UserError as error:
            plan_note = str(error)
        except Exception as error:  # the rest of the report does not depend on the planner
            plan_note = f"the planner failed with {describe_error(error)}"
    return Examined(run, history, diagnose(evidence), *coverage(evidence), notes, plan, plan_note, now)


def _config_of(run: RunFiles) -> tuple[Config | None, str]:
    """Return (configuration, ""), or (None, why it cannot be used)."""
    if not run.config:
        return None, "config.yaml is missing or cannot be read"
    try:
        return load_config(str(run.folder / "config.yaml")), ""
    except UserError as error:
        first, *others = error.args
        more = f" (and {len(others)} more mistakes)" if others else ""
        return None, f"this version does not accept the run's configuration: {first}{more}"


def _check_data(config: Config, notes: list[str]) -> "DataSample | None":
    """Return the result of checking some samples of the data; None if it fails. What was not checked is added to `notes`."""
    from raphael_dist.reporting.data_sample import sample_data  # imports torch, which takes seconds

    try:
        data = sample_data(config)
    except Exception as error:  # whatever is wrong with the data, the rest of the run can be checked
        reason = str(error) if isinstance(error, UserError) else describe_error(error)
        notes.append(f"Edge maps, duplicates and captions in the data were not checked: {reason.rstrip('.')}.")
        return None
    notes += data.notes
    return data


def _free_bytes(folder: Path) -> int | None:
    try:
        return free_bytes(folder)
    except OSError:
        return None


def _newest_bytes(folder: Path) -> int:
    """Return the size of the run's newest checkpoint in bytes; 0 if there is none."""
    checkpoints = [path for path in paths_in(folder / "checkpoints", "step-*") if step_of(path) is not None]
    if not checkpoints:
        return 0
    with contextlib.suppress(OSError):
        return sum(path.stat().st_size for path in max(checkpoints, key=lambda path: path.name).iterdir())
    return 0
