"""The small model that the command `prove` trains: its configurations, its batches, and its training in plain PyTorch."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch
from torch import Tensor

from raphael_dist.config.schema import Config, config_from_tree
from raphael_dist.config.types import Dtype
from raphael_dist.model.batch import Batch
from raphael_dist.model.diffusion import NoiseSchedule
from raphael_dist.model.losses import compute_losses
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.model.unet_interface import GateNoise
from raphael_dist.planning.meta_batch import meta_batch
from raphael_dist.text import JsonObject

Slots = Sequence[tuple[int, float]]
EXPERTS = 8  # of each kind, so that ep can be 1, 2, 4 or 8
ADAM_EPS = 1e-3  # large: otherwise Adam turns rounding errors in tiny gradients into full steps
# Widths are multiples of 8, as the grouped product on GPUs requires. With SGD the change of the weights is the gradient.
TREE: dict[str, JsonObject] = {
    "model": {
        "channels": [16, 24],
        "attention": [True, False],
        "layers_per_block": 1,
        "head_dim": 8,
        "norm_groups": 8,
        "text_width": 16,
        "expert_width": [24, 32],
        "gate_width": 16,
        "space_experts": EXPERTS,
        "time_experts": EXPERTS,
    },
    "image": {"vae": "none", "buckets": [[8, 8]]},
    "text": {"max_tokens": 7},
    "edge": {"channels": 4},
    "ema": {"enabled": False},
    "optim": {"kind": "sgd", "lr": 0.05, "max_grad_norm": 0.5},
}


@dataclass(frozen=True)
class Case:
    """One combination of settings with which the command `prove` tests training.

    Attributes:
        dtype: "float32" or "bfloat16".
        stage: ZeRO stage, from 0 to 3.
        ep: number of ranks over which the experts of each layer are sharded; 1: not sharded.
    """

    dtype: str
    stage: int
    ep: int

    def __str__(self) -> str:
        return f"{self.dtype} ZeRO-{self.stage} ep {self.ep}"


def cases(world: int) -> list[Case]:
    """Return all combinations of dtype, ZeRO stage and expert parallelism that `prove` tests on `world` ranks."""
    sizes = expert_sizes(world)
    plain = [Case(dtype, stage, 1) for dtype in get_args(Dtype) for stage in range(4) if (dtype, stage) != ("bfloat16", 0)]
    return plain + [Case(dtype, stage, ep) for dtype in get_args(Dtype) for stage in (1, 2) for ep in sizes[1:]]


def expert_sizes(world: int) -> list[int]:
    """Return over how many of `world` ranks the 8 experts of the `prove` model can be sharded: divisors of 8 and `world`."""
    return [n for n in range(1, EXPERTS + 1) if EXPERTS % n == 0 and world % n == 0]


def case_config(case: Case, world: int, batch: int = 0, micro: int = 2, **sections: JsonObject) -> Config:
    """Return the configuration of the small model of `prove` with the settings of `case` on `world` ranks.

    Args:
        case: dtype, ZeRO stage and expert parallelism.
        world: number of ranks.
        batch: global batch size. 0: 4 world - 1, so that with `micro` = 2 a step has two micro-steps, and the last one has
            an empty slot (a sample with weight 0).
        micro: micro-batch size.
        **sections: settings to replace, as {key: value} by section.
    """
    sections["train"] = {"global_batch_size": batch or 4 * world - 1, "micro_batch_size": micro, "dtype": case.dtype}
    sections["parallel"] = {"space_ep": case.ep, "time_ep": case.ep, "placement": ["shard"]}
    return config_from_tree({name: {**TREE.get(name, {}), **sections.get(name, {})} for name in {*TREE, *sections}})


def position_batch(config: Config, slots: Slots, num_blocks: int) -> Batch:
    """Return a synthetic training batch, with images of the largest configured size, without reading a data set.

    Args:
        config: the run's configuration.
        slots: (position in the run's order of training samples, weight in the loss) of each sample of the batch. The
            data of a sample depend on `run.seed` and this position only.
        num_blocks: number of transformer blocks of the model; each has its own gate noise.
    """
    meta = meta_batch(config, 1, num_blocks)
    samples = [_sample(config, meta, position, weight) for position, weight in slots]
    joined: dict[str, Any] = {
        field.name: _join([getattr(sample, field.name) for sample in samples]) for field in fields(Batch)[:-2]
    }
    return Batch(**joined)


def _sample(config: Config, meta: Batch, position: int, weight: float) -> Batch:
    draw = torch.Generator().manual_seed(config.run.seed * 1_000_003 + position)
    sample = meta.map_tensors(lambda t: torch.randn(t.shape, generator=draw) if t.is_floating_point() else t)
    tokens = config.text.max_tokens
    end = torch.tensor([position % tokens])
    sample.position, sample.weight, sample.end = torch.tensor([position]), torch.tensor([weight]), end
    sample.timestep = torch.tensor([position * 389 % config.diffusion.num_timesteps])
    sample.text_mask = torch.arange(tokens)[None] <= end
    sample.edge = None if sample.edge is None else sample.edge.sigmoid()
    sample.small = None if sample.small is None else sample.small.tanh()
    return sample


def _join(values: list[Any]) -> Tensor | GateNoise | None:
    if values[0] is None:
        return None
    if isinstance(values[0], GateNoise):
        return GateNoise(*(torch.cat(parts) for parts in zip(*values, strict=True)))
    return torch.cat(values)


def digest(tensors: Iterable[Tensor]) -> str:
    """Return a checksum (16 hex digits of SHA-256) of the values of all tensors, which must be in CPU memory."""
    checksum = hashlib.sha256()
    for tensor in tensors:
        checksum.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return checksum.hexdigest()[:16]


class Reference:
    """Trains the whole global batch in one process, in float32, without DeepSpeed, other ranks or micro-steps.

    The distributed training is compared with it.

    Attributes:
        weights: current weights of the model, by name.
        norm: gradient norm of the last step, before clipping.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        """Build the model from the configuration's seed. Its weights are float32, rounded to values of `train.dtype`."""
        self.config, self.device, self.norm = config, device, 0.0
        torch.manual_seed(config.run.seed)
        self.model = RaphaelUNet(config)
        self.num_blocks = self.model.num_blocks
        dtype = getattr(torch, config.train.dtype)
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(p.to(dtype))
        self.model.to(device)
        self.weights: dict[str, Tensor] = dict(self.model.named_parameters())
        self._schedule = NoiseSchedule.create(config.diffusion, device)
        optim, parameters = config.optim, self.model.parameters()
        self._optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(parameters, lr=optim.lr)
            if optim.kind == "sgd"
            else torch.optim.AdamW(parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=0.0)
        )

    def losses(self, slots: Slots) -> Tensor:
        """Return the loss of each of B samples, computed with the current parameters of the model, float32 [B].

        Each loss is multiplied by the sample's factor: 1, or 0 for a sample that only fills the micro-batch.

        `slots`: (position in the run's order of training samples, factor) of each sample.
        """
        batch = position_batch(self.config, slots, self.num_blocks).to(self.device)
        return compute_losses(self.model, batch, self._schedule, self.config, torch.float32).total

    def gradients(self, slots: Slots) -> dict[str, Tensor]:
        """Return the gradients of (summed loss of some samples / global batch size), by parameter name.

        `slots`: (position in the run's order of training samples, factor of the sample's loss) of each of the samples.
        """
        loss = self.losses(slots).sum() / self.config.train.global_batch_size
        gradients = torch.autograd.grad(loss, list(self.weights.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(self.weights, gradients, strict=True))

    def step(self, gradients: dict[str, Tensor]) -> None:
        """Clip gradients, set `norm`, and take an optimizer step.

        `gradients`: those of a whole global batch, by parameter name. Clipping changes these tensors.
        """
        for name, p in self.weights.items():
            p.grad = gradients[name]
        clip = self.config.optim.max_grad_norm or float("inf")
        self.norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip))
        self._optimizer.step()
