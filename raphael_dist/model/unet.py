"""The U-Net of Stable Diffusion 2 with RAPHAEL's transformer blocks (Fig. 3 and 8), under diffusers' parameter names.

Shape legend: B samples, C channels, Y text tokens, K experts, L transformer blocks in order of execution, D text width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raphael_dist.config import Config
from raphael_dist.model.experts import require_grouped_gemm
from raphael_dist.model.layers import BlockSpec, SpatialTransformer
from raphael_dist.model.residual import ResidualBlock, layout, like
from raphael_dist.model.routing import (
    BlockPlan,
    Gate,
    balance_loss_B,
    band_of_timestep_B,
    choose,
    gate_logits,
    one_hot,
    space_weights_BYK,
)


class GateNoise(NamedTuple):
    """Noise on the gates' logits, drawn per sample position: time float32 [B, L, K], space float32 [B, L, Y, K]."""

    time_BLK: Tensor
    space_BLYK: Tensor


class UNetOutput(NamedTuple):
    """What one forward pass returns.

    It is a tuple because DeepSpeed looks for tensors only in tuples, lists and dicts. Where it finds none, it does not
    prepare for the backward pass, and gradients of earlier micro-steps are added once more.

    prediction: [B, C, h, w]. edge_logits: per block with an edge module, float32 [B, h, w].
    space_used: per block, share of image tokens that need each space expert, [B, K]. time_expert: per block, int64 [B].
    balance: per block, load-balance loss of the text gate, float32 [B]; empty when it has no weight.
    """

    prediction: Tensor
    edge_logits: tuple[Tensor, ...] = ()
    space_used: tuple[Tensor, ...] = ()
    time_expert: tuple[Tensor, ...] = ()
    balance: tuple[Tensor, ...] = ()


class Added(NamedTuple):
    """What a control adds to the skips, outermost first, and to the middle, at full strength."""

    skips: tuple[Tensor, ...]
    middle: Tensor


class Pass(NamedTuple):
    """One forward pass: what all of its blocks read, the plans of those to come, and what those that ran have left."""

    embedding_BE: Tensor
    text_BYD: Tensor
    end_B: Tensor
    plans: Iterator[BlockPlan]
    edge_logits: list[Tensor | None]
    space_used: list[Tensor | None]


