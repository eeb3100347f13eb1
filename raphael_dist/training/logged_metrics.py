"""Collects the measurements of a run and writes them to metrics.jsonl, TensorBoard, trackers, the console and the log."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import TracebackType
from typing import Self

import torch
from PIL import Image

from raphael_dist.analysis.route_figures import draw_heat_map
from raphael_dist.checkpoint.save_state import Save
from raphael_dist.config.schema import Config, to_yaml
from raphael_dist.model.batch import Batch
from raphael_dist.model.losses import Losses
from raphael_dist.parallel.async_collectives import Traffic
from raphael_dist.runtime.ranks import Ranks
from raphael_dist.training.console import Console
from raphael_dist.training.data_timer import DataTimer
from raphael_dist.training.expert_load import DeadExperts, load_metrics, relative_load
from raphael_dist.training.metrics import Metrics
from raphael_dist.training.metrics_files import MetricsWriter
from raphael_dist.training.stragglers import Stopwatch, Stragglers
from raphael_dist.training.throughput import peak_gib, throughput
from raphael_dist.training.wandb_mlflow import Trackers, flat

_log = logging.getLogger(__name__)


class Telemetry:
    """Collects the measurements of a run. Every rank records values without waiting for the device; rank 0 writes them.

    Rank 0 writes to metrics.jsonl, TensorBoard, trackers, terminal and log. Use it as a context manager around training.
    Tags are names of metrics such as "train/loss".
    """

    def __init__(self, config: Config, ranks: Ranks, device: torch.device, hosts: list[str]) -> None:
        """Open the output files on rank 0.

        Args:
            config: the run's configuration.
            ranks: this rank and the number of ranks.
            device: this rank's device.
            hosts: the host name of each rank, for messages about slow ranks.
        """
        self._ranks, self._device, self._dtype = ranks, device, getattr(torch, config.train.dtype)
        self._max_steps = config.train.max_steps
        self._metrics, self._dead_experts = Metrics(device), DeadExperts()
        self._current_step = Metrics(device)
        self._steps: list[tuple[int, Metrics]] = []  # since the last log line
        self._stopwatch, self._stragglers = Stopwatch(device), Stragglers(hosts)
        self._writer = MetricsWriter(config.run.dir, config.train.load_scalars) if ranks.is_main else None
        self._sinks: list[MetricsWriter | Trackers] = []
        if self._writer is not None:
            self._writer.describe(to_yaml(config), flat(config))
            self._sinks = [self._writer, Trackers(config)]
        self._data_timer, self._began = DataTimer(), time.monotonic()
        self._logged_step, self._logged_at = 0, time.monotonic()
        self._flops = 0.0

    def begin(self, step: int, flops: float) -> None:
        """Start logging the steps after optimizer step `step` (0 in a new run).

        Values that an earlier process logged for later steps are removed, because these steps are repeated.

        `flops`: model FLOPs per sample, forward and backward, for the model FLOP utilisation (MFU).
        """
        self._logged_step, self._flops = step, flops
        self._console = Console(self._ranks.is_main, step, self._max_steps)
        self.return_to(step)

    @property
    def seconds(self) -> float:
        """Seconds since this object was created, at the start of this process."""
        return time.monotonic() - self._began

    def __enter__(self) -> Self:
        self._console.advance(self._logged_step)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._console.close()
        for sink in self._sinks:
            sink.close()

    @contextmanager
    def waiting_for_data(self) -> Iterator[DataTimer]:
        """Return a context manager that counts the time spent in its body as time waiting for data.

        It yields a DataTimer. The body must fetch a batch, call the timer's `fetched`, and then copy the batch to the
        device.
        """
        with self._data_timer.waiting():
            yield self._data_timer
        self._stopwatch.add(self._data_timer.last_wait)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Return a context manager that measures the time of its body, a forward pass, to find slow ranks."""
        with self._stopwatch.measuring():
            yield

    def record(self, batch: Batch, losses: Losses) -> None:
        """Add a micro-batch's samples, losses and expert loads to those of the current optimizer step.

        This does not wait for the GPU. `losses`: the losses that the forward pass on `batch` returned.
        """
        count, add = batch.weight.sum(), self._current_step.add
        add("samples", count, "sum")
        for tag, value in (("loss", losses.denoise), ("loss_weighted", losses.total), ("loss_edge", losses.edge)):
            add(f"train/{tag}", value.sum(), "mean", count)
        if losses.space_used is not None:
            add("load/space", losses.space_used, "sum")
        if losses.time_load is not None:
            add("load/time", losses.time_load, "sum")
        self._metrics.add("computed", count, "sum")
        self._metrics.add("memory/peak_gib", peak_gib(batch.weight.device), "max")

    def record_traffic(self, traffic: Traffic) -> None:
        """Record `traffic`, the bytes that this rank sent to other ranks in one optimizer step, for the next log line.

        Call it only for steps that updated the weights.
        """
        for part, num_bytes in asdict(traffic).items():
            self._metrics.add(f"comm/{part}", float(num_bytes), "mean")

    def end_step(self, step: int, updated: bool) -> None:
        """End the recording of optimizer step `step`.

        `updated`: whether the step changes the weights. If true, its losses and expert loads are kept for the next log line;
        otherwise they are dropped.
        """
        if updated:
            self._steps.append((step, self._current_step))
        self._current_step = Metrics(self._device)

    def drop_step(self, step: int) -> None:
        """Drop the losses and expert loads of optimizer step `step`, because it did not change the weights after all."""
        self._steps = [(number, metrics) for number, metrics in self._steps if number != step]

    def return_to(self, step: int) -> None:
        """Remove all values of steps after `step`, in memory and in files, because the run will log those steps again."""
        self._steps = [(number, metrics) for number, metrics in self._steps if number <= step]
        self._dead_experts.clear()
        if self._writer is not None:
            self._writer.return_to(step)

    def log_step(self, step: int, samples_seen: int, replaced: int, own: dict[str, float]) -> None:
        """Reduce the values recorded since the last call over all ranks, then write and show them.

        Collective; waits for the device. If no step since the last call updated the weights, no losses are logged.

        Args:
            step: the optimizer step.
            samples_seen: number of training samples that the run has used up to this step.
            replaced: number of unreadable samples that this rank has replaced since the start of this process; summed over
                ranks.
            own: further metrics by name, which are equal on all ranks and are not reduced.
        """
        self._metrics.add("data/replaced", float(replaced), "sum")
        for _, metrics in self._steps:
            self._metrics.merge(metrics)
        self._steps = []
        reduced, now = self._metrics.reduce(), time.monotonic()
        samples, computed = (float(reduced.pop(name, 0.0)) for name in ("samples", "computed"))
        values, elapsed = {tag: float(v) for tag, v in reduced.items() if v.ndim == 0} | own, now - self._logged_at
        values |= self._log_loads(step, reduced, samples)
        values |= throughput(computed, elapsed, self._flops, self._device, self._dtype, self._ranks.world_size)
        shares, line = self._data_timer.take(elapsed)
        values |= shares
        if line is not None:
            self.warn(f"step {step}: {line}")
        values["time/slowest_rank_ratio"] = self._log_stragglers(step)
        self._logged_at, self._logged_step = now, step
        self.write(step, samples_seen, values)
        self._console.scalars(step, values)

    def _log_loads(self, step: int, reduced: dict[str, torch.Tensor], samples: float) -> dict[str, float]:
        values: dict[str, float] = {}
        for kind, total in (("space", samples), ("time", None)):
            if f"load/{kind}" in reduced:
                values |= load_metrics(f"moe/{kind}", reduced[f"load/{kind}"], total)
                if self._writer is not None:
                    share_LK = relative_load(reduced[f"load/{kind}"]).numpy()
                    self._writer.image(
                        f"loads/{kind}", step, draw_heat_map(share_LK, f"load of the {kind} experts by block")
                    )
                values |= self._log_dead_experts(step, kind, reduced[f"load/{kind}"], samples)
        counts = [values[tag] for kind in ("space", "time") if (tag := f"moe/{kind}/dead_experts") in values]
        return values | ({"moe/dead_experts": sum(counts)} if counts else {})

    def _log_dead_experts(self, step: int, kind: str, load_LK: torch.Tensor, samples: float) -> dict[str, float]:
        dead_LK = self._dead_experts.find(kind, load_LK, samples)
        if dead_LK is None:
            return {}
        if line := self._dead_experts.warning(kind, dead_LK):
            self.warn(f"step {step}: {line}")
        return {f"moe/{kind}/dead_experts": float(dead_LK.sum())}

    def _log_stragglers(self, step: int) -> float:
        self._stragglers.observe(max(1, step - self._logged_step), self._stopwatch.take(), self._device)
        if slow := self._stragglers.describe_slow():
            self.warn(f"step {step}: {slow}")
        return self._stragglers.slowest_ratio()

    def log_save(self, saved: Save) -> None:
        """On rank 0, log that a checkpoint is complete, with its size and the duration of saving.

        `saved`: facts about this save, such as step, bytes and seconds.
        """
        self.line(saved.line)
        self.write(saved.manifest["step"], saved.manifest["samples_seen"], saved.metrics())

    def log_images(self, step: int, images: dict[str, Image.Image]) -> None:
        """On rank 0, write images to TensorBoard and the trackers (`run.trackers`, e.g. Weights & Biases).

        `step`: the optimizer step after which the images were drawn. `images`: PIL images by tag (the name in the tracker).
        """
        for sink in self._sinks:
            for tag, image in images.items():
                sink.image(tag, step, image)

    def write(self, step: int, samples_seen: int, values: dict[str, float]) -> None:
        """On rank 0, write metrics to metrics.jsonl, TensorBoard and the trackers (`run.trackers`, e.g. Weights & Biases).

        Args:
            step: the optimizer step.
            samples_seen: number of training samples that the run has used up to this step.
            values: the metrics by name, e.g. "train/loss".
        """
        for sink in self._sinks:
            sink.write(step, samples_seen, values)

    def flush(self) -> None:
        """On rank 0, wait until metrics.jsonl has all values written so far."""
        if self._writer is not None:
            self._writer.flush()

    def advance(self, step: int) -> None:
        """Show on the progress bar that optimizer step `step` of the run is complete."""
        self._console.advance(step)

    def line(self, text: str) -> None:
        """On rank 0, print a line on the console and write it to train.log."""
        self._console.line(text)

    def warn(self, text: str) -> None:
        """On rank 0, write the warning `text` to train.log and to stderr."""
        if self._ranks.is_main:
            _log.warning("%s", text)
