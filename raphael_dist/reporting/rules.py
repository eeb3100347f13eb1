"""Rules by which `raphael_dist doctor` detects problems of a run, such as a loss that does not fall. `RULES` lists them.

Each rule is a small function. It returns a `Finding` (a problem and its remedy), or None if there is no problem or the run
has no data about it.
"""

import math
import re
from statistics import fmean, median

from raphael_dist.analysis.expert_diagnostics import DEAD_SHARE
from raphael_dist.config.lr_schedule_arguments import ENDLESS
from raphael_dist.reporting.evidence import MIN_LINES, Finding, Rule, RunEvidence
from raphael_dist.reporting.expert_health import OVERLOADED, dead_blocks, experts_are_judged, overloaded_blocks
from raphael_dist.reporting.loss_rules import loss_not_falling, loss_not_finite, loss_rising
from raphael_dist.reporting.run_events import UNCLEAN, silent_seconds
from raphael_dist.reporting.run_files import RunFiles
from raphael_dist.text import counted
from raphael_dist.training.data_timer import KINDS, REMEDIES
from raphael_dist.training.stragglers import SLOW_RATIO

DATA_BOUND = 0.1  # share of the time spent waiting for data
CLIPPED = 0.8  # share of the log lines with clipped gradients
TRUNCATED = 0.05  # share of the captions
EMPTY = 0.2  # share of the edge maps
EDGE_LOSS = 1e-3  # lower losses mean maps without edges; with edges the loss stays above 0.01
DUPLICATES = 0.1  # share of the images
SKIPPED = 0.01  # share of the steps
DISK_SAVES = 2  # checkpoints that must still fit
_BALANCE = "set model.balance_weight=0.01 or raise it, or raise model.gate_noise or model.gate_noise_steps"
_TRUNCATED = re.compile(r"text\.max_tokens=(\d{1,9}): longer captions are truncated \((\d{1,15}) of (\d{1,15})\)")


def dead_experts(evidence: RunEvidence) -> Finding | None:
    """Return a finding (problem and remedy) if an expert gets less than 1% of the mean load of its block, else None."""
    dead = dead_blocks(evidence.run)
    scalar = evidence.run.last("moe/dead_experts", share=0.01)
    if not dead and not scalar:
        return None
    shown = "; ".join(f"{kind} experts in blocks {', '.join(map(str, blocks))}" for kind, blocks in dead.items())
    count = "experts are dead"
    if scalar:
        count = f"{counted(scalar, 'expert', '.0f')} {'is' if round(scalar) == 1 else 'are'} dead"
    where = f": an expert gets under {DEAD_SHARE:.0%} of the mean load of its block ({shown})" if shown else ""
    return Finding(count + where, _BALANCE)


def overloaded_experts(evidence: RunEvidence) -> Finding | None:
    """Return a finding (problem and remedy) if an expert gets over 90% of the work of its transformer block, else None."""
    over = overloaded_blocks(evidence.run)
    if not over:
        return None
    shown = "; ".join(f"{kind} experts in blocks {', '.join(map(str, blocks))}" for kind, blocks in over.items())
    return Finding(
        f"one expert gets more than {OVERLOADED:.0%} of the load of its block ({shown})",
        _BALANCE,
    )


def data_bound(evidence: RunEvidence) -> Finding | None:
    """Return a finding (problem and remedy) if at least 10% of the time is spent waiting for data, else None."""
    share = evidence.run.last("time/data_wait_frac", share=0.5)
    if share is None or share < DATA_BOUND:
        return None
    kind = longest_wait(evidence.run)
    return Finding(f"the run waits for data {share:.0%} of the time, most of it for {kind}", REMEDIES[kind])


def always_clipped(evidence: RunEvidence) -> Finding | None:
    """Return a finding (problem and remedy) if gradients are clipped in at least 80% of the logged steps, else None.

    Only the last half of the logged steps counts.
    """
    limit, norms = evidence.run.number("optim.max_grad_norm"), evidence.run.values("optim/grad_norm", share=0.5)
    share = fmean(norm > limit for norm in norms) if limit > 0 and norms else 0.0
    if len(norms) < MIN_LINES // 2 or share < CLIPPED:
        return None
    return Finding(
        f"gradients are clipped at {share:.0%} of the logged steps (median norm {median(norms):.3g}, limit {limit:g})",
        "lower optim.lr, lengthen optim.warmup_steps, or raise optim.max_grad_norm",
    )


