"""Checks of `prove` that compare training on all ranks with one process: gradients, gradient norm, weights, sums.

Every rank also runs the same training alone, in one process, as a reference. With it, the rank compares its own gradients
before they are reduced over ranks, and then its part of the weights. The first difference is reported with the rank,
parameter and expert. Later differences are not reported, because they follow from the first one.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from raphael_dist.checkpoint.tensors import stacked
from raphael_dist.cluster.gradient_comparison import differs, pieces
from raphael_dist.cluster.prove_model import Case, Reference, Slots, case_config, cases, digest, position_batch
from raphael_dist.cluster.prove_results import Problem, Proof, Result
from raphael_dist.config.schema import Config
from raphael_dist.engine.ds_keys import Tree
from raphael_dist.engine.engine import Engine
from raphael_dist.engine.zero_interface import global_shape
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.losses import compute_losses
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.runtime.ranks import gather_objects

STEPS = 3
# Relative differences that are allowed in losses and norms, in the gradient of a parameter or expert, and in all weights.
TOLERANCE = {"float32": (1e-4, 2e-3, 2e-3), "bfloat16": (2e-2, 0.2, 4e-2)}
SMALL_SHARE = 1e-3  # gradients below this share of the whole norm are mostly rounding errors in bfloat16
SMALL = {"reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000, "stage3_param_persistence_threshold": 100}
SUMMED_STAGES, SUMMED_STEPS = (1, 2, 3), 64  # micro-steps; sums rounded to bfloat16 are 0.5% wrong after 24 of them
SUM_TOLERANCE = 0.003  # the reduction over ranks adds some rounding, which grows with their number


class Steps:
    """The training in one process with which the training on several ranks is compared.

    Attributes:
        weights: item 0 has the initial weights by parameter name, item s those after s steps.
        losses: for each step, the loss of every sample of the global batch.
        gradients: for each step, the gradients of the global batch by parameter name, before clipping.
        norms: for each step, the norm of these gradients.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self._reference = Reference(config, device)
        self._batch, self._tolerance = config.train.global_batch_size, TOLERANCE[config.train.dtype][0]
        self.weights: list[dict[str, Tensor]] = [self._copy()]
        self.losses: list[Tensor] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.norms: list[float] = []

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self._reference.weights.items()}

    def take(self, steps: int) -> "Steps":
        """Train until `steps` steps have been taken in total since this object was created; return this object."""
        while len(self.norms) < steps:
            slots = self.slots(len(self.norms))
            with torch.no_grad():
                self.losses.append(self._reference.losses(slots))
            self.gradients.append(self._reference.gradients(slots))
            # Clipping changes them in place.
            self._reference.step({name: g.clone() for name, g in self.gradients[-1].items()})
            self.norms.append(self._reference.norm)
            self.weights.append(self._copy())
        return self

    def slots(self, step: int) -> Slots:
        """Return (position in the order of training samples, weight 1) of each sample of the batch of a step (from 0)."""
        return [(position, 1.0) for position in range(step * self._batch, (step + 1) * self._batch)]

    def own_loss(self, step: int, slots: Slots, before: int = 0) -> float:
        """Return the summed loss of some samples of step `step` (from 0) in the training in one process.

        `slots`: (position in the order of training samples, weight) of each sample. `before`: use the weights of this many
        steps earlier, to recognise a rank that missed an update.
        """
        if before == 0:
            return sum(weight * float(self.losses[step][position - step * self._batch]) for position, weight in slots)
        with torch.no_grad():
            for name, p in self._reference.weights.items():
                p.copy_(self.weights[step - before][name])
            loss = float(self._reference.losses(slots).sum())
            for name, p in self._reference.weights.items():
                p.copy_(self.weights[-1][name])
        return loss

    def loss_problem(self, step: int, slots: Sequence[Slots], loss: float) -> Problem | None:
        """Compare a rank's loss in step `step` (from 0) with the training in one process; return a problem if they differ.

        `slots`: for each micro-step, (position in the order of training samples, weight) of each of a rank's samples.
        `loss`: sum of the weighted losses of these samples, as this rank computed it.
        """
        own = [slot for micro in slots for slot in micro]
        reference = self.own_loss(step, own)
        if math.isclose(loss, reference, rel_tol=self._tolerance, abs_tol=1e-6):
            return None
        if step and math.isclose(loss, self.own_loss(step, own, before=1), rel_tol=self._tolerance):
            return Problem(f"this rank computes step {step + 1} with stale weights: those before the update of step {step}")
        return Problem(
            f"this rank's loss in step {step + 1} is {loss:.6g}, but {reference:.6g} in a training in one process"
        )

    def norm_problem(self, step: int, norm: float) -> Problem | None:
        """Return a problem if `norm`, the gradient norm of step `step` (from 0), differs from training in one process."""
        reference = self.norms[step]
        if math.isclose(norm, reference, rel_tol=self._tolerance):
            return None
        rest = [float(g.square().sum()) for name, g in self.gradients[step].items() if not stacked(name)]
        without = math.isclose(norm, math.sqrt(sum(rest)), rel_tol=self._tolerance)
        why = ": the gradients of the experts are left out" if without else ""
        return Problem(f"the gradient norm of step {step + 1} is {norm:.6g}, but {reference:.6g} in one process{why}", False)


