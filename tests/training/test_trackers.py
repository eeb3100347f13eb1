"""Where metrics go in addition to metrics.jsonl: TensorBoard, Weights & Biases, MLflow; and the end of a run.

Weights & Biases (offline) and MLflow (into a folder) are the real packages, where they are installed.
"""

import json
import logging
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raphael_dist.config.schema import Config
from raphael_dist.errors import UserError
from raphael_dist.training import wandb_mlflow
from raphael_dist.training.console_summary import end_lines
from raphael_dist.training.metrics_files import MetricsWriter
from raphael_dist.training.wandb_mlflow import Trackers, flat
from tests.lib.synthetic import tiny_config


def config_in(folder: Path, *names: str) -> Config:
    return tiny_config(run={"dir": str(folder), "trackers": list(names), "project": "tests"})


def test_tensorboard_shows_configuration_and_hyperparameters(tmp_path: Path) -> None:
    config, writer = config_in(tmp_path), MetricsWriter(tmp_path)
    writer.describe("optim: {lr: 0.05}", flat(config))
    writer.write(1, 12, {"train/loss": 0.5})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("configuration/text_summary")
    assert b"optim: {lr: 0.05}" in text.tensor_proto.string_val[0]
    data = events.summary_metadata
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= data.keys()
    assert b"optim.lr" in data["_hparams_/session_start_info"].plugin_data.content
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1, "no second run next to the curves"
    assert events.Scalars("train/loss")[0].value == 0.5


def test_hyperparameters_are_flat_and_hide_secrets() -> None:
    values = flat(tiny_config(data={"shards": ["https://user:SECRET@h/x.tar?key=SECRET"]}))
    assert values["data.shards"] == "['https://(hidden)@h/x.tar?(hidden)']"
    assert "SECRET" not in str(values)
    assert values["optim.lr"] == 0.05
    assert values["model.channels"] == "[16, 24]"
    assert all(isinstance(value, bool | int | float | str) for value in values.values())


def run_of(folder: Path, name: str, steps: range) -> None:
    tracker = Trackers(config_in(folder, name))
    assert tracker._open.keys() == {name}
    for step in steps:
        tracker.write(step, step, {"train/loss": 1 / step})
    tracker.image("samples", steps[-1], Image.new("RGB", (4, 4)))
    tracker.close()


def test_mlflow_run_is_continued_by_a_resumed_run(tmp_path: Path, monkeypatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_of(tmp_path, "mlflow", range(1, 3))
    run_of(tmp_path, "mlflow", range(3, 5))
    client = tracking.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tests"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["optim.lr"] == "0.05"
    assert [m.value for m in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 1 / 2, 1 / 3, 1 / 4]
    assert {path.path for path in client.list_artifacts(run.info.run_id, "samples")} == {
        "samples/step-00000002.png",
        "samples/step-00000004.png",
    }


def test_tracker_logs_repeated_steps_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, dict[str, float]]] = []

    class Recorder:
        def __init__(self, config: Config) -> None:
            pass

        def scalars(self, step: int, values: dict[str, float]) -> None:
            logged.append((step, values))

    monkeypatch.setitem(wandb_mlflow._TRACKERS, "mlflow", Recorder)
    rows = [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 2.0}, {"step": 1, "val/loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    resumed = Trackers(config_in(tmp_path, "mlflow"))
    for step in (1, 2, 3, 2, 3, 4):  # from the checkpoint of step 0, and once more from that of step 1
        resumed.write(step, step, {"train/loss": 1.0, "val/loss": 1.0})
    both = {"train/loss": 1.0, "val/loss": 1.0}
    assert logged == [(2, {"val/loss": 1.0}), (3, both), (4, both)]


def test_wandb_run_is_continued_by_a_resumed_run(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_of(tmp_path, "wandb", range(1, 3))
    known = (tmp_path / ".tracked-wandb").read_text()
    run_of(tmp_path, "wandb", range(3, 5))
    assert (tmp_path / ".tracked-wandb").read_text() == known
    written = list((tmp_path / "wandb").glob(f"offline-run-*-{known}/*.wandb"))
    assert len(written) == 2
    assert any(b"train/loss" in path.read_bytes() for path in written)


def test_tracker_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch) -> None:
    def missing(config: Config) -> None:
        import no_such_tracker  # noqa: F401

    monkeypatch.setitem(wandb_mlflow._TRACKERS, "wandb", missing)
    with pytest.raises(UserError, match=r"^run\.trackers=wandb .* not installed\. Run `pip install wandb`"):
        Trackers(config_in(tmp_path, "wandb"))


def test_failing_tracker_is_closed_with_one_warning(tmp_path: Path, monkeypatch) -> None:
    class Failing:
        def __init__(self, config: Config) -> None:
            self.calls = 0

        def scalars(self, step: int, values: object) -> None:
            raise ConnectionError("no network\nmore")

    monkeypatch.setitem(wandb_mlflow._TRACKERS, "mlflow", Failing)
    # One handler of our own: what the root's sees depends on the tests before.
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", records.append)
    monkeypatch.setattr(wandb_mlflow._log, "handlers", [handler])
    both = Trackers(config_in(tmp_path, "mlflow"))
    for step in range(3):
        both.write(step, step, {"train/loss": 1.0})
    both.close()
    assert [r.getMessage() for r in records] == ["run.trackers: mlflow failed (no network); training continues without it"]


def test_end_of_a_run_prints_paths_and_next_commands(tmp_path: Path) -> None:
    rows = [{"step": s, "samples_seen": s, "val/loss": v} for s, v in ((1, 0.5), (2, 0.3), (3, float("nan")), (4, 0.4))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/step-00000004.png").write_bytes(b"")
    lines = end_lines(config_in(tmp_path), 4, 7680, 3725)
    assert lines[0] == ("complete: 4 steps, 7,680 images, 1:02:05 in this process; best validation loss 0.3000 at step 2")
    assert lines[1] == f"  images      {tmp_path}/samples/step-00000004.png"
    assert any(f"--from auto {tmp_path} --to diffusers" in line for line in lines)
    nothing = config_in(tmp_path / "elsewhere")
    assert end_lines(nothing, 1, 1, 1)[0] == "complete: 1 step, 1 image, 0:00:01 in this process"
    run = nothing.run.model_copy(update={"init_from": Path("a/base")})
    trains_adapter_only = nothing.model_copy(update={"run": run, "lora": nothing.lora.model_copy(update={"rank": 4})})
    assert f"sample --checkpoint a/base --lora {run.dir} " in end_lines(trains_adapter_only, 1, 1, 1)[-2]
    assert f"convert --from auto {run.dir} --to peft" in end_lines(trains_adapter_only, 1, 1, 1)[-1]
