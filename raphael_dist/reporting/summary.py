"""Describes a run in sentences: convergence, experts, speed and failures, from its metrics and logs."""

import math
from collections.abc import Sequence
from statistics import fmean, variance

from raphael_dist.reporting.evidence import MIN_LINES
from raphael_dist.reporting.expert_health import MIN_SAMPLES, dead_blocks, experts_are_judged
from raphael_dist.reporting.loss_rules import FALLEN, find_rise
from raphael_dist.reporting.rules import DATA_BOUND, longest_wait
from raphael_dist.reporting.run_events import FAULTS, UNCLEAN, ending
from raphael_dist.reporting.run_facts import Examined
from raphael_dist.reporting.run_files import RunFiles
from raphael_dist.text import JsonObject, counted
from raphael_dist.training.stragglers import SLOW_RATIO

LEVEL = 0.05  # relative change of the loss between the last two eighths of a run below which it has levelled off
SAVING = 0.1  # share of the time above which saving checkpoints limits the speed
SLOWER = 0.5  # share of the planned images per second below which the report says so
PLACES = ("run.dir", "data.cache_dir")  # keys of folders, which differ between runs in any case


def convergence(run: RunFiles) -> str:
    """Return sentences that state whether a run's training loss has fallen and whether it has levelled off."""
    losses = run.values("train/loss")
    if len(losses) < MIN_LINES:
        return f"Unknown: {counted(len(losses), 'log line')} with a finite loss, at least {MIN_LINES} are needed."
    eighth = max(3, len(losses) // 8)
    before, end = losses[-2 * eighth : -eighth], losses[-eighth:]
    change, noise = fmean(end) - fmean(before), math.sqrt((variance(before) + variance(end)) / eighth)
    rise = find_rise(run)
    if rise is not None:
        verdict = f"No, it fell to {rise.lowest:.3g} up to step {rise.step:,} and rises again"
    elif fmean(end) > FALLEN * losses[0]:
        verdict = "No, it did not fall"
    elif abs(change) <= LEVEL * abs(fmean(before)):
        verdict = "It has levelled off"
    elif abs(change) <= 2 * noise:
        verdict = "Unclear, the loss varies more between log lines than it changes"
    else:
        verdict = "Not yet, it is still falling" if change < 0 else "No, it rises again"
    compared = f", {change / fmean(before):+.1%} compared with the eighth before it" if fmean(before) else ""
    text = (
        f"{verdict}: the training loss went from {losses[0]:.3g} to {fmean(end):.3g} (mean of the last eighth of the log "
        f"lines{compared})."
    )
    if rates := run.values("optim/lr"):
        limit, peak = run.number("train.max_steps"), max(rates)
        place = f"step {run.step:,} of {limit:,}" if limit else f"step {run.step:,}"
        text += f" At {place} the learning rate is "
        text += f"at {rates[-1] / peak:.0%} of its peak." if peak > 0 else "0, as in all log lines."
    held_out = [(loss, step) for step, loss in run.series.get("val/loss", []) if math.isfinite(loss)]
    if held_out:
        loss, step = min(held_out)
        text += f" The best validation loss is {loss:.3g}, at step {step:,}; the last is {held_out[-1][0]:.3g}."
    return text


def expert_health(run: RunFiles) -> str:
    """Return a sentence that states whether a run has dead experts (they get almost no work), and in which blocks."""
    if not any(tag.startswith("moe/") for tag in run.series):
        return "Unknown: no expert loads were logged. A dense model has none."
    dead, scalar = dead_blocks(run), run.last("moe/dead_experts", share=0.01)
    if scalar is not None and not dead:
        return f"Yes: {scalar:.0f} in the last log lines." if scalar else "No expert is dead in the last log lines."
    if not dead and not any(experts_are_judged(run, kind) for kind in ("space", "time")):
        return (
            "Unknown: there are too few images between two log lines to tell a dead expert from chance. Raise "
            f"train.log_every, so that each expert of a block gets {MIN_SAMPLES:.0f} images on average."
        )
    if not dead:
        return "No expert is dead in the last fifth of the log lines."
    where = "; ".join(f"{kind} experts in blocks {', '.join(map(str, blocks))}" for kind, blocks in dead.items())
    count = f" Number of dead experts in the last log lines: {scalar:.0f}." if scalar else ""
    return f"Yes, at least one in each of these: {where}.{count}"


def speed(examined: Examined) -> str:
    """Return sentences about a run's speed in images per second and what limits it, e.g. waiting for data.

    `examined`: the run and its logs.
    """
    run = examined.run
    rate = run.last("throughput/samples_per_s", share=0.5)
    if rate is None:
        return "Unknown: no throughput was logged."
    wait, ratio = (run.last(f"time/{name}", share=0.5) or 0.0 for name in ("data_wait_frac", "slowest_rank_ratio"))
    if rate <= 0:
        return "Unknown: the logged throughput is 0."
    stall = sum(run.values("checkpoint/stall_s")) / max(1e-9, run.step * (run.number("train.global_batch_size") or 1) / rate)
    if wait >= DATA_BOUND:
        bound = f"Waiting for data, most of it for {longest_wait(run)}"
    elif ratio > SLOW_RATIO:
        bound = "The slowest rank, for which all others wait"
    elif stall > SAVING:
        bound = "Saving checkpoints"
    else:
        bound = "Computation" if run.launch is not None and run.launch.world == 1 else "Computation and communication"
    mfu = run.last("throughput/mfu", share=0.5)
    utilised = f", {mfu:.1%} of the device's peak FLOP/s" if mfu else ""
    text = (
        f"{bound}. {rate:,.3g} images per second{utilised}. Waiting for data takes {wait:.1%} of the time, saving "
        f"{stall:.1%}; the slowest rank needs {ratio:.2f} times the median."
    )
    planned = next((row for row in examined.plan if row.measured == rate and row.ratio), None)
    if planned is not None and planned.planned and rate < SLOWER * planned.planned:
        text += (
            f" The planner predicts {planned.planned:,.3g} images per second: other programs use these devices, or the "
            "devices are slower than the planner assumes."
        )
    return text


def failures(examined: Examined) -> str:
    """Return sentences about faults (such as crashes), restarts and the end of a run. `examined`: the run and its logs."""
    history = examined.history
    if not examined.run.log:
        return "Unknown: there is no train.log."
    counts = {kind: len(history.of(kind)) for kind in (UNCLEAN, *FAULTS)}
    named = ", ".join(f"{kind}: {count}" for kind, count in counts.items() if count)
    total = f"Faults: {len(history.faults)} ({named})" if named else "Never: no fault is in the logs"
    starts, stops = len(history.of("start", "restart")), len(history.of("stopped"))
    planned = f", stops by a signal or the time limit: {stops}" if stops else ""
    return f"{total}. Starts: {starts}{planned}. The run is {ending(examined.run, history, examined.now)}."


def flatten(config: JsonObject) -> dict[str, str]:
    """Return a configuration (a dict of sections) as a flat dict such as {"train.max_steps": "1000"}."""
    flat = {}
    for section, values in config.items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            flat[f"{section}.{key}".rstrip(".")] = str(value)
    return flat


def differences(configs: Sequence[dict[str, str]]) -> list[str]:
    """Return the keys of the configuration, e.g. "optim.lr", whose values differ between runs.

    Left out are run.dir and data.cache_dir, which differ in any case. `configs`: the flat configuration of each run, as
    `flatten` returns it.
    """
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if key not in PLACES and len({config.get(key) for config in configs}) > 1]
