"""Builds and drives the DeepSpeed engine. This is the only caller of `deepspeed.initialize`."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from raphael_dist.config.run_sections import Optim
from raphael_dist.config.schema import Config
from raphael_dist.engine import ds_config, expert_groups
from raphael_dist.engine.deepspeed_comm import DeepSpeedObject, broadcast_weights, count_collectives, import_deepspeed
from raphael_dist.engine.ds_keys import Tree
from raphael_dist.engine.ema import Ema
from raphael_dist.engine.expert_groups import ParameterGroup
from raphael_dist.engine.fragments import Fragments
from raphael_dist.engine.gradient_buckets import overlap_bucket
from raphael_dist.engine.muon import Muon
from raphael_dist.engine.parameter_kinds import decays
from raphael_dist.engine.zero import Zero0, Zero12Contiguous, adapter
from raphael_dist.errors import UserError
from raphael_dist.model.compiling import compile_parts
from raphael_dist.model.cuda_graphs import replay_cuda_graphs
from raphael_dist.model.device import is_gpu
from raphael_dist.model.kernels.selection import use_kernels
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.model.unet_interface import UNetOutput
from raphael_dist.parallel import expert_dispatch
from raphael_dist.parallel.async_collectives import Traffic
from raphael_dist.parallel.batch_plan import BatchPlan
from raphael_dist.runtime.ranks import all_reduce_sum, raise_on_all_ranks
from raphael_dist.text import counted

if TYPE_CHECKING:
    from raphael_dist.engine.adamw import FusedUpdate

_ROW = 2**16  # elements that `square_sum` adds up in float32


class Engine:
    """A model that DeepSpeed trains, with one optimizer step per `plan.accumulation` calls of `backward`.

    Attributes:
        config: the run's configuration.
        plan: how the global batch is divided over ranks and micro-steps.
        device: this rank's device.
        dtype: precision of the model.
        ds_config: the full DeepSpeed configuration.
        stage: ZeRO stage.
        module: the U-Net.
        fragments: the parts of the fp32 weights and Adam moments that this rank stores.
        traffic: bytes that this rank sent to other ranks.
        grad_norm: global gradient norm of the last step, before clipping; infinite if that step was discarded. After
            `update_if` the caller sets it, once it knows the norm.
        defers_update: whether the trainer must finish steps by `update_if` (`train.kernels` with deferred_update).
    """

    def __init__(
        self,
        config: Config,
        json_tree: Tree,
        plan: BatchPlan,
        device: torch.device,
        model: RaphaelUNet | None = None,
    ) -> None:
        """Build the model, shard its experts, and initialise DeepSpeed. Collective.

        Args:
            config: the run's configuration.
            json_tree: the user's DeepSpeed JSON.
            plan: how the global batch is divided over ranks and micro-steps.
            device: this rank's device.
            model: the model to train, with equal weights on every rank; None: create it from `config`.

        Raises:
            UserError: settings contradict each other, or a required compiler or package is missing.
        """
        self.config, self.plan, self.device = config, plan, device
        self.dtype = getattr(torch, config.train.dtype)
        self.ds_config = ds_config.merge(config, json_tree, plan.accumulation, plan.world_size)
        self.stage = ds_config.zero_stage(self.ds_config)
        torch.manual_seed(config.run.seed)  # the same initial weights on every rank
        model = RaphaelUNet(config) if model is None else model
        self.traffic = self._prepare_model(model)
        bucket = overlap_bucket(self.ds_config, plan.world_size)
        optimizer = _optimizer(expert_groups.parameter_groups(model, bucket), config.optim, self.dtype)
        backend = count_collectives(self.traffic)
        broadcast_weights(model, expert_groups.copies())
        with backend.without_broadcasts():
            self._engine = _initialise(model, optimizer, self.ds_config)
        self.module: RaphaelUNet = self._engine.module
        self._zero = adapter(self._engine.optimizer, self.module, plan.world_size)
        if config.train.cuda_graphs:
            replay_cuda_graphs(self.module, self._contiguous(ds_config.cuda_graphs_error).views)
        self._zero.disable_builtin_clipping()
        self._engine.gradient_clipping = lambda: 0.0  # `update` clips
        self.fragments = Fragments(self.module, self._zero, optimizer)
        if isinstance(optimizer, Muon):
            zero = self._zero if isinstance(self._zero, Zero0) else self._contiguous(ds_config.muon_error)
            optimizer.set_layouts(zero.layouts(), {p: name for name, p in self.module.named_parameters()})
        self._fused = self._fuse_update() if "adamw" in config.train.kernels else None
        self.defers_update = "deferred_update" in config.train.kernels
        decayed = config.optim.has_moments and config.optim.weight_decay > 0
        self._decayed = [f.master for f in self.fragments if decayed and decays(f.name)]
        self.grad_norm = math.nan
        self._micro_step = 0
        self._touched: set[str] | None = self._watch_gradients() if config.train.check_gradients else None

    def _prepare_model(self, model: RaphaelUNet) -> Traffic:
        """Shard the experts, and set up kernels and compilation, before DeepSpeed wraps the model. Collective.

        Returns a counter of the bytes that this rank sends to the experts of other ranks.
        """
        config, device = self.config, self.device
        # ZeRO-3 frees weights between forward and backward. Only re-entrant recomputation gathers them again.
        for part in model.modules():  # the U-Net, and its control
            if isinstance(part, RaphaelUNet):
                part.gathers_weights = self.stage == 3
        traffic = expert_dispatch.shard_experts(model, config, self.plan, expert_groups.create_groups)
        expert_groups.add_moe_marker(model, config.model.space_experts + config.model.time_experts)
        use_kernels(model, config.train.kernels, device)
        if config.train.compile:
            _compile(model, config, self.stage, device)
        if config.train.cuda_graphs and not is_gpu(device):
            raise ds_config.cuda_graphs_error("a GPU", f"the device is {device.type}", "Use a GPU")
        return traffic

    def _contiguous(self, error: ds_config.RequirementError) -> Zero12Contiguous:
        if not isinstance(self._zero, Zero12Contiguous):
            bucket = self.ds_config["zero_optimization"]["reduce_bucket_size"]
            raise error(
                "zero_optimization.reduce_bucket_size (DeepSpeed JSON) of at least half the number of parameters",
                f"reduce_bucket_size is {bucket}",
                "Remove reduce_bucket_size from the JSON",
            )
        return self._zero

    def _fuse_update(self) -> "FusedUpdate":
        from raphael_dist.engine.adamw import FusedUpdate  # it needs Triton

        update = FusedUpdate(self.fragments, self.config.optim, self.device)
        self._contiguous(ds_config.fused_update_error).replace_step(update.launch)
        return update

    def create_ema(self) -> Ema | None:
        """Return a new moving average that starts at the current weights; None if `ema.enabled` is false."""
        flat = self._fused is not None
        return Ema(self.fragments, self.config.ema, flat) if self.config.ema.enabled else None

    def __call__(self, *args: object) -> UNetOutput:
        """Run the model's forward pass through DeepSpeed. Arguments and result are those of `RaphaelUNet.forward`."""
        return self._engine(*args)

    def backward(self, loss: Tensor, last: bool | None = None) -> None:
        """Run the backward pass of one micro-step. In the last micro-step of a step, also reduce the gradients over ranks.

        Args:
            loss: sum of the sample losses of the micro-step times `plan.loss_scale`, float32 []. This factor makes the
                gradients those of the mean loss over the global batch.
            last: whether this is the step's last micro-step; None: the `plan.accumulation`-th call is the last one.
        """
        self._micro_step += 1
        last = self._micro_step == self.plan.accumulation if last is None else last
        self._engine.set_gradient_accumulation_boundary(last)
        self._zero.prepare_backward(first=self._micro_step == 1, last=last)
        # DeepSpeed divides the loss by gradient_accumulation_steps; `plan.loss_scale` contains that factor.
        self._engine.backward(loss)
        if self._touched is not None:
            raise_on_all_ranks(self._check_gradients)
        if not last:
            self._engine.step()

    def _watch_gradients(self) -> set[str]:
        touched: set[str] = set()
        for name, p in self.module.named_parameters():
            if p.requires_grad:
                p.register_hook(lambda _, name=name: touched.add(name))
        return touched

    def _check_gradients(self) -> None:
        """Raise RuntimeError if a trained parameter got no gradient on this rank in this micro-step.

        If a gradient is missing, ZeRO-1 and 2 can add up gradients of different parameters when they reduce over ranks.
        """
        assert self._touched is not None
        missing = [name for name in self.fragments.shapes if name not in self._touched]
        self._touched.clear()
        if missing:
            raise RuntimeError(
                "train.check_gradients=true requires a gradient of every parameter, but on this rank "
                f"{counted(len(missing), 'parameter')} got none; the first is {missing[0]}. Use these parameters in the "
                "forward pass, or set train.check_gradients=false."
            )

    @torch.no_grad()
    def grad_square(self) -> Tensor:
        """Return this rank's contribution to the squared norm of a step's gradients, float64 [], on this rank's device.

        The sum of the results of all ranks is the square of the global norm before clipping. This sum is not finite if any
        gradient is not finite.
        """
        return square_sum(self._zero.gradients()).to(self.device) / self._zero.copies

    def step(self, lr: float, ema: Ema | None = None, step: int = 1) -> bool:
        """Finish an optimizer step: compute the gradient norm over all ranks, then call `update`. Collective.

        Call this method after the last `backward` of a step. The arguments are those of `update`. Benchmarks and tests use
        it; the trainer calls `grad_square` and `update`, to send the norm and other values in one all-reduce.

        Returns:
            False on all ranks if a gradient on any rank is not finite. Weights and moments are then unchanged.
        """
        norm = math.sqrt(float(all_reduce_sum(self.grad_square(), self.device)))
        if math.isfinite(norm):
            self.update(lr, norm, ema, step)
        else:
            self.discard_gradients()
        return math.isfinite(norm)

    @torch.no_grad()
    def update(self, lr: float, norm: float, ema: Ema | None = None, step: int = 1) -> None:
        """Finish a step: clip the gradients, update the weights, and update their moving average. Collective.

        Call this method after the last `backward` of a step.

        Args:
            lr: learning rate.
            norm: global norm of the gradients before clipping, finite and equal on all ranks.
            ema: the moving average from `create_ema`; None: there is none.
            step: the optimizer step, counted from 1.
        """
        clip, self.grad_norm = self.config.optim.max_grad_norm, norm
        factor = clip / (norm + 1e-6) if clip and norm > clip else 1.0
        if self._fused is not None:
            self._fused.prepare(lr, factor, ema, step)
        elif factor != 1:
            torch._foreach_mul_(list(self._zero.gradients()), factor)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._decay_and_step(1 - lr * self.config.optim.weight_decay)
        if ema is not None and self._fused is None:
            ema.update(step)

    @torch.no_grad()
    def update_if(self, good: Tensor, lr: float, norm: Tensor, ema: Ema | None = None, step: int = 1) -> None:
        """Finish a step as `update` does if `good` is true. Otherwise drop the gradients, and change nothing. Collective.

        The device decides, and the host does not wait. It requires the kernel adamw (`train.kernels`). The result is equal
        to that of `update` or `discard_gradients` bit by bit.

        Args:
            good: whether to update, bool [], equal on all ranks.
            lr: learning rate.
            norm: global norm of the gradients before clipping, float64 [], equal on all ranks. It is finite if `good` is
                true.
            ema: the moving average from `create_ema`; None: there is none.
            step: the optimizer step, counted from 1.
        """
        assert self._fused is not None, "train.kernels has no adamw"
        clip, factor = self.config.optim.max_grad_norm, torch.ones_like(norm)
        if clip:
            factor = (factor * clip / (norm + 1e-6)).masked_fill_(norm <= clip, 1.0)
        self._fused.prepare(lr, 1.0, ema, step)
        self._fused.decide(good, factor)
        # In float64, as on the host.
        self._decay_and_step((1 - good.double() * (lr * self.config.optim.weight_decay)).float())

    def _decay_and_step(self, decay: float | Tensor) -> None:
        """Multiply the weights that decay by `decay`, and run DeepSpeed's optimizer step."""
        assert self._engine.is_gradient_accumulation_boundary()
        self._micro_step = 0
        if self._decayed:
            torch._foreach_mul_(self._decayed, decay)
        self._engine.step()

    def discard_gradients(self) -> None:
        """End the current step without an update: drop its gradients, and leave weights and moments unchanged.

        Call this method on all ranks or on none. `grad_norm` becomes infinite.
        """
        self.grad_norm, self._micro_step = math.inf, 0
        with self._zero.skip_step():
            self._engine.step()

    def save_deepspeed(self, folder: Path) -> None:
        """Write a checkpoint in DeepSpeed's format to `folder`, for benchmarks. A run cannot resume from it. Collective."""
        self._engine.save_checkpoint(str(folder), tag="benchmark")


