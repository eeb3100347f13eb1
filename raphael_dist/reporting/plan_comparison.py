"""The speed and memory of a run, compared with the planner's prediction for the same settings."""

from dataclasses import dataclass

from raphael_dist.config.schema import Config
from raphael_dist.errors import UserError
from raphael_dist.reporting.run_files import RunFiles
from raphael_dist.text import counted


@dataclass(frozen=True)
class PlanRow:
    """A quantity of a run, e.g. images per second, as it was measured and as the planner predicts it.

    Attributes:
        name: the quantity with its unit.
        measured: mean over the last half of the run; for memory the peak. None: unknown.
        planned: the prediction; None: unknown.
    """

    name: str
    measured: float | None
    planned: float | None

    @property
    def ratio(self) -> float | None:
        return self.measured / self.planned if self.measured and self.planned else None


def measured_rows(run: RunFiles) -> list[PlanRow]:
    """Return speed, memory and utilisation of a run, from its logged metrics. `planned` is None in each row."""
    rate, images = run.last("throughput/samples_per_s", share=0.5), run.number("train.global_batch_size")
    peak = max(run.values("memory/peak_gib"), default=None)
    return [
        PlanRow("images per second", rate, None),
        PlanRow("seconds per step", images / rate if rate and images else None, None),
        PlanRow("peak memory of a rank, GiB", peak, None),
        PlanRow("share of the device's peak FLOP/s (MFU)", run.last("throughput/mfu", share=0.5), None),
    ]


def compare(run: RunFiles, config: Config, cluster_name: str) -> list[PlanRow]:
    """Return speed, memory and utilisation of a run as measured, and as the planner predicts them.

    The predictions are for the settings, the number of ranks and the ZeRO stage of the run.

    Args:
        run: the files of the run.
        config: the run's configuration.
        cluster_name: the hardware, a value of `tools/plan_run.py --cluster` such as "h100x8". "auto": "cpu" if the run used
            CPUs; a UserError if it used GPUs.

    Raises:
        UserError: the log does not state how the run started or which GPU it used, the cluster is unknown, or the planner
            cannot predict the settings.
    """
    from raphael_dist.planning.cluster_spec import load_cluster  # imports DeepSpeed, which takes seconds
    from raphael_dist.planning.search import Choice, Search

    launch = run.launch
    if launch is None:
        raise UserError(
            "train.log must contain the line with the number of ranks and the ZeRO stage, which the trainer logs at its "
            "start, but it has none; replace the file by a complete copy"
        )
    if cluster_name == "auto" and launch.device != "cpu":
        raise UserError("train.log does not state which GPU the run used; name it, for example with --cluster h100x8")
    cluster = load_cluster("cpu" if cluster_name == "auto" else cluster_name)
    choice = Choice(
        config.parallel.space_ep, config.parallel.time_ep, launch.stage, False, config.train.micro_batch_size,
        config.model.checkpoint_activations, config.parallel.placement[0],
    )  # fmt: skip
    outcome = Search(config, cluster, launch.world).evaluate(choice)
    if outcome is None:
        raise UserError(
            f"tools/plan_run.py, which predicts speed and memory, does not support a run on "
            f"{counted(launch.world, 'rank')} with these settings: {choice}"
        )
    step, peak = outcome.step, cluster.peak_tflops.get(config.train.dtype)
    planned = (
        step.images_per_s,
        step.seconds,
        outcome.memory.total / 2**30,
        step.mfu(peak.value) if peak else None,
    )
    return [PlanRow(row.name, row.measured, value) for row, value in zip(measured_rows(run), planned, strict=True)]


def plan_lines(rows: list[PlanRow]) -> list[str]:
    """Return a line for each quantity, e.g. "images per second: measured 95.2, planned 101"."""
    return [f"{row.name}: measured {number(row.measured)}, planned {number(row.planned)}" for row in rows]


def number(value: float | None) -> str:
    """Return a number as a string with three significant digits; "unknown" for None."""
    return "unknown" if value is None else f"{value:,.3g}"
