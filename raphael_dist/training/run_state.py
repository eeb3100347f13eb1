"""The state of a training run on one rank."""

from dataclasses import dataclass
from typing import IO, NamedTuple

from torch import Tensor

from raphael_dist.checkpoint.save import CheckpointStore
from raphael_dist.config.schema import Config
from raphael_dist.data.batches import BatchBuilder
from raphael_dist.data.run_data import DataSource
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.engine import Engine
from raphael_dist.errors import UserError
from raphael_dist.model.device import HostCopy
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.parallel.async_collectives import Traffic
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.runtime.ranks import Ranks
from raphael_dist.runtime.stop_request import StopRequest
from raphael_dist.runtime.watchdog import SLOW, Watchdog
from raphael_dist.sampling.sampler import Request
from raphael_dist.training.logged_metrics import Telemetry
from raphael_dist.training.step_guard import Guard
from raphael_dist.training.validation import Validator

StepLosses = list[tuple[Tensor, Tensor]]  # (positions, losses) of each micro-batch of a step, on this rank


@dataclass
class RunProgress:
    """How far the run is, equal on all ranks. A checkpoint stores only `step` and `samples_seen`.

    Attributes:
        max_steps: number of optimizer steps of the whole run.
        step: number of the last optimizer step. Skipped steps count.
        samples_seen: number of training samples that have been used.
        stage_start: last step of the previous stage (an entry of train.stages).
        stage_end: last step of the current stage. 0: the stage ends with the run.
        first_step: step of the checkpoint from which this process started, 0 without a checkpoint. If that checkpoint was
            given up because all steps after it were skipped: step of the earlier checkpoint that replaced it.
        updated: whether a step since `first_step` changed the weights.
        all_non_finite: whether no sample of the last skipped step had a finite loss: then the weights are the cause.
        save_due: whether to save a checkpoint after the next step that is not skipped.
    """

    max_steps: int
    step: int = 0
    samples_seen: int = 0
    stage_start: int = 0
    stage_end: int = 0
    first_step: int = 0
    updated: bool = False
    all_non_finite: bool = False
    save_due: bool = False

    @property
    def complete(self) -> bool:
        return self.step >= self.max_steps

    @property
    def stage_over(self) -> bool:
        """Whether to leave the current stage (an entry of train.stages; the whole run if there are none).

        True if the stage or the run is complete, or if a rollback returned to an earlier stage.
        """
        return not self.stage_start <= self.step < (self.stage_end or self.max_steps)

    def timeout_factor(self, micro_step: int) -> float:
        """Return the factor by which the watchdog's timeout is multiplied during a micro-step.

        The watchdog ends a run that hangs for longer than the timeout. The factor is 5 for the first micro-step of this
        process, which compiles kernels and allocates memory, and 1 for the others.

        `micro_step`: number of the micro-step in the current optimizer step, from 0.
        """
        return SLOW if self.step == self.first_step and micro_step == 0 else 1.0


@dataclass
class StopState:
    """Whether and why the run stops early. Only the trainer changes it.

    Attributes:
        request: whether this rank has been asked to stop, e.g. by a signal.
        agreed: whether all ranks have agreed to stop, which they do at the end of a step.
        data_failure: the error because of which this rank cannot get another batch; None: there was no such error.
    """

    request: StopRequest
    agreed: bool = False
    data_failure: UserError | None = None


class StartedStep(NamedTuple):
    """A step whose update has been started, but whose result the host has not read (`deferred_update`).

    Attributes:
        stats: the result of `deferred_update.reduce_step_stats`.
        losses: for each micro-batch, the positions and losses of this rank's samples.
        traffic: bytes that this rank sent to other ranks in the step.
    """

    stats: HostCopy
    losses: StepLosses
    traffic: Traffic


@dataclass
class Run:
    """The objects and the state of a training run on this rank: data, model, checkpoints, logging, progress."""

    config: Config
    ranks: Ranks
    plan: BatchPlan
    data: DataSource
    builder: BatchBuilder
    validator: Validator | None
    engine: Engine
    ema: Ema | None
    schedule: NoiseSchedule
    store: CheckpointStore
    guard: Guard
    telemetry: Telemetry
    watchdog: Watchdog
    lock: IO[str] | None  # of the run directory, on rank 0
    requests: list[Request]  # the images that are drawn during training
    progress: RunProgress
    stop: StopState
    started: StartedStep | None = None  # the last step, if its result has not been read