def _compile(model: RaphaelUNet, config: Config, stage: int, device: torch.device) -> None:
    if stage == 3:
        raise UserError(
            "train.compile=true requires ZeRO stage 0, 1 or 2, but the DeepSpeed config has stage 3, whose hooks would "
            "have to gather weights inside compiled code. Use ds_configs/zero2.json or set train.compile=false."
        )
    compile_parts(model, device, dynamic=config.parallel.uses_expert_parallelism or len(config.image.buckets) > 1)


def square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of the squares of all elements of all tensors, a float64 scalar tensor.

    Blocks of up to 65,536 consecutive squares are added up in float32, and the sums of the blocks in float64.
    """
    rows, rest = [], []
    for flat in (t.reshape(-1) for t in tensors):
        whole = flat.numel() // _ROW * _ROW
        if whole:
            rows.append(torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1, dtype=torch.float32))
        if whole < flat.numel():
            rest.append(flat[whole:])
    norms = torch.cat([*rows, torch.stack(torch._foreach_norm(rest, dtype=torch.float32))]) if rest else torch.cat(rows)
    return norms.double().square().sum()


def _optimizer(parameters: list[ParameterGroup], optim: Optim, dtype: torch.dtype) -> torch.optim.Optimizer:
    if optim.kind == "sgd":
        return torch.optim.SGD(parameters, lr=optim.lr)
    if optim.kind == "muon":
        return Muon(parameters, dtype, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=0.0, fused=True)
    # `update` applies weight decay: torch's applies to whole groups, and more groups would change ZeRO's buffers.
    return torch.optim.AdamW(parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=0.0, fused=True)


def _is_not_overflow(record: logging.LogRecord) -> bool:
    # `discard_gradients` makes DeepSpeed detect an overflow. The trainer reports skipped steps and their reasons.
    return "OVERFLOW!" not in record.getMessage()


def _initialise(model: nn.Module, optimizer: torch.optim.Optimizer, tree: Tree) -> DeepSpeedObject:
    deepspeed = import_deepspeed()
    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.WARNING)
    log.addFilter(_is_not_overflow)
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=tree, dist_init_required=False)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{field}={first['input']!r} in the DeepSpeed JSON is refused by DeepSpeed ({error.title}): {first['msg']}. "
            "Set a value that DeepSpeed accepts, or remove the key from the JSON."
        ) from None
    return engine