@cache
def _steps(dtype: str, world: int, device: torch.device) -> Steps:
    return Steps(case_config(Case(dtype, 0, 1), world), device).take(STEPS)


def seeds(proof: Proof) -> Result:
    """Check that all ranks compute the same initial weights and the same random batch from the run's seed. Collective.

    `proof`: this rank. Returns measurements and problems of this rank.
    """
    config = case_config(Case("float32", 0, 1), proof.ranks.world_size)
    reference = Reference(config, torch.device("cpu"))
    batch = position_batch(config, [(3, 1.0)], reference.num_blocks)
    own = {"initial weights": digest(reference.weights.values()), "noise of a sample": digest(batch.tensors())}
    every = gather_objects(own)
    problems = []
    for what, value in own.items():
        values = [other[what] for other in every]
        usual = max(values, key=values.count)
        if value != usual:
            problems.append(Problem(f"this rank computes other {what} than most ranks, so it has another seed"))
    return Result(["initial weights and noise are the same on all ranks"], problems)


def gradients(proof: Proof) -> Result:
    """Train three steps with every tested combination of dtype, ZeRO stage and expert parallelism. Collective.

    The training is compared with the same training in one process: losses, gradients before and after the reduction over
    ranks, gradient norms and weights.

    `proof`: this rank and its device. Returns measurements and problems of this rank.
    """
    problems: list[Problem] = []
    worst: dict[str, float] = {}
    every = cases(proof.ranks.world_size)
    for case in every:
        proof.mark(str(case))
        difference, problem = _compare_case(proof, case)
        worst[case.dtype] = max(worst.get(case.dtype, 0.0), difference)
        problems += [problem] if problem else []
    lines = [f"{len(every)} combinations, {STEPS} steps each (ep: ranks that share experts): {', '.join(map(str, every))}"]
    lines += [f"weights after {STEPS} steps, {dtype}: within {value:.0e} of one process" for dtype, value in worst.items()]
    return Result(lines, problems)


def _compare_case(proof: Proof, case: Case) -> tuple[float, Problem | None]:
    """Train with the settings of `case`, and compare with training in one process. Collective.

    Returns the relative difference (L2 norm) of this rank's weights from those of training in one process, and the first
    problem or None.
    """
    world = proof.ranks.world_size
    expected = _steps(case.dtype, world, proof.device)
    run = Trained(proof, case_config(case, world), {"stage": case.stage, **SMALL})
    problem: Problem | None = None
    for step in range(STEPS):
        proof.mark(f"{case}, step {step + 1}")
        slots, loss = run.accumulate(step)
        if step == 0:
            problem = run.local_problem(slots)
        problem = problem or expected.loss_problem(step, slots, loss)
        before = run.masters()
        run.update()
        if step == 0 and problem is None:
            problem = _reduced_problem(expected, run, before)
        problem = problem or expected.norm_problem(step, run.engine.grad_norm)
    difference = weights_difference(expected.weights[STEPS], run)
    if problem is None and not difference < TOLERANCE[case.dtype][2]:
        problem = Problem(f"weights after {STEPS} steps differ by {difference:.0e} from a training in one process", False)
    return difference, problem and problem.in_case(str(case))


