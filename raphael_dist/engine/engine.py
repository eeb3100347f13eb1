"""Builds the DeepSpeed engine: the only caller of `deepspeed.initialize`, and the place that knows its habits."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from raphael_dist.config import Config, Optim
from raphael_dist.convert.load import load_initial
from raphael_dist.engine import ds_config, expert_groups
from raphael_dist.engine.fragments import Fragments
from raphael_dist.errors import UserError
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.parallel import expert_parallel
from raphael_dist.parallel import ranks as parallel
from raphael_dist.parallel.batch_plan import BatchPlan

# DeepSpeed drops a step whose gradient norm is not finite, with all that this takes in each stage. Where each of its
# optimizers takes the norm from, and an answer that is infinite; under ZeRO-0 torch's optimizer does nothing instead.
_DROP: dict[str, Callable[..., Any]] = {
    "scaled_global_norm": lambda *_, **__: torch.tensor(math.inf),  # ZeRO-1 and 2
    "_get_norm_groups": lambda *_, **__: [torch.tensor(math.inf)],  # ZeRO-3
    "get_grads_for_norm": lambda *_, **__: ([torch.tensor([math.inf])], {}),  # bfloat16 under ZeRO-1
    "step": lambda *_, **__: None,  # ZeRO-0
}


class Engine:
    """A model under DeepSpeed with one optimizer step per `accumulation` calls of `backward`.

    Attributes: module (the U-Net), fragments (this rank's fp32 weights), traffic (bytes sent between experts' ranks), stage
    (ZeRO), dtype, device.
    """

    def __init__(self, config: Config, json_tree: dict[str, Any], plan: BatchPlan, device: torch.device) -> None:
        self.config, self.plan, self.device = config, plan, device
        self.dtype = getattr(torch, config.train.dtype)
        self.ds_config = ds_config.merge(config, json_tree, plan.accumulation, plan.world_size)
        self.stage = ds_config.zero_stage(self.ds_config)
        torch.manual_seed(config.run.seed)  # every rank starts from the same weights
        model = RaphaelUNet(config)
        if config.run.init_from is not None:
            load_initial(model, config.run.init_from)
        # ZeRO-3 frees weights between forward and backward; only re-entrant recomputation gathers them again.
        model.reentrant_checkpoint = self.stage == 3
        self.traffic = expert_parallel.apply(model, config, plan)
        self._engine = _initialise(model, config.optim, self.ds_config, device)
        self.module: RaphaelUNet = self._engine.module
        self.fragments = Fragments(self.module, self._engine.optimizer)
        self._grad_norm: float | None = None
        self._touched: set[str] | None = self._watch_gradients() if config.train.check_gradients else None

    def __call__(self, *args: Any) -> Any:
        """Run the model's forward pass through DeepSpeed."""
        return self._engine(*args)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of one micro-step; the last of a step also reduces them over ranks."""
        self._engine.backward(loss)
        if self._touched is not None:
            parallel.all_or_none(self._check_gradients)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def _watch_gradients(self) -> set[str]:
        touched: set[str] = set()
        for name, p in self.module.named_parameters():
            p.register_hook(lambda _, name=name: touched.add(name))
        return touched

    def _check_gradients(self) -> None:
        """ZeRO-1 and 2 reduce what each rank has: a gradient that is missing on one is added to another parameter's."""
        assert self._touched is not None
        missing = [name for name, _ in self.module.named_parameters() if name not in self._touched]
        self._touched.clear()
        if missing:
            raise RuntimeError(f"{len(missing)} parameters got no gradient on this rank, the first {missing[0]}")

    def step(self, lr: float) -> bool:
        """Clip and apply the accumulated gradients with learning rate `lr`; call after the last `backward` of a step.

        Returns False on all ranks, with weights and moments unchanged, when the gradients of any are not finite.
        """
        assert self._engine.is_gradient_accumulation_boundary()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        if self.stage == 0:
            self._grad_norm = float(
                torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
            )
            if not math.isfinite(self._grad_norm):  # reduced already, so it is the same on all ranks
                self.discard()
                return False
        self._engine.step()
        return not getattr(self._engine.optimizer, "overflow", False)

    def discard(self) -> None:
        """Drop the accumulated gradients instead of calling `step`: weights and moments stay. On all ranks or on none."""
        optimizer = self._engine.optimizer
        if self.stage == 0:
            self._grad_norm = math.inf
            for p in self.module.parameters():
                if p.grad is not None:
                    p.grad.zero_()
        name = next(name for name in _DROP if hasattr(optimizer, name))
        setattr(optimizer, name, _DROP[name])
        try:
            self._engine.step()
        finally:
            delattr(optimizer, name)

    def save_deepspeed(self, folder: Path) -> None:
        """Write DeepSpeed's own checkpoint, to compare with; training never reads it. Collective."""
        self._engine.save_checkpoint(str(folder), tag="benchmark")

    def grad_norm(self) -> float:
        """Return the global gradient norm of the last step, before clipping."""
        if self.stage == 0:
            return self._grad_norm if self._grad_norm is not None else math.nan
        norm = self._engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)


def learning_rate(config: Config, step: int) -> float:
    """Return the learning rate of optimizer step `step` (from 1): linear warm-up, then constant or half a cosine."""
    optim = config.optim
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.decay == "constant":
        return optim.lr
    progress = (step - 1 - optim.warmup_steps) / max(1, config.train.max_steps - optim.warmup_steps)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _optimizer(parameters: list[dict[str, Any]], optim: Optim, device: torch.device) -> torch.optim.Optimizer:
    if optim.kind == "sgd":
        return torch.optim.SGD(parameters, lr=optim.lr)
    fused = device.type == "cuda"
    return torch.optim.AdamW(
        parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=fused
    )


def _initialise(model: nn.Module, optim: Optim, tree: dict[str, Any], device: torch.device) -> Any:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    offload = "offload_optimizer" in tree.get("zero_optimization", {})
    optimizer = _optimizer(expert_groups.parameter_groups(model), optim, torch.device("cpu") if offload else device)
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=tree, dist_init_required=False)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{error.title} in the DeepSpeed JSON: {where}: given {first['input']!r}; {first['msg']}") from None
    return engine
