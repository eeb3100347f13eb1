"""A plan as a picture: memory bars, the timeline of a step, images a second over the number of devices."""

from pathlib import Path
from typing import Any

from raphael_dist.errors import UserError
from raphael_dist.planning.plan import RunPlan
from raphael_dist.planning.search import Outcome, Search
from raphael_dist.planning.step import by_phase

SHOWN = 5  # choices with a bar


def draw(plan: RunPlan, path: Path) -> None:
    """Write the picture as PNG. Raises UserError without matplotlib, and where it cannot be written."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise UserError('--figure needs matplotlib; pip install "raphael_dist[plan]"') from None
    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    _bars(axes[0], plan)
    _timeline(axes[1], plan)
    _scaling(axes[2], plan)
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise UserError(f"--figure {path}: cannot be written: {error.strerror}") from None
    finally:
        plt.close(figure)


def _bars(ax: Any, plan: RunPlan) -> None:
    best = plan.ranked[:SHOWN]
    kinds = list(dict.fromkeys(kind for o in best for kind in o.memory.by_kind()))
    bottom = [0.0] * len(best)
    for kind in kinds:
        sizes = [o.memory.by_kind().get(kind, 0) / 1e9 for o in best]
        ax.bar(range(len(best)), sizes, bottom=bottom, label=kind)
        bottom = [b + s for b, s in zip(bottom, sizes, strict=True)]
    ax.axhline(plan.cluster.memory_gb.value, color="black", linestyle="--", linewidth=1)
    ax.set_xticks(range(len(best)), [_short(o) for o in best], fontsize=7)
    ax.set_ylabel("GB of a rank")
    ax.set_title("memory of the best choices")
    ax.legend(fontsize=7)


def _short(o: Outcome) -> str:
    c = o.choice
    return f"ZeRO-{c.stage}{'o' if c.overlap else ''}\nep {c.space_ep},{c.time_ep}\nmicro {c.micro_batch}\n{c.recompute}"


def _timeline(ax: Any, plan: RunPlan) -> None:
    """Draw what the device and the links do in a step, all micro-steps of a kind together."""
    best, step = plan.best, plan.best.step
    trace = plan.search.profile.at(best.choice.micro_batch, best.choice.recompute)
    phases = {k: best.plan.accumulation * v for k, v in by_phase(trace, plan.cluster, plan.config.train.dtype).items()}
    phases["backward"] += phases.pop("recomputed")
    at, ends = 0.0, {}
    for phase, seconds in {**phases, "launches": step.launches, "update": step.update}.items():
        ax.barh(0, seconds * 1e3, left=at * 1e3, label=phase)
        at += seconds
        ends[phase] = at
    hidden = step.communication - step.exposed
    start = ends["backward"] - min(hidden, phases["backward"])
    ax.barh(1, hidden * 1e3, left=start * 1e3, label="communication, hidden")
    ax.barh(1, step.exposed * 1e3, left=at * 1e3, label="communication, not hidden")
    ax.set_yticks([0, 1], ["device", "links"])
    ax.set_xlabel("ms")
    ax.set_title(f"a step: {step.seconds * 1e3:.0f} ms")
    ax.legend(fontsize=7)


def _scaling(ax: Any, plan: RunPlan) -> None:
    """Draw images a second of the same choice on other numbers of devices, with as many images for each."""
    worlds = sorted({plan.search.world * 2**i // 2**6 for i in range(9)} - {0})
    points = [(world, rate) for world in worlds if (rate := rate_on(plan, world)) is not None]
    ax.plot(*zip(*points, strict=True), marker="o", label="plan")
    first = points[0]
    ax.plot(worlds, [first[1] / first[0] * w for w in worlds], linestyle=":", color="grey", label="as the smallest")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xlabel("devices")
    ax.set_ylabel("images/s")
    ax.set_title("images a second, equal micro-batch")
    ax.legend(fontsize=7)


def rate_on(plan: RunPlan, world: int) -> float | None:
    """Return images/s of the best choice on `world` devices with as many images a device; None where it cannot run."""
    search, batch = plan.search, plan.config.train.global_batch
    train = plan.config.train.model_copy(update={"global_batch": max(1, batch * world // search.world)})
    other = Search(plan.config.model_copy(update={"train": train}), search.cluster, world)
    other.__dict__["profile"] = search.profile  # the same model
    found = other.reckon(plan.best.choice)
    return None if found is None else found.step.images_per_s
