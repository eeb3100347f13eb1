"""Draws the plan of a run as a figure: memory by kind, timeline of a step, and images per second by number of devices."""

from pathlib import Path
from typing import TYPE_CHECKING

from raphael_dist.errors import UserError
from raphael_dist.planning.run_plan import RunPlan
from raphael_dist.planning.search import Choice, Search
from raphael_dist.planning.step_time import seconds_by_phase

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 5  # choices with a bar


def draw(plan: RunPlan, path: Path) -> None:
    """Draw the plan of a run: memory by kind, timeline of a step, images per second by number of devices.

    `path`: the PNG file that is written.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise UserError(
            "--figure requires the package matplotlib, which is not installed. Run `pip install 'raphael_dist[plan]'`."
        ) from None
    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    _draw_memory(axes[0], plan)
    _draw_timeline(axes[1], plan)
    _draw_scaling(axes[2], plan)
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise UserError(f"--figure {path} cannot be written: {error.strerror}. Choose another path.") from None
    finally:
        plt.close(figure)


def _draw_memory(ax: "Axes", plan: RunPlan) -> None:
    best = plan.ranked[:SHOWN]
    bottom = [0.0] * len(best)
    for kind in dict.fromkeys(kind for o in best for kind in o.memory.by_kind()):
        sizes = [o.memory.by_kind().get(kind, 0) / 1e9 for o in best]
        ax.bar(range(len(best)), sizes, bottom=bottom, label=kind)
        bottom = [b + s for b, s in zip(bottom, sizes, strict=True)]
    ax.axhline(plan.search.cluster.memory_gb.value, color="black", linestyle="--", linewidth=1)
    ax.set_xticks(range(len(best)), [_label(o.choice) for o in best], fontsize=7)
    ax.set_ylabel("GB per rank")
    ax.set_title("memory of the best choices")
    ax.legend(fontsize=7)


def _label(c: Choice) -> str:
    zero = f"ZeRO-{c.stage}{'o' if c.overlap else ''}"
    return f"{zero}\nep {c.space_ep},{c.time_ep}\nmicro {c.micro_batch_size}\n{c.recompute}"


def _draw_timeline(ax: "Axes", plan: RunPlan) -> None:
    """Draw when the device computes and the links transfer in one step of the best settings.

    All micro-steps are drawn as one forward and one backward pass.
    """
    best, step = plan.best, plan.best.step
    trace = plan.search.get_profile().at(best.choice.micro_batch_size, best.choice.recompute)
    phases = seconds_by_phase(trace, plan.search.cluster, plan.search.config.train.dtype)
    phases["backward"] += phases.pop("recomputed")
    phases = {phase: best.plan.accumulation * seconds for phase, seconds in phases.items()}
    start, ends = 0.0, {}
    for phase, seconds in {**phases, "launches": step.launches, "update": step.update}.items():
        ax.barh(0, seconds * 1e3, left=start * 1e3, label=phase)
        start += seconds
        ends[phase] = start
    hidden = step.communication - step.exposed
    hidden_start = ends["backward"] - min(hidden, phases["backward"])
    ax.barh(1, hidden * 1e3, left=hidden_start * 1e3, label="communication, hidden")
    ax.barh(1, step.exposed * 1e3, left=start * 1e3, label="communication, not hidden")
    ax.set_yticks([0, 1], ["device", "links"])
    ax.set_xlabel("ms")
    ax.set_title(f"a step: {step.seconds * 1e3:.0f} ms")
    ax.legend(fontsize=7)


def _draw_scaling(ax: "Axes", plan: RunPlan) -> None:
    """Draw images per second of the best settings on other numbers of devices, with an equal batch per device."""
    worlds = sorted({plan.search.world * 2**i // 2**6 for i in range(9)} - {0})
    points = [(world, rate) for world in worlds if (rate := images_per_s_on(plan, world)) is not None]
    ax.plot(*zip(*points, strict=True), marker="o", label="plan")
    smallest_world, smallest_rate = points[0]
    linear = [smallest_rate / smallest_world * world for world in worlds]
    ax.plot(worlds, linear, linestyle=":", color="grey", label="linear")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xlabel("devices")
    ax.set_ylabel("images/s")
    ax.set_title("images per second, equal micro-batch")
    ax.legend(fontsize=7)


def images_per_s_on(plan: RunPlan, world: int) -> float | None:
    """Predict images per second of the plan's best settings on `world` devices, with the same number of images per device.

    Returns None if these settings are not possible on that number of devices.
    """
    search, train = plan.search, plan.search.config.train
    train = train.model_copy(update={"global_batch_size": max(1, train.global_batch_size * world // search.world)})
    config = search.config.model_copy(update={"train": train})
    outcome = Search(config, search.cluster, world, profile=search.get_profile()).evaluate(plan.best.choice)
    return None if outcome is None else outcome.step.images_per_s
