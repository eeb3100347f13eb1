"""A run on N ranks as a discrete-event simulation: how many images a second it really makes, and what the rest is lost to.

Every step waits for its slowest rank. Ranks differ from step to step (`spread`), some are slow for good (`slow`), some wait
for data now and then; ranks that share experts meet at every exchange, all ranks at the end. Step durations are drawn from
steps that are simulated rank by rank. Events are the end of a stretch of steps, a checkpoint that is on disk, and a failure,
after which the run goes on from the last checkpoint that was on disk.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from raphael_dist.planning.plan import RunPlan

_DRAWS = 20_000_000  # random numbers for the steps that are simulated rank by rank
Seconds = defaultdict[str, float]  # by cause


@dataclass(frozen=True)
class Work:
    """A step on `ranks` ranks, in seconds. compute: of every rank; communication: what nothing hides, of all.

    spread: deviation of a rank's computation from step to step, relative. slow, slower: share of the ranks that are slow for
    good, and by which factor. data_share, data_s: how often a rank waits for data, and how long on average (exponential).
    group, exchanges: how many ranks share experts, and how often in a step they wait for each other.
    """

    ranks: int
    images: int
    compute: float
    communication: float = 0.0
    spread: float = 0.0
    slow: float = 0.0
    slower: float = 1.0
    data_share: float = 0.0
    data_s: float = 0.0
    group: int = 1
    exchanges: int = 0


@dataclass(frozen=True)
class Survival:
    """How a run survives. save_every: steps. stall_s: how long training waits for a save; write_s: until it is on disk.

    mtbf_s: mean time between failures of the whole run, exponential; infinite: none. restart_s: from one to the first step.
    """

    save_every: int
    stall_s: float = 0.0
    write_s: float = 0.0
    mtbf_s: float = np.inf
    restart_s: float = 0.0


@dataclass(frozen=True)
class Result:
    """seconds: simulated. steps: done and not lost. spent: where the seconds went; they add up. failures: how many."""

    work: Work
    seconds: float
    steps: int
    spent: dict[str, float]
    failures: int

    @property
    def images_per_s(self) -> float:
        return self.steps * self.work.images / self.seconds

    def describe(self) -> list[str]:
        """Return a table of where the time went."""
        ideal = self.work.images / (self.work.compute + self.work.communication)
        lines = [
            f"simulated {self.seconds / 86400:.2f} days on {self.work.ranks} ranks: {self.images_per_s:,.0f} images/s "
            f"({self.images_per_s / ideal:.1%} of {ideal:,.0f} without any loss), {self.steps:,} steps, "
            f"{self.failures} failures"
        ]
        order = sorted(self.spent.items(), key=lambda item: -item[1])
        return lines + [f"  {what:<22} {seconds / self.seconds:>7.2%}" for what, seconds in order if seconds > 0]


def step_durations(work: Work, seed: int = 0) -> NDArray[np.float64]:
    """Return seconds [steps, 3] of steps simulated rank by rank: without loss, with slow ranks, with waits for data too."""
    draw = np.random.default_rng(seed)
    segments = work.exchanges + 1
    count = int(np.clip(_DRAWS // (work.ranks * segments), 8, 4096))
    whole = work.compute + work.communication
    if not (work.spread or work.slow or work.data_share):
        return np.full((count, 3), whole)
    factor_R = np.where(np.arange(work.ranks) < round(work.slow * work.ranks), work.slower, 1.0)
    draw.shuffle(factor_R)
    rows = []
    for _ in range(count):
        # Of equal parts, so that their sum deviates by `spread`.
        noise_SR = 1 + work.spread * np.sqrt(segments) * draw.standard_normal((segments, work.ranks))
        parts_SR = work.compute / segments * factor_R * np.maximum(noise_SR, 0)
        waits_R = np.where(draw.random(work.ranks) < work.data_share, draw.exponential(1.0, work.ranks) * work.data_s, 0)
        slowest = _slowest(parts_SR, work.group) + work.communication
        parts_SR[0] += waits_R
        rows.append((whole, slowest, _slowest(parts_SR, work.group) + work.communication))
    return np.array(rows)


def _slowest(parts_SR: NDArray[np.float64], group: int) -> float:
    """Return when the last rank is done; the ranks of a group wait for each other after each part."""
    segments, ranks = parts_SR.shape
    whole = ranks // group * group
    grouped = parts_SR[:, :whole].reshape(segments, -1, group).max(axis=2).sum(axis=0)
    rest = parts_SR[:, whole:].sum(axis=0)
    return float(max(grouped.max(initial=0.0), rest.max(initial=0.0)))


def simulate(
    work: Work, survival: Survival, seconds: float, seed: int = 0, failures: Sequence[float] | None = None
) -> Result:
    """Run for `seconds`. failures: at which seconds the run fails, instead of by chance."""
    return _Simulation(work, survival, seconds, seed, failures).run()


class _Simulation:
    def __init__(self, work: Work, survival: Survival, end: float, seed: int, failures: Sequence[float] | None) -> None:
        self.work, self.survival, self.end = work, survival, end
        self.draw = np.random.default_rng(seed + 1)
        self.write_ends = 0.0
        self.durations = step_durations(work, seed)
        self.now, self.step, self.saved, self.num_failures = 0.0, 0, 0, 0
        self.kept: Seconds = defaultdict(float)  # seconds by cause, of what is on disk
        self.at_risk: list[tuple[int, Seconds]] = [(0, defaultdict(float))]  # up to each save not on disk yet
        self.events: list[tuple[float, int, str, int]] = []
        self.lives = 0  # events of a life that ended are passed over
        for at in self._failures(failures):
            heapq.heappush(self.events, (at, 0, "failure", -1))

    def _failures(self, given: Sequence[float] | None) -> Iterator[float]:
        if given is not None:
            yield from given
            return
        at = 0.0
        while np.isfinite(self.survival.mtbf_s):
            at += self.draw.exponential(self.survival.mtbf_s)
            if at >= self.end:
                return
            yield at

    def run(self) -> Result:
        self._stretch()
        while self.events and self.events[0][0] < self.end:
            self.now, _, kind, life = heapq.heappop(self.events)
            if kind == "failure":
                self._fail()
            elif life == self.lives:
                (self._save if kind == "stretch" else self._written)()
        return self._result()

    def _stretch(self) -> None:
        """Begin the steps up to the next save."""
        chosen = self.draw.integers(len(self.durations), size=self.survival.save_every)
        rows = self.durations[chosen]
        self.began, self.rows = self.now, np.cumsum(rows[:, 2])
        self.parts = np.cumsum(np.stack([rows[:, 1] - rows[:, 0], rows[:, 2] - rows[:, 1]], axis=1), axis=0)
        self._push(self.now + self.rows[-1], "stretch")

    def _save(self) -> None:
        """All steps of the stretch are done: copy them to the host, when the save before is on disk, and go on."""
        self._count(len(self.rows))
        if len(self.at_risk) > 1:  # wait for the one before
            self._push(self.write_ends, "stretch")
            self.at_risk[-1][1]["saves"] += self.write_ends - self.now
            self.rows = self.rows[:0]
            return
        self.at_risk[-1][1]["saves"] += self.survival.stall_s
        self.now += self.survival.stall_s
        self.at_risk.append((self.step, defaultdict(float)))
        self.write_ends = self.now + self.survival.write_s
        self._push(self.write_ends, "written", 0)
        self._stretch()

    def _count(self, steps: int) -> None:
        """Take in the first `steps` steps of the stretch."""
        if steps:
            slow, data = self.parts[steps - 1]
            bag, communication = self.at_risk[-1][1], steps * self.work.communication
            bag["compute"] += self.rows[steps - 1] - slow - data - communication
            bag["communication"] += communication
            bag["slow ranks"] += slow
            bag["data"] += data
            self.step += steps

    def _written(self) -> None:
        (_, done), *self.at_risk = self.at_risk
        self.saved = self.at_risk[0][0]
        _add(self.kept, done)

    def _fail(self) -> None:
        """Lose what is not on disk, and come back after the restart; a failure meanwhile begins it anew."""
        self.num_failures += 1
        self.lives += 1
        spent = sum(self.kept.values())
        self.kept["repeated work"] += max(0.0, self.now - spent) if self.now > spent else 0.0
        back = min(self.now + self.survival.restart_s, self.end)
        while self.events and self.events[0][0] < back:
            at, _, kind, _ = heapq.heappop(self.events)
            if kind == "failure":
                self.num_failures += 1
                back = min(at + self.survival.restart_s, self.end)
        self.kept["restarts"] += back - self.now
        self.step, self.at_risk, self.now = self.saved, [(self.saved, defaultdict(float))], back
        self._stretch()

    def _push(self, at: float, kind: str, order: int = 1) -> None:
        heapq.heappush(self.events, (at, order, kind, self.lives))

    def _result(self) -> Result:
        """Count the steps of the stretch that the end cuts, and the part of a step after them as computation."""
        if len(self.rows):
            self._count(int(np.searchsorted(self.rows, self.end - self.began, side="right")))
        total = self.kept
        for _, bag in self.at_risk:
            _add(total, bag)
        rest = self.end - sum(total.values())
        total["unfinished step" if rest > 0 else "saves"] += rest  # a save that the end cuts was counted whole
        return Result(self.work, self.end, self.step, dict(total), self.num_failures)


def _add(total: Seconds, more: Seconds) -> None:
    for what, seconds in more.items():
        total[what] += seconds


def simulate_plan(plan: RunPlan, days: float, seed: int = 0) -> str:
    """Simulate the best choice of a plan; return the report."""
    best, c = plan.best, plan.cluster
    group = max(best.choice.space_ep, best.choice.time_ep)
    blocks = 2 * plan.search.profile.few.in_block.sum() if group > 1 else 0
    work = Work(
        plan.search.world,
        best.step.images,
        best.step.compute,
        best.step.exposed,
        spread=c.spread.value,
        group=group,
        exchanges=int(blocks),
    )
    s = plan.saving
    survival = Survival(plan.save_every(), s.stall_s, s.write_s, s.mtbf_s, c.restart_s.value)
    result = simulate(work, survival, days * 86400, seed)
    calm = simulate(replace(work, spread=0.0), survival, days * 86400, seed)
    return "\n".join([*result.describe(), f"without differences between ranks: {calm.images_per_s:,.0f} images/s"])
