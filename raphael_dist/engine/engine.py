"""Builds the DeepSpeed engine: the only caller of `deepspeed.initialize`, and the place that knows its habits."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from raphael_dist.config import Config, Optim
from raphael_dist.engine import ds_config, expert_groups
from raphael_dist.engine.fragments import Fragments
from raphael_dist.engine.gradient_noise import GradientNoise
from raphael_dist.engine.zero import Collected, adapter
from raphael_dist.errors import UserError
from raphael_dist.model.compiling import compile_parts
from raphael_dist.model.device import is_gpu
from raphael_dist.model.graphs import replay
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel import expert_parallel
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.parallel.ranks import all_or_none, all_reduce_sum

_ROW = 2**16  # of `square_sum`


class Engine:
    """A model under DeepSpeed with one optimizer step per `accumulation` calls of `backward`.

    Attributes: module (the U-Net), fragments (this rank's fp32 weights), traffic (bytes sent between experts' ranks), stage
    (ZeRO), dtype, device.
    """

    def __init__(
        self,
        config: Config,
        json_tree: dict[str, Any],
        plan: BatchPlan,
        device: torch.device,
        model: RaphaelUNet | None = None,
    ) -> None:
        """`model`: equal on every rank; None makes a new one."""
        self.config, self.plan, self.device = config, plan, device
        self.dtype = getattr(torch, config.train.dtype)
        self.ds_config = ds_config.merge(config, json_tree, plan.accumulation, plan.world_size)
        self.stage = ds_config.zero_stage(self.ds_config)
        torch.manual_seed(config.run.seed)  # every rank starts from the same weights
        model = RaphaelUNet(config) if model is None else model
        # ZeRO-3 frees weights between forward and backward; only re-entrant recomputation gathers them again.
        for part in model.modules():  # a control is one too
            if isinstance(part, RaphaelUNet):
                part.gathers_weights = self.stage == 3
        self.traffic = expert_parallel.apply(model, config, plan, expert_groups.join)
        eta = config.recipe.gradient_noise
        self._noise = GradientNoise(model, eta, config.run.seed) if eta else None
        expert_groups.mark(model, config.model.space_experts + config.model.time_experts)
        if config.train.compile:
            _compile(model, config, self.stage, device)
        if config.train.cuda_graphs and not is_gpu(device):
            raise ds_config.no_graphs("needs a GPU")
        optimizer = _optimizer(expert_groups.parameter_groups(model), config.optim)
        self._engine = _initialise(model, optimizer, self.ds_config)
        self.module: RaphaelUNet = self._engine.module
        self._zero = adapter(self._engine.optimizer, self.module, plan.world_size)
        if config.train.cuda_graphs:
            if not isinstance(self._zero, Collected):
                raise ds_config.no_graphs("goes with a reduce_bucket_size of at least half the parameters")
            replay(self.module, self._zero.views)
        self._zero.quiet()
        self._engine.gradient_clipping = lambda: 0.0  # clipped here, by the norm that the step knows anyway
        self.fragments = Fragments(self.module, self._zero, optimizer)
        decayed = config.optim.kind == "adamw" and config.optim.weight_decay > 0
        self._decayed = [f.master for f in self.fragments if decayed and decays(f.name)]
        self.grad_norm = math.nan
        self._micro_step = 0
        self._touched: set[str] | None = self._watch_gradients() if config.train.check_gradients else None

    def __call__(self, *args: Any) -> Any:
        """Run the model's forward pass through DeepSpeed."""
        return self._engine(*args)

    def backward(self, loss: Tensor, last: bool | None = None, step: int = 0) -> None:
        """Accumulate gradients of one micro-step; the last of a step also reduces them over ranks.

        `last`: whether this is the step's last; None counts `accumulation` calls. `step`: the optimizer step, from 1, by
        which noise on gradients is drawn; 0: none.
        """
        self._micro_step += 1
        last = self._micro_step == self.plan.accumulation if last is None else last
        self._engine.set_gradient_accumulation_boundary(last)
        if self._noise is not None:
            self._noise.step = step if last else 0
        self._zero.begin(first=self._micro_step == 1)
        # DeepSpeed divides the loss by gradient_accumulation_steps; `plan.loss_scale` makes up for it.
        self._engine.backward(loss)
        if self._touched is not None:
            all_or_none(self._check_gradients)
        if not last:
            self._engine.step()

    def _watch_gradients(self) -> set[str]:
        touched: set[str] = set()
        for name, p in self.module.named_parameters():
            if p.requires_grad:
                p.register_hook(lambda _, name=name: touched.add(name))
        return touched

    def _check_gradients(self) -> None:
        """ZeRO-1 and 2 reduce what each rank has: a gradient that is missing on one is added to another parameter's."""
        assert self._touched is not None
        missing = [name for name in self.fragments.shapes if name not in self._touched]
        self._touched.clear()
        if missing:
            raise RuntimeError(f"{len(missing)} parameters got no gradient on this rank, the first {missing[0]}")

    @torch.no_grad()
    def grad_square(self) -> Tensor:
        """Return this rank's part of the squared norm of a step's gradients, float64 [], on its device.

        The sum over all ranks is the square of the global norm before clipping; it is not finite when a gradient is not.
        """
        return square_sum(self._zero.gradients()).to(self.device) / self._zero.copies

    def step(self, lr: float) -> bool:
        """Clip and apply the accumulated gradients with learning rate `lr`; call after the last `backward` of a step.

        Returns False on all ranks, with weights and moments unchanged, when the gradients of any are not finite. Collective.
        """
        norm = math.sqrt(float(all_reduce_sum(self.grad_square(), self.device)))
        if math.isfinite(norm):
            self.update(lr, norm)
        else:
            self.discard()
        return math.isfinite(norm)

    @torch.no_grad()
    def update(self, lr: float, norm: float) -> None:
        """Clip and apply the accumulated gradients; `norm`, finite: their global norm, which all ranks know alike."""
        assert self._engine.is_gradient_accumulation_boundary()
        clip, self.grad_norm, self._micro_step = self.config.optim.clip, norm, 0
        if clip and norm > clip:
            torch._foreach_mul_(list(self._zero.gradients()), clip / (norm + 1e-6))
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        if self._decayed:
            torch._foreach_mul_(self._decayed, 1 - lr * self.config.optim.weight_decay)
        self._engine.step()

    def discard(self) -> None:
        """Drop the accumulated gradients instead of applying them: weights and moments stay. On all ranks or on none."""
        self.grad_norm, self._micro_step = math.inf, 0
        with self._zero.drop():
            self._engine.step()

    def save_deepspeed(self, folder: Path) -> None:
        """Write DeepSpeed's own checkpoint, to compare with; training never reads it. Collective."""
        self._engine.save_checkpoint(str(folder), tag="benchmark")


