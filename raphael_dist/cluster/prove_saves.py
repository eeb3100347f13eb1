"""Checks of `prove` for checkpoints: a run is killed while it saves, then resumed on fewer ranks with another ZeRO stage."""

import os
import signal
from math import prod

import torch
from torch import Tensor

from raphael_dist.checkpoint.progress import Progress
from raphael_dist.checkpoint.save import CheckpointStore
from raphael_dist.checkpoint.tensors import stacked
from raphael_dist.cluster.gradient_comparison import pieces
from raphael_dist.cluster.prove_model import ADAM_EPS, Case, case_config, expert_sizes
from raphael_dist.cluster.prove_numbers import TOLERANCE, Steps, Trained, weights_difference
from raphael_dist.cluster.prove_results import Problem, Proof, Result
from raphael_dist.config.schema import Config
from raphael_dist.text import counted

SAVED_STEP, RESUMED_STEPS = 2, 2
DATA = {"data.shards": "synthetic"}


def _run_config(proof: Proof, world: int, ep: int) -> Config:
    """Return the configuration of the run that is killed and resumed, on `world` ranks with experts sharded over `ep`.

    The global batch size is the same before and after resuming: it follows from the launcher's number of ranks.
    """
    optim = {"kind": "adamw", "lr": 3e-3, "eps": ADAM_EPS, "max_grad_norm": 0.5}
    run = {"dir": str(proof.folder / "resume")}
    case = Case("float32", 2, ep)
    return case_config(case, world, batch=4 * proof.launched - 1, optim=optim, run=run)


def save_and_kill(proof: Proof) -> Result:
    """Train two steps with sharded experts, save a checkpoint, train on, and kill all ranks during the next save (SIGKILL).

    The check `resume` uses the checkpoint. `proof`: this rank, its device, and the folder to save in. Never returns a
    result, because this process is killed, too.
    """
    world = proof.ranks.world_size
    config = _run_config(proof, world, expert_sizes(world)[-1])
    run = Trained(proof, config, {"stage": 2})
    store = CheckpointStore(config, proof.ranks, run.engine.fragments, None, DATA)
    store.root.mkdir(parents=True, exist_ok=True)
    for step in range(SAVED_STEP + 2):
        proof.mark(f"step {step + 1}")
        run.accumulate(step)
        run.update()
        progress = Progress(step + 1, (step + 1) * config.train.global_batch_size, step + 1, {})
        if step + 1 == SAVED_STEP:
            store.save(progress)
    proof.mark("killed")
    store.begin(progress)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def resume(proof: Proof) -> Result:
    """Resume the run that `save_and_kill` left, on fewer ranks, with ZeRO-1 and without expert parallelism. Collective.

    The loaded weights, and the losses, gradient norms and weights of the following steps must equal those of a training in
    one process that was never stopped.

    `proof`: this rank, its device, and the folder with the run. Returns measurements and problems of this rank.
    """
    world = proof.ranks.world_size
    config = _run_config(proof, world, 1)
    run = Trained(proof, config, {"stage": 1})
    store = CheckpointStore(config, proof.ranks, run.engine.fragments, None, DATA)
    proof.mark("resuming")
    progress = store.resume()
    if progress is None:
        return Result([], [Problem("--out has no complete checkpoint. Check that all nodes share this folder", False)])
    expected = Steps(config, proof.device).take(progress.step + RESUMED_STEPS)
    problem = _restored_problem(expected.weights[progress.step], run)
    for step in range(progress.step, progress.step + RESUMED_STEPS):
        proof.mark(f"step {step + 1}")
        slots, loss = run.accumulate(step)
        problem = problem or expected.loss_problem(step, slots, loss)
        run.update()
        problem = problem or expected.norm_problem(step, run.engine.grad_norm)
    difference = weights_difference(expected.weights[-1], run)
    if problem is None and not difference < TOLERANCE["float32"][2]:
        problem = Problem(
            f"this rank's weights {RESUMED_STEPS} steps after resuming differ by {difference:.0e} from those of a training "
            "in one process",
            False,
        )
    before = proof.launched
    lines = [
        f"saved by {counted(before, 'rank')} (ZeRO-2, ep {expert_sizes(before)[-1]}), killed during the next save, resumed "
        f"at step {progress.step} on {counted(world, 'rank')} (ZeRO-1, ep 1)",
        f"weights {RESUMED_STEPS} steps later: within {difference:.0e} of one process",
    ]
    return Result(lines, [problem] if problem else [])


def _restored_problem(expected: dict[str, Tensor], run: Trained) -> Problem | None:
    for f in run.engine.fragments:
        whole = expected[f.name].flatten().to(f.master)
        for label, part in pieces(f.name, f.shape, f.start, f.numel):
            start, values = f.start + part.start, f.master[part]
            if torch.allclose(values, whole[start : start + values.numel()], rtol=1e-4, atol=1e-5):
                continue
            each = prod(f.shape[1:])
            for other in range(f.shape[0]) if stacked(f.name) else ():
                at = other * each + start % each
                if torch.allclose(values, whole[at : at + values.numel()], rtol=1e-4, atol=1e-5):
                    return Problem(f"after resuming, {label} holds the weights of expert {other}")
            return Problem(f"after resuming, the weights of {label} are not those that were saved")
    return None
