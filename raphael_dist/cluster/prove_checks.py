"""The list of all checks of the command `prove`, in the order in which they run, with their time limits."""

from collections.abc import Callable
from dataclasses import dataclass

from raphael_dist.cluster import preflight, prove_hardware, prove_numbers, prove_plan, prove_saves
from raphael_dist.cluster.prove_results import Proof, Result


@dataclass(frozen=True)
class Check:
    """One check of the command `prove`, which tests whether a cluster trains correctly.

    Attributes:
        title: title in the report.
        run: the function that a worker process runs on each rank.
        limit_s: time limit in seconds, long enough for a slow CPU. Afterwards the worker process is ended.
        environment: whether a failure means a bad environment (exit code 2), such as a slow network. Otherwise a failure
            means wrong numbers (exit code 3).
        alone: whether the check needs worker processes that run no other check.
        ranks: a function from the number of all ranks to the number of ranks on which the check runs.
    """

    title: str
    run: Callable[[Proof], Result]
    limit_s: float
    environment: bool = False
    alone: bool = False
    ranks: Callable[[int], int] = lambda world: world


def _preflight(proof: Proof) -> Result:
    """Run the preflight (`preflight.Probe`), which writes a report file for the agents. Return an empty `Result`."""
    out = proof.folder / "preflight"
    out.mkdir(exist_ok=True)
    preflight.Probe(proof.config, proof.ranks, out, with_data=bool(proof.config.data.shards)).run()
    return Result()


def fewer(world: int) -> int:
    """Return on how many ranks `prove` resumes a run that was saved on `world` ranks: half of them, at least 1."""
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
    "plan": Check("A measured step compared with the planner's prediction", prove_plan.plan, 300),
    "micro_batch": Check("The largest micro-batch that fits", prove_plan.micro_batch, 300),
    KILL: Check("Save, then kill all ranks during the next save", prove_saves.save_and_kill, 300, alone=True),
    "resume": Check("Resume the killed run on fewer ranks", prove_saves.resume, 300, alone=True, ranks=fewer),
}