def checkpoints_fail(evidence: RunEvidence) -> Finding | None:
    """Return a finding (problem and remedy) if a save of a checkpoint failed or a checkpoint is damaged, else None."""
    failed = max(evidence.run.values("checkpoint/failed"), default=0.0)
    events = evidence.history.of("save failed")
    count = max(int(failed), len(events))
    if not count and not evidence.run.damaged:
        return None
    what = [f"saves of a checkpoint failed (number: {count})"] if count else []
    what += [f"checkpoints are damaged ({', '.join(evidence.run.damaged[:3])})"] * bool(evidence.run.damaged)
    why = f"; the last: {events[-1].text}" if events else ""
    return Finding(
        " and ".join(what) + why, "free disk space or check the disk, then resume: the newest intact checkpoint is used"
    )


def slow_ranks(evidence: RunEvidence) -> Finding | None:
    """Return a finding (problem and remedy) if the slowest rank needs over 1.5 times the median rank's time, else None."""
    ratios = evidence.run.values("time/slowest_rank_ratio", share=0.5)
    if not ratios or median(ratios) <= SLOW_RATIO:
        return None
    named = evidence.history.of("slow rank")
    who = f" ({named[-1].text.partition(': ')[2]})" if named else ""
    return Finding(
        f"the slowest rank needs {median(ratios):.1f} times the median rank's time{who}",
        "check clock speed, other processes and disk of this rank's host, or exclude the host",
    )


def wrong_schedule(evidence: RunEvidence) -> Finding | None:
    """Return a finding (problem and remedy) if a schedule does not fit the run's number of steps, else None.

    A schedule does not fit in each of these cases:

    - The learning rate is 0 in all log lines.
    - The warm-up of the learning rate takes half of the steps or more.
    - The gate noise lasts longer than the run.
    - The learning rate is below 0.1% of its peak in more than a tenth of the log lines.
    - The run is complete, and the learning rate is still above half of its peak.
    """
    run, steps = evidence.run, evidence.run.number("train.max_steps")
    warmup, noise = run.number("optim.warmup_steps"), run.number("model.gate_noise_steps")
    if steps and warmup >= steps / 2:
        return Finding(f"optim.warmup_steps={warmup} is half of train.max_steps={steps} or more", "lower optim.warmup_steps")
    if steps and run.number("model.gate_noise") and noise > steps:
        return Finding(
            f"model.gate_noise_steps={noise} is longer than train.max_steps={steps}: the noise never falls to 0",
            "lower model.gate_noise_steps",
        )
    rates = [(step, rate) for step, rate in run.series.get("optim/lr", []) if math.isfinite(rate)]
    peak = max((rate for _, rate in rates), default=0.0)
    if len(rates) >= MIN_LINES and peak <= 0:
        return Finding("the learning rate is 0 in all log lines: the weights do not change", "set optim.lr above 0")
    idle = [step for step, rate in rates if rate < 0.001 * peak and step > warmup]
    if len(rates) >= MIN_LINES and len(idle) > 0.1 * len(rates):
        return Finding(
            f"the learning rate has been below 0.1% of its peak since step {idle[0]} of {rates[-1][0]}",
            "lower train.max_steps, or lengthen the schedule (optim.lr_schedule_args)",
        )
    complete = bool(evidence.history.of("complete"))
    decays = str(run.option("optim.lr_schedule", "constant")) not in ENDLESS
    if complete and decays and len(rates) >= MIN_LINES and rates[-1][1] > 0.5 * peak:
        return Finding(
            f"the run is complete, but its learning rate ended at {rates[-1][1] / peak:.0%} of its peak",
            "shorten the schedule (optim.lr_schedule_args), or train longer",
        )
    return None


