"""Experiment trackers: Weights & Biases and MLflow (`run.trackers`), through one small interface.

Each tracker receives the scalars and images that metrics.jsonl and TensorBoard receive. If a tracker fails, it is closed
with one warning, and the run continues. The run directory stores the id that the tracker gave to the run, so that a resumed
run continues under the same id. API keys come from the environment variables of each package and are never written into the
run directory.
"""

import logging
import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Protocol

from PIL import Image

from raphael_dist.config.schema import Config
from raphael_dist.errors import UserError
from raphael_dist.storage.files import replace_bytes
from raphael_dist.text import redact
from raphael_dist.training.metrics_files import read_metrics

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """The interface of an experiment tracker."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send metrics of optimizer step `step` to the tracker. `values`: the metrics by name, e.g. "train/loss"."""

    def image(self, tag: str, step: int, image: Image.Image) -> None:
        """Send an image of optimizer step `step` to the tracker, which shows it under the name `tag`."""

    def close(self) -> None:
        """Send buffered values, and end this run in the tracker."""


class WandbTracker:
    """Records a run in Weights & Biases. With WANDB_MODE=offline the record stays on the local disk."""

    def __init__(self, config: Config) -> None:
        import wandb

        id_file = config.run.dir / ".tracked-wandb"
        run_id = id_file.read_text() if id_file.is_file() else None
        self._wandb = wandb
        self._run = wandb.init(
            project=config.run.project,
            name=config.run.dir.name,
            id=run_id,
            resume="allow" if run_id else None,
            dir=str(config.run.dir),
            config=flat(config),
        )
        replace_bytes(id_file, self._run.id.encode())

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, tag: str, step: int, image: Image.Image) -> None:
        self._run.log({tag: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """Records a run in MLflow: at MLFLOW_TRACKING_URI if that is set, else in a database in the run directory."""

    def __init__(self, config: Config) -> None:
        from mlflow.tracking import MlflowClient

        id_file, folder = config.run.dir / ".tracked-mlflow", config.run.dir.absolute()
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(tracking_uri=uri or f"sqlite:///{folder / 'mlflow.db'}")
        if id_file.is_file():
            self._id = id_file.read_text()
            return
        experiment = self._client.get_experiment_by_name(config.run.project)
        if experiment is None:
            artifacts = None if uri else (folder / "mlflow").as_uri()
            experiment_id = self._client.create_experiment(config.run.project, artifacts)
        else:
            experiment_id = experiment.experiment_id
        self._id = self._client.create_run(experiment_id, run_name=config.run.dir.name).info.run_id
        for key, value in flat(config).items():
            self._client.log_param(self._id, key, str(value)[:500])
        replace_bytes(id_file, self._id.encode())

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._client.log_metric(self._id, tag, value, step=step)

    def image(self, tag: str, step: int, image: Image.Image) -> None:
        self._client.log_image(self._id, image, f"{tag}/step-{step:08d}.png")

    def close(self) -> None:
        self._client.set_terminated(self._id)


# By the name in run.trackers, which is the name of the package, too.
_TRACKERS: dict[str, Callable[[Config], Tracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}


class Trackers:
    """All experiment trackers of a run (`run.trackers`: Weights & Biases, MLflow), on rank 0.

    If a tracker fails, a warning is logged and it is no longer used. A step that is repeated after a rollback is not sent
    again.
    """

    def __init__(self, config: Config) -> None:
        """Open all trackers of the configuration. Raises UserError for a tracker whose package is not installed."""
        self._open: dict[str, Tracker] = {}
        history = config.run.dir / "metrics.jsonl"
        series = read_metrics(history) if config.run.trackers and history.is_file() else {}
        self._last_steps = {tag: points[-1][0] for tag, points in series.items()}
        for name in config.run.trackers:
            try:
                self._open[name] = _TRACKERS[name](config)
            except ImportError:
                raise UserError(_not_installed(name)) from None
            except Exception as error:
                _warn(name, error)

    def write(self, step: int, samples_seen: int, values: Mapping[str, float]) -> None:
        unlogged = {tag: value for tag, value in values.items() if step > self._last_steps.get(tag, -1)}
        if unlogged:
            self._last_steps.update(dict.fromkeys(unlogged, step))
            self._each(lambda tracker: tracker.scalars(step, unlogged))

    def image(self, tag: str, step: int, image: Image.Image) -> None:
        self._each(lambda tracker: tracker.image(tag, step, image))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._open = {}

    def _each(self, work: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                work(tracker)
            except Exception as error:  # whatever their packages raise
                self._open.pop(name)
                _warn(name, error)


def _warn(name: str, error: Exception) -> None:
    why = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    _log.warning("run.trackers: %s failed (%s); training continues without it", name, why)


def check_installed(config: Config) -> None:
    """Raise UserError with a line for each tracker in `run.trackers` ("wandb", "mlflow") whose package is not installed."""
    missing = [name for name in config.run.trackers if find_spec(name) is None]
    if missing:
        raise UserError(*map(_not_installed, missing))


def _not_installed(name: str) -> str:
    return (
        f"run.trackers={name} requires the package {name}, but it is not installed. Run `pip install {name}`, or remove it "
        "from run.trackers."
    )


def flat(config: Config) -> dict[str, bool | int | float | str]:
    """Return the configuration as a flat dict with keys like "train.dtype". Values of secrets are replaced by "(hidden)"."""
    tree = redact(config.model_dump(mode="json"))
    values = {f"{section}.{name}": value for section, fields in tree.items() for name, value in fields.items()}
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in values.items()}
