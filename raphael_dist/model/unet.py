"""The U-Net of Stable Diffusion 2 with RAPHAEL's transformer blocks (Fig. 3 and 8) and diffusers' parameter names.

Shape legend: B samples, C channels, Y text tokens, K experts, L transformer blocks in order of execution, D text width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raphael_dist.model.layers import SpatialTransformer, UNetLevel
from raphael_dist.model.megablocks import require_megablocks
from raphael_dist.model.norms import GroupNorm
from raphael_dist.model.residual_block import ResidualBlock, feature_map_format
from raphael_dist.model.routing import (
    BlockRouting,
    Gate,
    balance_loss_B,
    band_of_timestep_B,
    choose,
    gate_logits,
    one_hot,
    space_weights_BYK,
)
from raphael_dist.model.unet_interface import ControlResiduals, GateNoise, UNetInput, UNetOutput

if TYPE_CHECKING:
    from raphael_dist.config.schema import Config

TIME_GRID = 64  # timesteps at which the balance of the time gates is measured


class ForwardState(NamedTuple):
    """State of one forward pass: inputs of all blocks, the experts of blocks that have not run yet, and collected outputs.

    `embedding_BE`: timestep embeddings. `text_BYD`: text tokens. `end_B`: index of the end-of-text token. Each transformer
    block takes one item from `routings`, and appends one to `edge_logits` and to `space_used` (fields of `BlockOutput`).
    """

    embedding_BE: Tensor
    text_BYD: Tensor
    end_B: Tensor
    routings: Iterator[BlockRouting]
    edge_logits: list[Tensor | None]
    space_used: list[Tensor | None]


def _present(values: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(value for value in values if value is not None)


def count_samples(onehot_LBK: Tensor) -> Sequence[Tensor]:
    """Return the number of samples of each time expert: for each of L layers int64 [K], on the device of `onehot_LBK`.

    `onehot_LBK`: for each layer and sample, which of its K time experts it has, one-hot, bool.
    """
    return onehot_LBK.sum(dim=1).unbind(0)


class RaphaelUNet(nn.Module):
    """RAPHAEL's denoising network of noised latents, timestep and caption; without experts Stable Diffusion 2's U-Net."""

    def __init__(self, config: "Config", with_edges: bool = True) -> None:
        """Build the U-Net.

        Args:
            config: the sections `model`, `edge`, `diffusion`, `upscale` and `run`, or an object with their fields.
            with_edges: whether to build the modules that predict edges, if edge.weight is above 0.
        """
        super().__init__()
        self.config = m = config.model
        self.num_timesteps, self.upscale = config.diffusion.num_timesteps, config.upscale
        self.seed = config.run.seed
        self.edge_channels = config.edge.channels if with_edges and config.edge.weight > 0 else 0
        if m.expert_backend == "megablocks":
            require_megablocks(m.megablocks_folder)
        # With ZeRO-3, and with diffusers' sequential offload, a module has its weights only during its own forward pass.
        self.gathers_weights = False
        # Expert parallelism replaces this function, because it also needs the counts of other ranks.
        self.count_samples: Callable[[Tensor], Sequence[Any]] = count_samples
        self.block_levels: list[int] = []  # of the transformer blocks, in order of execution
        self.control: nn.Module | None = None  # set by controlnet.add_control
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
        self.conv_norm_out = GroupNorm(m.norm_groups, channels[0], eps=1e-5, silu=True)
        self.conv_out = nn.Conv2d(channels[0], m.latent_channels, 3, padding=1)
        if m.time_experts and m.time_routing == "learned":
            self.time_gates = nn.ModuleList(Gate(embed, m.gate_width, m.time_experts) for _ in range(self.num_blocks))
        if m.space_experts:
            self.text_gates = nn.ModuleList(
                Gate(m.text_width, m.gate_width, m.space_experts) for _ in range(self.num_blocks)
            )

    def _resnet(self, inner: int, outer: int) -> ResidualBlock:
        return ResidualBlock(inner, outer, 4 * self.config.channels[0], self.config.norm_groups)

    def _transformer(self, level: int) -> SpatialTransformer:
        seed = self.seed * 1000 + self.num_blocks
        self.block_levels.append(level)
        return SpatialTransformer(self.config, level, self.edge_channels, seed)

    @property
    def num_blocks(self) -> int:
        """Return the number of transformer blocks."""
        return len(self.block_levels)

    def _level(self, level: int, pairs: list[tuple[int, int]], resize: nn.Module | None) -> UNetLevel:
        resnets = [self._resnet(inner, outer) for inner, outer in pairs]
        with_attention = self.config.attention[level]
        return UNetLevel(resnets, [self._transformer(level) for _ in pairs] if with_attention else [], resize)

    def _down(self, level: int, inner: int, width: int, skips: list[int]) -> UNetLevel:
        count, last = self.config.layers_per_block, level == len(self.config.channels) - 1
        skips += [width] * (count if last else count + 1)
        pairs = [(inner if i == 0 else width, width) for i in range(count)]
        return self._level(level, pairs, None if last else Downsample2D(width, use_conv=True, name="op"))

    def _middle(self, width: int) -> UNetLevel:
        resnets = [self._resnet(width, width), self._resnet(width, width)]
        return UNetLevel(resnets, [self._transformer(len(self.config.channels) - 1)])

    def _up(self, level: int, inner: int, skips: list[int]) -> UNetLevel:
        width, pairs = self.config.channels[level], []
        for _ in range(self.config.layers_per_block + 1):
            pairs.append((inner + skips.pop(), width))
            inner = width
        return self._level(level, pairs, Upsample2D(width, use_conv=True) if level > 0 else None)

    def forward(
        self,
        x_BCHW: Tensor,
        timestep_B: Tensor,
        text_BYD: Tensor,
        text_mask_BY: Tensor,
        end_B: Tensor,
        noise: GateNoise | None = None,
        edge_Bhw: Tensor | None = None,
        residuals: ControlResiduals | None = None,
    ) -> UNetOutput:
        """Predict the noise, velocity or flow in the noised latents `x_BCHW`; the prediction is [B, C, H, W].

        `timestep_B`: int64. `text_BYD`, `text_mask_BY`: text tokens, and bool, False at padding. `end_B`: index of the
        end-of-text token, int64. `noise`: noise on the logits of the gates, which select experts; None: no noise.

        Args:
            edge_Bhw: edge map in 0..1 for the model's own ControlNet; None: that ControlNet is not used.
            residuals: residuals of a ControlNet that is not part of the model; None: there are none.
        """
        inputs = UNetInput(x_BCHW, timestep_B, text_BYD, text_mask_BY, end_B, noise)
        state, routings = self.begin(inputs)
        x, skips = self.encode(state, self.stem(x_BCHW))
        if self.control is not None and edge_Bhw is not None:
            residuals = self.control(inputs, edge_Bhw)
        if residuals is not None:
            skips = [skip + self.control_scale * added for skip, added in zip(skips, residuals.skips, strict=True)]
            x = x + self.control_scale * residuals.middle
        x = self.decode(state, x, skips)
        return UNetOutput(
            prediction=self.conv_out(self.conv_norm_out(x)),
            edge_logits=_present(state.edge_logits),
            space_used=_present(state.space_used),
            time_expert=_present([routing.time_expert_B for routing in routings]),
            balance=_present([routing.balance_B for routing in routings]),
        )

    def begin(self, inputs: UNetInput) -> tuple[ForwardState, list[BlockRouting]]:
        """Begin a forward pass: embed timesteps and select each block's experts; return the pass's state and the experts."""
        embedding = self.time_embedding(self.time_proj(inputs.timestep_B).to(inputs.x_BCHW.dtype))
        routings = self.route_blocks(inputs.timestep_B, embedding, inputs.text_BYD, inputs.text_mask_BY, inputs.noise)
        return ForwardState(embedding, inputs.text_BYD, inputs.end_B, iter(routings), [], []), routings

    def stem(self, x_BCHW: Tensor) -> Tensor:
        """Return the first feature map [B, C', H, W], computed by the first convolution from noised latents [B, C, H, W]."""
        x: Tensor = self.conv_in(x_BCHW.contiguous(memory_format=feature_map_format(x_BCHW.device)))
        if torch.is_grad_enabled() and not x.requires_grad:
            # If weights are frozen: re-entrant recomputation and exchanges between ranks have a backward pass only if an
            # input requires a gradient.
            x.requires_grad_()
        return x

    def encode(self, state: ForwardState, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run the encoder and the middle block on `x`, the result of `stem`. `state`: the first result of `begin`.

        Returns the output of the middle block, and the encoder's feature maps that the decoder reads, outermost first.
        """
        skips = [x]
        for level in cast(list[UNetLevel], self.down_blocks):
            for i in range(len(level.resnets)):
                x = self._layer(state, level, i, x)
                skips.append(x)
            if level.downsamplers is not None:
                x = level.downsamplers[0](x)
                skips.append(x)
        x = self._layer(state, self.mid_block, 0, x)
        return self._residual(self.mid_block, 1, x, state.embedding_BE), skips

    def decode(self, state: ForwardState, x: Tensor, skips: list[Tensor]) -> Tensor:
        """Run the decoder on the results of `encode`, and return the feature map before the last norm and convolution."""
        skips = list(skips)
        for level in cast(list[UNetLevel], self.up_blocks):
            for i in range(len(level.resnets)):
                x = self._layer(state, level, i, torch.cat([x, skips.pop()], dim=1))
            if level.upsamplers is not None:
                # output_size: the size of the next skip, which can be odd.
                x = level.upsamplers[0](x, output_size=skips[-1].shape[-2:])
        return x

    def _layer(self, state: ForwardState, level: UNetLevel, index: int, x: Tensor) -> Tensor:
        x = self._residual(level, index, x, state.embedding_BE)
        if level.attentions is not None:
            transformer = cast(SpatialTransformer, level.attentions[index])
            x, logits, used = self._attend(transformer, x, state.text_BYD, state.end_B, next(state.routings))
            state.edge_logits.append(logits)
            state.space_used.append(used)
        return x

    def _residual(self, level: UNetLevel, index: int, x: Tensor, embedding_BE: Tensor) -> Tensor:
        out: Tensor = self._run(self.config.checkpoint_activations == "all", level.resnets[index], x, embedding_BE)
        return out

    def route_blocks(
        self, timestep_B: Tensor, embedding_BE: Tensor, text_BYD: Tensor, text_mask_BY: Tensor, noise: GateNoise | None
    ) -> list[BlockRouting]:
        """Choose the experts of every block (Sec. 3.1 and 7.3) from timesteps and captions; return one routing per block.

        `embedding_BE`: timestep embeddings. `text_mask_BY`: False at padding. `noise`: added to the gates' logits, or None.
        """
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
        if m.balance_weight > 0 and torch.is_grad_enabled():
            if m.space_experts:
                balance = balance_loss_B(logits_LBYK, expert_LBY, taking_part).unbind()
            if m.time_experts and m.time_routing == "learned":
                time_balance = self.time_balance_L(timestep_B.device).unsqueeze(1).expand(-1, len(timestep_B))
                balance = [own if other is None else own + other for own, other in zip(time_balance, balance, strict=True)]
        return [
            BlockRouting(*fields)
            for fields in zip(time_expert, time_samples, time_factor, space_weight, balance, strict=True)
        ]

    def route_time(self, timestep_B: Tensor, embedding_BE: Tensor, noise: GateNoise | None) -> tuple[Tensor, Tensor]:
        """Return each sample's time expert in each of L blocks, int64 [L, B], and a factor for the expert's output [L, B].

        The gates get their gradient through this factor (`routing.choose`).
        `embedding_BE`: timestep embeddings. `noise`: added to the gates' logits; None: no noise.
        """
        m = self.config
        if m.time_routing == "boundaries":
            expert_LB = band_of_timestep_B(timestep_B, m.time_experts, self.num_timesteps).expand(self.num_blocks, -1)
            return expert_LB, torch.ones_like(expert_LB, dtype=torch.float32)
        logits_LBK = self._gate_logits(self.time_gates, embedding_BE)
        return choose(logits_LBK, noise.time_BLK.transpose(0, 1) if noise else None, m.gate_gradient)

    def time_balance_L(self, device: torch.device) -> Tensor:
        """Return the load-balance loss of the time gate of each of L blocks, float32 [L]. Only gates get its gradient.

        A sample has one timestep, so its choice alone cannot be balanced. Training draws timesteps evenly. Therefore the
        loss is computed on evenly spaced timesteps, without gate noise, and does not depend on how a batch is divided.
        """
        logits_LGK = self.time_logits(device)
        return balance_loss_B(logits_LGK, logits_LGK.detach().argmax(dim=-1))

    def time_logits(self, device: torch.device) -> Tensor:
        """Return the logits of L time gates for K experts at G = TIME_GRID evenly spaced timesteps, float32 [L, G, K].

        Only the gates get a gradient.
        """
        grid_G = torch.arange(TIME_GRID, device=device) * self.num_timesteps // TIME_GRID
        with torch.no_grad():
            embedding_GE = self.time_embedding(self.time_proj(grid_G).to(self.conv_in.weight.dtype))
        return self._gate_logits(self.time_gates, embedding_GE)

    def text_logits(self, text_RD: Tensor) -> Tensor:
        """Return the logits of L blocks' text gates for K experts and R text tokens `text_RD`, float32 [L, R, K]."""
        return self._gate_logits(self.text_gates, text_RD.to(self.conv_in.weight.dtype))

    def _gate_logits(self, gates: nn.ModuleList, x: Tensor) -> Tensor:
        """Return the logits of the gates of all L blocks for the same input x [..., D], float32 [L, ..., K]."""
        if self.gathers_weights:
            return torch.stack([gate(x) for gate in gates])
        return gate_logits(cast(Sequence[Gate], gates), x)

    def _attend(
        self, transformer: SpatialTransformer, x_BCHW: Tensor, text_BYD: Tensor, end_B: Tensor, routing: BlockRouting
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run a transformer block; return the feature map, and `edge_logits` and `space_used_BK` as in `BlockOutput`."""
        size_hw = (x_BCHW.shape[2], x_BCHW.shape[3])
        h_BND = transformer.to_tokens(x_BCHW)
        block = transformer.transformer_blocks[0]

        def body(h: Tensor, text: Tensor, factor: Tensor | None, weight: Tensor | None) -> tuple[Tensor | None, ...]:
            return tuple(block(h, text, end_B, replace(routing, time_factor_B=factor, space_weight_BYK=weight), size_hw))

        tensors = (h_BND, text_BYD, routing.time_factor_B, routing.space_weight_BYK)
        h_BND, edge_logits, used_BK = self._run(self.config.checkpoint_activations != "none", body, *tensors)
        return transformer.to_feature_map(h_BND, x_BCHW), edge_logits, used_BK

    def _run(self, recompute: bool, part: Callable[..., Any], *tensors: Tensor | None) -> Any:
        """Run a part of the model. With `recompute`, it saves no activations and is run again in the backward pass."""
        if recompute and torch.is_grad_enabled():
            # A part is deterministic, so there is no generator state to preserve.
            return checkpoint(part, *tensors, use_reentrant=self.gathers_weights, preserve_rng_state=False)
        return part(*tensors)
