"""Rank: runs the command `prove`, which checks a cluster, with one deliberate fault (see tests/lib/forks.py).

Each rank pretends to be a different node: n1, n2, ... A fault replaces functions in the agent process of the rank. The agent
forks the processes of the checks, so that these processes also have the fault. The keys of the argument `spec` are
    folder: the results are written to its subfolder `proof`
    fault: name in FAULTS; empty: none
    checks: names of the checks to run
    cases: [dtype, ZeRO stage, expert parallelism] of each training to check
    limit_s: time limit of each check in seconds
    arguments: further arguments of `prove`
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raphael_dist.checkpoint.reader import CheckpointReader
from raphael_dist.checkpoint.tensors import stacked
from raphael_dist.cli import prove as command
from raphael_dist.cluster import host_devices, preflight, prove_agent, prove_hardware, prove_model, prove_numbers
from raphael_dist.engine import ds_config
from raphael_dist.engine.engine import Engine, square_sum

EXPERT = "w1"


def after_init(change: Callable[[Engine], None]) -> None:
    """Call `change` with every `Engine` that is created from now on."""
    original = Engine.__init__

    @wraps(original)
    def init(self: Engine, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        change(self)

    Engine.__init__ = init  # type: ignore[method-assign]


def scaled_expert(engine: Engine) -> None:
    """Double the gradient of one expert: the one with the largest gradient in the first layer with stacked experts."""

    def double(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[gradient.flatten(1).norm(dim=1).argmax()] *= 2
        return gradient

    name = next(n for n in engine.fragments.shapes if stacked(n) and n.endswith(EXPERT))
    dict(engine.module.named_parameters())[name].register_hook(double)


def norm_without_experts() -> None:
    def grad_square(self: Engine) -> torch.Tensor:
        rest = [p.grad for name, p in self.module.named_parameters() if not stacked(name) and p.grad is not None]
        return square_sum(rest) / dist.get_world_size()  # ZeRO-0: every rank has all gradients

    Engine.grad_square = grad_square  # type: ignore[method-assign]


def dropped_micro_step() -> None:
    original = Engine.backward

    def backward(self: Engine, loss: torch.Tensor, last: bool | None = None) -> None:
        original(self, loss * (0.0 if self._micro_step == 1 else 1.0), last)

    Engine.backward = backward  # type: ignore[method-assign]


def other_seed() -> None:
    prove_model.TREE["run"] = {"seed": 7}


def bf16_sums() -> None:
    ds_config.sums_in_float32 = lambda dtype, accumulation: False


def wrong_expert() -> None:
    original = CheckpointReader.read

    def read(self: CheckpointReader, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        if kind != "master" or not stacked(name) or not name.endswith(EXPERT):
            return original(self, kind, name, start, numel)
        total = prod(self.shapes[name])
        return original(self, kind, name, 0, total).roll(-total // self.shapes[name][0])[start : start + numel]

    CheckpointReader.read = read  # type: ignore[method-assign]


def stale_weights() -> None:
    original = Engine.update

    def update(self: Engine, *arguments: Any) -> None:
        before = [p.detach().clone() for p in self.module.parameters()]
        original(self, *arguments)
        with torch.no_grad():
            for p, old in zip(self.module.parameters(), before, strict=True):
                p.copy_(old)

    Engine.update = update  # type: ignore[method-assign]


def other_torch() -> None:
    original = preflight.versions
    preflight.versions = lambda: original() | {"torch": "2.11.0"}


def slow_link() -> None:
    original = preflight._exchange

    def exchange(*args: Any) -> None:
        time.sleep(1.0)
        original(*args)

    preflight._exchange = exchange


def late_clock() -> None:
    original = time.time
    time.time = lambda: original() + 3600.5  # printed as +3600, also with an error of half a second


def shared_gpu() -> None:
    host_devices.gpu_use = lambda device: {"id": "GPU-1234", "used_gib": 31.0}


def wrong_bytes() -> None:
    original = dist.all_to_all_single

    def all_to_all(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        done = original(output, *args, **kwargs)
        output[-1] += 1
        return done

    dist.all_to_all_single = all_to_all


def hang() -> None:
    prove_hardware.Collective = lambda *args: time.sleep(1000)  # type: ignore[assignment,misc]


def hanging_agent() -> None:
    original = prove_agent.Worker.follow

    def follow(self: prove_agent.Worker, name: str, outcome: prove_agent.Outcome, first: bool) -> None:
        if name == "links":
            time.sleep(1000)
        original(self, name, outcome, first)

    prove_agent.Worker.follow = follow  # type: ignore[method-assign]


# By name: the ranks that have the fault (None: all), and how it is planted.
FAULTS: dict[str, tuple[tuple[int, ...] | None, Callable[[], None]]] = {
    "scaled expert": ((1,), lambda: after_init(scaled_expert)),
    "norm without experts": (None, norm_without_experts),
    "dropped micro-step": ((1,), dropped_micro_step),
    "other seed": ((2,), other_seed),
    "bf16 sums": (None, bf16_sums),
    "wrong expert": ((0,), wrong_expert),
    "stale weights": ((1,), stale_weights),
    "other torch": ((1,), other_torch),
    "slow link": ((3,), slow_link),
    "late clock": ((1,), late_clock),
    "shared GPU": ((1,), shared_gpu),
    "wrong bytes": ((1,), wrong_bytes),
    "hang": ((1,), hang),
    "hanging agent": ((1,), hanging_agent),
}


def main(spec: dict[str, Any]) -> int:
    """Run `prove` with the fault and the checks of `spec`; return its exit code."""
    rank = int(os.environ["RANK"])
    os.environ.update(SLURMD_NODENAME=f"n{rank + 1}", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    prove_agent.START_METHOD, prove_agent.GRACE_S = "fork", 10.0
    limit = {"limit_s": spec["limit_s"]} if "limit_s" in spec else {"limit_s": 600.0}
    prove_agent.CHECKS = {name: replace(prove_agent.CHECKS[name], **limit) for name in spec["checks"]}
    if "limit_s" in spec:
        prove_agent.START_S = 0.0
    if "cases" in spec:
        prove_numbers.cases = lambda world: [prove_model.Case(*case) for case in spec["cases"]]
    prove_numbers.SUMMED_STAGES, prove_numbers.SUMMED_STEPS = (2,), 24
    if spec.get("fault"):
        ranks, plant = FAULTS[spec["fault"]]
        if ranks is None or rank in ranks:
            plant()
    return command.main(["--out", str(Path(spec["folder"]) / "proof"), *spec.get("arguments", [])])
