"""The list of the checks of `prove`, in order, with their time limits."""

from collections.abc import Callable
from dataclasses import dataclass

from raphael_dist.cluster import preflight, prove_hardware, prove_numbers, prove_saves
from raphael_dist.cluster.prove_results import Proof, Result


@dataclass(frozen=True)
class Check:
    """One check of `prove`.

    Attributes:
        title: title in the report.
        run: the function that a worker process runs on each rank.
        limit_s: time limit in seconds, long enough for a slow CPU. Then the worker is ended.
        environment: whether a failure means a bad environment (exit code 2) and not wrong numbers (exit code 3).
        alone: whether it runs in worker processes of its own.
        ranks: returns on how many ranks it runs, given the number of all ranks.
    """

    title: str
    run: Callable[[Proof], Result]
    limit_s: float
    environment: bool = False
    alone: bool = False
    ranks: Callable[[int], int] = lambda world: world


def _preflight(proof: Proof) -> Result:
    """Check this rank on its own, then links and clocks with the others; the agents judge the reports."""
    out = proof.folder / "preflight"
    out.mkdir(exist_ok=True)
    preflight.Probe(proof.config, proof.ranks, out, with_data=bool(proof.config.data.shards)).run()
    return Result()


def fewer(world: int) -> int:
    """Return the number of ranks on which a run that was saved on `world` ranks is resumed."""
    return max(1, world // 2)


PREFLIGHT, KILL = "environment", "save"
CHECKS = {
    PREFLIGHT: Check("Environment: versions, clocks, disk, GPUs, network", _preflight, 180, environment=True, alone=True),
    "links": Check("Latency and bandwidth of collectives", prove_hardware.links, 300, environment=True),
    "seeds": Check("Equal initial weights and noise on all ranks", prove_numbers.seeds, 120),
    "gradients": Check("Gradients, their norm and weights compared with one process", prove_numbers.gradients, 900),
    "sums": Check("Gradient sums over many micro-steps in bfloat16", prove_numbers.sums, 600),
    "graphs": Check("CUDA graphs", prove_hardware.graphs, 120),
    "waits": Check("Waits of the host for the GPU", prove_hardware.waits, 300),
    "plan": Check("A measured step compared with the planner's prediction", prove_hardware.plan, 300),
    "micro_batch": Check("The largest micro-batch that fits", prove_hardware.micro_batch, 300),
    KILL: Check("Save, then kill all ranks during the next save", prove_saves.save_and_kill, 300, alone=True),
    "resume": Check("Resume the killed run on fewer ranks", prove_saves.resume, 300, alone=True, ranks=fewer),
}
