"""Runs followed elsewhere too: Weights & Biases and MLflow (`run.trackers`), through one small interface.

Each takes what goes to metrics.jsonl and TensorBoard. A tracker that fails is left out with one warning; it ends no run. The
run directory notes which of their runs is this one, so that a resumed run goes on in it. Keys come from the environment, as
each package wants them; none is written into a run.
"""

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from raphael_dist.config import Config
from raphael_dist.errors import UserError, redact

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What a run tells a tracker."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take the scalars of optimizer step `step`."""

    def image(self, tag: str, step: int, image: Any) -> None:
        """Take a PIL image."""

    def close(self) -> None:
        """Send what is held back, and end."""


class WandbTracker:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it on disk."""

    def __init__(self, config: Config) -> None:
        import wandb

        mark = config.run.dir / ".tracked-wandb"
        known = mark.read_text() if mark.is_file() else None
        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            project=config.run.project,
            name=config.run.dir.name,
            id=known,
            resume="allow" if known else None,
            dir=str(config.run.dir),
            config=flat(config),
        )
        mark.write_text(self._run.id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, tag: str, step: int, image: Any) -> None:
        self._run.log({tag: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """A run of MLflow, where MLFLOW_TRACKING_URI says, else in a database in the run directory."""

    def __init__(self, config: Config) -> None:
        from mlflow.tracking import MlflowClient

        mark = config.run.dir / ".tracked-mlflow"
        where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(config.run.dir / 'mlflow.db').absolute()}"
        self._client: Any = MlflowClient(tracking_uri=where)
        if mark.is_file():
            self._id = mark.read_text()
            return
        found = self._client.get_experiment_by_name(config.run.project)
        place = None if "MLFLOW_TRACKING_URI" in os.environ else (config.run.dir / "mlflow").absolute().as_uri()
        experiment = found.experiment_id if found else self._client.create_experiment(config.run.project, place)
        self._id = self._client.create_run(experiment, run_name=config.run.dir.name).info.run_id
        for key, value in flat(config).items():
            self._client.log_param(self._id, key, str(value)[:500])
        mark.write_text(self._id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._client.log_metric(self._id, tag, value, step=step)

    def image(self, tag: str, step: int, image: Any) -> None:
        self._client.log_image(self._id, image, f"{tag}/step-{step:08d}.png")

    def close(self) -> None:
        self._client.set_terminated(self._id)


_KINDS: dict[str, tuple[Callable[[Config], Tracker], str]] = {
    "wandb": (WandbTracker, "wandb"),
    "mlflow": (MlflowTracker, "mlflow"),
}


class Trackers:
    """All trackers of a run, each until it fails. For rank 0."""

    def __init__(self, config: Config) -> None:
        """UserError: a tracker whose package is not installed."""
        self._open: dict[str, Tracker] = {}
        for name in config.run.trackers:
            make, package = _KINDS[name]
            try:
                self._open[name] = make(config)
            except ImportError:
                raise UserError(f"run.trackers: {name} is not installed; pip install {package}, or leave it out") from None
            except Exception as error:
                self._failed(name, error)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.scalars(step, values))

    def image(self, tag: str, step: int, image: Any) -> None:
        self._each(lambda tracker: tracker.image(tag, step, image))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._open = {}

    def _each(self, work: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                work(tracker)
            except Exception as error:  # whatever a stranger's package raises
                self._open.pop(name)
                self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> None:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        _log.warning("run.trackers: %s fails (%s); training goes on without it", name, why)


def flat(config: Config) -> dict[str, Any]:
    """Return the configuration by dotted keys, numbers and texts, without what is named like a secret."""
    tree = redact(config.model_dump(mode="json"))
    values = {f"{section}.{name}": value for section, fields in tree.items() for name, value in fields.items()}
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in values.items()}
