"""The U-Net of Stable Diffusion 2 with RAPHAEL's transformer blocks (Fig. 3 and 8), under diffusers' parameter names.

Shape legend: B samples, C channels, Y text tokens, K experts, L transformer blocks in order of execution, D text width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, cast

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raphael_dist.config import Config
from raphael_dist.model.experts import megablocks_product
from raphael_dist.model.layers import BlockSpec, SpatialTransformer
from raphael_dist.model.routing import BlockPlan, Gate, balance_loss_B, choose, space_weights_BYK


class GateNoise(NamedTuple):
    """Noise on the gates' logits, drawn per sample position: time float32 [B, L, K], space float32 [B, L, Y, K]."""

    time_BLK: Tensor
    space_BLYK: Tensor


@dataclass
class UNetOutput:
    """What one forward pass returns.

    prediction: [B, C, h, w]. edge_logits: per block with an edge module, float32 [B, h, w].
    space_used: per block, share of image tokens that need each space expert, [B, K]. time_expert: per block, int64 [B].
    balance: per block, load-balance loss of the text gate, float32 [B]; empty when it has no weight.
    """

    prediction: Tensor
    edge_logits: list[Tensor] = field(default_factory=list)
    space_used: list[Tensor] = field(default_factory=list)
    time_expert: list[Tensor] = field(default_factory=list)
    balance: list[Tensor] = field(default_factory=list)


def count_samples(onehot_LBK: Tensor) -> list[list[int]]:
    """Return how many samples each expert of each layer serves, [L][K], on the host."""
    return onehot_LBK.sum(dim=1).tolist()


class Stage(nn.Module):
    """One level of the way down, the middle, or the way up: residual blocks, each followed by attention if it has any."""

    resnets: nn.ModuleList
    attentions: nn.ModuleList | None
    downsamplers: nn.ModuleList | None
    upsamplers: nn.ModuleList | None

    def __init__(
        self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module], resize: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions) if attentions else None
        self.downsamplers = nn.ModuleList([resize]) if isinstance(resize, Downsample2D) else None
        self.upsamplers = nn.ModuleList([resize]) if isinstance(resize, Upsample2D) else None