class Trained:
    """The small model of `prove` in a training engine. It records this rank's gradients before the reduction over ranks."""

    def __init__(self, proof: Proof, config: Config, zero: Tree) -> None:
        self.config, self._proof = config, proof
        self.plan = BatchPlan.of(config, proof.ranks.world_size)
        self.engine = Engine(config, {"zero_optimization": zero}, self.plan, proof.device)
        self._schedule = NoiseSchedule.create(config.diffusion, proof.device)
        self._micro = 0
        self.recorded: list[dict[str, Tensor]] = []  # by micro-step
        self._starts: dict[str, int] = {}  # first element of this rank's experts, in the whole parameter
        for name, p in self.engine.module.named_parameters():
            self._starts[name] = global_shape(p)[1]
            p.register_hook(lambda g, name=name: self._record(name, g))

    def _record(self, name: str, gradient: Tensor) -> None:
        recorded = self.recorded[self._micro]
        value = gradient.detach().float().clone()
        recorded[name] = recorded[name] + value if name in recorded else value

    def accumulate(self, step: int) -> tuple[list[Slots], float]:
        """Run forward and backward of all micro-steps of step `step` (from 0). Collective.

        Returns for each micro-step (position in the order of training samples, weight) of each of this rank's samples, and
        the summed loss of all these samples.
        """
        first, plan = step * self.plan.global_batch_size, self.plan
        slots: list[Slots] = [plan.slots(first, self._proof.ranks.rank, micro) for micro in range(plan.accumulation)]
        self.recorded = [{} for _ in slots]
        total = 0.0
        for self._micro, micro in enumerate(slots):
            batch = position_batch(self.config, micro, self.engine.module.num_blocks).to(self._proof.device)
            loss = compute_losses(self.engine, batch, self._schedule, self.config, self.engine.dtype).total.sum()
            self.engine.backward(loss * self.plan.loss_scale)
            total += float(loss.detach())
        return slots, total

    def update(self) -> None:
        """Reduce the gradients over ranks, and change the weights. Collective."""
        self.engine.step(self.config.optim.lr)

    def masters(self) -> list[Tensor]:
        """Return copies of the fp32 weights that this rank owns under ZeRO: one tensor per range of a parameter."""
        return [master.detach().clone() for master in self.engine.fragments.masters()]

    def local_problem(self, slots: Sequence[Slots]) -> Problem | None:
        """Compare this rank's gradients, before they are reduced over ranks, with those of a training in one process.

        `slots`: what the last call of `accumulate` returned. Returns a problem that states the first difference, or None.
        """
        reference = Reference(self.config, self._proof.device)
        micro_steps = [self._expected(reference, micro, number) for number, micro in enumerate(slots)]
        norm = math.sqrt(sum(float(g.square().sum()) for micro in micro_steps for g in micro.values()))
        tolerance = TOLERANCE[self.config.train.dtype][1]
        for number, (actual, expected) in enumerate(zip(self.recorded, micro_steps, strict=True)):
            nothing = all(not g.any() for g in actual.values())
            if nothing and any(g.any() for g in expected.values()):
                return Problem(f"this rank's gradient of micro-step {number + 1} of {len(slots)} is missing")
            for name, gradient in expected.items():
                value = actual.get(name, torch.zeros_like(gradient))
                shape, start = self.engine.fragments.shapes[name], self._starts[name]
                for label, part in pieces(name, shape, start, value.numel()):
                    text = differs(value.flatten()[part], gradient.flatten()[part], SMALL_SHARE * norm, tolerance)
                    if text:
                        return Problem(f"this rank's local gradient of {label} is {text} that of training in one process")
        return None

    def _expected(self, reference: Reference, micro: Slots, number: int) -> dict[str, Tensor]:
        """Compute in one process the gradients that this rank must have in micro-step `number`, by parameter name.

        The loss is over this rank's samples `micro`; for sharded experts, over those of all ranks in the group that shares
        the experts. Gradients are multiplied by the number of ranks, because the reduction over ranks takes the mean.
        """
        world, ep = self._proof.ranks.world_size, self.config.parallel.space_ep
        own = reference.gradients(micro)
        group = own
        if ep > 1:
            first = self._proof.ranks.rank // ep * ep
            members = [self.plan.slots(0, rank, number) for rank in range(first, first + ep)]
            group = reference.gradients([slot for slots in members for slot in slots])
        expected = {}
        for name, p in self.engine.module.named_parameters():
            start, experts = getattr(p, "expert_slice", (0, None))
            gradient = own[name] if experts is None else group[name][start : start + p.shape[0]]
            expected[name] = gradient * world  # because the reduction then takes the mean over ranks
        return expected