def disk_nearly_full(evidence: RunEvidence) -> Finding | None:
    """Return a finding (problem and remedy) if the disk of the run directory is nearly full, else None.

    A disk is nearly full if its free space is less than two checkpoints take, or less than 256 MiB.
    """
    need = DISK_SAVES * evidence.checkpoint_bytes
    if evidence.free_bytes is None or evidence.free_bytes >= max(need, 1 << 28):
        return None
    return Finding(
        f"the disk of the run directory has {evidence.free_bytes / 2**30:.2f} GiB left; a checkpoint takes "
        f"{evidence.checkpoint_bytes / 2**30:.2f} GiB",
        "free some space, or lower checkpoint.keep",
    )


def truncated_captions(evidence: RunEvidence) -> Finding | None:
    """Return a finding (problem and remedy) if at least 5% of the captions are longer than the encoder reads, else None.

    If samples of the data were checked, their captions are counted. Otherwise the counts are taken from the log: each
    process warns once, and states how many captions it had encoded by then and how many of them were too long. With
    data.features=cached a process counts all captions of the shards; with data.features=online it counts captions up to the
    first one that is too long.
    """
    remedy = "shorten the captions, or raise text.max_tokens in a new run if the encoder allows more"
    data = evidence.data
    if data is not None and data.truncated is not None and data.captions:
        if data.truncated < TRUNCATED * data.captions:
            return None
        share, limit = data.truncated / data.captions, f"text.max_tokens={evidence.run.number('text.max_tokens')}"
        counts = f"{data.truncated} of {data.captions} in the checked samples"
        return Finding(f"{share:.0%} of the captions ({counts}) are longer than {limit}", remedy)
    lines = [match for line in evidence.run.log if (match := _TRUNCATED.match(line.text))]
    truncated, total = (sum(int(match[group]) for match in lines) for group in (2, 3))
    # A process stops counting at its first truncated caption, so this one must not count (inverse sampling, Haldane 1945).
    if truncated == len(lines) or truncated - len(lines) < TRUNCATED * (total - len(lines)):
        return None
    counts = f"{truncated} of {total} that were encoded before the warnings in the logs"
    return Finding(
        f"{truncated / total:.0%} of the captions ({counts}) are longer than text.max_tokens={lines[-1][1]}", remedy
    )


def empty_edge_maps(evidence: RunEvidence) -> Finding | None:
    """Return a finding (problem and remedy) if the edge loss is on, but many edge maps have no edges, else None.

    There is a finding if more than 20% of the checked edge maps have no edges, or if the edge loss is at most 0.001.
    """
    if not evidence.run.number("edge.weight"):
        return None
    remedy = "make them again (python -m raphael_dist prepare with --edges), or set edge.weight=0 in a new run"
    if evidence.data is not None and evidence.data.edges and evidence.data.empty_edges > EMPTY * evidence.data.edges:
        return Finding(f"{evidence.data.empty_edges} of {evidence.data.edges} edge maps are empty", remedy)
    loss = evidence.run.last("train/loss_edge")
    if loss is None or len(evidence.run.values("train/loss_edge")) < MIN_LINES or loss > EDGE_LOSS:
        return None
    return Finding(f"the edge loss is {loss:.1g}: the edge maps seem to be empty", remedy)


def duplicates(evidence: RunEvidence) -> Finding | None:
    """Return a finding (problem and remedy) if more than 10% of the checked images look like another image, else None."""
    if evidence.data is None or evidence.data.duplicates <= DUPLICATES * evidence.data.samples:
        return None
    return Finding(
        f"{evidence.data.duplicates} of {evidence.data.samples} images look like another image",
        "remove duplicates, which the model memorises (python tools/inspect_data.py lists them)",
    )


def skipped_steps(evidence: RunEvidence) -> Finding | None:
    """Return a finding (problem and remedy) if over 1% of the steps were skipped (bad loss or gradient), else None."""
    skipped = max(evidence.run.values("train/skipped"), default=0.0)
    if skipped <= SKIPPED * max(1, evidence.run.step):
        return None
    return Finding(
        f"{skipped:.0f} of {evidence.run.step} steps were skipped",
        "lower optim.lr, and check the samples that the log names",
    )


