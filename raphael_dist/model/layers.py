"""The transformer block of Fig. 3: self-attention, cross-attention, Time-MoE, Space-MoE, each with pre-norm and residual.

Everything except experts, gates and edge modules is a layer of diffusers and keeps its parameter names.

Shape legend: B samples, N image tokens, Y text tokens, K experts, D width, C channels, H heads.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from raphael_dist.model.edge_supervision import EdgeModule
from raphael_dist.model.moe import SpaceMoE, TimeMoE
from raphael_dist.model.norms import GroupNorm, LayerNorm
from raphael_dist.model.routing import BlockRouting, region_mask_BNY

if TYPE_CHECKING:
    from raphael_dist.config.model_sections import Model

_POSITION_PERIODS = (4.0, 128.0)  # in latent positions


class BlockOutput(NamedTuple):
    """The output of a transformer block for B samples.

    Attributes:
        h_BND: N image tokens of width D for each sample.
        edge_logits: logits of the predicted edges, float32 [B, h, w]; None without an edge module.
        space_used_BK: share of image tokens that each of K space experts processes, 0..1; None without a Space-MoE.
    """

    h_BND: Tensor
    edge_logits: Tensor | None
    space_used_BK: Tensor | None


class MapProcessor:
    """An attention processor of diffusers that also returns the attention map M = softmax(Q K^T / sqrt(d)) (Sec. 3.1).

    The map is averaged over heads.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        use_kernel: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Compute cross-attention from N image tokens to Y text tokens, and also return the attention map.

        Args:
            attn: diffusers' attention layer, whose projections are used.
            hidden_states: image tokens [B, N, D].
            encoder_hidden_states: text tokens [B, Y, text width].
            attention_mask: not used; diffusers passes it.
            use_kernel: whether to use the Triton kernel, which never stores the attention maps of single heads.

        Returns:
            The output [B, N, D], and the attention of each image token to each text token, float32 [B, N, Y].
        """
        projections = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        out, map_BNY = self._attend(*projections, attn.heads, attn.scale, use_kernel)
        projected: Tensor = attn.to_out[1](attn.to_out[0](out))
        return projected, map_BNY

    @staticmethod
    def _attend(
        q_BND: Tensor, k_BYD: Tensor, v_BYD: Tensor, heads: int, scale: float, use_kernel: bool
    ) -> tuple[Tensor, Tensor]:
        if use_kernel:
            from raphael_dist.model.kernels.cross_attention import cross_attention

            return cross_attention(q_BND, k_BYD, v_BYD, heads, scale)
        q, k, v = (torch.unflatten(x, 2, (heads, -1)).transpose(1, 2) for x in (q_BND, k_BYD, v_BYD))
        map_BHNY = torch.softmax((q @ k.transpose(2, 3)).float() * scale, dim=-1)
        return (map_BHNY.to(v.dtype) @ v).transpose(1, 2).flatten(2), map_BHNY.mean(dim=1)


class TransformerBlock(nn.Module):
    """The transformer block of RAPHAEL (Fig. 3). Without experts it is the block of Stable Diffusion."""

    use_kernel = False  # whether cross-attention with a map runs in the Triton kernel of `train.kernels`

    def __init__(self, config: "Model", level: int, edge_channels: int, seed: int) -> None:
        """Build the block.

        Args:
            config: the section `model`, or an object with its fields.
            level: the block's U-Net level, 0 for the outermost; determines its widths.
            edge_channels: width of the module that predicts edges; 0: none.
            seed: fixes the initial weights of the experts.
        """
        super().__init__()
        dim, hidden, head_dim = config.channels[level], config.expert_width[level], config.head_dim
        heads = dim // head_dim
        self.mask_threshold = config.mask_threshold
        self.norm1 = LayerNorm(dim)
        self.attn1 = Attention(dim, heads=heads, dim_head=head_dim)
        self.norm2 = LayerNorm(dim)
        self.attn2 = Attention(dim, cross_attention_dim=config.text_width, heads=heads, dim_head=head_dim)
        self.norm3 = LayerNorm(dim)
        if config.time_experts:
            self.time_moe = TimeMoE(config.time_experts, dim, hidden, config.time_activation, seed=2 * seed)
            self.time_moe.use_megablocks = config.expert_backend == "megablocks"
            self.time_moe.megablocks_folder = config.megablocks_folder
        else:
            self.ff = FeedForward(dim, inner_dim=hidden, activation_fn=config.time_activation)
        self.space_moe = None
        if config.space_experts:
            sizes, shared = (config.space_experts, dim, hidden), math.ceil(config.shared_expert * hidden)
            self.space_moe = SpaceMoE(*sizes, config.expert_backend, seed=2 * seed + 1, shared=shared)
        self.edge = EdgeModule(edge_channels) if edge_channels else None
        self.needs_attention_map = self.space_moe is not None or self.edge is not None
        if self.needs_attention_map:
            self.attn2.set_processor(MapProcessor())  # type: ignore[arg-type]

    def forward(
        self, h_BND: Tensor, text_BYD: Tensor, end_B: Tensor, routing: BlockRouting, size_hw: tuple[int, int]
    ) -> BlockOutput:
        """Run the block: self-attention, cross-attention, Time-MoE, edge prediction, Space-MoE.

        Args:
            h_BND: N image tokens of each sample.
            text_BYD: Y text tokens of each sample.
            end_B: for each sample, the index of the end-of-text token, int64.
            routing: the selected experts of the samples and text tokens.
            size_hw: height and width of the feature map whose pixels are the image tokens; h * w = N.
        """
        h_BND = h_BND + self.attn1(self.norm1(h_BND))
        attended, map_BNY = self._cross_attention(self.norm2(h_BND), text_BYD)
        h_BND = h_BND + attended
        h_BND = h_BND + self._time_layer(self.norm3(h_BND), routing)
        edge_logits, used_BK = None, None
        if self.edge is not None:
            edge_logits = self.edge(map_BNY, end_B, size_hw)
        if self.space_moe is not None:
            assert map_BNY is not None
            mask_BNY = region_mask_BNY(map_BNY, self.mask_threshold)
            out_BND, used_BK = self.space_moe(h_BND, mask_BNY, routing.space_weight_BYK)
            h_BND = h_BND + out_BND
        return BlockOutput(h_BND, edge_logits, used_BK)

    def _cross_attention(self, h_BND: Tensor, text_BYD: Tensor) -> tuple[Tensor, Tensor | None]:
        options = {"use_kernel": self.use_kernel} if self.needs_attention_map else {}
        out = self.attn2(h_BND, encoder_hidden_states=text_BYD, **options)
        return out if self.needs_attention_map else (out, None)

    def _time_layer(self, h_BND: Tensor, routing: BlockRouting) -> Tensor:
        out_BND: Tensor
        if routing.time_expert_B is None:
            out_BND = self.ff(h_BND)
        else:
            out_BND = self.time_moe(h_BND, routing.time_expert_B, routing.time_samples, routing.time_factor_B)
        return out_BND


def image_positions_ND(height: int, width: int, token_size: int, like: Tensor) -> Tensor:
    """Return a sinusoidal position encoding of N image tokens, [N, D], with the device, dtype and D of `like`.

    A quarter of the D values encodes the row, the others the column. Rows and columns are counted from the middle of the
    image, in positions (pixels) of the latents, so they mean the same on every level and in images of every size.

    Args:
        height: height of the feature map in image tokens.
        width: width of the feature map in image tokens; height * width = N.
        token_size: side of an image token, counted in positions of the latents.
        like: tensor [..., D] that determines D, device and dtype of the result, such as the image tokens.
    """
    dim = like.shape[-1]
    rows_HD, columns_WD = (
        _sines((torch.arange(count, device=like.device) + 0.5 - count / 2) * token_size, features)
        for count, features in ((height, dim // 4), (width, dim - dim // 4))
    )
    rows_HWD, columns_HWD = rows_HD[:, None].expand(-1, width, -1), columns_WD.expand(height, -1, -1)
    return torch.cat([rows_HWD, columns_HWD], dim=-1).flatten(0, 1).to(like.dtype)


def _sines(place_P: Tensor, features: int) -> Tensor:
    """Return sines and cosines of P coordinates, [P, features], with geometrically growing periods (`_POSITION_PERIODS`).

    `place_P`: the coordinates, in positions of the latents. `features`: number of values for each coordinate.
    """
    count = (features + 1) // 2
    shortest, longest = _POSITION_PERIODS
    steps = torch.arange(count, device=place_P.device) / max(count - 1, 1)
    angles = 2 * math.pi * place_P[:, None] / (shortest * (longest / shortest) ** steps)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :features]


class SpatialTransformer(nn.Module):
    """A transformer block, with the layers that convert a feature map to its tokens and back.

    Parameter names are those of diffusers' Transformer2DModel. The class has no `forward`: `RaphaelUNet` calls `to_tokens`,
    the block, and `to_feature_map`.
    """

    def __init__(self, config: "Model", level: int, edge_channels: int, seed: int) -> None:
        """Build the transformer. The arguments are those of `TransformerBlock`."""
        super().__init__()
        dim = config.channels[level]
        # Side of an image token, counted in positions (pixels) of the latents; 0: no position encoding.
        self.token_size = 2**level if config.image_positions else 0
        self.norm = GroupNorm(config.norm_groups, dim, eps=1e-6, silu=False)
        self.proj_in = nn.Linear(dim, dim)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(config, level, edge_channels, seed)])
        self.proj_out = nn.Linear(dim, dim)

    def to_tokens(self, x_BCHW: Tensor) -> Tensor:
        """Convert a feature map [B, C, h, w] to image tokens [B, N, D], one for each of its N = h * w pixels; D = C."""
        tokens_BND: Tensor = self.proj_in(self.norm(x_BCHW).flatten(2).transpose(1, 2))
        if self.token_size:
            height, width = x_BCHW.shape[2:]
            tokens_BND = tokens_BND + image_positions_ND(height, width, self.token_size, tokens_BND)
        return tokens_BND

    def to_feature_map(self, h_BND: Tensor, x_BCHW: Tensor) -> Tensor:
        """Convert image tokens [B, h * w, C] to a feature map [B, C, h, w], add the feature map `x_BCHW`; return the sum.

        `x_BCHW` is the input of the transformer (its residual). The result has the memory format of `x_BCHW`.
        """
        # A sum has the memory format of its first term. The tokens are channels last, which is slow on a CPU.
        out_BND: Tensor = self.proj_out(h_BND)
        return x_BCHW + out_BND.transpose(1, 2).view_as(x_BCHW)


class UNetLevel(nn.Module):
    """One level of the U-Net's encoder or decoder, or the middle block.

    It consists of residual blocks. On levels with attention, a transformer block follows each residual block, except the
    second one of the middle block. `downsamplers` or `upsamplers` holds the layer that changes the size, if there is one.
    """

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