def _reduced_problem(expected: Steps, run: Trained, before: list[Tensor]) -> Problem | None:
    """Compare this rank's part of the reduced gradient with training in one process; return a problem or None.

    The reduced gradient is computed from the change of the weights in the first step of SGD.

    `expected`: the training in one process. `run`: the training on all ranks. `before`: the weights before this step.
    """
    clip, norm, lr = run.config.optim.max_grad_norm, run.engine.grad_norm, run.config.optim.lr
    scale = lr * min(1.0, clip / (norm + 1e-6))
    tolerance = TOLERANCE[run.config.train.dtype][1]
    for fragment, old in zip(run.engine.fragments, before, strict=True):
        change = (old - fragment.master) / scale
        gradient = expected.gradients[0][fragment.name].flatten()[fragment.start : fragment.start + fragment.numel]
        rounding = 2e-7 * float(old.abs().max()) / scale * math.sqrt(old.numel()) / tolerance
        for label, part in pieces(fragment.name, fragment.shape, fragment.start, fragment.numel):
            text = differs(change[part], gradient[part].to(change), SMALL_SHARE * expected.norms[0] + rounding, tolerance)
            if text:
                return Problem(f"the reduced gradient of {label} is {text} that of a training in one process", False)
    return None


def weights_difference(expected: dict[str, Tensor], run: Trained) -> float:
    """Return the relative difference (L2 norm) between the fp32 weights that this rank stores and the expected ones.

    `expected`: the whole (not sharded) weights by parameter name. `run`: the distributed training on this rank.
    """
    error, size = 0.0, 0.0
    for f in run.engine.fragments:
        reference = expected[f.name].flatten()[f.start : f.start + f.numel].to(f.master)
        error += float((f.master - reference).square().sum())
        size += float(reference.square().sum())
    return math.sqrt(error / size) if size else 0.0


def sums(proof: Proof) -> Result:
    """Check that gradients of many bfloat16 micro-steps are summed in float32, not in bfloat16. Collective.

    The engine's sum, computed from the change of the weights in a step of SGD, is compared with a float32 sum of the same
    gradients.

    `proof`: this rank and its device. Returns measurements and problems of this rank.
    """
    world = proof.ranks.world_size
    problems, worst = [], 0.0
    tolerance = SUM_TOLERANCE * math.sqrt(1 + math.log2(world))
    for stage in SUMMED_STAGES:
        case = Case("bfloat16", stage, 1)
        proof.mark(str(case))
        config = case_config(case, world, batch=SUMMED_STEPS * world, micro=1)
        run = Trained(proof, config, {"stage": stage})
        run.accumulate(0)
        before = run.masters()
        run.update()
        summed = {}
        for name in sorted(run.engine.fragments.shapes):
            total = torch.stack([micro[name] for micro in run.recorded if name in micro]).sum(0)
            dist.all_reduce(total)
            summed[name] = total.flatten() / world
        scale = config.optim.lr * min(1.0, config.optim.max_grad_norm / (run.engine.grad_norm + 1e-6))
        error, size = 0.0, 0.0
        for f, old in zip(run.engine.fragments, before, strict=True):
            part = summed[f.name][f.start : f.start + f.numel].to(old)
            error += float(((old - f.master) / scale - part).square().sum())
            size += float(part.square().sum())
        difference = math.sqrt(error / size) if size else 0.0
        worst = max(worst, difference)
        if not difference < tolerance:
            text = f"the sum of gradients over {SUMMED_STEPS} micro-steps is {difference:.2%} away from the float32 sum"
            problems.append(Problem(f"{text}: it is rounded to bfloat16 after each micro-step", False).in_case(str(case)))
    return Result([f"sums over {SUMMED_STEPS} micro-steps in bfloat16: within {worst:.2%} of float32"], problems)
