"""What is measured of a run, and where it is said: metrics.jsonl, TensorBoard, the console and the log."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch

from raphael_dist.checkpoint.store import Save
from raphael_dist.config import Config, to_yaml
from raphael_dist.insight.figures import heat_map
from raphael_dist.model.batch import Batch
from raphael_dist.model.objective import Losses
from raphael_dist.parallel.ranks import Ranks
from raphael_dist.training.console import Reporter
from raphael_dist.training.measure import peak_gib, throughput
from raphael_dist.training.metrics import ExpertLoadMonitor, Metrics, MetricsWriter, load_metrics, relative_load
from raphael_dist.training.straggler import Stopwatch, Stragglers
from raphael_dist.training.summary import closing
from raphael_dist.training.trackers import Trackers, flat
from raphael_dist.training.waiting import DataWait

_log = logging.getLogger(__name__)


class Telemetry:
    """Collects on every rank without waiting for the device, and writes on rank 0. Use it as a context around training.

    `flops`: model FLOPs per sample.
    """

    def __init__(self, config: Config, ranks: Ranks, device: torch.device, hosts: list[str]) -> None:
        """`hosts`: the name of each rank's host, to name the slow ones."""
        self._ranks, self._device, self._dtype = ranks, device, getattr(torch, config.train.dtype)
        self._max_steps = config.train.max_steps
        self._metrics, self._loads = Metrics(device), ExpertLoadMonitor()
        self._stopwatch, self._stragglers = Stopwatch(device), Stragglers(hosts)
        self._writer = MetricsWriter(config.run.dir, config.train.load_scalars) if ranks.is_main else None
        self._trackers = Trackers(config) if ranks.is_main else None
        if self._writer is not None:
            self._writer.describe(to_yaml(config), flat(config))
        self._console: Reporter | None = None
        self._wait, self._began = DataWait(), time.monotonic()
        self._logged_step, self._logged_at = 0, time.monotonic()
        self.flops = 0.0

    def begin(self, step: int, flops: float) -> None:
        """Note where this process begins to train."""
        self._logged_step, self.flops = step, flops

    def __enter__(self) -> "Telemetry":
        self._console = Reporter(self._ranks.is_main, self._logged_step, self._max_steps)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._console is not None:
            self._console.close()
        for sink in (self._writer, self._trackers):
            if sink is not None:
                sink.close()

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Return the next batch on the device, and time the wait for it."""
        batch, waited = self._wait.next(batches, self._device)
        self._stopwatch.add(waited)
        return batch

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Time a forward pass, which is this rank's own work (straggler.py)."""
        began = self._stopwatch.start()
        yield
        self._stopwatch.stop(began)

    def record(self, batch: Batch, losses: Losses, bytes_sent: int) -> None:
        """Add a micro-batch's sums, without waiting for the device; `bytes_sent` went to experts elsewhere."""
        count, add = batch.weight.sum(), self._metrics.add
        add("samples", count, "sum")
        for tag, value in (("loss", losses.total), ("loss_denoise", losses.denoise), ("loss_edge", losses.edge)):
            add(f"train/{tag}", value.sum(), "mean", count)
        if losses.space_used is not None:
            add("load/space", losses.space_used, "sum")
        if losses.time_load is not None:
            add("load/time", losses.time_load, "sum")
        add("comm/bytes_sent", float(bytes_sent), "sum")
        add("memory/peak_gib", peak_gib(batch.weight.device), "max")

    def log_step(self, step: int, samples_seen: int, replaced: int, own: dict[str, float]) -> dict[str, float]:
        """Reduce over ranks what was recorded since the last call; write, show and return it. Collective.

        Waits for the device. replaced: bad samples that this rank has replaced so far. own: numbers that every rank knows.
        """
        self._metrics.add("data/replaced", float(replaced), "sum")
        reduced, now = self._metrics.reduce(), time.monotonic()
        values = {tag: float(v) for tag, v in reduced.items() if v.ndim == 0 and tag != "samples"} | own
        samples, elapsed = float(reduced["samples"]), now - self._logged_at
        values |= self._log_loads(step, reduced, samples)
        values |= throughput(samples, elapsed, self.flops, self._device, self._dtype, self._ranks.world_size)
        waited, line = self._wait.take(elapsed)
        values |= waited
        if line is not None:
            self.warn(f"step {step}: {line}")
        values["time/slowest_rank_ratio"] = self._log_stragglers(step)
        self._logged_at, self._logged_step = now, step
        self.write(step, samples_seen, values)
        if self._console is not None:
            self._console.scalars(step, values)
        return values

    def _log_loads(self, step: int, reduced: dict[str, torch.Tensor], samples: float) -> dict[str, float]:
        values: dict[str, float] = {}
        for kind, total in (("space", samples), ("time", None)):
            if f"load/{kind}" in reduced:
                values |= load_metrics(f"moe/{kind}", reduced[f"load/{kind}"], total)
                if self._writer is not None:
                    share_LK = relative_load(reduced[f"load/{kind}"]).numpy()
                    self._writer.image(f"loads/{kind}", step, heat_map(share_LK, f"load of the {kind} experts by block"))
                for line in self._loads.new(kind, reduced[f"load/{kind}"], samples):
                    self.warn(line)
        return values

    def _log_stragglers(self, step: int) -> float:
        self._stragglers.observe(max(1, step - self._logged_step), self._stopwatch.take(), self._device)
        if slow := self._stragglers.slow():
            self.warn(f"step {step}: {slow}")
        return self._stragglers.slowest_ratio()

    def log_save(self, saved: Save) -> None:
        """Tell of a checkpoint that was published."""
        self.line(saved.line)
        self.write(saved.manifest["step"], saved.manifest["samples_seen"], saved.metrics())

    def log_images(self, step: int, images: dict[str, Any]) -> None:
        """Show PIL images by tag."""
        for tag, image in images.items():
            if self._writer is not None:
                self._writer.image(tag, step, image)
            if self._trackers is not None:
                self._trackers.image(tag, step, image)

    def write(self, step: int, samples_seen: int, values: dict[str, float]) -> None:
        """Write scalars by tag, on rank 0."""
        if self._writer is not None:
            self._writer.write(step, samples_seen, values)
        if self._trackers is not None:
            self._trackers.scalars(step, values)

    def closing(self, config: Config, steps: int, images: int) -> None:
        """Say where things are and what to run next, when the run is complete."""
        if self._ranks.is_main:
            for line in closing(config, steps, images, time.monotonic() - self._began):
                self.line(line)

    def advance(self, step: int) -> None:
        """Show that a step is done."""
        if self._console is not None:
            self._console.advance(step)

    def line(self, text: str) -> None:
        """Say a line on the console and in the log, once for all ranks."""
        if self._console is not None:
            self._console.line(text)

    def warn(self, text: str) -> None:
        """Write a warning, once for all ranks."""
        if self._ranks.is_main:
            _log.warning("%s", text)