def _present(found: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(value for value in found if value is not None)


def count_samples(onehot_LBK: Tensor) -> Sequence[Tensor]:
    """Return how many samples each expert of each layer serves, int64 [K] per layer, on the device of the one-hot."""
    return onehot_LBK.sum(dim=1).unbind(0)


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
        self.num_timesteps, self.upscale = config.diffusion.num_timesteps, config.upscale
        self.seed, self.edge_channels = config.run.seed, config.edge.channels if config.edge.weight > 0 else 0
        if m.space_backend == "megablocks":
            require_grouped_gemm()
        self.gathers_weights = False  # ZeRO-3: a module has its weights only while its own forward runs
        # Expert parallelism needs the counts of other ranks too, and puts its own function here.
        self.count_samples: Callable[[Tensor], Sequence[Any]] = count_samples
        self.block_levels: list[int] = []  # of the transformer blocks, in order of execution
        self.control: nn.Module | None = None  # model.control puts one here
        self.control_scale = 1.0
        channels, embed = m.channels, 4 * m.channels[0]
        self.conv_in = nn.Conv2d(m.latent_channels + self.upscale.channels, channels[0], 3, padding=1)
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
        if m.time_experts and m.time_routing == "learned":
            self.time_gates = nn.ModuleList(Gate(embed, m.gate_width, m.time_experts) for _ in range(self.num_blocks))
        if m.space_experts:
            self.text_gates = nn.ModuleList(
                Gate(m.text_width, m.gate_width, m.space_experts) for _ in range(self.num_blocks)
            )

    def _resnet(self, inner: int, outer: int) -> ResidualBlock:
        return ResidualBlock(inner, outer, 4 * self.config.channels[0], self.config.norm_groups)

    def _transformer(self, level: int, width: int) -> SpatialTransformer:
        m = self.config
        spec = BlockSpec(
            dim=width,
            head_dim=m.head_dim,
            text_width=m.text_width,
            hidden=m.expert_width[level],
            space_experts=m.space_experts,
            shared_hidden=math.ceil(m.shared_expert * m.expert_width[level]),
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
        edge_Bhw: Tensor | None = None,
    ) -> UNetOutput:
        """Predict the noise (or velocity) of noised latents.

        Args:
            x_BCHW: noised latents [B, C, h, w], and what lies beside them (model/upscale.py). timestep_B: int64 [B].
            text_BYD: text tokens [B, Y, D]; text_mask_BY: bool, False at padding; end_B: int64, the end-of-text token.
            noise: gate noise in training; None routes without noise.
            edge_Bhw: an edge map in 0..1 to be followed, where the model has a control; None: the model is as without one.
        """
        through, planned = self.begin(x_BCHW, timestep_B, text_BYD, text_mask_BY, end_B, noise)
        x, skips = self.way_down(through, self.enter(x_BCHW))
        if self.control is not None and edge_Bhw is not None:
            added = self.control(x_BCHW, timestep_B, text_BYD, text_mask_BY, end_B, noise, edge_Bhw)
            skips = [skip + self.control_scale * more for skip, more in zip(skips, added.skips, strict=True)]
            x = x + self.control_scale * added.middle
        x = self.way_up(through, x, skips)
        return UNetOutput(
            prediction=self.conv_out(like(nn.functional.silu(self.conv_norm_out(x)), x)),
            edge_logits=_present(through.edge_logits),
            space_used=_present(through.space_used),
            time_expert=_present([plan.time_expert_B for plan in planned]),
            balance=_present([plan.balance_B for plan in planned]),
        )

    def begin(
        self,
        x_BCHW: Tensor,
        timestep_B: Tensor,
        text_BYD: Tensor,
        text_mask_BY: Tensor,
        end_B: Tensor,
        noise: GateNoise | None,
    ) -> tuple["Pass", list[BlockPlan]]:
        """Return a forward pass, with all of its blocks routed. Arguments as in `forward`."""
        embedding = self.time_embedding(self.time_proj(timestep_B).to(x_BCHW.dtype))
        planned = self.route_blocks(timestep_B, embedding, text_BYD, text_mask_BY, noise)
        return Pass(embedding, text_BYD, end_B, iter(planned), [], []), planned

    def enter(self, x_BCHW: Tensor) -> Tensor:
        """Return the first feature map of noised latents."""
        x = self.conv_in(x_BCHW.contiguous(memory_format=layout(x_BCHW.device)))
        if torch.is_grad_enabled() and not x.requires_grad:
            # Frozen weights with adapters: re-entrant recomputation has a backward pass only where an input has a gradient,
            # and so have exchanges between ranks.
            x.requires_grad_()
        return x

    def way_down(self, through: "Pass", x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return what the middle makes of the first feature map, and the skips, outermost first."""
        skips = [x]
        for stage in cast(list[Stage], self.down_blocks):
            for i in range(len(stage.resnets)):
                x = self._through(through, stage, i, x)
                skips.append(x)
            if stage.downsamplers is not None:
                x = stage.downsamplers[0](x)
                skips.append(x)
        x = self._through(through, self.mid_block, 0, x)
        return self._residual(self.mid_block, 1, x, through.embedding_BE), skips

    def way_up(self, through: "Pass", x: Tensor, skips: list[Tensor]) -> Tensor:
        """Return the last feature map."""
        skips = list(skips)
        for stage in cast(list[Stage], self.up_blocks):
            for i in range(len(stage.resnets)):
                x = self._through(through, stage, i, torch.cat([x, skips.pop()], dim=1))
            if stage.upsamplers is not None:
                # The size of the next skip, so that odd sizes come back as they went.
                x = stage.upsamplers[0](x, output_size=skips[-1].shape[-2:])
        return x

    def _through(self, through: "Pass", stage: Stage, index: int, x: Tensor) -> Tensor:
        x = self._residual(stage, index, x, through.embedding_BE)
        if stage.attentions is not None:
            transformer = cast(SpatialTransformer, stage.attentions[index])
            x, logits, used = self._attend(transformer, x, through.text_BYD, through.end_B, next(through.plans))
            through.edge_logits.append(logits)
            through.space_used.append(used)
        return x

    def _residual(self, stage: Stage, index: int, x: Tensor, embedding_BE: Tensor) -> Tensor:
        out: Tensor = self._run(self.config.checkpoint_activations == "all", stage.resnets[index], x, embedding_BE)
        return out

    def route_blocks(
        self, timestep_B: Tensor, embedding_BE: Tensor, text_BYD: Tensor, text_mask_BY: Tensor, noise: GateNoise | None
    ) -> list[BlockPlan]:
        """Route every block (Sec. 3.1 and 7.3) from the timestep and the caption alone, all blocks at once."""
        m = self.config
        none: Sequence[Any] = [None] * self.num_blocks
        time_expert, time_samples, time_factor, space_weight, balance = none, none, none, none, none
        if m.time_experts:
            expert_LB, factor_LB = self.route_time(timestep_B, embedding_BE, noise)
            time_samples = self.count_samples(one_hot(expert_LB, m.time_experts))
            time_expert, time_factor = expert_LB.unbind(), factor_LB.unbind()
        if m.space_experts:
            logits_LBYK = self._gate_logits(self.text_gates, text_BYD)
            noise_LBYK = noise.space_BLYK.transpose(0, 1) if noise else None
            expert_LBY, factor_LBY = choose(logits_LBYK, noise_LBYK, m.gate_gradient)
            taking_part = text_mask_BY if m.mask_padding else None
            space_weight = space_weights_BYK(expert_LBY, factor_LBY, m.space_experts, taking_part).unbind()
            if m.balance_weight > 0:
                balance = balance_loss_B(logits_LBYK, expert_LBY).unbind()
        return [
            BlockPlan(*fields) for fields in zip(time_expert, time_samples, time_factor, space_weight, balance, strict=True)
        ]

    def route_time(self, timestep_B: Tensor, embedding_BE: Tensor, noise: GateNoise | None) -> tuple[Tensor, Tensor]:
        """Return each block's time expert of each sample, int64 [L, B], and the factor, float32 [L, B], as `choose` does."""
        m = self.config
        if m.time_routing == "boundaries":
            expert_LB = band_of_timestep_B(timestep_B, m.time_experts, self.num_timesteps).expand(self.num_blocks, -1)
            return expert_LB, torch.ones_like(expert_LB, dtype=torch.float32)
        logits_LBK = self._gate_logits(self.time_gates, embedding_BE)
        return choose(logits_LBK, noise.time_BLK.transpose(0, 1) if noise else None, m.gate_gradient)

    def _gate_logits(self, gates: nn.ModuleList, x: Tensor) -> Tensor:
        """Return the logits of every block's gate, float32 [L, ..., K], for x [..., D]."""
        if self.gathers_weights:
            return torch.stack([gate(x) for gate in gates])
        return gate_logits(cast(Sequence[Gate], gates), x)

    def _attend(
        self, transformer: SpatialTransformer, x_BCHW: Tensor, text_BYD: Tensor, end_B: Tensor, plan: BlockPlan
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the feature map, and the block's edge logits and used share as in `BlockOutput`."""
        size_hw = (x_BCHW.shape[2], x_BCHW.shape[3])
        h_BND = transformer.enter(x_BCHW)
        block = transformer.transformer_blocks[0]

        def body(h: Tensor, text: Tensor, factor: Tensor | None, weight: Tensor | None) -> tuple[Tensor | None, ...]:
            return tuple(block(h, text, end_B, replace(plan, time_factor_B=factor, space_weight_BYK=weight), size_hw))

        tensors = (h_BND, text_BYD, plan.time_factor_B, plan.space_weight_BYK)
        h_BND, edge_logits, used_BK = self._run(self.config.checkpoint_activations != "none", body, *tensors)
        return transformer.leave(h_BND, x_BCHW), edge_logits, used_BK

    def _run(self, recompute: bool, part: Callable[..., Any], *tensors: Tensor | None) -> Any:
        """Run a part of the model; with `recompute` it runs again in the backward pass, and its activations are not kept."""
        if not recompute or not torch.is_grad_enabled():
            return part(*tensors)
        # No randomness inside a part, so there is no generator state to keep.
        return checkpoint(part, *tensors, use_reentrant=self.gathers_weights, preserve_rng_state=False)
