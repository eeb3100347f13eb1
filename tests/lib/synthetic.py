"""A tiny model and synthetic batches, for tests without a data set.

The numbers of a sample depend only on its position in the sample order, not on the number of ranks or the micro-batch size.
"""

from collections.abc import Sequence

import torch

from raphael_dist.config.schema import Config, config_from_tree
from raphael_dist.engine.fragments import Fragments
from raphael_dist.engine.zero import Zero0
from raphael_dist.model.batch import Batch
from raphael_dist.model.controlnet import add_control
from raphael_dist.model.lora import add_lora
from raphael_dist.model.unet import RaphaelUNet
from raphael_dist.model.unet_interface import GateNoise

TOKENS, TEXT_WIDTH, SIZE = 7, 12, 8

TREE = {
    "model": {
        "channels": [16, 24],
        "attention": [True, False],
        "layers_per_block": 1,
        "head_dim": 8,
        "norm_groups": 8,
        "text_width": TEXT_WIDTH,
        "expert_width": [20, 28],
        "gate_width": 10,
        "space_experts": 6,
        "time_experts": 4,
    },
    "edge": {"channels": 4},
    "optim": {"lr": 0.05, "max_grad_norm": 0.5},
    "train": {"global_batch_size": 12, "micro_batch_size": 3},
}


def tiny_config(**sections: dict) -> Config:
    """Return the configuration of the tiny model (TREE). `sections`: {key: value} by section, to replace its values."""
    names = set(TREE) | set(sections)
    return config_from_tree({name: {**TREE.get(name, {}), **sections.get(name, {})} for name in names})


def synthetic_batch(
    config: Config, slots: Sequence[tuple[int, float]], num_blocks: int, last_experts_until: int | None = None
) -> Batch:
    """Return a batch whose samples are random numbers that depend only on the position of each sample.

    Args:
        config: configuration of the model.
        slots: for each sample of the batch, its position in the sample order and its weight in the loss.
        num_blocks: number of transformer blocks of the model.
        last_experts_until: samples at this position and later ones are never routed to the last expert of a layer. Tests
            of experts without samples use this. None: no such limit.
    """

    def draw(what: int, *shape: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(1000 * p + what) for p, _ in slots]
        return torch.stack([torch.randn(*shape, generator=g) for g in generators])

    m, side = config.model, SIZE * config.upscale.patch
    positions = torch.tensor([p for p, _ in slots])
    noise = GateNoise(draw(4, num_blocks, m.time_experts), draw(5, num_blocks, TOKENS, m.space_experts))
    if last_experts_until is not None:
        for logits in noise:
            logits[positions >= last_experts_until, ..., -1] = -1e9
    return Batch(
        position=positions,
        weight=torch.tensor([w for _, w in slots]),
        x0=draw(0, m.latent_channels, SIZE, SIZE),
        noise=draw(1, m.latent_channels, SIZE, SIZE),
        timestep=(positions * 389) % 1000,
        text=draw(2, TOKENS, TEXT_WIDTH),
        text_mask=torch.arange(TOKENS).expand(len(slots), -1) <= (positions % TOKENS)[:, None],
        end=positions % TOKENS,
        edge=draw(3, *((SIZE, SIZE) if config.control.enabled else (16, 16))).sigmoid(),
        gate_noise=noise,
        small=draw(6, 3, side, side).tanh() if config.upscale.factor else None,
    )


def adapted_model(config: Config) -> RaphaelUNet:
    """Return a frozen model with random weights, and a trainable LoRA adapter or ControlNet as configured.

    The adapter has random weights as well. With its usual initial values it would not change the model's output.
    """
    torch.manual_seed(config.run.seed)
    model = RaphaelUNet(config)
    if config.control.enabled:
        add_control(model, config, config.run.seed)
    else:
        add_lora(model, config.lora, config.run.seed)
    draw = torch.Generator().manual_seed(8)
    for name, p in model.named_parameters():
        if p.requires_grad and (config.lora.rank or ".controlnet_" in name):
            torch.nn.init.normal_(p, std=0.1, generator=draw)
    return model


def plain_fragments(model: torch.nn.Module) -> Fragments:
    """Return the weights of `model` as the `Fragments` that checkpoints are made of, for one process without DeepSpeed."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return Fragments(model, Zero0(optimizer, model, world_size=1), optimizer)