def stalled(evidence: RunEvidence) -> Finding | None:
    """Return a finding (problem and remedy) if the run is not complete but no longer writes to its log, else None.

    There is a finding if the age of the last log line is at least 10 minutes, and at least 20 times the usual time between
    two lines of progress. If the log has fewer than two lines of progress, there is a finding after an hour without a line.
    """
    silent = silent_seconds(evidence.run, evidence.history, evidence.now)
    if silent is None:
        return None
    return Finding(
        f"the run is not complete and has logged nothing for {counted(silent / 60, 'minute', ',.0f')}",
        "if no process runs any more, start the same command again: it resumes",
    )


def crashes(evidence: RunEvidence) -> Finding | None:
    """Return a finding (problem and remedy) if the run was killed, crashed or hung, else None.

    A run has one or more starts: the first, and those that resumed it. If only the latest start was killed or crashed, and
    no start hung, `stalled` reports it instead.
    """
    unclean, hangs = len(evidence.history.of(UNCLEAN)), len(evidence.history.of("hang"))
    if not hangs and (not unclean or (unclean == 1 and stalled(evidence))):
        return None
    counts = {f"was {UNCLEAN}": unclean, "hung": hangs}
    shown = [f"{what} {count} time{'s' * (count > 1)}" for what, count in counts.items() if count]
    return Finding(
        f"the run {' and '.join(shown)}",
        "look in dmesg for processes that were killed for lack of memory, in the logs of all ranks for errors, and in "
        "logs/stacks-rank-*.txt for the place of the last hang",
    )


# Each rule with what it checks, and what it needs: a tag of the metrics, or a field of `RunEvidence` or `RunFiles`.
RULES: dict[Rule, tuple[str, str]] = {
    loss_not_finite: ("whether the loss is finite", "train/loss"),
    loss_not_falling: ("whether the loss falls", "train/loss"),
    loss_rising: ("whether the loss rises again", "train/loss"),
    dead_experts: ("dead experts", "expert_samples"),
    overloaded_experts: ("overloaded experts", "expert_samples"),
    data_bound: ("waiting for data", "time/data_wait_frac"),
    slow_ranks: ("slow ranks", "time/slowest_rank_ratio"),
    always_clipped: ("clipped gradients", "optim/grad_norm"),
    skipped_steps: ("skipped steps", "train/skipped"),
    wrong_schedule: ("length of the schedules", "optim/lr"),
    checkpoints_fail: ("failed and damaged checkpoints", "checkpoint/failed log"),
    disk_nearly_full: ("free disk space", "free_bytes"),
    truncated_captions: ("truncated captions", "log data"),
    empty_edge_maps: ("empty edge maps", "train/loss_edge data"),
    duplicates: ("duplicate images", "data"),
    crashes: ("crashes and hangs", "log"),
    stalled: ("how recent the log is", "log"),
}


def diagnose(evidence: RunEvidence) -> list[Finding]:
    """Look for problems of a run with all rules in RULES; return the problems with their remedies, in the rules' order.

    `evidence`: what is known about the run: metrics, logs, configuration, disk space.
    """
    return [finding for rule in RULES if (finding := rule(evidence))]


def coverage(evidence: RunEvidence) -> tuple[list[str], list[str]]:
    """Return (names of the problems that the rules can detect in a run, names of the other problems).

    A problem cannot be detected if the run has no data about this problem, e.g. if the run has no log.
    """
    seen: list[str] = []
    unseen: list[str] = []
    for what, needs in RULES.values():
        has = any(need in evidence.run.series or _has(evidence, need) for need in needs.split())
        (seen if has else unseen).append(what)
    return seen, unseen


def _has(evidence: RunEvidence, need: str) -> bool:
    if need == "expert_samples":
        return any(experts_are_judged(evidence.run, kind) for kind in ("space", "time"))
    value = getattr(evidence, need, None) if need in ("data", "free_bytes") else getattr(evidence.run, need, None)
    return value is not None and value != [] and value != {}


def longest_wait(run: RunFiles) -> str:
    """Return the kind of data loading for which a run waits longest: "reading", "decoding", "encoding" or "copying".

    This is the kind with the largest mean share of the time, over the second half of the logged values. "reading" is also
    returned if the run has not waited for any kind.
    """
    return max(KINDS, key=lambda kind: run.last(f"time/data_wait_{kind}", share=0.5) or 0.0)