def _compile(model: RaphaelUNet, config: Config, stage: int, device: torch.device) -> None:
    if stage == 3:
        raise UserError(
            "train.compile=true does not go with ZeRO-3, which gathers weights by hooks inside the parts that are compiled; "
            "use ds_configs/zero2.json or train.compile=false"
        )
    compile_parts(model, device, dynamic=config.parallel.spreads or len(config.image.buckets) > 1)


def square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of all squares, float64 []: in float32 within rows of `_ROW` numbers, since longer ones lose digits."""
    rows, rest = [], []
    for flat in (t.reshape(-1) for t in tensors):
        whole = flat.numel() // _ROW * _ROW
        if whole:
            rows.append(torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1, dtype=torch.float32))
        if whole < flat.numel():
            rest.append(flat[whole:])
    norms = torch.cat([*rows, torch.stack(torch._foreach_norm(rest, dtype=torch.float32))]) if rest else torch.cat(rows)
    return norms.double().square().sum()


def decays(name: str) -> bool:
    """Return whether `optim.weight_decay` acts on a parameter: on matrices and kernels, not on norms, biases and gates.

    By name, since stacked experts' biases [K, F] look like matrices, and flat parts under ZeRO have no shape.
    """
    owner, _, leaf = name.rpartition(".")
    norm = owner.rpartition(".")[2].removeprefix("conv_").startswith("norm")
    return (
        leaf.split("_lora_")[0] in ("weight", "w1", "w2")
        and not norm
        and not name.startswith(("text_gates.", "time_gates."))
    )


def _optimizer(parameters: list[dict[str, Any]], optim: Optim) -> torch.optim.Optimizer:
    if optim.kind == "sgd":
        return torch.optim.SGD(parameters, lr=optim.lr)
    # Weight decay is the engine's (`update`): torch's acts on whole groups, and more groups would cut ZeRO's buffers anew.
    return torch.optim.AdamW(parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=0.0, fused=True)


def _not_of_a_dropped_step(record: logging.LogRecord) -> bool:
    # `discard` makes DeepSpeed see an overflow. Whether a step was skipped, and why, is the trainer's to say.
    return "OVERFLOW!" not in record.getMessage()


def import_deepspeed() -> Any:
    """Return the module `deepspeed`, with its shared-memory all-reduce turned off.

    On CPUs it would compile that in C++ on first use, for about a minute; gloo needs none.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _initialise(model: nn.Module, optimizer: torch.optim.Optimizer, tree: dict[str, Any]) -> Any:
    deepspeed = import_deepspeed()
    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.WARNING)
    log.addFilter(_not_of_a_dropped_step)
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=tree, dist_init_required=False)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{error.title} in the DeepSpeed JSON: {where}: given {first['input']!r}; {first['msg']}") from None
    return engine