class RaphaelUNet(nn.Module):
    """D(x_t, t, y) of RAPHAEL; with `space_experts = time_experts = 0`, Stable Diffusion 2's U-Net."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = m = config.model
        self.seed, self.edge_channels = config.run.seed, config.edge.channels if config.edge.weight > 0 else 0
        if m.space_backend == "megablocks":
            megablocks_product([])  # is it there?
        self.reentrant_checkpoint = False
        # Expert parallelism needs the counts of other ranks too, and puts its own function here.
        self.count_samples: Callable[[Tensor], list[list[int]]] = count_samples
        self.block_levels: list[int] = []  # of the transformer blocks, in order of execution
        channels, embed = m.channels, 4 * m.channels[0]
        self.conv_in = nn.Conv2d(m.latent_channels, channels[0], 3, padding=1)
        self.time_proj = Timesteps(channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(channels[0], embed)
        self.down_blocks = nn.ModuleList()
        skips = [channels[0]]
        for level, width in enumerate(channels):
            self.down_blocks.append(self._down(level, skips[-1], width, skips))
        self.mid_block = self._middle(channels[-1])
        self.up_blocks = nn.ModuleList()
        width = channels[-1]
        for level in reversed(range(len(channels))):
            self.up_blocks.append(self._up(level, width, skips))
            width = channels[level]
        self.conv_norm_out = nn.GroupNorm(m.norm_groups, channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], m.latent_channels, 3, padding=1)
        if m.time_experts:
            self.time_gates = nn.ModuleList(Gate(embed, m.gate_width, m.time_experts) for _ in range(self.num_blocks))
        if m.space_experts:
            self.text_gates = nn.ModuleList(
                Gate(m.text_width, m.gate_width, m.space_experts) for _ in range(self.num_blocks)
            )

    def _resnet(self, inner: int, outer: int) -> ResnetBlock2D:
        groups = self.config.norm_groups
        return ResnetBlock2D(
            in_channels=inner, out_channels=outer, temb_channels=4 * self.config.channels[0], groups=groups, eps=1e-5
        )

    def _transformer(self, level: int, width: int) -> SpatialTransformer:
        m = self.config
        spec = BlockSpec(
            dim=width,
            head_dim=m.head_dim,
            text_width=m.text_width,
            hidden=m.expert_width[level],
            space_experts=m.space_experts,
            time_experts=m.time_experts,
            time_activation=m.time_activation,
            space_backend=m.space_backend,
            mask_threshold=m.mask_threshold,
            edge_channels=self.edge_channels,
            seed=self.seed * 1000 + self.num_blocks,
        )
        self.block_levels.append(level)
        return SpatialTransformer(spec, m.norm_groups)

    @property
    def num_blocks(self) -> int:
        """Return the number of transformer blocks."""
        return len(self.block_levels)

    def _stage(self, level: int, pairs: list[tuple[int, int]], resize: nn.Module | None) -> Stage:
        resnets = [self._resnet(inner, outer) for inner, outer in pairs]
        with_attention = self.config.attention[level]
        return Stage(resnets, [self._transformer(level, outer) for _, outer in pairs] if with_attention else [], resize)

    def _down(self, level: int, inner: int, width: int, skips: list[int]) -> Stage:
        count, last = self.config.layers_per_block, level == len(self.config.channels) - 1
        skips += [width] * (count if last else count + 1)
        pairs = [(inner if i == 0 else width, width) for i in range(count)]
        return self._stage(level, pairs, None if last else Downsample2D(width, use_conv=True, name="op"))

    def _middle(self, width: int) -> Stage:
        resnets = [self._resnet(width, width), self._resnet(width, width)]
        return Stage(resnets, [self._transformer(len(self.config.channels) - 1, width)])

    def _up(self, level: int, inner: int, skips: list[int]) -> Stage:
        width, pairs = self.config.channels[level], []
        for _ in range(self.config.layers_per_block + 1):
            pairs.append((inner + skips.pop(), width))
            inner = width
        return self._stage(level, pairs, Upsample2D(width, use_conv=True) if level > 0 else None)

    def forward(
        self,
        x_BCHW: Tensor,
        timestep_B: Tensor,
        text_BYD: Tensor,
        text_mask_BY: Tensor,
        end_B: Tensor,
        noise: GateNoise | None = None,
    ) -> UNetOutput:
        """Predict the noise (or velocity) of noised latents.

        Args:
            x_BCHW: noised latents [B, C, h, w]. timestep_B: int64 [B].
            text_BYD: text tokens [B, Y, D]; text_mask_BY: bool, False at padding; end_B: int64, the end-of-text token.
            noise: gate noise in training; None routes without noise.
        """
        embedding = self.time_embedding(self.time_proj(timestep_B).to(x_BCHW.dtype))
        planned = self.plan(embedding, text_BYD, text_mask_BY, noise)
        plans = iter(planned)
        out = UNetOutput(prediction=x_BCHW, balance=[p.balance_B for p in planned if p.balance_B is not None])

        def run(stage: Stage, index: int, x: Tensor) -> Tensor:
            x = stage.resnets[index](x, embedding)
            if stage.attentions is not None:
                x = self._attend(cast(SpatialTransformer, stage.attentions[index]), x, text_BYD, end_B, next(plans), out)
            return x

        x = self.conv_in(x_BCHW)
        skips = [x]
        for stage in cast(list[Stage], self.down_blocks):
            for i in range(len(stage.resnets)):
                x = run(stage, i, x)
                skips.append(x)
            if stage.downsamplers is not None:
                x = stage.downsamplers[0](x)
                skips.append(x)
        x = run(self.mid_block, 0, x)
        x = self.mid_block.resnets[1](x, embedding)
        for stage in cast(list[Stage], self.up_blocks):
            for i in range(len(stage.resnets)):
                x = run(stage, i, torch.cat([x, skips.pop()], dim=1))
            if stage.upsamplers is not None:
                # The size of the next skip, so that odd sizes come back as they went.
                x = stage.upsamplers[0](x, output_size=skips[-1].shape[-2:])
        out.prediction = self.conv_out(nn.functional.silu(self.conv_norm_out(x)))
        return out

    def plan(self, embedding_BE: Tensor, text_BYD: Tensor, text_mask_BY: Tensor, noise: GateNoise | None) -> list[BlockPlan]:
        """Route every block (Sec. 3.1 and 7.3) from the timestep embedding and the caption alone."""
        blocks = range(self.num_blocks)
        none: list = [None] * self.num_blocks
        time_expert, time_samples, time_factor = none, none, none
        if self.config.time_experts:
            routed = [
                self._choose(self.time_gates[i](embedding_BE), noise.time_BLK[:, i] if noise else None) for i in blocks
            ]
            time_expert, time_factor = [r[0] for r in routed], [r[1] for r in routed]
            onehot_LBK = nn.functional.one_hot(torch.stack(time_expert), self.config.time_experts)
            time_samples = self.count_samples(onehot_LBK)  # the one wait for the device in a forward pass
        space_weight, balance = none, none
        if self.config.space_experts:
            logits = [self.text_gates[i](text_BYD) for i in blocks]
            routed = [self._choose(logits[i], noise.space_BLYK[:, i] if noise else None) for i in blocks]
            taking_part = text_mask_BY if self.config.mask_padding else None
            space_weight = [space_weights_BYK(r[0], r[1], self.config.space_experts, taking_part) for r in routed]
            if self.config.balance_weight > 0:
                balance = [balance_loss_B(logits[i], routed[i][0]) for i in blocks]
        return [
            BlockPlan(*fields) for fields in zip(time_expert, time_samples, time_factor, space_weight, balance, strict=True)
        ]

    def _choose(self, logits: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        return choose(logits, noise, self.config.gate_gradient)

    def _attend(
        self,
        transformer: SpatialTransformer,
        x_BCHW: Tensor,
        text_BYD: Tensor,
        end_B: Tensor,
        plan: BlockPlan,
        out: UNetOutput,
    ) -> Tensor:
        size_hw = (x_BCHW.shape[2], x_BCHW.shape[3])
        h_BND = transformer.enter(x_BCHW)
        block = transformer.transformer_blocks[0]

        def body(h: Tensor, text: Tensor, factor: Tensor | None, weight: Tensor | None) -> tuple[Tensor | None, ...]:
            return tuple(block(h, text, end_B, replace(plan, time_factor_B=factor, space_weight_BYK=weight), size_hw))

        tensors = (h_BND, text_BYD, plan.time_factor_B, plan.space_weight_BYK)
        if self.config.checkpoint_activations and torch.is_grad_enabled():
            # No randomness inside a block, so there is no generator state to keep.
            result = checkpoint(body, *tensors, use_reentrant=self.reentrant_checkpoint, preserve_rng_state=False)
        else:
            result = body(*tensors)
        h_BND, edge_logits, used_BK = result
        if edge_logits is not None:
            out.edge_logits.append(edge_logits)
        if used_BK is not None:
            out.space_used.append(used_BK)
        if plan.time_expert_B is not None:
            out.time_expert.append(plan.time_expert_B)
        return transformer.leave(h_BND, x_BCHW)
