"""Start real ranks (processes of torch.distributed) for a test, with a free port and a time-out, and end all of them."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raphael_dist.runtime.ranks import free_port
from tests.lib import forks

ROOT = Path(__file__).parents[2]
LONG = "RAPHAEL_LONG" in os.environ  # run all cases of tests of which `make test-slow` runs a part


def leave() -> None:
    """Wait for the other ranks, and destroy the process group.

    Workers call this before they exit. Otherwise threads of the group are still running when the process ends.
    """
    dist.barrier()
    dist.destroy_process_group()


def rank_env(world_size: int, gpus: bool = False) -> dict[str, str]:
    """Return environment variables for `world_size` ranks on this host, with a free port.

    RANK and LOCAL_RANK are 0; the caller replaces them for other ranks. GPUs are hidden from the ranks unless `gpus`.
    """
    return {
        **os.environ,
        **({} if gpus else forks.NO_GPU),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "OMP_NUM_THREADS": "1",
    }


def run_ranks(
    command: list[str], world_size: int, timeout: float = 240, exit_code: int = 0, *, fresh: bool = False, gpus: bool = False
) -> list[str]:
    """Run `python COMMAND` as `world_size` ranks; return the output of each rank.

    Args:
        command: program and arguments.
        world_size: number of ranks.
        timeout: seconds after which ranks are killed.
        exit_code: code with which every rank must exit.
        fresh: start a new Python process for each rank, and give it other string hashes. This shows whether results depend
            on the order of sets. By default ranks are forked from a process that has imported everything.
        gpus: run new processes as with `fresh`, and let them use the GPUs.

    Raises:
        AssertionError: a rank exits with another code, or does not end in time.
        subprocess.TimeoutExpired: a rank of `fresh` or `gpus` does not end in time.
    """
    env = rank_env(world_size, gpus)
    if fresh or gpus:
        codes, outputs = _fresh_ranks(command, world_size, timeout, env)
    else:
        with tempfile.TemporaryDirectory() as folder:
            codes = forks.server().run_program(Path(folder), world_size, timeout, command, env)
            outputs = [(Path(folder) / f"out-{rank}.txt").read_text() for rank in range(world_size)]
    for rank, (code, output) in enumerate(zip(codes, outputs, strict=True)):
        assert code == exit_code, f"rank {rank} of {world_size} exited with {code}:\n{output[-4000:]}"
    return outputs


def _fresh_ranks(command: list[str], world_size: int, timeout: float, env: dict[str, str]) -> tuple[list[int], list[str]]:
    ranks = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**env, "RANK": str(r), "LOCAL_RANK": str(r), "PYTHONHASHSEED": str(r + 1)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for r in range(world_size)
    ]
    deadline = time.monotonic() + timeout
    try:
        outputs = [p.communicate(timeout=max(1.0, deadline - time.monotonic()))[0] for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    return [p.returncode for p in ranks], outputs


def train_steps(folder: Path, world_size: int, **spec: Any) -> dict[str, Any]:
    """Run tests/workers/train_steps.py once with `spec`; return its results as `train_many` does."""
    return train_many(folder, world_size, [spec])[0]


def train_many(
    folder: Path,
    world_size: int,
    specs: list[dict[str, Any]],
    timeout: float = 240,
    *,
    fresh: bool = False,
    gpus: bool = False,
) -> list[dict[str, Any]]:
    """Train the tiny model with tests/workers/train_steps.py, for each of `specs` in turn in the same processes.

    `folder`: for the results of the ranks. `timeout`, `fresh`, `gpus`: as in `run_ranks`.

    Returns:
        For each spec: losses and gradient norms by step, bytes that each rank sent, the complete tensors from the ranks'
        parts (`put_together`), and "resumed": those at the start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(specs))
    out = str(folder / "out.pt")
    command = ["tests/workers/train_steps.py", out, str(folder / "spec.json")]
    run_ranks(command, world_size, timeout, fresh=fresh, gpus=gpus)
    return [_read_steps(f"{out}.{i}", world_size) for i in range(len(specs))]


def _read_steps(out: str, world_size: int) -> dict[str, Any]:
    parts = [torch.load(f"{out}.{rank}") for rank in range(world_size)]
    return {
        "losses": parts[0]["losses"],
        "norms": parts[0]["norms"],
        "sent": [part["sent"] for part in parts],
        "gathered": [part["gathered"] for part in parts],
        "spread": parts[0]["spread"],
        **put_together([part["fragments"] for part in parts]),
        "resumed": put_together([part["resumed"] for part in parts]),
    }


def put_together(ranks: list[list[tuple]]) -> dict[str, Any]:
    """Join the parts of tensors that the ranks own to complete tensors.

    `ranks`: for each rank its (parameter name, shape, index of the first element, {kind: elements}).

    Returns:
        "weights": flat fp32 weights by name, "moments": by kind and name, "covered": number of elements of all parts by
        name. This number is larger than that of the tensor if several ranks own the same elements.

    Raises:
        AssertionError: elements are missing.
    """
    whole: dict[str, dict[str, torch.Tensor]] = {"master": {}, "exp_avg": {}, "exp_avg_sq": {}}
    covered: dict[str, int] = {}
    for name, shape, start, kinds in (fragment for fragments in ranks for fragment in fragments):
        covered[name] = covered.get(name, 0) + kinds["master"].numel()
        for kind, values in kinds.items():
            flat = whole.setdefault(kind, {}).setdefault(name, torch.full((torch.Size(shape).numel(),), float("nan")))
            flat[start : start + values.numel()] = values.flatten()
    assert not any(w.isnan().any() for kind in whole.values() for w in kind.values()), "the fragments leave a gap"
    return {"weights": whole.pop("master"), "moments": whole, "covered": covered}
