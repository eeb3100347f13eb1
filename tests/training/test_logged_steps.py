"""Which steps the logged losses belong to, and the gate noise of a step: the real `train_step` with dummy parts.

The engine is a plain model and SGD in this process; telemetry, rules and recovery are the real ones.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from raphael_dist.checkpoint.progress import Progress
from raphael_dist.config.schema import Config
from raphael_dist.engine.engine import square_sum
from raphael_dist.errors import UserError
from raphael_dist.model.batch import Batch
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.losses import compute_losses
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.model.unet_interface import GateNoise
from raphael_dist.parallel.async_collectives import Traffic
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.runtime.ranks import Ranks
from raphael_dist.runtime.stop_request import StopRequest
from raphael_dist.training.logged_metrics import Telemetry
from raphael_dist.training.metrics_files import MetricsWriter, read_metrics
from raphael_dist.training.run_state import Run, RunProgress, StopState
from raphael_dist.training.step_guard import Guard
from raphael_dist.training.trainer import log_step, train_step
from tests.lib.synthetic import synthetic_batch, tiny_config

CPU = torch.device("cpu")
SPIKE, NAN = 13, 3  # steps, counted from 1 over all that are tried
SECTIONS: dict[str, dict] = {
    "train": {
        "global_batch_size": 2,
        "micro_batch_size": 2,
        "max_steps": 20,
        "spike_action": "rollback",
        "spike_sigma": 8.0,
    },
    "model": {"gate_noise": 0.5, "gate_noise_steps": 20, "channels": [8], "attention": [True], "expert_width": [8]},
    "diffusion": {"min_snr_gamma": 5.0},
    "edge": {"weight": 0.0},
}


class PlainEngine:
    """The engine's methods that a step calls, of a model in this process."""

    dtype, grad_norm, device, defers_update = torch.float32, 0.0, CPU, False

    def __init__(self, config: Config) -> None:
        torch.manual_seed(0)
        self.module, self.noise = RaphaelUNet(config), (0.0, 0.0)
        self.traffic = Traffic()
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1.0)

    def __call__(self, *args: Any) -> Any:
        self.noise = float(args[5].time_BLK.min()), float(args[5].space_BLYK.max())
        return self.module(*args)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def grad_square(self) -> torch.Tensor:
        return square_sum([p.grad for p in self.module.parameters() if p.grad is not None])

    def update(self, lr: float, norm: float, ema: object = None, step: int = 1) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3 / max(1.0, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def update_if(self, good: torch.Tensor, lr: float, norm: torch.Tensor, ema: object = None, step: int = 1) -> None:
        if good:
            self.update(lr, float(norm))
        else:
            self.discard_gradients()

    def discard_gradients(self) -> None:
        self.optimizer.zero_grad()


class Store:
    """One checkpoint, after the tenth step."""

    written, failed = False, 0

    def rewind(self) -> Progress:
        return Progress(10, 20, 9, {})

    def amend(self, progress: Progress) -> None:
        pass


def batches(config: Config, plan: BatchPlan) -> Iterator[Batch]:
    """Yield what a builder builds of positions 0, 1, ...; the gates' noise is 1 everywhere."""
    for tried in range(1, 99):
        batch = synthetic_batch(config, plan.slots((tried - 1) * 2, 0, 0), 4)
        assert batch.gate_noise is not None
        batch.gate_noise = GateNoise(*map(torch.ones_like, batch.gate_noise))
        batch.noise *= {SPIKE: 1e3, NAN: math.nan}.get(tried, 1.0)
        yield batch


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = tiny_config(**SECTIONS, run={"dir": tmp_path})
    data: Any = SimpleNamespace(replaced=0, key=str)
    watchdog: Any = SimpleNamespace(heartbeat=lambda *_: None)
    builder: Any = SimpleNamespace()
    engine: Any = PlainEngine(config)
    store: Any = Store()
    telemetry = Telemetry(config, Ranks(), CPU, ["here"])
    telemetry.begin(0, 1.0)
    schedule = NoiseSchedule.create(config.diffusion)
    plan = BatchPlan.of(config, 1)
    yield Run(
        config, Ranks(), plan, data, builder, None, engine, None, schedule, store, Guard(config.train), telemetry,
        watchdog, None, [], RunProgress(config.train.max_steps, updated=True), StopState(StopRequest()),
    )  # fmt: skip
    dist.destroy_process_group()


@pytest.mark.parametrize("log_every", [1, 99])
def test_logged_losses_and_gate_noise_follow_the_steps(run: Run, log_every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are skipped or undone are in no logged loss, and the gates' noise is the step's, whatever its positions."""
    stream, losses, weighted = batches(run.config, run.plan), dict[int, float](), dict[int, float]()

    def noting(*args: Any) -> Any:
        computed = compute_losses(*args)
        assert args[0].noise == pytest.approx([0.5 * (1 - run.progress.step / 20)] * 2)
        losses[run.progress.step + 1] = float(computed.denoise.mean())
        weighted[run.progress.step + 1] = float(computed.total.detach().mean())
        return computed

    monkeypatch.setattr("raphael_dist.training.trainer.compute_losses", noting)
    while run.progress.step < 15:
        if train_step(run, stream) and (run.progress.step % log_every == 0 or run.progress.step == 15):
            log_step(run)
    assert run.guard.rollbacks == 1
    assert run.progress.samples_seen == 2 * (SPIKE + 5)  # after step 13 the steps 11 to 15 were taken, with other samples
    run.telemetry.__exit__(None, None, None)
    taken = [step for step in range(1, 16) if step != NAN]
    assert all(weighted[step] <= losses[step] for step in taken)  # predicted noise: every weight is at most 1
    assert weighted[1] < 0.9 * losses[1], "min-SNR must be at work"
    rows = read_metrics(run.config.run.dir / "metrics.jsonl")
    for tag, expected in (("train/loss", losses), ("train/loss_weighted", weighted)):
        if log_every == 1:
            assert rows[tag] == [(step, pytest.approx(expected[step], rel=1e-5)) for step in taken]
        else:
            assert rows[tag] == [(15, pytest.approx(sum(expected[step] for step in taken) / len(taken), rel=1e-5))]
    assert [step for step, _ in rows["optim/lr"]] == ([*range(1, 16)] if log_every == 1 else [15])


def deferred(run: Run) -> Run:
    """Let the engine of `run` defer updates. Only the end of the run requires a result at once."""
    train = {**SECTIONS["train"], "log_every": 99}
    run.config = tiny_config(**{**SECTIONS, "train": train}, run={"dir": run.config.run.dir})
    run.engine.defers_update = True
    return run


def test_deferred_result_is_read_in_the_next_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, losses = batches(run.config, run.plan), list[float]()
    run = deferred(run)

    def noting(*args: Any) -> Any:
        computed = compute_losses(*args)
        losses.append(float(computed.denoise.mean()))
        return computed

    monkeypatch.setattr("raphael_dist.training.trainer.compute_losses", noting)
    known = []  # good and skipped steps, after each step
    for _ in range(6):
        assert train_step(run, stream)
        known.append((len(run.guard.window), run.guard.skipped))
    assert known == [(0, 0), (1, 0), (2, 0), (2, 1), (3, 1), (4, 1)]
    run.stop.request = StopRequest(max_time=0)
    agreed = []
    while not run.stop.agreed:
        train_step(run, stream)
        agreed.append(run.stop.agreed)
    assert agreed == [False, True]
    assert run.started is None, "a run that stops knows the result of its last step"
    assert (run.progress.step, len(run.guard.window), run.guard.skipped) == (8, 7, 1)
    log_step(run)
    run.telemetry.__exit__(None, None, None)
    ((step, loss),) = read_metrics(run.config.run.dir / "metrics.jsonl")["train/loss"]
    taken = [loss for i, loss in enumerate(losses, start=1) if i != NAN]
    assert (step, loss) == (8, pytest.approx(sum(taken) / 7, rel=1e-5))


def test_deferred_step_without_data_changes_no_weights(run: Run) -> None:
    def failing() -> Iterator[Batch]:
        yield next(batches(run.config, run.plan))
        raise UserError("no data")

    run, stream = deferred(run), failing()
    run.builder.dummy_batch = lambda slots: synthetic_batch(run.config, slots, 4)
    train_step(run, stream)
    before = [p.detach().clone() for p in run.engine.module.parameters()]
    train_step(run, stream)
    with pytest.raises(UserError, match="no data"):
        train_step(run, stream)
    assert all(torch.equal(p, old) for p, old in zip(run.engine.module.parameters(), before, strict=True))


def test_each_step_is_logged_once_after_a_rollback(tmp_path: Path) -> None:
    def written(first: int, last: int, factor: float, writer: MetricsWriter) -> None:
        for step in range(first, last + 1):
            writer.write(step, 8 * step, {"train/loss": factor * step})

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path)
    writer.return_to(0)
    written(1, 6, 1.0, writer)
    writer.close()
    time.sleep(1.1)  # TensorBoard reads the files in order of their names: the second, the process, a number without zeros
    writer = MetricsWriter(tmp_path)
    writer.return_to(2)  # resumed from step 2
    written(3, 5, 2.0, writer)
    writer.return_to(4)  # a rollback
    written(5, 5, 3.0, writer)
    writer.close()
    expected = [(1, 1.0), (2, 2.0), (3, 6.0), (4, 8.0), (5, 15.0)]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == expected
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 5
    assert read_metrics(tmp_path / "metrics.jsonl")["train/loss"] == expected
