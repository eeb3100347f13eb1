"""The transformer block of Fig. 3: self-attention, cross-attention, Time-MoE, Space-MoE, each with pre-norm and residual.

Everything that is not an expert, a gate or an edge module is a diffusers layer under the name it has in diffusers.
Shape legend: B samples, N image tokens, Y text tokens, K experts, D width, C channels, H heads.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from raphael_dist.config import SpaceBackend
from raphael_dist.model.edge import EdgeModule
from raphael_dist.model.moe import SpaceMoE, TimeMoE
from raphael_dist.model.routing import BlockPlan, region_mask_BNY


@dataclass(frozen=True)
class BlockSpec:
    """What one transformer block is made of. Zero experts leave a layer out; edge_channels 0 leaves the edge module out.

    shared_hidden: width of the Space-MoE's shared expert, 0: none.
    """

    dim: int
    head_dim: int
    text_width: int
    hidden: int
    space_experts: int
    shared_hidden: int
    time_experts: int
    time_activation: Any
    space_backend: SpaceBackend
    mask_threshold: float
    edge_channels: int
    seed: int


class BlockOutput(NamedTuple):
    """h_BND [B, N, D]; edge logits float32 [B, h, w] or None; share of image tokens per space expert [B, K] or None."""

    h_BND: Tensor
    edge_logits: Tensor | None
    space_used_BK: Tensor | None


class MapProcessor:
    """Attention that also returns its map M = softmax(Q K^T / sqrt(d)) (Sec. 3.1), averaged over heads."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the output [B, N, D] and the map, float32 [B, N, Y]."""
        batch, heads = hidden_states.shape[0], attn.heads
        q, k, v = (
            x.view(batch, -1, heads, x.shape[-1] // heads).transpose(1, 2)
            for x in (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        )
        map_BHNY = torch.softmax((q @ k.transpose(2, 3)).float() * attn.scale, dim=-1)
        out = (map_BHNY.to(v.dtype) @ v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out)), map_BHNY.mean(dim=1)


class TransformerBlock(nn.Module):
    """One block of Fig. 3. With no experts it is Stable Diffusion's block."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        dim, heads = spec.dim, spec.dim // spec.head_dim
        self.mask_threshold = spec.mask_threshold
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads=heads, dim_head=spec.head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, cross_attention_dim=spec.text_width, heads=heads, dim_head=spec.head_dim)
        self.norm3 = nn.LayerNorm(dim)
        if spec.time_experts:
            self.time_moe = TimeMoE(spec.time_experts, dim, spec.hidden, spec.time_activation, seed=2 * spec.seed)
            self.time_moe.use_megablocks = spec.space_backend == "megablocks"
        else:
            self.ff = FeedForward(dim, inner_dim=spec.hidden, activation_fn=spec.time_activation)
        self.space_moe = None
        if spec.space_experts:
            sizes = (spec.space_experts, dim, spec.hidden)
            self.space_moe = SpaceMoE(*sizes, spec.space_backend, seed=2 * spec.seed + 1, shared=spec.shared_hidden)
        self.edge = EdgeModule(spec.edge_channels) if spec.edge_channels else None
        self.wants_map = self.space_moe is not None or self.edge is not None
        if self.wants_map:
            self.attn2.set_processor(MapProcessor())  # type: ignore[arg-type]

    def forward(
        self, h_BND: Tensor, text_BYD: Tensor, end_B: Tensor, plan: BlockPlan, size_hw: tuple[int, int]
    ) -> BlockOutput:
        """Run the block on image tokens [B, N, D] and text tokens [B, Y, D]; `end_B` is the end-of-text index (int64)."""
        h_BND = h_BND + self.attn1(self.norm1(h_BND))
        attended, map_BNY = self._cross_attention(self.norm2(h_BND), text_BYD)
        h_BND = h_BND + attended
        h_BND = h_BND + self._time_layer(self.norm3(h_BND), plan)
        edge_logits, used_BK = None, None
        if self.edge is not None:
            edge_logits = self.edge(map_BNY, end_B, size_hw)
        if self.space_moe is not None:
            assert map_BNY is not None
            out_BND, used_BK = self.space_moe(h_BND, region_mask_BNY(map_BNY, self.mask_threshold), plan.space_weight_BYK)
            h_BND = h_BND + out_BND
        return BlockOutput(h_BND, edge_logits, used_BK)

    def _cross_attention(self, h_BND: Tensor, text_BYD: Tensor) -> tuple[Tensor, Tensor | None]:
        out = self.attn2(h_BND, encoder_hidden_states=text_BYD)
        return out if self.wants_map else (out, None)

    def _time_layer(self, h_BND: Tensor, plan: BlockPlan) -> Tensor:
        if plan.time_expert_B is None or plan.time_samples is None:
            return self.ff(h_BND)
        return self.time_moe(h_BND, plan.time_expert_B, plan.time_samples, plan.time_factor_B)


class SpatialTransformer(nn.Module):
    """One transformer block between feature maps, with the names of diffusers' Transformer2DModel."""

    def __init__(self, spec: BlockSpec, norm_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, spec.dim, eps=1e-6)
        self.proj_in = nn.Linear(spec.dim, spec.dim)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(spec)])
        self.proj_out = nn.Linear(spec.dim, spec.dim)

    def enter(self, x_BCHW: Tensor) -> Tensor:
        """Return image tokens [B, N, D]."""
        return self.proj_in(self.norm(x_BCHW).flatten(2).transpose(1, 2))

    def leave(self, h_BND: Tensor, x_BCHW: Tensor) -> Tensor:
        """Return the feature map [B, C, h, w] with the residual added, in the residual's memory format."""
        # A sum has that of its first term. The tokens lie channels last, and so would all maps after them, also on a CPU.
        return x_BCHW + self.proj_out(h_BND).transpose(1, 2).view_as(x_BCHW)
